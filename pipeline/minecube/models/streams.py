"""Stream rows of windows through a network.

A thread makes rows ahead. They are copied to a GPU while it computes, and results are copied back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from minecube.arrays import UInt16

T = TypeVar("T")
_END = object()
_RESULTS_IN_FLIGHT = 3
"""Results on their way from a GPU, so that it can compute on meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Strip(Generic[T]):
    """A row of windows."""

    tag: T
    """Data of any type that accompanies the strip's results."""
    pixels: UInt16 | Tensor
    """[time, band, window, columns], 0 = no observation."""
    lefts: tuple[int, ...]
    """First columns of its windows."""


def upload(strips: Iterator[Strip[T]], device: torch.device) -> Generator[Strip[T], None, None]:
    """Copy strips to the GPU from pinned memory while it computes."""
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start_copies() -> Iterator[tuple[Strip[T], torch.cuda.Event]]:
        for strip in strips:
            with torch.cuda.stream(copying):
                pinned = torch.as_tensor(np.ascontiguousarray(strip.pixels)).pin_memory()
                pixels = pinned.to(device, non_blocking=True)
                yield Strip(tag=strip.tag, pixels=pixels, lefts=strip.lefts), copying.record_event()

    with closing(read_ahead(start_copies())) as copies:
        for strip, copied in copies:
            working = torch.cuda.current_stream(device)
            working.wait_event(copied)
            if isinstance(strip.pixels, Tensor):
                strip.pixels.record_stream(working)
            yield strip


def download(results: Iterator[tuple[T, Tensor, Tensor]]) -> Iterator[tuple[T, Tensor, Tensor]]:
    """Copy the tensors to the CPU's memory.

    A GPU receives three more items to compute before the first is awaited.
    """
    flying: deque[tuple[T, Tensor, Tensor, torch.cuda.Event]] = deque()
    for tag, values, finite in results:
        if not (values.is_cuda or finite.is_cuda):
            yield tag, values, finite
            continue
        copies = (_start_download(values), _start_download(finite))
        copied = torch.cuda.current_stream(values.device).record_event()
        flying.append((tag, *copies, copied))
        if len(flying) > _RESULTS_IN_FLIGHT:
            yield _await_copy(flying.popleft())
    while flying:
        yield _await_copy(flying.popleft())


def _start_download(values: Tensor) -> Tensor:
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)


def _await_copy(flight: tuple[T, Tensor, Tensor, torch.cuda.Event]) -> tuple[T, Tensor, Tensor]:
    tag, values, finite, copied = flight
    copied.synchronize()
    return tag, values, finite


def read_ahead(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """Yield the same items, with `depth` of them made ahead by a thread.

    Close the generator to end the thread.
    """
    with ThreadPoolExecutor(1) as maker:
        coming = deque(maker.submit(next, items, _END) for _ in range(depth))
        try:
            while (item := coming.popleft().result()) is not _END:
                coming.append(maker.submit(next, items, _END))
                yield item  # type: ignore[misc]
        finally:
            maker.shutdown(cancel_futures=True)
