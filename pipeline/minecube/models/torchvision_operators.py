"""Make a CUDA build of torchvision importable next to a CPU build of torch.

timm imports torchvision, and PyPI has only its CUDA build. Its import fails at the first operator
that a CPU build of torch lacks. Without this module, no network of `libraries` could then be built:
with torch 2.13.0+cpu and torchvision 0.28.0 from PyPI, `import timm` raises RuntimeError.
"""

from __future__ import annotations

import importlib

import torch


def declare_missing_operators() -> None:
    """Declare torchvision's two missing operators, if its import fails; no network calls them.

    An intact torchvision is left alone, since its operators cannot be declared twice.

    Raises:
        RuntimeError: The import fails next to a CUDA build of torch.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        if torch.version.cuda is not None:
            raise
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
