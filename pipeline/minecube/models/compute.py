"""Apply networks to a stream of windows, on the cores of a CPU or on a GPU.

On a CPU every core runs one thread. A thread passes a few neighbouring windows at a time through
single-threaded kernels. A kernel split among threads, or chosen by batch size, changes the last
bits of a logit. Here no kernel is split. Windows are grouped by the network and by their position
only. A map therefore does not depend on cores, workers or thread timing. This is also the fastest
way (benchmarks/predict.py).

On a GPU windows are gathered into batches across rows, site-years and pairs. The batch size is
doubled until memory or throughput stops growing. If a later batch runs out of memory, the size is
halved and its windows are computed again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minecube.compiled import compiled
from minecube.device import device_of
from minecube.errors import ModelError
from minecube.models.folding import folded
from minecube.models.layout import across, summed, weighted
from minecube.models.network import Trained, logits
from minecube.models.streams import Strip, uploaded

T = TypeVar("T")
_Sums = tuple[int, NDArray[np.int64], NDArray[np.bool_]]
"""Result of neighbouring windows: left column of the first, their weighted sums for the row, and
per window whether all logits are finite."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GAIN = 1.05  # minimum speed-up of a doubled batch
_LARGEST = 1024  # windows per batch
# Windows per call on a CPU: enough to amortise the overhead of a call, few enough to keep a layer's
# input and output in cache. Measured on 21 small networks with 17 windows per row: at most 2 %
# slower than 4, 8 or 17 windows per call.
_BEST, _BYTES = 16, 3.7e6  # maximum windows; input plus output bytes, mean over layers

log = logging.getLogger(__name__)


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
                f"expected a precision of {', '.join(PRECISIONS)}, workers and batch of 1 or more, found {self.precision}, "
                f"{self.workers}, {self.batch}"
            )
        if self.compiled and self.device.startswith("cpu"):
            # Group sizes vary. torch would compile each one, and give up at a size left to chance.
            raise ModelError(
                "torch.compile is for GPUs; on a CPU it takes its time, gains nothing, and a map's last bits would depend on "
                "which windows come first: leave --compile out"
            )

    def place(self) -> torch.device:
        """Return the device; raises ModelError if it is not available."""
        return device_of(self.device)

    def __str__(self) -> str:
        return (
            f"torch {torch.__version__} on {self.place().type} in {_precision(self, self.place())}"
        )


def rows_of(
    forward: Forward, strips: Iterator[Strip[T]], ramp: NDArray[np.int64], compute: Compute
) -> Generator[tuple[T, Tensor, Tensor], None, None]:
    """Yield each strip's logit sums, in order, as (`Strip.of`, sums, finite).

    Sums are weighted, int64 [time, class, window, columns], on the device. `finite` marks the
    windows with only finite logits.

    Raises:
        ModelError: The device's memory cannot hold one window.
    """
    if forward.place.type == "cpu":
        yield from on_cores(forward, strips, ramp, compute.workers or _cores())
    else:
        yield from on_gpu(forward, strips, ramp)


def ready(trained: Trained, compute: Compute, years: Sequence[int]) -> Forward:
    """Copy the network to its device and optimise it there for views of these years.

    Raises:
        ModelError: The device is not available.
    """
    place, side = compute.place(), trained.card.window_px
    network = deepcopy(trained.network).to(place).eval()
    if place.type != "cpu":
        return Forward(network, trained, compute, years)
    window = torch.zeros(1, len(years), len(trained.card.bands), side, side)
    network = folded(network, lambda: logits(network, trained.card.task, window, years))
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = Forward(network, trained, compute, years)
    forward.group = forward.together(window)
    return forward


def _cores() -> int:
    """Count the cores available to this process; a shared machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _precision(compute: Compute, place: torch.device) -> str:
    return compute.precision or ("fp32" if place.type == "cpu" else "bf16")


class Forward:
    """Prepared network: windows uint16 [n, time, band, y, x] -> logits [n, time, class, y, x].

    Logits are float32. Windows are normalised on the device.
    """

    def __init__(
        self, network: nn.Module, trained: Trained, compute: Compute, years: Sequence[int]
    ) -> None:
        self.place, self.trained, self._years = compute.place(), trained, years
        self.group = compute.batch
        """Windows per call; None until it is determined."""
        if compute.compiled:
            network.compile(dynamic=False)
        self._network = network
        self._compiled, self._dtype = compute.compiled, PRECISIONS[_precision(compute, self.place)]
        numbers = (
            torch.tensor(v, dtype=torch.float32, device=self.place)
            for v in (trained.mean, trained.std)
        )
        mean, std = (v.view(-1, 1, 1) for v in numbers)
        self._mean, self._scale = mean, 1 / std

    def normal(self, windows: Tensor) -> Tensor:
        """Normalise windows as `network.normalise` does."""
        values = windows.to(torch.float32)
        return torch.where(values > 0, (values - self._mean).mul_(self._scale), 0)

    def together(self, window: Tensor) -> int:
        """Choose the number of windows per call on a CPU.

        `window` is one window [1, time, band, y, x] in floating point.
        """
        sizes: list[int] = []

        def note(_: nn.Module, given: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor):
                sizes.append(sum(t.nbytes for t in (*given, output) if isinstance(t, Tensor)))

        layers = [
            m for m in self._network.modules() if m is not self._network and not any(m.children())
        ]
        if not layers:
            return _BEST
        noting = [layer.register_forward_hook(note) for layer in layers]
        with torch.inference_mode():
            logits(self._network, self.trained.card.task, window, self._years)
        for hook in noting:
            hook.remove()
        return min(max(round(_BYTES * len(sizes) / max(sum(sizes), 1)), 1), _BEST)

    def __call__(self, windows: Tensor, full: int | None = None) -> Tensor:
        """Compute the logits of windows; windows in floating point are already normalised.

        For a compiled network, fewer windows than `full` are padded to `full`. Each other number
        would be compiled again.
        """
        values = windows if windows.is_floating_point() else self.normal(windows)
        if self._compiled and full and len(values) < full:
            values = torch.cat([values, values.new_zeros((full - len(values), *values.shape[1:]))])
        with (
            torch.inference_mode(),
            torch.autocast(self.place.type, self._dtype, enabled=self._dtype != torch.float32),
        ):
            found = logits(self._network, self.trained.card.task, values, self._years)
        return found[: len(windows)].float()


def on_cores(
    forward: Forward, strips: Iterator[Strip[T]], ramp: NDArray[np.int64], workers: int
) -> Iterator[tuple[T, Tensor, Tensor]]:
    """Compute `rows_of` by threads with a few windows per call."""
    side, best, own = len(ramp), forward.group or 1, threading.local()
    mean, std = (np.array(of, np.float32) for of in (forward.trained.mean, forward.trained.std))

    def some(pixels: NDArray[np.uint16], lefts: Sequence[int]) -> _Sums:
        # Memory is reused: allocating it takes longer than filling it.
        if len(getattr(own, "windows", ())) < len(lefts):
            own.windows = np.empty((len(lefts), *pixels.shape[1:3], side, side), np.float32)
        windows = own.windows[: len(lefts)]
        for window, left in zip(windows, lefts, strict=True):
            cut(pixels, left, mean, std, window)
        found = forward(torch.from_numpy(windows)).contiguous().numpy()
        total = np.zeros((*found.shape[1:4], lefts[-1] - lefts[0] + side), np.int64)
        finite = np.empty(len(lefts), np.bool_)
        summed(found, np.subtract(lefts, lefts[0]), ramp, total, finite)
        return lefts[0], total, finite

    waiting: deque[tuple[Strip[T], list[Future[_Sums]]]] = deque()
    with (
        _one_thread_each(),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        try:
            for strip in strips:
                # Strips of `mapping` are not copied here.
                pixels = np.ascontiguousarray(np.asarray(strip.pixels).transpose(2, 0, 1, 3))
                calls = [pool.submit(some, pixels, lefts) for lefts in _together(strip.lefts, best)]
                waiting.append((strip, calls))
                # Keep more calls pending than workers, so no worker waits for the end of a row.
                while (
                    len(waiting) > 1
                    and sum(len(found) for _, found in list(waiting)[1:]) >= 2 * workers
                ):
                    yield _row(*waiting.popleft())
                if len(waiting) > 2 * workers + 1:  # rows with few or no windows to compute
                    yield _row(*waiting.popleft())
            while waiting:
                yield _row(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@compiled
def cut(
    strip: NDArray[np.uint16],
    left: int,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Write a window of a contiguous strip [row, time, band, column] into `out`.

    `out` is [time, band, row, column], bit by bit as from `network.normalise`.
    """
    times, bands, rows, side = out.shape
    for y in range(rows):
        for t in range(times):
            for band in range(bands):
                centre, unit = mean[band], std[band]
                row, found = strip[y, t, band, left : left + side], out[t, band, y]
                for x in range(side):
                    found[x] = (np.float32(row[x]) - centre) / unit if row[x] else np.float32(0)


def _together(lefts: Sequence[int], best: int) -> list[Sequence[int]]:
    """Split a row's windows into groups of equal size, about `best` each.

    One call of 1.5 x `best` windows costs less than two of half that size.
    """
    if not lefts:
        return []
    count = max(round(len(lefts) / best), 1)
    ends = [len(lefts) * n // count for n in range(count + 1)]
    return [lefts[a:b] for a, b in pairwise(ends)]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Limit the calling thread to one torch thread until the map is finished.

    The calling thread adds up results. More threads would keep the cores busy with waiting.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(strip: Strip[T], calls: list[Future[_Sums]]) -> tuple[T, Tensor, Tensor]:
    found = [call.result() for call in calls]
    if not found:
        return strip.of, torch.zeros(()), torch.ones(0, dtype=torch.bool)
    row = found[0][1]
    if row.shape[-1] < strip.pixels.shape[-1]:
        row = np.zeros((*row.shape[:-1], strip.pixels.shape[-1]), np.int64)
        for left, total, _ in found:
            row[..., left : left + total.shape[-1]] += total
    return (
        strip.of,
        torch.from_numpy(row),
        torch.from_numpy(np.concatenate([finite for *_, finite in found])),
    )


def _finite(found: Tensor) -> Tensor:
    """Report per window [n, ...] whether all logits are finite (a sum propagates NaN and inf)."""
    return found.flatten(1).sum(dim=1, dtype=torch.float64).isfinite()


def on_gpu(
    forward: Forward, strips: Iterator[Strip[T]], ramp: NDArray[np.int64]
) -> Iterator[tuple[T, Tensor, Tensor]]:
    """Compute `rows_of` in batches, starting with the last site's batch size, if any."""
    with closing(uploaded(strips, forward.place)) as there:
        forward.group = yield from in_batches(
            forward, there, torch.from_numpy(ramp).to(forward.place), forward.group
        )


@dataclass
class _Row(Generic[T]):
    """Strip with windows still to compute."""

    strip: Strip[T]
    finite: Tensor
    left: int
    """Windows still to compute."""
    total: Tensor = field(default_factory=lambda: torch.zeros(()))


def in_batches(
    forward: Callable[[Tensor, int | None], Tensor],
    strips: Iterator[Strip[T]],
    ramp: Tensor,
    batch: int | None,
) -> Generator[tuple[T, Tensor, Tensor], None, int | None]:
    """Compute `rows_of` in batches across rows, in the same way on any device.

    Returns the batch size found to fit.
    """
    rows: deque[_Row[T]] = deque()
    todo: deque[tuple[_Row[T], int]] = deque()
    for strip in strips:
        count = len(strip.lefts)
        row = _Row(strip, torch.ones(count, dtype=torch.bool, device=ramp.device), count)
        rows.append(row)
        todo.extend((row, n) for n in range(count))
        if batch is None and todo:
            batch = found_batch(_timed(forward, torch.as_tensor(strip.pixels)[..., : len(ramp)]))
            log.info("%d windows to a batch", batch)
        while batch is not None and len(todo) >= batch:
            batch = _take(forward, todo, ramp, batch)
        while rows and not rows[0].left:
            done = rows.popleft()
            yield done.strip.of, done.total, done.finite
    fits = batch  # the remaining windows fill no batch and do not test its size
    while todo and batch is not None:
        batch = _take(forward, todo, ramp, batch)
    for done in rows:
        yield done.strip.of, done.total, done.finite
    return fits


def _take(
    forward: Callable[[Tensor, int | None], Tensor],
    todo: deque[tuple[_Row[T], int]],
    ramp: Tensor,
    batch: int,
) -> int:
    """Compute one batch of pending windows, add it up, and return the next batch size.

    The size is halved if the batch did not fit into memory.
    """
    group = list(islice(todo, batch))
    cut = [
        torch.as_tensor(row.strip.pixels)[..., row.strip.lefts[n] :][..., : len(ramp)]
        for row, n in group
    ]
    found: Tensor | None = None
    try:
        found = forward(torch.stack(cut), batch)
    except torch.OutOfMemoryError as error:
        if batch == 1:
            raise ModelError(
                "the device's memory does not hold one window of this model; use a device with more, or a smaller model"
            ) from error
    if found is None:  # outside `except`: the error still references tensors there
        if ramp.is_cuda:
            torch.cuda.empty_cache()
        log.warning("out of memory at %d windows to a batch; going on with %d", batch, batch // 2)
        return batch // 2
    for each, good, (row, n) in zip(weighted(found, ramp), _finite(found), group, strict=True):
        if not row.total.dim():
            columns = row.strip.pixels.shape[-1]
            row.total = torch.zeros(
                (*each.shape[:-1], columns), dtype=torch.int64, device=each.device
            )
        across(row.total, row.strip.lefts[n], each)
        row.finite[n] = good
        row.left -= 1
        todo.popleft()
    return batch


def found_batch(seconds: Callable[[int], float]) -> int:
    """Find the batch size by doubling until memory or throughput stops growing.

    `seconds` measures one batch of a given size.
    """
    best, fastest, size = 1, 0.0, 1
    while size <= _LARGEST:
        try:
            speed = size / seconds(size)
        except torch.OutOfMemoryError:
            break
        if speed < fastest * _GAIN:
            break
        best, fastest, size = size, speed, size * 2
    return best


def _timed(
    forward: Callable[[Tensor, int | None], Tensor], window: Tensor
) -> Callable[[int], float]:
    def seconds(size: int) -> float:
        windows = window.expand(size, *window.shape).contiguous()
        for _ in range(2):  # the first call chooses kernels and compiles
            start = time.perf_counter()
            forward(windows, size)
            if windows.is_cuda:
                torch.cuda.synchronize(windows.device)
        return time.perf_counter() - start

    return seconds
