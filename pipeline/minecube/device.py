"""Choose the device for torch."""

from __future__ import annotations

import torch

from minecube.errors import ModelError


def find_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        ModelError: torch does not know the device, or sees no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(
            f"device {name!r} is not one that torch knows; expected cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ModelError(
            f"device {name!r} was asked for, but torch {torch.__version__} sees {gpus} GPUs here; "
            "use cpu or another number, or install a CUDA build of torch"
        )
    try:
        torch.zeros(1, device=device).tolist()  # some device types have names even if missing
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        raise ModelError(
            f"device {name!r} is not there for torch {torch.__version__}; use cpu, cuda or cuda:N"
        ) from error
    return device
