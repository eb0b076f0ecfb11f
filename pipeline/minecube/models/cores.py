"""Apply networks to a stream of windows on the cores of a CPU.

Every core runs one thread. A thread passes a few neighbouring windows at a time through
single-threaded kernels. A kernel split among threads, or chosen by batch size, changes the last
bits of a logit. Here no kernel is split. Windows are grouped by the network and by their position
only. A map therefore does not depend on cores, workers or thread timing. This is also the fastest
way (benchmarks/predict.py).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from minecube.arrays import Bool, Float32, Int64, UInt16
from minecube.compiled import compiled
from minecube.models.forward import Forward
from minecube.models.layout import sum_windows
from minecube.models.streams import Strip

T = TypeVar("T")


class _Sums(NamedTuple):
    """Result of neighbouring windows."""

    column: int
    """First column of the first window."""
    total: Int64
    """Weighted sums [time, class, window, column] from `column` on."""
    finite: Bool
    """Per window, whether all logits are finite."""


def sum_on_cores(
    forward: Forward, strips: Iterator[Strip[T]], ramp: Int64, workers: int | None
) -> Iterator[tuple[T, Tensor, Tensor]]:
    """Compute `mapping.sum_rows` by threads with a few windows per call.

    `workers` defaults to the cores available to this process.
    """
    threads = workers or _count_cores()
    calls = _Calls(forward, ramp)
    waiting: deque[tuple[Strip[T], list[Future[_Sums]]]] = deque()
    with (
        _single_torch_thread(),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        try:
            for strip in strips:
                # Strips of `mapping` are not copied here.
                pixels = np.ascontiguousarray(np.asarray(strip.pixels).transpose(2, 0, 1, 3))
                groups = group_windows(strip.lefts, forward.group or 1)
                waiting.append((strip, [pool.submit(calls.run, pixels, g) for g in groups]))
                # Keep more calls pending than workers, so no worker waits for the end of a row.
                while len(waiting) > 1 and _count_later_calls(waiting) >= 2 * threads:
                    yield _sum_row(*waiting.popleft())
                if len(waiting) > 2 * threads + 1:  # rows with few or no windows to compute
                    yield _sum_row(*waiting.popleft())
            while waiting:
                yield _sum_row(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Calls:
    """Calls of a network for neighbouring windows of a row, with memory for windows per thread."""

    def __init__(self, forward: Forward, ramp: Int64) -> None:
        self._forward = forward
        self._ramp = ramp
        self._mean = np.array(forward.trained.mean, np.float32)
        self._std = np.array(forward.trained.std, np.float32)
        self._memory = threading.local()

    def run(self, pixels: UInt16, lefts: Sequence[int]) -> _Sums:
        """Sum the weighted logits of the windows at `lefts` of a strip."""
        side = len(self._ramp)
        windows = self._allocate((len(lefts), *pixels.shape[1:3], side, side))
        for window, column in zip(windows, lefts, strict=True):
            cut_window(pixels, column, self._mean, self._std, window)
        logits = self._forward(torch.from_numpy(windows)).contiguous().numpy()
        total = np.zeros((*logits.shape[1:4], lefts[-1] - lefts[0] + side), np.int64)
        finite = np.empty(len(lefts), np.bool_)
        sum_windows(logits, np.subtract(lefts, lefts[0]), self._ramp, total, finite)
        return _Sums(lefts[0], total, finite)

    def _allocate(self, shape: tuple[int, ...]) -> Float32:
        """Return this thread's memory: allocating it takes longer than filling it."""
        if len(getattr(self._memory, "windows", ())) < shape[0]:
            self._memory.windows = np.empty(shape, np.float32)
        windows: Float32 = self._memory.windows[: shape[0]]
        return windows


@compiled
def cut_window(strip: UInt16, column: int, mean: Float32, std: Float32, window: Float32) -> None:
    """Write a window of a contiguous strip [row, time, band, column] into `window`.

    `window` is [time, band, row, column], bit by bit as from `network.normalise`.
    """
    dates, bands, rows, side = window.shape
    for y in range(rows):
        for t in range(dates):
            for band in range(bands):
                centre = mean[band]
                unit = std[band]
                values = strip[y, t, band, column : column + side]
                output = window[t, band, y]
                for x in range(side):
                    if values[x]:
                        output[x] = (np.float32(values[x]) - centre) / unit
                    else:
                        output[x] = np.float32(0)


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
        row = np.zeros((*row.shape[:-1], columns), np.int64)
        for group in groups:
            row[..., group.column : group.column + group.total.shape[-1]] += group.total
    finite = np.concatenate([group.finite for group in groups])
    return strip.tag, torch.from_numpy(row), torch.from_numpy(finite)
