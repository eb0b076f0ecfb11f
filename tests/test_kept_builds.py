"""A site-year whose inputs are unchanged is kept without reading its scenes; any change is found."""

from __future__ import annotations

import dataclasses
import io
import shutil

import pyarrow.parquet as pq
import pytest
import zarr

from known_scenes import site_of
from minecube import cube, scenes
from minecube.catalog import load_recipes, load_sites, load_sources
from minecube.errors import SceneError
from minecube.jobs.build import BuildJob, build_cubes
from minecube.jobs.scene_lists import hash_list
from minecube.scenes import snapshot
from minecube.simulate import World, simulate_archive

YEARS = (2020, 2022)


@pytest.fixture
def job(world, built, tmp_path):
    """The build of the built world, on copies of its store and scene lists."""
    shutil.copytree(built, tmp_path / "cubes.zarr")
    shutil.copytree(world / "cubes.zarr-scenes", tmp_path / "lists")
    return BuildJob(
        store=cube.Store(tmp_path / "cubes.zarr"),
        sources=(load_sources(world / "archive" / "sources.yaml")["sim-earth-search"],),
        recipe=load_recipes()["annual-median"],
        snapshots=tmp_path / "lists",
    )


@pytest.fixture
def site(world):
    return load_sites(world / "sites.geojson")[0]


def change_marker(job, year, **entries):
    """Change entries of a marker; None removes one."""
    group = zarr.open_group(str(job.store), path=f"pit/builds/{year}", mode="r+")
    marker = {**group.attrs, **entries}
    group.attrs.put({name: value for name, value in marker.items() if value is not None})


def drop_first_row(path):
    """Take the first scene from a list, whose header stays as it was."""
    table = pq.read_table(path)
    pq.write_table(table.slice(1).replace_schema_metadata(table.schema.metadata), path)


def list_path(job, year):
    return job.snapshots / f"pit_{year}_sim-earth-search.parquet"


@pytest.mark.parametrize("version", ["this", "older"])
def test_a_kept_site_year_has_the_scenes_and_days_of_its_stored_list(job, site, version):
    """Older versions stored neither inputs nor days: there the scenes are read again."""
    if version == "older":
        for year in YEARS:
            change_marker(job, year, inputs=None, days=None)
    for outcome in build_cubes(job, [site], YEARS):
        group = zarr.open_group(str(job.store), path=f"pit/builds/{outcome.year}", mode="r")
        used = pq.read_table(io.BytesIO(bytes(group["scenes"][:])))
        assert outcome.state == "kept"
        assert outcome.scenes == used.num_rows > 0
        assert outcome.days == len(set(used["minecube:solar_day"].to_pylist())) > 0
        assert outcome.message == ""


def test_a_list_with_other_scenes_under_the_same_header(job, site):
    """The other year is kept, and the run goes on."""
    drop_first_row(list_path(job, 2022))
    kept, failed = build_cubes(job, [site], YEARS)
    assert (kept.year, kept.state) == (2020, "kept")
    assert (failed.year, failed.state) == (2022, "stale")
    assert "its scenes have changed since they were saved" in failed.message


def test_a_source_at_another_host(job, site):
    """Files that the new host may not name are refused, although the store has the site-year."""
    (source,) = job.sources
    moved = dataclasses.replace(source, href="https://elsewhere.org/items.parquet")
    with pytest.raises(
        SceneError, match=r"expected a scene listed by elsewhere\.org|is not read from"
    ):
        build_cubes(dataclasses.replace(job, sources=(moved,)), [site], YEARS)


def test_a_build_with_lost_reads_is_kept_until_it_may_be_replaced(job, site):
    reads = cube.read_markers(job.store, "pit")[2020]["reads"]
    change_marker(job, 2020, reads={**reads, "completeness": 0.5})
    (kept,) = build_cubes(job, [site], (2020,))
    assert (kept.state, kept.message[:23]) == ("kept", "has 50.00% of its reads")
    lossy = dataclasses.replace(job, overwrite=True, min_read_completeness=0.5)
    assert [outcome.state for outcome in build_cubes(lossy, [site], YEARS)] == ["kept", "kept"]
    again = dataclasses.replace(job, overwrite=True)
    assert [outcome.state for outcome in build_cubes(again, [site], YEARS)] == ["built", "kept"]


def test_another_rule_for_a_conflict_is_another_build(job, site):
    change_marker(job, 2020, offset_conflicts=[{"scene": "a"}])
    warn = dataclasses.replace(job, on_offset_conflict="warn")
    stale, kept = build_cubes(warn, [site], YEARS)
    assert (stale.state, kept.state) == ("stale", "kept")
    assert "use --overwrite to replace it" in stale.message
    (kept,) = build_cubes(job, [site], (2020,))
    assert kept.state == "kept"


def test_a_damaged_marker_fails_its_site_year_alone(job, site):
    (job.store.path / "pit" / "builds" / "2020" / "zarr.json").write_text("{")
    failed, kept = build_cubes(job, [site], YEARS)
    assert (failed.year, failed.state) == (2020, "failed")
    assert "cannot be read" in failed.message
    assert (kept.year, kept.state) == (2022, "kept")


def test_a_neighbouring_years_list_counts_where_the_recipe_falls_back_on_it(tmp_path):
    site = site_of("pit", 360000, 5600040, 48, 48)
    world = World(
        years=(2020, 2021, 2022), dates_per_year=2, winter_dates=0, styles=("earth-search",)
    )
    simulate_archive([site], tmp_path / "archive", world)
    (source,) = load_sources(tmp_path / "archive" / "sources.yaml").values()
    recipe = load_recipes()["annual-median"]
    job = BuildJob(
        store=cube.Store(tmp_path / "cubes.zarr"),
        sources=(source,),
        recipe=dataclasses.replace(recipe, min_dates=1, fallback=("neighbour-year",)),
        snapshots=tmp_path / "lists",
    )
    states = [build_cubes(job, [site], (2021,))[0].state for _ in range(2)]
    assert states == ["built", "kept"]
    path = list_path(job, 2022)
    fewer = snapshot.load(path).scenes[1:]
    search = snapshot.hash_search(site, 2022, [source])
    snapshot.save(scenes.SearchResult(scenes=fewer, listed=len(fewer)), path, search)
    (stale,) = build_cubes(job, [site], (2021,))
    assert stale.state == "stale"
    assert "other scenes" in stale.message


def test_a_lists_hash_depends_on_its_file_place_and_rules(job, site):
    (source,) = job.sources
    first = hash_list(site, 2020, [source], job.snapshots)
    assert first is not None
    renamed = dataclasses.replace(source, title="x", href="/other/folder/items.parquet")
    assert hash_list(site, 2020, [renamed], job.snapshots) == first
    others = [
        hash_list(site, 2022, [source], job.snapshots),
        hash_list(dataclasses.replace(site, margin=60.0), 2020, [source], job.snapshots),
        hash_list(
            site,
            2020,
            [dataclasses.replace(source, href="https://elsewhere.org/items.parquet")],
            job.snapshots,
        ),
        hash_list(
            site, 2020, [dataclasses.replace(source, resolution_m={"B04": 20})], job.snapshots
        ),
    ]
    drop_first_row(list_path(job, 2020))
    others.append(hash_list(site, 2020, [source], job.snapshots))
    assert None not in others
    assert len({first, *others}) == 6
    assert hash_list(site, 2021, [source], job.snapshots) is None
