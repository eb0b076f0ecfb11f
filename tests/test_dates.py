"""Scenes that are left out after they were chosen no longer count, neither as dates nor as scenes."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
import stac_geoparquet.arrow
import zarr
from scipy import ndimage
from scipy.spatial import cKDTree

from known_scenes import grid_at, site_of
from minecube import cube
from minecube.catalog import Recipe, Registration
from minecube.jobs import build as building
from minecube.scenes.item_file import read_items

SHIFTED_PX = 2


@pytest.fixture
def site():
    return site_of("pit", 360000, 5600040, 150, 150)


def listed(archive, dates):
    """A source of these dates over one texture; those marked lie 20 m too far east."""
    grid = grid_at(359400, 5600640, 360, 360)
    rng = np.random.default_rng(0)
    corners = cKDTree(rng.uniform(0, 360, (600, 2)))
    field = corners.query(np.indices((360, 360)).reshape(2, -1).T)[1].reshape(360, 360)
    texture = rng.uniform(300, 3000, 600)[field] + 30 * ndimage.gaussian_filter(
        rng.normal(size=(360, 360)), 1
    )
    items = []
    for date, shifted in dates.items():
        full = np.roll(texture, SHIFTED_PX if shifted else 0, axis=1).astype(np.uint16)
        pixels = {"B04": full, "B11": full[::2, ::2]}
        items.append(archive.item(f"{date}T10:00:00", grid, pixels).to_dict())
    archive.root.mkdir(exist_ok=True)
    path = archive.root / "items.parquet"
    stac_geoparquet.arrow.to_parquet(stac_geoparquet.arrow.parse_stac_items_to_arrow(items), path)
    return archive.source


def job_of(source, tmp_path, min_dates):
    recipe = Recipe(
        id="small",
        title="t",
        bands=("B04", "B11"),
        min_dates=min_dates,
        block_px=64,
        chunk_px=32,
        registration=Registration(most_px=0.5, beyond="drop"),
    )
    return building.BuildJob(
        store=cube.Store(tmp_path / "cubes.zarr"),
        sources=(source,),
        recipe=recipe,
        snapshots=tmp_path / "lists",
    )


DATES = {"2020-05-01": False, "2020-06-01": False, "2020-07-01": True, "2020-08-01": False}


def test_scenes_left_out_are_listed_with_the_reason_and_not_counted(archive, site, tmp_path):
    job = job_of(listed(archive, DATES), tmp_path, min_dates=3)
    (outcome,) = building.build_cubes(job, [site], [2020])
    assert (outcome.state, outcome.scenes, outcome.days) == ("built", 3, 3), outcome.message
    marker = cube.read_markers(job.store, "pit")[2020]
    left_out = {scene["id"][11:19]: scene.get("left_out") for scene in marker["scenes"]}
    assert left_out == {
        "20200501": None,
        "20200601": None,
        "20200701": "registration",
        "20200801": None,
    }
    assert len(cube.list_used_scenes(marker)) == 3
    kept = read_items(blob(job.store, tmp_path))
    assert sorted(scene.id[11:19] for scene in kept) == ["20200501", "20200601", "20200801"]
    assert cube.verify(job.store).findings == ()
    (again,) = building.build_cubes(job, [site], [2020])
    assert (again.state, again.scenes, again.days) == ("kept", 3, 3)


def blob(store, tmp_path):
    path = tmp_path / "scenes.parquet"
    path.write_bytes(zarr.open_array(f"{store}/pit/builds/2020/scenes")[:].tobytes())
    assert len(pd.read_parquet(io.BytesIO(path.read_bytes()), columns=["id"])) == 3
    return path


def test_dates_are_counted_again_once_scenes_are_left_out(archive, site, tmp_path):
    dates = {date: shifted for date, shifted in DATES.items() if date != "2020-08-01"}
    job = job_of(listed(archive, dates), tmp_path, min_dates=3)
    (outcome,) = building.build_cubes(job, [site], [2020])
    assert outcome.state == "failed"
    assert outcome.message.startswith("2 dates of 2020 are left, and recipe 'small' needs 3")
    assert cube.read_markers(job.store, "pit") == {}
