"""Catalogues and scene lists of others cannot name local files, or bring access rules."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import stac_geoparquet.arrow

from known_items import LEFT, PLAIN, TOP
from known_scenes import grid_at, serve, site_of, write_tif
from minecube import cube, scenes
from minecube.catalog import Access
from minecube.errors import ReadError, SceneError
from minecube.jobs import build as building
from minecube.jobs.scene_lists import path_of_list
from minecube.scenes import snapshot


@pytest.fixture
def served(tmp_path):
    """URL under which `tmp_path` is served with byte ranges."""
    with serve(tmp_path) as url:
        yield url


SECRET = 4321


@pytest.fixture
def listed(archive, tmp_path, served):
    """A file of items on a server that names a local file, and the site and source; `at` makes it name another."""
    grid = grid_at(LEFT, TOP, 60, 60)
    local = write_tif(tmp_path / "private" / "B04.tif", np.full((60, 60), SECRET, np.uint16), grid)
    item = archive.item("2020-07-05T10:00:00", grid, {"B04": 1, "B11": 1})
    for asset in item.assets.values():
        asset.href = str(Path(asset.href).relative_to(tmp_path))

    def at(href):
        item.assets["B04"].href = href
        table = stac_geoparquet.arrow.parse_stac_items_to_arrow(
            [item.to_dict(transform_hrefs=False)]
        )
        stac_geoparquet.arrow.to_parquet(table, tmp_path / "items.parquet")
        return dataclasses.replace(archive.source, href=f"{served}/items.parquet"), item

    return at, local, site_of("s", LEFT, TOP, 60, 60)


@pytest.mark.parametrize(
    "form", ["{}", "file://{}", "FILE://{}", "/vsicurl/file://{}", "GTIFF_DIR:1:{}"]
)
def test_a_remote_catalogue_names_no_local_file(listed, form, tmp_path):
    at, local, site = listed
    source, item = at(form.format(local))
    with pytest.raises(
        SceneError, match=f"item {item.id}: asset B04 is not read from .*; it is refused"
    ):
        scenes.search(site, 2020, source)
    store = str(tmp_path / "cubes.zarr")
    job = building.BuildJob(
        store=cube.Store(store), sources=(source,), recipe=PLAIN, snapshots=tmp_path / "lists"
    )
    with pytest.raises(SceneError, match=item.id):
        building.build_cubes(job, [site], [2020])
    assert not Path(store).exists()


def test_a_saved_list_names_no_local_file(listed, tmp_path):
    """Made by somebody else, with the right hash, for the right site; its file is said to come from a local catalogue."""
    at, local, site = listed
    source, _ = at("archive/none.tif")
    (scene,) = scenes.search(site, 2020, source).scenes
    scene.assets["B04"].href = str(local)
    scene.properties["minecube:origin"] = ""
    job = building.BuildJob(
        store=cube.Store(tmp_path / "c.zarr"),
        sources=(source,),
        recipe=PLAIN,
        snapshots=tmp_path / "lists",
    )
    path = path_of_list(site, 2020, [source], job.snapshots)
    snapshot.save(
        scenes.SearchResult(scenes=(scene,), listed=1),
        path,
        snapshot.hash_search(site, 2020, [source]),
    )
    with pytest.raises(
        SceneError, match=f"item {scene.id}: asset B04 is not read from {local}: it is a local file"
    ):
        building.build_cubes(job, [site], [2020])
    assert not job.store.path.exists()


def test_a_saved_list_brings_no_access_of_its_own(archive):
    """Where tokens come from, and whom they are for, is what the source says."""
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    site = site_of("s", LEFT, TOP, 60, 60)
    fewer = dataclasses.replace(archive.source, access=Access(connections=3))
    scenes.check_saved_scenes([scene], site, 2020, [fewer])
    access = json.loads(scene.properties["minecube:access"])
    access |= {"kind": "s3", "href": "http://evil.example.org", "credentials_for": ["ours"]}
    scene.properties["minecube:access"] = json.dumps(access)
    with pytest.raises(
        SceneError,
        match=f"scene {scene.id}: expected the access rules of source test, found others",
    ):
        scenes.check_saved_scenes([scene], site, 2020, [archive.source])


@pytest.mark.parametrize("origin", ["", None, "127.0.0.1"])
def test_a_saved_list_names_no_origin_of_its_own(archive, origin):
    """A scene that claims a local or private catalogue would be allowed to reach private hosts."""
    site = site_of("s", LEFT, TOP, 60, 60)
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    scenes.check_saved_scenes([scene], site, 2020, [archive.source])
    source = dataclasses.replace(archive.source, href="https://stac.example.org/v1")
    for band in scene.assets:
        scene.assets[band].href = f"https://files.example.org/{band}.tif"
    scene.properties["minecube:origin"] = "stac.example.org"
    scenes.check_saved_scenes([scene], site, 2020, [source])
    scene.properties["minecube:origin"] = origin
    with pytest.raises(SceneError, match=r"expected a scene listed by stac\.example\.org"):
        scenes.check_saved_scenes([scene], site, 2020, [source])


def test_a_scene_without_origin_is_not_read(archive):
    grid = grid_at(LEFT, TOP, 60, 60)
    scene = archive.scene("2020-07-05T10:00:00", grid, {"B04": 1, "B11": 1})
    del scene.properties["minecube:origin"]
    with pytest.raises(
        ReadError, match="expected the host of its catalogue in minecube:origin, found None"
    ):
        scenes.stack([scene], grid, ["B04"])


def test_a_scene_that_was_changed_after_it_was_listed_is_checked_when_it_is_read(listed):
    at, local, site = listed
    source, _ = at("archive/none.tif")
    (scene,) = scenes.search(site, 2020, source).scenes
    for href in (
        str(local),
        f"file://{local}",
        f"/vsicurl/{local}",
        "http://169.254.169.254/latest",
    ):
        scene.assets["B04"].href = href
        with pytest.raises(ReadError, match=f"scene {scene.id}: B04 is not read from"):
            scenes.stack([scene], scenes.grid_of(site), ["B04"])


def test_an_image_of_another_format_is_refused_by_name_and_nothing_is_committed(listed, tmp_path):
    at, local, site = listed
    (tmp_path / "V.tif").write_text(
        f'<VRTDataset rasterXSize="60" rasterYSize="60"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{local}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    source, _ = at("V.tif")
    job = building.BuildJob(
        store=cube.Store(tmp_path / "c.zarr"),
        sources=(source,),
        recipe=PLAIN,
        snapshots=tmp_path / "lists",
    )
    (outcome,) = building.build_cubes(job, [site], [2020])
    assert outcome.state == "failed"
    assert re.search(
        r"V\.tif: is not read \(expected a GeoTIFF or JPEG 2000 file, found another format\)",
        outcome.message,
    )
    assert not cube.read_markers(job.store, site.id)
