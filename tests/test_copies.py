"""A file that is gone for good: its acquisition is read from the next source, and the provenance says so."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import stac_geoparquet.arrow

from known_scenes import grid_at, serve, site_of
from minecube import cube, scenes
from minecube.catalog import Recipe
from minecube.cube.write.staging import Staging
from minecube.errors import UnusableFileError
from minecube.jobs import build as building
from minecube.jobs.scene_lists import load_or_save
from minecube.reader import read

RECIPE = Recipe(id="small", title="t", bands=("B04", "B11"), min_dates=3, block_px=64, chunk_px=32)
DATES = ("2020-05-01", "2020-06-01", "2020-07-01")
VALUES = (100, 200, 300)


@pytest.fixture
def site():
    return site_of("pit", 360000, 5600040, 120, 120)


@pytest.fixture
def two(archive):
    """Two sources of the same acquisitions, in other processings, whose pixels tell them apart."""
    grid = grid_at(359400, 5600640, 240, 240)
    second = dataclasses.replace(archive, root=archive.root.with_name("second"), source_id="second")
    for listing, processed, more in ((archive, None, 0), (second, "20230101T000000", 7)):
        items = []
        for day, value in zip(DATES, VALUES, strict=True):
            pixels = {"B04": value + more, "B11": value + more}
            items.append(
                listing.item(f"{day}T10:00:00", grid, pixels, processed=processed).to_dict(
                    transform_hrefs=False
                )
            )
        table = stac_geoparquet.arrow.parse_stac_items_to_arrow(items)
        stac_geoparquet.arrow.to_parquet(table, listing.root / "items.parquet")
    return archive, second


def job_of(two, tmp_path, **more):
    sources = tuple(listing.source for listing in two)
    return building.BuildJob(
        store=cube.Store(tmp_path / "c.zarr"),
        sources=sources,
        recipe=RECIPE,
        snapshots=tmp_path / "lists",
        **more,
    )


def built(job, site):
    (outcome,) = building.build_cubes(job, [site], [2020])
    return outcome


def pixels(job):
    values = cube.open_committed(job.store, "pit").reflectance.sel(year=2020).values
    return np.unique(values).tolist()


def folder_of(listing, day):
    (folder,) = listing.root.glob(f"S2A_MSIL2A_{day.replace('-', '')}*")
    return folder


@pytest.mark.parametrize("band", ["SCL", "B04", "B11"])
def test_a_missing_file_is_read_from_the_next_source(two, site, tmp_path, band):
    """The median of 100, 200 and 300 is 200; of the copy's 207, too."""
    first, second = two
    (folder_of(first, "2020-06-01") / f"{band}.tif").unlink()
    job = job_of(two, tmp_path)
    outcome = built(job, site)
    assert (outcome.state, outcome.scenes, outcome.days) == ("built", 3, 3), outcome.message
    assert pixels(job) == [207]
    marker = cube.read_markers(job.store, "pit")[2020]
    gone, copy = folder_of(first, "2020-06-01").name, folder_of(second, "2020-06-01").name
    of = {scene["id"]: scene for scene in marker["scenes"]}
    assert of[gone]["left_out"] == f"{band} is gone (No such file or directory)"
    assert (of[copy]["source"], of[copy]["copy_of"]) == ("second", gone)
    assert {scene["id"] for scene in cube.list_used_scenes(marker)} == set(of) - {gone}
    assert outcome.copies == {
        gone: f"{band} is gone (No such file or directory); read {copy} of second instead"
    }
    assert marker["reads"]["completeness"] == 1
    assert not cube.verify(job.store).findings
    again = built(job, site)
    assert (again.state, again.scenes, again.days) == ("kept", 3, 3)


def test_all_that_is_gone_is_found_at_once(two, site, tmp_path, monkeypatch):
    first, _ = two
    shutil.rmtree(folder_of(first, "2020-06-01"))
    (folder_of(first, "2020-07-01") / "B11.tif").unlink()
    tries, composite_year = [], building._composite_year
    monkeypatch.setattr(
        building,
        "_composite_year",
        lambda *args, **more: tries.append(1) or composite_year(*args, **more),
    )
    job = job_of(two, tmp_path)
    assert built(job, site).state == "built"
    assert pixels(job) == [207]
    assert len(tries) == 2
    marker = cube.read_markers(job.store, "pit")[2020]
    assert [scene["source"] for scene in cube.list_used_scenes(marker)].count("second") == 2


def test_a_broken_file_is_read_from_the_next_source(two, site, tmp_path):
    """Its header is whole: only reading tells."""
    first, _ = two
    path = folder_of(first, "2020-06-01") / "B04.tif"
    path.write_bytes(path.read_bytes()[:700])
    job = job_of(two, tmp_path)
    assert built(job, site).state == "built"
    assert pixels(job) == [207]


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    ("size", "why"),
    [(0, "it is empty"), (8, "it ends after 8 bytes, before its header does"), (300, "")],
)
def test_an_empty_or_cut_file_is_gone(two, site, tmp_path, size, why, far):
    """300 bytes hold the directory of a GeoTIFF, without the projection that it names."""
    first, second = two
    path = folder_of(first, "2020-06-01") / "B04.tif"
    path.write_bytes(path.read_bytes()[:size])
    why = why or "it ends after 300 bytes, before its header does"
    with serve(tmp_path) as url:
        href = f"{url}/{path.relative_to(tmp_path)}" if far else str(path)
        with pytest.raises(
            UnusableFileError,
            match=rf"B04\.tif: cannot be read \({why}\), .*; check that the file is there and whole",
        ):
            read(href, scenes.grid_of(site))
    job = job_of(two, tmp_path)
    outcome = built(job, site)
    assert outcome.state == "built", outcome.message
    assert pixels(job) == [207]
    gone, copy = path.parent.name, folder_of(second, "2020-06-01").name
    assert outcome.copies == {gone: f"B04 is gone ({why}); read {copy} of second instead"}


def test_a_copy_that_is_empty_is_not_taken(two, site, tmp_path):
    first, second = two
    (folder_of(first, "2020-06-01") / "B04.tif").unlink()
    (folder_of(second, "2020-06-01") / "B11.tif").write_bytes(b"")
    outcome = built(job_of(two, tmp_path), site)
    assert outcome.state == "failed"
    assert "name one more --source that has it" in outcome.message


def test_a_file_of_another_format_is_an_error(two, site, tmp_path):
    first, _ = two
    path = folder_of(first, "2020-06-01") / "B04.tif"
    path.write_text("<html>")
    outcome = built(job_of(two, tmp_path), site)
    assert outcome.state == "failed"
    assert (
        "B04.tif: is not read (expected a GeoTIFF or JPEG 2000 file, found another format)"
        in outcome.message
    )
    assert outcome.message.endswith("replace the file")


def test_what_no_source_has_fails_and_names_the_option(two, site, tmp_path):
    first, second = two
    for listing in (first, second):
        (folder_of(listing, "2020-06-01") / "B04.tif").unlink()
    job = job_of(two, tmp_path)
    outcome = built(job, site)
    assert outcome.state == "failed"
    assert (
        f"{folder_of(first, '2020-06-01')}/B04.tif: cannot be read (No such file or directory)"
        in outcome.message
    )
    assert outcome.message.endswith(
        "; name one more --source that has it, or accept lost reads with --min-read-completeness"
    )
    (outcome,) = building.build_cubes(
        dataclasses.replace(job, min_read_completeness=0.5), [site], [2020]
    )
    assert outcome.state == "built"
    marker = cube.read_markers(job.store, "pit")[2020]
    assert 0.5 < marker["reads"]["completeness"] < 1
    assert pixels(job) == [200]  # the mean of 100 and 300


def test_a_copy_is_preferred_to_a_loss_that_is_allowed(two, site, tmp_path):
    first, _ = two
    (folder_of(first, "2020-06-01") / "B04.tif").unlink()
    job = job_of(two, tmp_path, min_read_completeness=0.5)
    assert built(job, site).state == "built"
    assert pixels(job) == [207]
    assert cube.read_markers(job.store, "pit")[2020]["reads"]["completeness"] == 1


def test_the_only_source_has_no_copies(two, site, tmp_path):
    first, _ = two
    (folder_of(first, "2020-06-01") / "B04.tif").unlink()
    outcome = built(job_of([first], tmp_path), site)
    assert outcome.state == "failed"
    assert "--min-read-completeness" in outcome.message


def test_an_interrupted_build_with_copies_goes_on(two, site, tmp_path, monkeypatch):
    """The second run begins with the copies that the first one took: what that one has written is not built again."""
    first, _ = two
    (folder_of(first, "2020-06-01") / "B04.tif").unlink()
    job = job_of(two, tmp_path)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "commit", interrupted)
        assert built(job, site).state == "failed"
    assert cube.has_unfinished_build(job.store, "pit", 2020)
    begun, composite_year = [], building._composite_year
    monkeypatch.setattr(
        building,
        "_composite_year",
        lambda site_year, chosen, *args, **more: (
            begun.append({s.id for s in chosen}) or composite_year(site_year, chosen, *args, **more)
        ),
    )
    assert built(job, site).state == "built"
    assert len(begun) == 1
    assert folder_of(first, "2020-06-01").name not in begun[0]
    assert pixels(job) == [207]


def test_a_second_source_that_cannot_be_searched_fails_nothing_more(two, site, tmp_path):
    """Its list is asked for only once something is gone."""
    first, second = two
    job = job_of(two, tmp_path)
    load_or_save(site, 2020, job.sources, job.snapshots)
    (second.root / "items.parquet").unlink()
    (folder_of(first, "2020-06-01") / "B04.tif").unlink()
    outcome = built(job, site)
    assert outcome.state == "failed"
    assert "B04.tif: cannot be read" in outcome.message
