"""The command line on a small simulated world, in this process or in one of its own."""

from __future__ import annotations

import re
import subprocess
import sys

import geopandas as gpd
import pyarrow.parquet as pq
import stac_geoparquet.arrow
from click.testing import CliRunner

from known_scenes import site_of
from minecube.cli import cli
from minecube.simulate import World, simulate_archive

PROGRESS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ ")


def run(*arguments, ok=0, cwd=None):
    """The command in a process of its own; (standard output, standard error)."""
    command = [sys.executable, "-c", "from minecube.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == ok, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def run_here(*arguments, ok=0):
    """The same within this process, which spares the seconds of importing."""
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, f"exit {done.exit_code}\n{done.output}"
    return done.stdout, done.stderr


def messages_in(err):
    """Return the lines of standard error apart from progress, which begins with the time."""
    return [line for line in err.splitlines() if not PROGRESS.match(line)]


def make_world(folder):
    """A site of 120 x 96 px, two years, one provider; polygons of the site and of its mine."""
    site = site_of("pit", 360000, 5600040, 120, 96)
    simulate_archive(
        [site],
        folder / "archive",
        World(years=(2020, 2022), dates_per_year=6, winter_dates=1, styles=("earth-search",)),
    )
    gpd.GeoDataFrame({"id": ["pit"], "margin": [0]}, geometry=[site.geometry], crs=4326).to_file(
        folder / "sites.geojson"
    )
    return folder


def build_world(world):
    """That world built and labelled: the store."""
    store = world / "cubes.zarr"
    out, _ = run("build", *args(world, store))
    assert out.count("built") == 2
    run("label", "--store", store, "--polygons", world / "archive" / "truth_footprints.parquet")
    return store


def args(world, store, years="2020,2022", source="sim-earth-search"):
    return (
        "--sites",
        world / "sites.geojson",
        "--years",
        years,
        "--catalog",
        world / "archive",
        "--source",
        source,
        "--store",
        store,
    )


def items_of(path):
    return [dict(item) for item in stac_geoparquet.arrow.stac_table_to_items(pq.read_table(path))]


def write_items(items, path):
    stac_geoparquet.arrow.to_parquet(stac_geoparquet.arrow.parse_stac_items_to_arrow(items), path)
