"""Later runs write the views that are missing or out of date, and no others."""

from __future__ import annotations

import io
import types
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from zarr.core.attributes import Attributes

from known_predictions import (
    NET,
    PAIRS,
    RECIPE,
    build,
    expected,
    mapped,
    pit,
    store_of,
    whole,
    years,
)
from minecube import cube
from minecube.cube import Prediction
from minecube.errors import BusyError, CubeError
from minecube.grid import grid_of


@pytest.fixture
def site():
    return pit()


@pytest.fixture
def store(tmp_path, site):
    return store_of(tmp_path, site)


def test_a_finished_run_does_nothing_again(store, tmp_path):
    mapped(store, years(2019, 2020, 2021))
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "cubes.zarr").rglob("*")}
    assert mapped(store, years(2019, 2020, 2021)) == []
    assert mapped(store, years(2020)) == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cubes.zarr").rglob("*")} == there
    assert mapped(store, years(2019, 2020, 2021), overwrite=True) == years(2019, 2020, 2021)


@pytest.mark.parametrize("blocks", [0, 3, 5, 6, 9, 14])
def test_a_killed_run_goes_on_with_the_years_that_are_not_done(store, blocks):
    with pytest.raises(KeyboardInterrupt):
        mapped(store, years(2019, 2020, 2021), dies_after=blocks)
    done = blocks // 5
    lacking = ", ".join(map(str, (2019, 2020, 2021)[done:]))
    with pytest.raises(
        CubeError, match=f"not mapped pit to its end: of 3 maps lack {lacking if done else ''}"
    ):
        cube.open_probability(store, "pit", "net")
    (finding,) = cube.verify(store).findings
    assert (finding.kind, finding.what) == ("unfinished", "predictions/net")
    assert (
        finding.found
        == f"{lacking} not mapped; run `minecube predict` again, unless it is still running"
    )
    assert mapped(store, years(2019, 2020, 2021)) == years(2019, 2020, 2021)[done:]
    whole(store, 2019, 2020, 2021)
    assert cube.verify(store).findings == ()


def test_a_killed_run_over_an_older_map_leaves_none_of_it(store):
    """Else the older map's rows would stand in the new one's."""
    mapped(store, years(2019, 2020, 2021))
    with pytest.raises(KeyboardInterrupt):
        mapped(
            store,
            years(2019, 2020, 2021),
            origin={**NET, "weights_sha256": "b"},
            dies_after=7,
            overwrite=True,
        )
    with pytest.raises(CubeError, match="of 3 maps lack 2020, 2021"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2019, 2020, 2021), origin={**NET, "weights_sha256": "b"}) == years(
        2020, 2021
    )


@pytest.mark.parametrize("dies_after", [None, 7])
def test_another_model_replaces_a_prediction_only_when_told(store, dies_after):
    other = {"origin": {**NET, "weights_sha256": "b"}}
    with suppress(KeyboardInterrupt):
        mapped(store, years(2019, 2020, 2021), dies_after=dies_after)
    for how in (other, {**other, "variable": "change"}, {"variable": "change"}):
        views = PAIRS if "variable" in how else years(2019, 2020, 2021)
        with pytest.raises(
            CubeError,
            match=r"pit/predictions/net was made by another model; choose another --name, or .* --over",
        ):
            mapped(store, views, **how)
    mapped(store, years(2019, 2020, 2021))
    whole(store, 2019, 2020, 2021)
    assert mapped(store, years(2019, 2020, 2021), **other, overwrite=True) == years(
        2019, 2020, 2021
    )
    assert cube.open_probability(store, "pit", "net").attrs["model"]["weights_sha256"] == "b"
    assert mapped(store, PAIRS, variable="change", **other, overwrite=True) == list(PAIRS)
    assert cube.verify(store).findings == ()


def test_another_build_is_mapped_anew_and_no_other(store, site):
    mapped(store, years(2019, 2020, 2021))
    build(store, site, 2020, version="2", overwrite=True)
    with pytest.raises(CubeError, match="mapped pit before 2020 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert [f.kind for f in cube.verify(store).findings] == ["stale"]
    with pytest.raises(KeyboardInterrupt):
        mapped(store, years(2019, 2020, 2021), dies_after=2)
    with pytest.raises(CubeError, match="of 3 maps lack 2020"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2019, 2020, 2021)) == years(2020)
    whole(store, 2019, 2020, 2021)
    assert cube.verify(store).findings == ()


class Reads:
    """Of ten, of which some were lost."""

    def __init__(self, lost):
        self.many = {"planned": 10, "lost": lost}

    def totals(self):
        return {**self.many, "completeness": 1 - self.many["lost"] / 10}

    def lost(self):
        return []

    def to_parquet(self):
        pd.DataFrame({name: [n] for name, n in self.many.items()}).to_parquet(out := io.BytesIO())
        return out.getvalue()


def test_the_same_build_of_other_pixels_is_mapped_anew(store, site):
    """Reads that were lost are not in a build's name: it is made of the same scenes by the same recipe."""
    four = years(2019, 2020, 2021, 2022)
    build(store, site, 2022, reads=Reads(1), completeness=0.5)
    mapped(store, four)
    first = cube.read_markers(store, "pit")[2022]["build_id"]
    build(store, site, 2022, seed=1, reads=Reads(0), overwrite=True)
    assert cube.read_markers(store, "pit")[2022]["build_id"] == first
    with pytest.raises(CubeError, match="mapped pit before 2022 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert [f.kind for f in cube.verify(store).findings] == ["stale"]
    assert mapped(store, four) == four[3:]
    cube.withdraw_years(store, "pit", [2022])
    build(store, site, 2022, seed=1, reads=Reads(0))  # the very same pixels, again
    whole(store, 2019, 2020, 2021, 2022)
    assert cube.verify(store).findings == ()


@pytest.mark.parametrize(
    ("variable", "views"), [("probability", years(2021, 2022)), ("change", [(2021, 2022)])]
)
def test_a_year_that_is_not_committed_is_not_mapped(store, site, variable, views):
    """Else its map would be of no build, and never out of date."""
    with pytest.raises(
        CubeError, match=r"(2021-)?2022 of pit is not committed, and its pixels may change"
    ):
        mapped(store, views, variable=variable)
    with pytest.raises(CubeError, match="no prediction of 'net' for pit"):
        cube.open_probability(store, "pit", "net")
    cube.withdraw_years(store, "pit", [2019])
    grid = xr.open_zarr(str(store), group="pit", consolidated=False).footprint
    with pytest.raises(CubeError, match="2019 of pit is not committed"):
        cube.write_probability(store, "pit", "net", grid, {})


def test_later_years_and_pairs_join_those_that_are_there(store, site):
    mapped(store, years(2019, 2021))
    assert mapped(store, years(2019, 2020, 2021)) == years(2020)
    whole(store, 2019, 2020, 2021)  # in their order
    build(store, site, 2022)
    with pytest.raises(CubeError, match="mapped pit before 2022 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2019, 2020, 2021, 2022)) == years(2022)
    whole(store, 2019, 2020, 2021, 2022)
    assert cube.verify(store).findings == ()
    change = {"variable": "change", "origin": {"id": "other"}}
    mapped(store, PAIRS[1:2], overwrite=True, **change)
    assert mapped(store, PAIRS, **change) == [PAIRS[0], PAIRS[2]]
    found = cube.open_change(store, "pit", "net")
    assert list(
        zip(found["first"].values.tolist(), found["second"].values.tolist(), strict=True)
    ) == list(PAIRS)
    for pair, values in zip(PAIRS, found, strict=True):
        np.testing.assert_array_equal(values, expected(pair)[0])
    assert cube.verify(store).findings == ()


def test_an_earlier_year_joins_those_that_are_there(store, site):
    mapped(store, years(2019, 2020, 2021))
    cube.create_site(store, site, grid_of(site), [2017], RECIPE)
    build(store, site, 2017)
    with pytest.raises(CubeError, match="mapped pit before 2017 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2017, 2019, 2020, 2021)) == years(2017)
    whole(store, 2017, 2019, 2020, 2021)


@pytest.mark.parametrize("dies_at", ["change", "first", "first written", "group"])
@pytest.mark.parametrize(
    "then", [(PAIRS[0], PAIRS[2]), PAIRS[:1], PAIRS], ids=["other", "fewer", "more"]
)
def test_a_run_killed_while_it_makes_room_leaves_no_pair_under_another_ones_name(
    store, monkeypatch, dies_at, then
):
    """Room is made array by array; the group says last what it is for."""
    mapped(store, PAIRS[:1], variable="change")
    name, _, written = dies_at.partition(" ")
    where, does = (
        (zarr.Array, "__setitem__" if written else "resize")
        if name != "group"
        else (Attributes, "put")
    )
    done = getattr(where, does)

    def dying(self, *args):
        if name == "group":
            raise KeyboardInterrupt
        done(self, *args)
        if self.basename == name:
            raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(where, does, dying)
        with pytest.raises(KeyboardInterrupt):
            mapped(store, PAIRS[:2], variable="change")
    mapped(store, then, variable="change")
    found = cube.open_change(store, "pit", "net")
    assert list(
        zip(found["first"].values.tolist(), found["second"].values.tolist(), strict=True)
    ) == list(then)
    for n, pair in enumerate(then):
        np.testing.assert_array_equal(found[n], expected(pair)[0])
    assert cube.verify(store).findings == ()


def test_a_series_of_more_years_is_another_one(store, site):
    mapped(store, [(2019, 2020, 2021)], series=True)
    build(store, site, 2022)
    longer = (2019, 2020, 2021, 2022)
    assert mapped(store, [longer], series=True) == [longer]
    np.testing.assert_array_equal(
        cube.open_probability(store, "pit", "net"), expected(longer, series=True)[:, 0]
    )
    assert cube.verify(store).findings == ()


def test_a_year_that_is_no_longer_committed_is_not_shown(store):
    mapped(store, years(2019, 2020, 2021))
    cube.withdraw_years(store, "pit", [2020])
    with pytest.raises(CubeError, match="mapped pit before 2020 was built as it is now"):
        cube.open_probability(store, "pit", "net")
    assert mapped(store, years(2019, 2021)) == []
    whole(store, 2019, 2021)


def constant(todo, value, meanwhile=None):
    """Maps of one value; with something else going on before the second row of the second map."""
    for n, view in enumerate(todo):
        for y in (0, 64, 128):
            if meanwhile and (n, y) == (1, 64):
                meanwhile()
            yield types.SimpleNamespace(
                view=view, y=y, values=np.full((1, 1, min(64, 150 - y), 90), value, np.uint8)
            )


@pytest.mark.parametrize(
    "other", [NET, {**NET, "weights_sha256": "b"}], ids=["same model", "another of that name"]
)
def test_of_two_runs_at_once_the_second_is_told_and_writes_nothing(store, other):
    """Else the maps of one would stand under the name, and the checksums, of the other."""
    three = years(2019, 2020, 2021)

    def meanwhile():
        with pytest.raises(
            BusyError,
            match=r"pit/predictions/net is being written by another run \(process \d+ on ",
        ):
            mapped(store, three, origin=other)

    first = Prediction(model="net", views=three, origin=NET)
    assert (
        cube.write_prediction(store, "pit", first, lambda todo: constant(todo, 5, meanwhile))
        == three
    )
    assert (cube.open_probability(store, "pit", "net") == 5).all()
    assert cube.verify(store).findings == ()


def test_two_models_map_one_site_at_once(store):
    three, others = years(2019, 2020, 2021), []

    def meanwhile():
        others.append(mapped(store, three))

    other = Prediction(model="other", views=three, origin={"id": "other"})
    assert (
        cube.write_prediction(store, "pit", other, lambda todo: constant(todo, 5, meanwhile))
        == others[0]
        == three
    )
    whole(store, 2019, 2020, 2021)
    assert (cube.open_probability(store, "pit", "other") == 5).all()
    assert cube.verify(store).findings == ()
