"""How good a network is on the validation sites while it is trained."""

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


def judged(network: nn.Module, loader: DataLoader[Any], card: ModelCard, settings: Settings, years: Sequence[int]) -> Tensor:
    """Of the loader's windows, pixels rightly, wrongly, and wrongly not said to be of a class: int64 [3], classes together.

    Those whose target is unknown are in none. Where processes share the windows out, the counts are of all.

    Raises:
        ModelError: no pixel is of a class, so that F1 would tell nothing.
    """
    place = next(network.parameters()).device
    counts = torch.zeros(3, dtype=torch.int64, device=place)
    if dist.is_initialized():
        for buffer in network.buffers():  # each process has gathered statistics of its own
            dist.broadcast(buffer, 0)
    network.eval()
    with torch.inference_mode(), torch.autocast(place.type, torch.bfloat16, enabled=place.type in settings.bf16):
        for image, wanted in loader:
            said = logits(network, card.task, image.to(place, non_blocking=True), years) >= 0
            truth = wanted.to(place)
            counts += torch.stack([(said & (truth == 1)).sum(), (said & (truth == 0)).sum(), (~said & (truth == 1)).sum()])
    if dist.is_initialized():
        dist.all_reduce(counts)
    if not counts[0] + counts[2]:
        raise ModelError(
            f"model {card.id}: {settings.valid_windows} windows of the validation sites hold no pixel of "
            f"{', '.join(card.classes)}, so no epoch is better than another: raise valid_windows"
        )
    return counts.cpu()


def scores_of(counts: Tensor) -> dict[str, float]:
    """Formulas over the counts of `judged`: NaN where nothing was there to be judged."""
    tp, fp, fn = (int(n) for n in counts)

    def ratio(part: int, whole: int) -> float:
        return part / whole if whole else math.nan

    return {
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "iou": ratio(tp, tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
    }
