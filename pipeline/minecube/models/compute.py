"""Say on which device a network runs, in which precision, and in how large groups of windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minecube.device import find_device
from minecube.errors import ModelError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Device, threads, batch size and precision of a computation."""

    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    workers: int | None = None
    """Threads on a CPU. Default: the cores available to this process."""
    batch: int | None = None
    """Windows per call on a GPU. Default: the fastest size found. Ignored on a CPU."""
    precision: str | None = None
    """fp32 or bf16 (autocast). Default: bf16 on a GPU, fp32 on a CPU."""
    compiled: bool = False
    """Whether to run torch.compile for a GPU first: minutes once, then faster maps."""

    def __post_init__(self) -> None:
        counts = [n for n in (self.workers, self.batch) if n is not None]
        if self.precision not in (None, *PRECISIONS) or any(n < 1 for n in counts):
            raise ModelError(
                f"expected a precision of {', '.join(PRECISIONS)}, workers and batch of 1 or more, "
                f"found {self.precision}, {self.workers}, {self.batch}"
            )
        if self.compiled and self.device.startswith("cpu"):
            # Group sizes vary. torch would compile each one, and give up at a size left to chance.
            raise ModelError(
                "torch.compile is for GPUs; on a CPU it takes its time, gains nothing, and a map's "
                "last bits would depend on which windows come first: leave --compile out"
            )

    def find_device(self) -> torch.device:
        """Return the device; raises ModelError if it is not available."""
        return find_device(self.device)

    def dtype(self) -> torch.dtype:
        """Return the type in which the network computes."""
        return PRECISIONS[self._precision(self.find_device())]

    def __str__(self) -> str:
        device = self.find_device()
        return f"torch {torch.__version__} on {device.type} in {self._precision(device)}"

    def _precision(self, device: torch.device) -> str:
        if self.precision:
            return self.precision
        return "fp32" if device.type == "cpu" else "bf16"
