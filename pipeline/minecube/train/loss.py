"""Compute the loss from sums over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minecube.catalog import TrainingSettings


def compute_loss(logits: Tensor, targets: Tensor, settings: TrainingSettings) -> Tensor:
    """Compute binary cross entropy over the known pixels of all classes, plus optional Dice loss.

    Both are formulas over sums of the whole batch. If processes share a batch, their sums are added
    up before the formulas. Loss and gradient (averaged over processes) then equal those of one
    process with all windows.

    Logits and targets are [n, time, class, y, x]. Targets are 1, 0, or above for unknown. The
    settings `positive_weight`, `focal` and `dice` apply.
    """
    known = targets <= 1
    positive = (targets == 1).float()
    # Replaces logits of unknown pixels, also NaN.
    logits = torch.where(known, logits.float(), 0)
    each = nn.functional.binary_cross_entropy_with_logits(logits, positive, reduction="none")
    if settings.focal:
        # `each` is -log of the true class's probability, and exp(-each) this probability.
        each = each * (1 - torch.exp(-each)) ** settings.focal
    each = each * (1 + (settings.positive_weight - 1) * positive)
    sums = [torch.where(known, each, 0).sum()[None], known.sum()[None].float()]
    if settings.dice:
        axes = (0, 1, 3, 4)  # all but the class
        probability = torch.where(known, torch.sigmoid(logits), 0)
        sums.append((probability * positive).sum(axes))
        sums.append(probability.sum(axes) + positive.sum(axes))
    total = torch.cat(sums)
    if dist.is_initialized():
        total = _SumOverProcesses.apply(total)  # type: ignore[no-untyped-call]
    loss: Tensor = total[0] / total[1].clamp(min=1)
    if settings.dice:
        overlap, sizes = total[2:].chunk(2)
        loss = loss + settings.dice * (1 - (2 * overlap + 1) / (sizes + 1)).mean()
    return loss


class _SumOverProcesses(torch.autograd.Function):
    """Sum over all processes.

    Its gradient is the sum of their gradients, averaged by DistributedDataParallel afterwards.
    """

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:  # noqa: ARG004  torch passes it
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.clone()
        dist.all_reduce(total)
        return total
