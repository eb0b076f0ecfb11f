"""Name the extra that installs a missing package."""

from __future__ import annotations

import click

EXTRAS = {
    "torch": ("PyTorch", "torch"),
    "distributed": ("Dask", "cluster"),
    "dask_jobqueue": ("dask-jobqueue", "cluster"),
    "icechunk": ("Icechunk", "publish"),
    "segmentation_models_pytorch": ("segmentation-models-pytorch", "models"),
    "timm": ("timm", "models"),
    "transformers": ("transformers", "models"),
}
"""Missing module -> (display name, extra that installs it)."""


def explain_missing(error: ModuleNotFoundError, command: str) -> Exception:
    """Return an install hint for an optional package; return any other import error unchanged."""
    if error.name not in EXTRAS:
        return error
    package, extra = EXTRAS[error.name]
    return click.UsageError(
        f"`minecube {command}` needs {package}: pip install 'minecube[{extra}]'"
    )
