"""Training windows from a cube, against the release's way: one uncompressed .npy file a patch and year.

    python benchmarks/windows.py [--json FILE] [--rounds 3] [--table]

It makes both layouts of the same pixels, packs the cube into one file, as one copies it to where one trains, and reads 160-px
windows of 10 bands and 10 years, with labels, through torch's DataLoader with 2 workers: patches in random order, windows of
the cube anywhere. Ratios are packed cube / patches, and beside them (`built_`) those of the cube as it was built, of medians
over the rounds: speeds in samples/s, so above 1 is faster; bytes and files on disk, below 1 is less.

The pixels are land that is alike over 60 m and 12 m, each band with a gain of its own, and each year with what a median leaves
of the noise; bands of 20 m fill four pixels, as in real cubes. They pack a little worse than those of a real scene do (LZ4HC at
128 pixels: 0.49 of their bytes, against 0.44 of an Earth Search scene, 29RKH of 2020-02-19). Counts and quality go into the
cube, too: patches have neither.

Cold is without a page of any file in memory: each is flushed and given back by posix_fadvise(DONTNEED), which needs no root
and leaves other programs' caches alone, and that they are gone is checked (mincore). File names and inodes stay known,
which is in favour of the many files.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import os
import platform
import statistics
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import shapely
import xarray as xr
import zarr
from pyproj import Transformer
from scipy import ndimage
from shapely.geometry import box
from torch.utils.data import DataLoader
from zarr.codecs import BloscCodec, ZstdCodec

from minecube import cube
from minecube.catalog import BANDS, NATIVE_M, Recipe, Site
from minecube.cube.read.pixels import Pixels
from minecube.cube.read.windows import window_starts
from minecube.grid import grid_of
from minecube.jobs.tables import format_table

SIDE, SIZE, WORKERS, BATCH = 2046, 160, 2, 4
YEARS = tuple(range(2015, 2025))
RECIPE = Recipe(id="bench", title="as the shipped ones")
PACKINGS = {
    "zstd (Zarr's own)": ZstdCodec(level=0),
    "lz4, bits": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "lz4hc, bits": BloscCodec(cname="lz4hc", clevel=5, shuffle="bitshuffle"),
    "zstd 1, bits": BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
    "zstd 3, bytes": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
}


def main() -> None:
    """Make both layouts, or the table of chunks and packings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="try chunk sizes and packings instead")
    asked = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(machine, flush=True)
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # on a disk: where TMPDIR is memory, `forget` says so
        figures = {
            "machine": machine,
            **(tried(Path(folder)) if asked.table else compared(Path(folder), asked.rounds)),
        }
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def land(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Coarse and fine structure of deviation 1."""
    rng = np.random.default_rng(1)
    fields = [
        ndimage.gaussian_filter(rng.standard_normal((side, side), dtype=np.float32), s)
        for s in (6, 1.2)
    ]
    return fields[0] / fields[0].std(), fields[1] / fields[1].std()


def year_of(ground: tuple[np.ndarray, np.ndarray], year: int) -> np.ndarray:
    """Reflectance uint16 [band, y, x]."""
    rng, (coarse, fine) = np.random.default_rng(year), ground
    made = np.empty((len(BANDS), *coarse.shape), np.uint16)
    for n, band in enumerate(BANDS):
        pixels = (
            1200
            + 150 * n
            + coarse * 350
            + fine * 120
            + rng.standard_normal(coarse.shape, dtype=np.float32) * 40
        )
        if NATIVE_M[band] == 20:
            pixels = pixels[::2, ::2].repeat(2, axis=0).repeat(2, axis=1)
        made[n] = np.clip(pixels, 1, 10000)
    return made


def mine_of(side: int, year: int) -> np.ndarray:
    """Footprint uint8 [y, x], a little larger each year."""
    y, x = np.mgrid[:side, :side] - side / 2
    return (np.hypot(x, y * 1.3) < side / 4 + 4 * (year - YEARS[0])).astype(np.uint8)


def make(folder: Path) -> tuple[Path, Path]:
    """The cube and the patches; where they are."""
    store, patches, ground = folder / "cubes.zarr", folder / "patches", land(SIDE)
    corners = box(
        360025, 5600040 - SIDE * 10 + 25, 360000 + SIDE * 10 - 25, 5600015
    )  # snapped outwards to the grid
    move = Transformer.from_crs(32633, 4326, always_xy=True).transform
    site = Site(id="pit", geometry=shapely.transform(corners, move, interleaved=False))
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(id="a", properties=told)
    for year in YEARS:
        pixels, mine = year_of(ground, year), mine_of(SIDE, year)
        clear = (
            12 + 3 * ground[0] + np.random.default_rng(-year % 99).standard_normal((SIDE, SIDE))
        ).clip(1)[::2, ::2]
        layers = {
            "clear_count": clear.repeat(2, axis=0).repeat(2, axis=1).astype(np.uint16),
            "quality": (mine | 1),
        }
        side = RECIPE.block_px
        made = {
            "reflectance": (
                ("band", "y", "x"),
                da.from_array(pixels, chunks=(len(BANDS), side, side)),
            )
        }
        made |= {
            name: (("y", "x"), da.from_array(layer, chunks=side)) for name, layer in layers.items()
        }
        cube.write_year(
            cube.Store(store),
            xr.Dataset(made),
            cube.describe_build(site, year, grid, RECIPE, [scene]),
            b"",
            cube.BuildOptions(workers=2),
        )
        labels = xr.DataArray(
            mine[None], dims=("year", "y", "x"), coords={"year": [year], **xr_coords(grid)}
        )
        cube.write_footprint(cube.Store(store), site.id, labels, origin="drawn")
        for y, x in places():
            part = patches / f"{y}_{x}"
            part.mkdir(parents=True, exist_ok=True)
            np.save(part / f"image_{year}.npy", pixels[:, y : y + SIZE, x : x + SIZE])
            np.save(part / f"label_{year}.npy", mine[y : y + SIZE, x : x + SIZE])
    return store, patches


def xr_coords(grid: Any) -> Any:
    """Coordinates of the grid, as xarray has them."""
    import odc.geo.xr

    return odc.geo.xr.xr_coords(grid)


def places(step: int = SIZE) -> list[tuple[int, int]]:
    """Where patches begin, the last flush with the far border, as the published loaders crop."""
    return list(itertools.product(window_starts(SIDE, SIZE, step), repeat=2))


class Patches:
    """The release's way: a file a patch and year."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / f"{y}_{x}" for y, x in places()]

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> dict[str, Any]:
        kinds = {"reflectance": "image", "footprint": "label"}
        return {
            name: np.stack([np.load(self.folders[index] / f"{kind}_{year}.npy") for year in YEARS])
            for name, kind in kinds.items()
        }


def files_of(place: Path) -> list[Path]:
    """A folder's files, or the one file."""
    return [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]


def forget(place: Path) -> None:
    """Take every page of the files there out of memory, and see that it is gone."""
    os.sync()
    files = [p for p in files_of(place) if p.stat().st_size]
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    kept = sum(pages_in_memory(path) for path in files)
    if kept:
        raise SystemExit(
            f"{kept} pages of {place} are still in memory: this file system does not forget, so nothing is cold"
        )


def pages_in_memory(path: Path) -> int:
    """How many pages of a file are cached: what mincore(2) says, which reads none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        whole = np.frombuffer(mapped, np.uint8)
        flags = np.zeros(-(-len(whole) // mmap.PAGESIZE), np.uint8)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(whole.ctypes.data),
            ctypes.c_size_t(len(whole)),
            ctypes.c_void_p(flags.ctypes.data),
        )
        del whole
    if failed:
        raise SystemExit(f"{path}: mincore does not say what is cached")
    return int((flags & 1).sum())


def speed(dataset: Any) -> float:
    """Samples a second over the whole dataset, in random order, workers' start included."""
    start = time.perf_counter()
    for _ in DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS):
        pass
    return len(dataset) / (time.perf_counter() - start)


def on_disk(place: Path) -> tuple[int, int]:
    """Bytes that its files take up, and how many there are."""
    files = [p.stat() for p in files_of(place)]
    return sum(f.st_blocks * 512 for f in files), len(files)


def compared(folder: Path, rounds: int) -> dict[str, Any]:
    """The layouts, read cold and warm in turn."""
    store, patches = make(folder)
    places_of = {"packed": folder / "cubes.zarr.zip", "built": store, "patches": patches}
    start = time.perf_counter()
    cube.pack(cube.Store(store), places_of["packed"])
    packing = time.perf_counter() - start
    speeds: dict[str, list[float]] = {}
    for n in range(rounds):
        for name, place in places_of.items():
            dataset = (
                Patches(place)
                if name == "patches"
                else cube.CubeDataset(cube.Store(place), length=len(places()), seed=n)
            )
            forget(place)
            speeds.setdefault(f"{name}_cold", []).append(speed(dataset))
            speeds.setdefault(f"{name}_warm", []).append(speed(dataset))
    middle = {name: statistics.median(each) for name, each in speeds.items()}
    room = {
        name: dict(zip(("bytes", "files"), on_disk(place), strict=True))
        for name, place in places_of.items()
    }
    ratios, rows = {}, []
    for what, values in (
        ("cold", {name: middle[f"{name}_cold"] for name in places_of}),
        ("warm", {name: middle[f"{name}_warm"] for name in places_of}),
        ("bytes", {name: room[name]["bytes"] for name in places_of}),
        ("files", {name: room[name]["files"] for name in places_of}),
    ):
        ratios[f"{what}_ratio"] = values["packed"] / values["patches"]
        ratios[f"built_{what}_ratio"] = values["built"] / values["patches"]
        unit = {"cold": "samples/s, cold", "warm": "samples/s, warm", "bytes": "MB on disk"}.get(
            what, what
        )
        shown = [v / 1e6 if what == "bytes" else v for v in values.values()]
        rows.append((unit, *shown, ratios[f"{what}_ratio"], ratios[f"built_{what}_ratio"]))
    print(format_table(("what", *places_of, "packed / patches", "built / patches"), rows))
    print(f"packing: {room['packed']['bytes'] / 1e6 / packing:.0f} MB/s, its checksum included")
    return {**ratios, "samples_per_s": middle, "rounds": speeds, "packing_s": packing, **room}


def tried(folder: Path) -> dict[str, Any]:
    """Chunk sizes and packings: room, windows from memory, whole-site reading for maps, packing. Times are the processor's."""
    pixels = np.stack([year_of(ground, year) for ground in [land(1280)] for year in YEARS[:2]])
    rng = np.random.default_rng(0)
    at = [tuple(int(v) for v in rng.integers(0, 1280 - SIZE, 2)) for _ in range(40)]
    rows = []
    for chunk, (name, packing) in itertools.product((64, 80, 128, 160, 256), PACKINGS.items()):
        path, side = folder / f"{chunk}_{name}", 1024 // chunk * chunk
        start = time.process_time()
        how = {
            "chunks": (1, 10, chunk, chunk),
            "shards": (1, 10, side, side),
            "compressors": packing,
        }
        array = zarr.create_array(
            path, name="reflectance", shape=pixels.shape, dtype="u2", fill_value=0, **how
        )
        array[:] = pixels
        packed = time.process_time() - start
        array = zarr.open_array(path / "reflectance")
        whole, window = [], []
        reader = Pixels.open(cube.Store(path), "reflectance")
        for _ in range(3):
            start = time.process_time()
            array[:]
            whole.append(time.process_time() - start)
            start = time.process_time()
            for y, x in at:
                reader.cut(range(2), y, x, SIZE)
            window.append((time.process_time() - start) / len(at) / 2)
        size = on_disk(path)[0] / pixels.nbytes
        mb = pixels.nbytes / 1e6
        print(".", end="", flush=True)
        rows.append((chunk, name, size, min(window) * 1e3, mb / min(whole), mb / packed))
    headings = (
        "chunk",
        "packing",
        "bytes / raw",
        "window, CPU ms a year",
        "map, MB a CPU s",
        "packing, MB a CPU s",
    )
    print("\n" + format_table(headings, rows))
    return {"table": [dict(zip(headings, row, strict=True)) for row in rows]}


if __name__ == "__main__":
    main()
