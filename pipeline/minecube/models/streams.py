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
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
_END = object()


@dataclass(frozen=True, kw_only=True)
class Strip(Generic[T]):
    """A row of windows."""

    of: T
    """Data of any type for its map."""
    pixels: NDArray[np.uint16] | Tensor
    """[time, band, window, columns], 0 = no observation."""
    lefts: tuple[int, ...]
    """First columns of its windows."""


def uploaded(strips: Iterator[Strip[T]], place: torch.device) -> Generator[Strip[T], None, None]:
    """Copy strips to the GPU from pinned memory while it computes."""
    copying = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]

    def upload() -> Iterator[tuple[Strip[T], torch.cuda.Event]]:
        for strip in strips:
            with torch.cuda.stream(copying):
                pinned = torch.as_tensor(np.ascontiguousarray(strip.pixels)).pin_memory()
                pixels = pinned.to(place, non_blocking=True)
                yield Strip(of=strip.of, pixels=pixels, lefts=strip.lefts), copying.record_event()

    with closing(ahead(upload())) as copied:
        for strip, there in copied:
            working = torch.cuda.current_stream(place)
            working.wait_event(there)
            if isinstance(strip.pixels, Tensor):
                strip.pixels.record_stream(working)
            yield strip


def landed(found: Iterator[tuple[T, Tensor, Tensor]]) -> Iterator[tuple[T, Tensor, Tensor]]:
    """Copy the tensors to the CPU's memory.

    A GPU receives three more items to compute before the first is awaited.
    """
    flying: deque[tuple[T, Tensor, Tensor, torch.cuda.Event | None]] = deque()
    for of, *tensors in found:
        if not any(t.is_cuda for t in tensors):
            yield of, tensors[0], tensors[1]
            continue
        here = [
            torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
            for t in tensors
        ]
        flying.append(
            (of, here[0], here[1], torch.cuda.current_stream(tensors[0].device).record_event())
        )
        if len(flying) > 3:
            yield _waited(flying.popleft())
    while flying:
        yield _waited(flying.popleft())


def _waited(flown: tuple[T, Tensor, Tensor, torch.cuda.Event | None]) -> tuple[T, Tensor, Tensor]:
    of, first, second, there = flown
    if there is not None:
        there.synchronize()
    return of, first, second


def ahead(items: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
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
