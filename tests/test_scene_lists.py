"""Saved scene lists give back their scenes, and are refused where they do not belong."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from known_items import LEFT, TOP, read_real_items
from known_scenes import grid_at, site_of
from minecube import scenes
from minecube.catalog import Offset, as_dict
from minecube.errors import SceneError
from minecube.grid import grid_of
from minecube.scenes import snapshot


@pytest.fixture(scope="session")
def real(real_data):
    return read_real_items(real_data)


def test_a_list_is_of_its_place_and_its_sources_rules(archive, tmp_path):
    """Offsets and hrefs were decided when it was made: by a rule that has been corrected since it would be built wrong."""
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    here, path, source = site_of("s", LEFT, TOP, 60, 60), tmp_path / "s.parquet", archive.source
    snapshot.save(
        scenes.SearchResult(scenes=(scene,)), path, snapshot.hash_search(here, 2020, [source])
    )
    moved = dataclasses.replace(source, href="elsewhere.parquet", title="x", searches_per_s=1)
    assert snapshot.load(path, snapshot.hash_search(here, 2020, [moved])).scenes
    for site, year, sources in (
        (site_of("s", LEFT, TOP, 54, 60), 2020, [source]),
        (site_of("t", LEFT, TOP, 60, 60), 2020, [source]),
        (here, 2021, [source]),
        (here, 2020, [source, dataclasses.replace(source, id="more")]),
        (here, 2020, [dataclasses.replace(source, offset=Offset(value=0))]),
        (here, 2020, [dataclasses.replace(source, resolution_m={"B04": 20})]),
    ):
        with pytest.raises(
            SceneError, match="holds the scenes of another place, or of another rule"
        ):
            snapshot.load(path, snapshot.hash_search(site, year, sources))


def test_a_list_of_another_version_is_refused(real, tmp_path):
    path = tmp_path / "x.parquet"
    scene = scenes.normalise(*real["S2A_29RKH_20200219_0_L2A"])
    snapshot.save(scenes.SearchResult(scenes=(scene,)), path)
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"minecube"])
    older = {b"minecube": json.dumps(header | {"format": 0}).encode()}
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | older), path)
    with pytest.raises(
        SceneError, match=r"x\.parquet: was saved by another version of minecube; search again"
    ):
        snapshot.load(path)


def test_a_snapshot_that_was_changed_is_refused(real, tmp_path):
    scene = scenes.normalise(*real["S2A_29RKH_20200219_0_L2A"])
    path = tmp_path / "snapshot.parquet"
    snapshot.save(scenes.SearchResult(scenes=(scene,)), path)
    table = pq.read_table(path)
    at = table.column_names.index("minecube:offset")
    pq.write_table(table.set_column(at, "minecube:offset", pa.array([-1000])), path)
    with pytest.raises(SceneError, match="have changed since they were saved"):
        snapshot.load(path)


def test_a_snapshot_gives_back_what_was_saved(real, tmp_path):
    listed = sorted(
        (scenes.normalise(*pair) for pair in real.values()), key=lambda s: (s.datetime, s.id)
    )
    found = scenes.SearchResult(scenes=tuple(listed), listed=99, refused={"some": "why"})
    snapshot.save(found, tmp_path / "snapshot.parquet")
    back = snapshot.load(tmp_path / "snapshot.parquet")
    assert [s.to_dict() for s in back.scenes] == [s.to_dict() for s in listed]
    assert (back.listed, back.refused, back.copies) == (99, {"some": "why"}, 99 - 1 - len(listed))
    assert not list(tmp_path.glob("*.part"))


def test_a_list_of_another_place_year_or_source_is_refused(archive):
    """It would be committed as a year of zeros."""
    scene = archive.scene("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    here, there = site_of("s", LEFT, TOP, 60, 60), site_of("s", LEFT + 50000, TOP, 60, 60)
    scenes.check_saved_scenes([scene], here, 2020, [archive.source])
    other = dataclasses.replace(archive.source, id="other")
    for site, year, source, said in (
        (there, 2020, archive.source, "elsewhere"),
        (here, 2022, archive.source, "of 2020"),
        (here, 2020, other, "from test"),
    ):
        with pytest.raises(SceneError, match=f"holds scenes {said}"):
            scenes.check_saved_scenes([scene], site, year, [source])


def test_a_file_that_is_no_snapshot(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 this is not it")
    with pytest.raises(SceneError, match=r"x\.parquet: cannot be read as stac-geoparquet"):
        snapshot.load(tmp_path / "x.parquet")


def test_lists_that_were_saved_before_there_was_such_a_rule_still_belong(archive):
    """The hash of the rules that earlier versions wrote: without the field."""
    site, source = site_of("s", LEFT, TOP, 60, 60), archive.source
    grid, rule = grid_of(site), as_dict(source)
    for name in ("title", "href", "licence", "searches_per_s"):
        del rule[name]
    del rule["access"]["connections"], rule["offset"]["own"]
    asked = {
        "site": "s",
        "grid": [str(grid.crs), *grid.transform[:6], *grid.shape],
        "year": 2020,
        "sources": [rule],
    }
    expected = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    assert snapshot.hash_search(site, 2020, [source]) == expected
    own = dataclasses.replace(source, offset=dataclasses.replace(source.offset, own=0))
    assert snapshot.hash_search(site, 2020, [own]) != expected
