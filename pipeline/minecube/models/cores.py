"""Apply networks to a stream of windows on the cores of a CPU.

Every core runs one thread. A thread passes a few neighbouring windows at a time through
single-threaded kernels. A kernel split among threads, or chosen by batch size, changes the last
bits of a logit. Here no kernel is split. Windows are grouped by the network and by their position
only. A map therefore does not depend on cores, workers or thread timing. This is also the fastest
way (benchmarks/predict.py).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from minecube.arrays import Int64, UInt16
from minecube.models.forward import Forward
from minecube.models.layout import add_window, are_finite, weight_logits
from minecube.models.network import normalise
from minecube.models.streams import Strip

T = TypeVar("T")


class _Sums(NamedTuple):
    """Result of neighbouring windows."""

    column: int
    """First column of the first window."""
    total: Tensor
    """Weighted sums [time, class, window, column] from `column` on."""
    finite: Tensor
    """Per window, whether all logits are finite."""


def sum_on_cores(
    forward: Forward, strips: Iterator[Strip[T]], ramp: Int64, workers: int | None
) -> Iterator[tuple[T, Tensor, Tensor]]:
    """Compute `mapping.sum_rows` by threads with a few windows per call.

    `workers` defaults to the cores available to this process.
    """
    threads = workers or _count_cores()
    weights = torch.from_numpy(ramp)
    waiting: deque[tuple[Strip[T], list[Future[_Sums]]]] = deque()
    with (
        _single_torch_thread(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        try:
            for strip in strips:
                pixels = np.asarray(strip.pixels)
                groups = group_windows(strip.lefts, forward.group or 1)
                calls = [pool.submit(_sum_group, forward, pixels, g, weights) for g in groups]
                waiting.append((strip, calls))
                # Keep more calls pending than workers, so no worker waits for the end of a row.
                while len(waiting) > 1 and _count_later_calls(waiting) >= 2 * threads:
                    yield _sum_row(*waiting.popleft())
                if len(waiting) > 2 * threads + 1:  # rows with few or no windows to compute
                    yield _sum_row(*waiting.popleft())
            while waiting:
                yield _sum_row(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _sum_group(forward: Forward, pixels: UInt16, lefts: Sequence[int], ramp: Tensor) -> _Sums:
    """Sum the weighted logits of the windows at `lefts` of a strip [time, band, row, column]."""
    side = len(ramp)
    start = lefts[0]
    trained = forward.trained
    group = normalise(pixels[..., start : lefts[-1] + side], trained.mean, trained.std)
    columns = [left - start for left in lefts]
    # Bands last in memory, as convolutions on a CPU compute: torch would transpose each window.
    bands_last = np.ascontiguousarray(np.moveaxis(group, 1, -1))
    windows = np.stack([bands_last[:, :, column : column + side] for column in columns])
    logits = forward(torch.from_numpy(np.moveaxis(windows, -1, 2)))
    total = torch.zeros((*logits.shape[1:4], group.shape[-1]), dtype=torch.int64)
    for column, window in zip(columns, weight_logits(logits, ramp), strict=True):
        add_window(total, column, window)
    return _Sums(start, total, are_finite(logits))


def group_windows(lefts: Sequence[int], size: int) -> list[Sequence[int]]:
    """Split a row's windows into groups of equal size, about `size` each.

    One call of 1.5 x `size` windows costs less than two of half that size.
    """
    if not lefts:
        return []
    count = max(round(len(lefts) / size), 1)
    ends = [len(lefts) * n // count for n in range(count + 1)]
    return [lefts[start:end] for start, end in pairwise(ends)]


def _count_cores() -> int:
    """Count the cores available to this process; a shared machine may have more."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count_later_calls(waiting: deque[tuple[Strip[T], list[Future[_Sums]]]]) -> int:
    """Count the calls of all waiting rows except the first."""
    return sum(len(calls) for _, calls in waiting) - len(waiting[0][1])


@contextmanager
def _single_torch_thread() -> Iterator[None]:
    """Limit the calling thread to one torch thread until the map is finished.

    The calling thread adds up results. More threads would keep the cores busy with waiting.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sum_row(strip: Strip[T], calls: list[Future[_Sums]]) -> tuple[T, Tensor, Tensor]:
    groups = [call.result() for call in calls]
    if not groups:
        return strip.tag, torch.zeros(()), torch.ones(0, dtype=torch.bool)
    row = groups[0].total
    columns = strip.pixels.shape[-1]
    if row.shape[-1] < columns:
        row = torch.zeros((*row.shape[:-1], columns), dtype=torch.int64)
        for group in groups:
            add_window(row, group.column, group.total)
    return strip.tag, row, torch.cat([group.finite for group in groups])
