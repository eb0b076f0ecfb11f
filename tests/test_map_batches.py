"""Batches, as on a GPU, give the same map and adapt to the device's memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from known_maps import given_by, holes, normal, reflectance, stored, untrained
from minecube.errors import ModelError
from minecube.models import Compute, Mapper, batches, mapping, predict
from minecube.models.forward import Forward
from minecube.models.layout import Layout
from minecube.models.streams import Strip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[Forward]]:
    """Start to compute on the CPU as on a GPU, in batches of this size at first."""

    def start(batch: int | None) -> list[Forward]:
        forwards: list[Forward] = []

        def sum_rows(
            forward: Forward, strips: Iterator[Strip[object]], ramp: np.ndarray, _: Compute
        ) -> Iterator[object]:
            if forward not in forwards:
                forward.group = batch
                forwards.append(forward)
            yield from batches.sum_in_batches(forward, strips, torch.from_numpy(ramp))

        monkeypatch.setattr(mapping, "sum_rows", sum_rows)
        return forwards

    return start


@pytest.mark.parametrize("batch", [None, 1, 5, 64, 10_000])
def test_batches_across_rows_and_years_give_the_same_map(
    batch: int | None, batched: Callable[[int | None], list[Forward]]
) -> None:
    of = holes(reflectance(11, 70, 53))
    expected = predict(untrained(), of)
    batched(batch)
    found = predict(untrained(), of)
    assert np.array_equal(found == 255, expected == 255)
    assert (
        np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    )  # the last bits of a logit depend on the batch


def test_out_of_memory_halves_the_batch_and_takes_the_same_windows_again(
    batched: Callable[[int | None], list[Forward]], caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    def forward(windows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(windows))
        if len(windows) > 6:
            raise torch.OutOfMemoryError("no room")
        return windows[:, :1]

    of = reflectance(12, 70, 53)
    forwards = batched(40)
    assert (
        np.abs(predict(given_by(forward), of).values - stored(normal(of.values[:, 0]))).max()
        <= 0.5 + 1e-3
    )
    assert sizes[:4] == [40, 20, 10, 5]
    assert set(sizes[3:-1]) == {5}
    assert [made.group for made in forwards] == [5]  # of which the next site makes use
    layout = Layout(70, 53, 16)
    assert sum(size for size in sizes if size <= 6) == 2 * len(layout.tops) * len(
        layout.lefts
    )  # each once
    assert "out of memory at 10 windows to a batch; going on with 5" in caplog.text


def test_a_batch_is_looked_for_once_and_used_for_all_sites(
    batched: Callable[[int | None], list[Forward]],
) -> None:
    sizes, room, calls = list[int](), [12], itertools.count()
    search = [1, 1, 2, 2, 4, 4, 8, 8, 16]  # each size twice, until memory runs out
    model, of = untrained(), reflectance(13, 70, 53)
    expected = predict(model, of)

    def limited(windows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(windows))
        if len(windows) > room[0]:
            raise torch.OutOfMemoryError("no room")
        if next(calls) < len(search[:-1]):
            time.sleep(0.4 / len(windows))  # larger batches are far faster, on a busy machine too
        return model.network(windows)

    batched(None)
    mapper = Mapper(given_by(limited))
    layout = Layout(70, 53, 16)
    count = 2 * len(layout.tops) * len(layout.lefts)
    for site, (fits, size) in enumerate(((12, 8), (12, 8), (7, 4), (12, 4))):
        room[0], sizes[:] = fits, []
        rows = list(mapper.map_rows(of, [(2019,), (2020,)]))
        found = np.concatenate(
            [
                np.concatenate([r.values for r in rows if r.view == (y,)], axis=-2)[0]
                for y in (2019, 2020)
            ]
        )
        assert np.abs(found.astype(int) - expected.values.astype(int)).max() <= 1
        if site == 0:
            assert sizes[: len(search)] == search
            del sizes[: len(search)]
        done = [n for n in sizes if n <= fits]
        assert sum(done) == count
        assert set(done[:-1]) == {size}
    sizes[:], room[0] = [], 0
    with pytest.raises(ModelError, match="does not hold one window"):
        list(mapper.map_rows(of, [(2019,)]))
    assert sizes == [4, 2, 1]


def test_memory_that_runs_out_over_the_last_few_says_nothing_of_the_next_site() -> None:
    def logits(windows: torch.Tensor) -> torch.Tensor:
        if len(windows) == 3:
            raise torch.OutOfMemoryError("no room")
        return torch.ones_like(windows[:, :1])

    strips = [
        Strip(
            tag=0, pixels=np.ones((1, 10, 16, 16 * 11), np.uint16), lefts=tuple(range(0, 176, 16))
        )
    ]
    model = given_by(logits)
    forward = Forward(model.network, model, Compute(batch=8), (2019,))
    rows = batches.sum_in_batches(forward, iter(strips), torch.ones(16, dtype=torch.int64))
    ((_, total, _),) = rows
    assert (total == 2**20).all()
    assert forward.group == 8


def test_memory_that_does_not_hold_one_window_is_an_error(
    batched: Callable[[int | None], list[Forward]],
) -> None:
    def forward(windows: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    batched(None)
    with pytest.raises(ModelError, match="does not hold one window"):
        predict(given_by(forward), reflectance(13))


def test_the_batch_doubles_until_memory_or_throughput_stops() -> None:
    tried: list[int] = []

    def seconds(size: int, fixed: float, room: int) -> float:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("no room")
        return fixed + size * 0.01

    assert (
        batches.find_batch(lambda n: seconds(n, 0.1, 10**6)) == 128
    )  # 256 would be faster by 3.9 % only
    assert tried == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert batches.find_batch(lambda n: seconds(n, 0.1, 20)) == 16
    assert batches.find_batch(lambda n: seconds(n, 0, 10**6)) == 1
    assert batches.find_batch(lambda n: seconds(n, 100, 10**6)) == 1024
    assert batches.find_batch(lambda n: seconds(n, 0, 0)) == 1


def test_a_logit_that_is_no_number_stops_and_says_where(
    batched: Callable[[int | None], list[Forward]],
) -> None:
    of = reflectance(15, 100, 60)
    of.values[1, :, 40, 30] = 60_000
    model = given_by(lambda x: torch.where(x > 50, torch.nan, x)[:, :1])
    # Windows over row 40 begin at 28 and 36, those over column 30 at 20 and 28: it is the first of them that is named.
    where = "model small: a logit is not a number in 2020, in the window at row 28, column 20"
    with pytest.raises(ModelError, match=where):
        predict(model, of)
    batched(16)
    with pytest.raises(ModelError, match=where):
        predict(model, of)
