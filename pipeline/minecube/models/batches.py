"""Apply networks to a stream of windows in batches, on a GPU.

Windows are gathered into batches across rows, site-years and pairs. The batch size is doubled until
memory or throughput stops growing. If a later batch runs out of memory, the size is halved and its
windows are computed again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

from minecube.errors import ModelError
from minecube.models.forward import Forward
from minecube.models.layout import add_window, are_finite, weight_logits
from minecube.models.streams import Strip

T = TypeVar("T")
_LEAST_GAIN = 1.05  # minimum speed-up of a doubled batch
_LARGEST_BATCH = 1024  # windows

log = logging.getLogger(__name__)


@dataclass
class _Row(Generic[T]):
    """Strip with windows still to compute."""

    strip: Strip[T]
    finite: Tensor
    """Per window, whether all logits are finite."""
    pending: int
    """Windows still to compute."""
    total: Tensor = field(default_factory=lambda: torch.zeros(()))


def sum_in_batches(
    forward: Forward, strips: Iterator[Strip[T]], ramp: Tensor
) -> Iterator[tuple[T, Tensor, Tensor]]:
    """Compute `mapping.sum_rows` in batches across rows, in the same way on any device.

    The batch size is `forward.group`, that of the last site. Without one it is found at the first
    window. It is halved if it does not fit into memory.
    """
    rows: deque[_Row[T]] = deque()
    windows: deque[tuple[_Row[T], int]] = deque()
    for strip in strips:
        count = len(strip.lefts)
        row = _Row(strip, torch.ones(count, dtype=torch.bool, device=ramp.device), count)
        rows.append(row)
        windows.extend((row, n) for n in range(count))
        if forward.group is None and windows:
            window = torch.as_tensor(strip.pixels)[..., : len(ramp)]
            forward.group = find_batch(_timer(forward, window))
            log.info("%d windows to a batch", forward.group)
        while forward.group is not None and len(windows) >= forward.group:
            forward.group = _compute_batch(forward, windows, ramp, forward.group)
        while rows and not rows[0].pending:
            finished = rows.popleft()
            yield finished.strip.tag, finished.total, finished.finite
    batch = forward.group  # the remaining windows fill no batch and do not test its size
    while windows and batch is not None:
        batch = _compute_batch(forward, windows, ramp, batch)
    for row in rows:
        yield row.strip.tag, row.total, row.finite


def _compute_batch(
    forward: Forward, windows: deque[tuple[_Row[T], int]], ramp: Tensor, batch: int
) -> int:
    """Compute one batch of pending windows, add it up, and return the next batch size.

    The size is halved if the batch did not fit into memory.
    """
    group = list(islice(windows, batch))
    output: Tensor | None = None
    try:
        output = forward(_cut_windows(group, len(ramp)), batch)
    except torch.OutOfMemoryError as error:
        if batch == 1:
            raise ModelError(
                "the device's memory does not hold one window of this model; use a device with "
                "more, or a smaller model"
            ) from error
    if output is None:  # outside `except`: the error still references tensors there
        if ramp.is_cuda:
            torch.cuda.empty_cache()
        log.warning("out of memory at %d windows to a batch; going on with %d", batch, batch // 2)
        return batch // 2
    for window, finite, (row, n) in zip(
        weight_logits(output, ramp), are_finite(output), group, strict=True
    ):
        if not row.total.dim():
            shape = (*window.shape[:-1], row.strip.pixels.shape[-1])
            row.total = torch.zeros(shape, dtype=torch.int64, device=window.device)
        add_window(row.total, row.strip.lefts[n], window)
        row.finite[n] = finite
        row.pending -= 1
        windows.popleft()
    return batch


def _cut_windows(group: list[tuple[_Row[T], int]], side: int) -> Tensor:
    """Stack the windows of these rows and numbers."""
    windows = []
    for row, n in group:
        column = row.strip.lefts[n]
        windows.append(torch.as_tensor(row.strip.pixels)[..., column : column + side])
    return torch.stack(windows)


def find_batch(seconds: Callable[[int], float]) -> int:
    """Find the batch size by doubling until memory or throughput stops growing.

    `seconds` measures one batch of a given size.
    """
    best = 1
    fastest = 0.0
    size = 1
    while size <= _LARGEST_BATCH:
        try:
            speed = size / seconds(size)
        except torch.OutOfMemoryError:
            break
        if speed < fastest * _LEAST_GAIN:
            break
        best = size
        fastest = speed
        size *= 2
    return best


def _timer(forward: Forward, window: Tensor) -> Callable[[int], float]:
    def time_batch(size: int) -> float:
        windows = window.expand(size, *window.shape).contiguous()
        for _ in range(2):  # the first call chooses kernels and compiles
            start = time.perf_counter()
            forward(windows, size)
            if windows.is_cuda:
                torch.cuda.synchronize(windows.device)
        return time.perf_counter() - start

    return time_batch
