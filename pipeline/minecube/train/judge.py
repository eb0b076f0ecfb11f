"""Score a network on the validation sites during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from minecube.catalog import ModelCard, Settings
from minecube.errors import ModelError
from minecube.models import logits


def judged(
    network: nn.Module,
    loader: DataLoader[Any],
    card: ModelCard,
    settings: Settings,
    years: Sequence[int],
) -> Tensor:
    """Count true positives, false positives and false negatives of the loader's pixels.

    Counts are int64 [3], of all classes together, without unknown targets. If processes share the
    windows, the counts are of all processes.

    Raises:
        ModelError: No pixel is of a class, so F1 has no meaning.
    """
    place = next(network.parameters()).device
    counts = torch.zeros(3, dtype=torch.int64, device=place)
    if dist.is_initialized():
        for buffer in network.buffers():  # statistics differ between processes
            dist.broadcast(buffer, 0)
    network.eval()
    with (
        torch.inference_mode(),
        torch.autocast(place.type, torch.bfloat16, enabled=place.type in settings.bf16),
    ):
        for image, wanted in loader:
            said = logits(network, card.task, image.to(place, non_blocking=True), years) >= 0
            truth = wanted.to(place)
            counts += torch.stack(
                [
                    (said & (truth == 1)).sum(),
                    (said & (truth == 0)).sum(),
                    (~said & (truth == 1)).sum(),
                ]
            )
    if dist.is_initialized():
        dist.all_reduce(counts)
    if not counts[0] + counts[2]:
        raise ModelError(
            f"model {card.id}: {settings.valid_windows} windows of the validation sites hold no pixel of "
            f"{', '.join(card.classes)}, so no epoch is better than another: raise valid_windows"
        )
    return counts.cpu()


def scores_of(counts: Tensor) -> dict[str, float]:
    """Compute scores from the counts of `judged`; NaN if undefined."""
    tp, fp, fn = (int(n) for n in counts)

    def ratio(part: int, whole: int) -> float:
        return part / whole if whole else math.nan

    return {
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "iou": ratio(tp, tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
    }
