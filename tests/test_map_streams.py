"""Rows are read once, shortly before they are needed, in memory that stays flat."""

from __future__ import annotations

import dataclasses
import threading
import tracemalloc
from collections.abc import Iterator

import dask
import numpy as np
import pytest
import torch
import xarray as xr

from known_maps import CHANGE, SMALL, YEARS, given_by, pair_of, reflectance, untrained
from minecube.catalog import BANDS
from minecube.models import Compute, Mapper, list_views, predict, streams

pytestmark = pytest.mark.usefixtures("one_thread")


def recording(of: xr.DataArray, read: list[int]) -> xr.DataArray:
    """The same pixels, lazy: chunks of 256 rows, of which each notes its first row as it is read."""

    def block(
        values: np.ndarray, block_info: dict[int, dict[str, list[tuple[int, int]]]]
    ) -> np.ndarray:
        read.append(block_info[0]["array-location"][2][0])
        return values

    lazy = of.chunk({"year": 1, "y": 256})
    lazy = lazy.copy(
        data=lazy.data.map_blocks(block, dtype=np.uint16, meta=np.empty((0, 0, 0, 0), np.uint16))
    )
    lazy.encoding["chunks"] = (1, 10, 256, 40)
    return lazy


def test_every_row_is_read_once_a_view_and_not_long_before_it_is_needed() -> None:
    cards = [dataclasses.replace(card, window_px=256) for card in (SMALL, CHANGE)]
    of, read = reflectance(9, 3328, 40, YEARS), list[int]()
    lazy, model = recording(of, read), untrained(cards[0])
    for rows in Mapper(model, Compute(workers=2)).map_rows(lazy, [(2019,)]):
        # A strip that waits, one that is made, rows in flight, and the row of windows itself.
        assert max(read) <= rows.y + 256 * 8
    assert sorted(read) == list(range(0, 3328, 256))
    read.clear()
    list(Mapper(given_by(pair_of, cards[1])).map_rows(lazy, list_views(CHANGE, YEARS)))
    assert sorted(read) == sorted([*range(0, 3328, 256)] * 6)
    quick = given_by(lambda x: x[:, :1], cards[0])
    xr.testing.assert_identical(predict(quick, lazy), predict(quick, of))


def test_memory_is_flat_in_the_number_of_rows() -> None:
    model = given_by(lambda x: x[:, :1], dataclasses.replace(SMALL, window_px=64))

    def peak(height: int) -> int:
        def rows(block_info: dict[None, dict[str, list[tuple[int, int]]]]) -> np.ndarray:
            (a, b) = block_info[None]["array-location"][2]
            return np.full((1, 10, b - a, 150), 1000, np.uint16)

        import dask.array as da

        made = da.map_blocks(
            rows,
            chunks=((1,), (10,), (256,) * (height // 256), (150,)),
            dtype=np.uint16,
            meta=np.empty((0,) * 4, np.uint16),
        )
        lazy = xr.DataArray(
            made, dims=("year", "band", "y", "x"), coords={"year": [2019], "band": list(BANDS)}
        )
        lazy.encoding["chunks"] = (1, 10, 256, 150)
        tracemalloc.start()
        seen = sum(
            r.values.shape[-2] for r in Mapper(model, Compute(workers=2)).map_rows(lazy, [(2019,)])
        )
        left, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seen == height
        return most - left  # without Dask's graph, of which a taller site has more

    peak(2560)  # what is imported and kept once
    small, large = peak(2560), peak(10240)
    # A peak varies with who is quick, by some strips; held pixels of the taller site would add all of their bytes.
    assert large - small < (10240 - 2560) * 150 * 20 / 4


def test_a_reader_is_ahead_by_as_much_as_was_asked_for_and_ends_when_closed() -> None:
    made: list[int] = []
    before = threading.active_count()

    def items() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            yield n

    there = streams.read_ahead(items(), depth=2)
    assert next(there) == 0
    deadline = threading.Event()
    for _ in range(200):
        if len(made) == 3:  # one taken, two waiting
            break
        deadline.wait(0.01)
    deadline.wait(0.05)
    assert made == [0, 1, 2]
    there.close()
    assert threading.active_count() == before
    assert list(streams.read_ahead(iter(range(50)))) == list(range(50))


def test_an_error_in_the_reader_reaches_the_caller_and_no_thread_stays() -> None:
    of, before = reflectance(1, 1100, 40, (2019,)), threading.active_count()

    def block(
        values: np.ndarray, block_info: dict[int, dict[str, list[tuple[int, int]]]]
    ) -> np.ndarray:
        if block_info[0]["array-location"][2][0] == 768:
            raise OSError("bad sector")
        return values

    lazy = of.chunk({"y": 256})
    lazy = lazy.copy(
        data=lazy.data.map_blocks(block, dtype=np.uint16, meta=np.empty((0, 0, 0, 0), np.uint16))
    )
    with dask.config.set(scheduler="synchronous"):  # so that no thread is Dask's
        with pytest.raises(OSError, match="bad sector"):
            predict(untrained(), lazy)
        rows = Mapper(untrained()).map_rows(lazy, [(2019,)])
        next(rows)
        rows.close()  # the caller has enough
    assert threading.active_count() == before
    assert torch.get_num_threads() == 1
