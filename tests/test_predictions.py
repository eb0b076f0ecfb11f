"""Predictions are written in rows, committed by view, and checked for damage."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import xarray as xr
import zarr

from known_predictions import NET, PAIRS, expected, mapped, pit, store_of, whole, years
from minecube import cube
from minecube.cube import Prediction
from minecube.errors import CubeError
from minecube.grid import grid_of


@pytest.fixture
def site():
    return pit()


@pytest.fixture
def store(tmp_path, site):
    return store_of(tmp_path, site)


def test_years_are_written_in_rows_and_found_again(store, site):
    assert mapped(store, years(2019, 2020, 2021)) == years(2019, 2020, 2021)
    whole(store, 2019, 2020, 2021)
    found = cube.open_probability(store, "pit", "net")
    assert found.odc.geobox == grid_of(site)
    assert found.attrs["model"] == NET
    assert found.attrs["builds"] == {
        str(y): a["build_id"] for y, a in cube.read_markers(store, "pit").items()
    }
    assert cube.verify(store).findings == ()
    unaided = xr.open_zarr(str(store), group="pit/predictions/net", consolidated=False)
    assert unaided.probability.dtype == np.uint8
    assert "_FillValue" not in unaided.probability.attrs


def test_pairs_have_years_and_classes(store):
    classes = ("removed", "new")
    assert mapped(store, PAIRS, variable="change", classes=classes) == list(PAIRS)
    found = cube.open_change(store, "pit", "net")
    assert found.dims == ("pair", "class", "y", "x")
    assert list(
        zip(found["first"].values.tolist(), found["second"].values.tolist(), strict=True)
    ) == list(PAIRS)
    assert found["class"].values.tolist() == list(classes)
    for n, pair in enumerate(PAIRS):
        np.testing.assert_array_equal(found[n], expected(pair, 2)[0])
    assert cube.verify(store).findings == ()
    with pytest.raises(CubeError, match="'net' maps change, not probability"):
        cube.open_probability(store, "pit", "net")


def test_a_pair_is_few_files(store, tmp_path):
    mapped(store, PAIRS, variable="change")
    files = [
        p for p in (tmp_path / "cubes.zarr/pit/predictions/net/change/c").rglob("*") if p.is_file()
    ]
    assert len(files) == 3 * 2  # of 150 x 90 px, in shards of 128


@pytest.mark.parametrize(
    ("variable", "views", "shard"), [("probability", years(2019), 64), ("change", PAIRS, 128)]
)
def test_chunks_are_of_twice_the_side_of_reflectance(store, variable, views, shard):
    mapped(store, views, variable=variable)
    array = zarr.open_array(str(store), path=f"pit/predictions/net/{variable}", mode="r")
    assert (array.chunks[-2:], array.shards[-2:]) == ((64, 64), (shard, shard))


def test_a_site_whose_place_is_damaged_is_one_sentence(store, tmp_path):
    metadata = tmp_path / "cubes.zarr/pit/zarr.json"
    about = json.loads(metadata.read_text())
    for wrong in (
        {},
        {"spatial:shape": None},
        {"spatial:shape": [1]},
        {"spatial:transform": [1, 2]},
    ):
        attrs = {k: v for k, v in about["attributes"].items() if k != "spatial:shape"} | wrong
        metadata.write_text(json.dumps({**about, "attributes": attrs}))
        with pytest.raises(CubeError, match="pit cannot be read"):
            mapped(store, years(2019))


def test_a_series_is_one_view(store):
    all_years = (2019, 2020, 2021)
    assert mapped(store, [all_years], series=True) == [all_years]
    found = cube.open_probability(store, "pit", "net")
    np.testing.assert_array_equal(found, expected(all_years, series=True)[:, 0])
    assert mapped(store, [all_years], series=True) == []
    assert cube.verify(store).findings == ()


def test_missing_rows_are_not_committed(store):
    for heights in ((7, 40), (7, 40, 1, 64)):
        with pytest.raises(
            CubeError,
            match=r"expected row \d+ of 2019, found (none|row 0 of 2020); this map is not committed",
        ):
            mapped(store, years(2019, 2020), heights=heights)
        with pytest.raises(CubeError, match="not mapped pit to its end"):
            cube.open_probability(store, "pit", "net")


def test_a_shard_that_comes_out_empty_leaves_none_of_before(store, tmp_path):
    mapped(store, years(2019))
    shard = tmp_path / "cubes.zarr/pit/predictions/net/probability/c/0/0/0"
    assert shard.exists()

    def nothing(todo):
        for view in todo:
            yield types.SimpleNamespace(
                view=view, y=0, values=np.full((1, 1, 150, 90), 255, np.uint8)
            )

    cube.write_prediction(
        store,
        "pit",
        Prediction(model="net", views=years(2019), origin=NET),
        nothing,
        overwrite=True,
    )
    assert not shard.exists()
    assert [f.kind for f in cube.verify(store).findings] == [
        "stale"
    ]  # 2020 and 2021 were not mapped


def test_flipped_bits_are_found(store, tmp_path):
    mapped(store, PAIRS, variable="change")
    shard = tmp_path / "cubes.zarr/pit/predictions/net/change/c/1/0/0/0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    (finding,) = cube.verify(store).findings
    assert (finding.kind, finding.cure, finding.what) == (
        "damaged",
        "predict",
        "predictions/net/change/c/1/0/0/0",
    )
    shard.unlink()
    assert [f.kind for f in cube.verify(store).findings] == ["missing"]


def test_a_damaged_group_is_begun_anew(store, tmp_path):
    mapped(store, years(2019, 2020, 2021))
    (tmp_path / "cubes.zarr/pit/predictions/net/zarr.json").write_text("{")
    assert mapped(store, years(2019, 2020, 2021)) == years(2019, 2020, 2021)
    whole(store, 2019, 2020, 2021)


def test_other_variables_are_refused():
    with pytest.raises(
        CubeError, match="expected a prediction of probability or change, found 'height'"
    ):
        Prediction(model="net", views=years(2019), origin={}, variable="height")
