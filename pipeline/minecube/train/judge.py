"""Score a network on the validation sites during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from minecube.catalog import ModelCard, TrainingSettings
from minecube.errors import ModelError
from minecube.models import compute_logits


def count_pixels(
    network: nn.Module,
    loader: DataLoader[Any],
    card: ModelCard,
    settings: TrainingSettings,
    years: Sequence[int],
) -> Tensor:
    """Count true positives, false positives and false negatives of the loader's pixels.

    Counts are int64 [3], of all classes together, without unknown targets. If processes share the
    windows, the counts are of all processes.

    Raises:
        ModelError: No pixel is of a class, so F1 has no meaning.
    """
    device = next(network.parameters()).device
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    if dist.is_initialized():
        for buffer in network.buffers():  # statistics differ between processes
            dist.broadcast(buffer, 0)
    network.eval()
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type in settings.bf16),
    ):
        for image, targets in loader:
            positive = (
                compute_logits(network, card.task, image.to(device, non_blocking=True), years) >= 0
            )
            truth = targets.to(device)
            counts += torch.stack(
                [
                    (positive & (truth == 1)).sum(),
                    (positive & (truth == 0)).sum(),
                    (~positive & (truth == 1)).sum(),
                ]
            )
    if dist.is_initialized():
        dist.all_reduce(counts)
    if not counts[0] + counts[2]:
        raise ModelError(
            f"model {card.id}: {settings.valid_windows} windows of the validation sites hold no "
            f"pixel of {', '.join(card.classes)}, so no epoch is better than another: raise "
            "valid_windows"
        )
    return counts.cpu()


def compute_scores(counts: Tensor) -> dict[str, float]:
    """Compute scores from the counts of `count_pixels`; NaN if undefined."""
    tp, fp, fn = (int(n) for n in counts)
    return {
        "f1": _divide(2 * tp, 2 * tp + fp + fn),
        "iou": _divide(tp, tp + fp + fn),
        "precision": _divide(tp, tp + fp),
        "recall": _divide(tp, tp + fn),
    }


def _divide(part: int, total: int) -> float:
    return part / total if total else math.nan
