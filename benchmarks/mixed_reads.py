"""Count mixtures of two builds that a reader sees while a site is updated.

    python benchmarks/mixed_reads.py [--json FILE] [--reads 10000]

A process builds the same two site-years again and again, and publishes them after each round. All
pixels of a round have one value. Meanwhile this process reads all pixels, by turns in three ways:
from the working store, from the newest published version (branch `main`), and from the newest tag.

A read is mixed if it has two values. In the working store each year counts by itself: years are
committed one by one. In a published version both years must have the same value. A read of the
working store may be refused, with an error that asks to open the cube again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import tempfile
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path

import dask.array as da
import icechunk
import numpy as np
import shapely
import xarray as xr

from minecube import cube
from minecube.catalog import Recipe, Site
from minecube.cube.provenance import describe_build
from minecube.errors import CubeError
from minecube.grid import grid_of
from minecube.jobs.publish import publish_sites
from minecube.jobs.tables import format_table

YEARS = (2020, 2021)
SITE = Site(id="pit", geometry=shapely.box(13.0, 50.5, 13.03, 50.52))
RECIPE = Recipe(id="fast", title="", bands=("B04", "B11"), block_px=128, chunk_px=128)
WAYS = ("store", "main", "tag")


def main() -> None:
    """Count mixed reads, and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--reads", type=int, default=10_000, help="number of reads (10000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = count_mixed_reads(Path(folder), options.reads)
    rows = [(name, figures[name]) for name in sorted(figures)]
    print(format_table(("count", "reads"), rows))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def count_mixed_reads(folder: Path, reads: int) -> dict[str, int]:
    """Read a site so many times while another process updates it.

    Returns:
        `mixed_reads`, which should be 0; `refused_reads` of the working store; the reads of each of
        `WAYS`, and `versions`, the number of values that were seen.
    """
    _write_round(folder, 1)
    context = multiprocessing.get_context("forkserver")
    stop = context.Event()
    writer = context.Process(target=_keep_writing, args=(folder, stop), daemon=True)
    writer.start()
    counts: Counter[str] = Counter()
    values: set[int] = set()
    try:
        for way in itertools.islice(itertools.cycle(WAYS), reads):
            counts[way] += 1
            try:
                pixels = _read(folder, way)
            except CubeError:
                counts["refused_reads"] += 1
                continue
            counts["mixed_reads"] += _is_mixed(pixels, by_year=way == "store")
            values.update(np.unique(pixels).tolist())
            if not writer.is_alive():
                raise RuntimeError("the writer has died")
    finally:
        stop.set()
        writer.join()
    names = ("mixed_reads", "refused_reads", *WAYS)
    return {name: counts[name] for name in names} | {"versions": len(values)}


def _keep_writing(folder: Path, stop: Event) -> None:
    for value in itertools.count(2):
        if stop.is_set():
            return
        _write_round(folder, 1 + value % 60_000)


def _write_round(folder: Path, value: int) -> None:
    """Build all years with one value, and publish them under a tag."""
    store = cube.Store(folder / "cubes.zarr")
    grid = grid_of(SITE)
    cube.create_site(store, SITE, grid, YEARS, RECIPE)
    for year in YEARS:
        provenance = describe_build(SITE, year, grid, RECIPE, [], value=value)
        provenance["version"] = str(value)  # makes another build of it
        options = cube.BuildOptions(overwrite=True)
        cube.write_year(store, _make_composite(grid.shape, value), provenance, b"scenes", options)
    publish_sites(store, [SITE.id], SITE.id, str(folder / "releases"), f"v{value}")


def _make_composite(shape: tuple[int, int], value: int) -> xr.Dataset:
    def fill(*sizes: int) -> da.Array:
        chunks = (*sizes[:-2], RECIPE.block_px, RECIPE.block_px)
        return da.full(sizes, value, dtype=np.uint16, chunks=chunks)

    return xr.Dataset(
        {
            "reflectance": (("band", "y", "x"), fill(len(RECIPE.bands), *shape)),
            "clear_count": (("y", "x"), fill(*shape)),
            "quality": (("y", "x"), (fill(*shape) > 0).astype(np.uint8)),
        }
    )


def _read(folder: Path, way: str) -> np.ndarray:
    """Read reflectance and counts of all years: uint16 [year, pixel]."""
    if way == "store":
        opened = cube.open_committed(cube.Store(folder / "cubes.zarr"), SITE.id)
    else:
        opened = _open_version(str(folder / "releases"), way)
    layers = [opened[name].to_numpy() for name in ("reflectance", "clear_count")]
    return np.concatenate([layer.reshape(len(layer), -1) for layer in layers], axis=1)


@functools.cache
def _open_repository(place: str) -> icechunk.Repository:
    return icechunk.Repository.open(icechunk.local_filesystem_storage(place))


def _open_version(place: str, way: str) -> xr.Dataset:
    repository = _open_repository(place)
    if way == "main":
        session = repository.readonly_session("main")
    else:
        newest = max(repository.list_tags(), key=lambda tag: int(tag.removeprefix("v")))
        session = repository.readonly_session(tag=newest)
    return xr.open_zarr(session.store, group=SITE.id, consolidated=False, chunks=None)


def _is_mixed(pixels: np.ndarray, *, by_year: bool) -> bool:
    if by_year:
        return bool((pixels != pixels[:, :1]).any())
    return bool((pixels != pixels[0, 0]).any())


if __name__ == "__main__":
    main()
