"""Compare reading training windows from a cube with reading patches of the release.

    python benchmarks/windows.py [--json FILE] [--rounds 3] [--table]

The release has one uncompressed .npy file per patch and year. The script writes the same pixels
in both layouts, and packs the cube into one file. torch's DataLoader with 2 workers then reads
windows of 160 px, 10 bands and 10 years with labels. Patches come in random order, windows of
the cube from anywhere. The cube also has counts and quality, the patches do not.

Ratios compare medians over the rounds. `*_ratio` is packed cube / patches, `built_*_ratio` is
unpacked cube / patches. Speeds are in samples/s, so above 1 is faster. For bytes and files on
disk, below 1 is less.

The pixels are land that varies over 60 m and 12 m. Each band has its own level, and each year
its own remaining noise. Bands of 20 m fill four pixels. The pixels compress a little worse than
a real scene (LZ4HC at 128 px: 0.49 of the bytes, 0.44 for Earth Search 29RKH of 2020-02-19).

Cold means that no page of the files is in memory. posix_fadvise(DONTNEED) drops the pages. It
needs no root and leaves the caches of other programs alone. mincore checks the result. File
names and inodes stay cached, which favours many files.
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

SIDE = 2046
"""Side of the site in pixels."""
SIZE = 160
"""Side of a window in pixels."""
WORKERS = 2
BATCH = 4
YEARS = tuple(range(2015, 2025))
RECIPE = Recipe(id="bench", title="default settings")
COMPRESSIONS = {
    "zstd (Zarr's own)": ZstdCodec(level=0),
    "lz4, bits": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "lz4hc, bits": BloscCodec(cname="lz4hc", clevel=5, shuffle="bitshuffle"),
    "zstd 1, bits": BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
    "zstd 3, bytes": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
}


def main() -> None:
    """Compare both layouts, or tabulate chunk sizes and compressions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per layout (3)")
    parser.add_argument(
        "--table", action="store_true", help="tabulate chunk sizes and compressions instead"
    )
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(machine, flush=True)
    # TMPDIR must be on a disk: `drop_cached_pages` stops with an error if it is in memory.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        measured = (
            measure_compressions(root) if options.table else compare_layouts(root, options.rounds)
        )
        figures = {"machine": machine, **measured}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def draw_land(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw coarse and fine structure with a standard deviation of 1."""
    rng = np.random.default_rng(1)
    fields = [
        ndimage.gaussian_filter(rng.standard_normal((side, side), dtype=np.float32), s)
        for s in (6, 1.2)
    ]
    return fields[0] / fields[0].std(), fields[1] / fields[1].std()


def draw_year(ground: tuple[np.ndarray, np.ndarray], year: int) -> np.ndarray:
    """Draw the reflectance of a year, uint16 [band, y, x]."""
    rng = np.random.default_rng(year)
    coarse, fine = ground
    reflectance = np.empty((len(BANDS), *coarse.shape), np.uint16)
    for number, band in enumerate(BANDS):
        pixels = (
            1200
            + 150 * number
            + coarse * 350
            + fine * 120
            + rng.standard_normal(coarse.shape, dtype=np.float32) * 40
        )
        if NATIVE_M[band] == 20:
            pixels = pixels[::2, ::2].repeat(2, axis=0).repeat(2, axis=1)
        reflectance[number] = np.clip(pixels, 1, 10000)
    return reflectance


def draw_mine(side: int, year: int) -> np.ndarray:
    """Draw the footprint of a year, uint8 [y, x]. The mine grows each year."""
    y, x = np.mgrid[:side, :side] - side / 2
    return (np.hypot(x, y * 1.3) < side / 4 + 4 * (year - YEARS[0])).astype(np.uint8)


def write_layouts(folder: Path) -> tuple[Path, Path]:
    """Write the cube and the patches. Returns their paths."""
    store = folder / "cubes.zarr"
    patches = folder / "patches"
    ground = draw_land(SIDE)
    # The grid snaps outwards, so corners lie within its border pixels.
    corners = box(360025, 5600040 - SIDE * 10 + 25, 360000 + SIDE * 10 - 25, 5600015)
    to_degrees = Transformer.from_crs(32633, 4326, always_xy=True).transform
    site = Site(id="pit", geometry=shapely.transform(corners, to_degrees, interleaved=False))
    grid = grid_of(site)
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    properties = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(id="a", properties=properties)
    for year in YEARS:
        pixels = draw_year(ground, year)
        mine = draw_mine(SIDE, year)
        clear = (
            12 + 3 * ground[0] + np.random.default_rng(-year % 99).standard_normal((SIDE, SIDE))
        ).clip(1)[::2, ::2]
        layers = {
            "clear_count": clear.repeat(2, axis=0).repeat(2, axis=1).astype(np.uint16),
            "quality": (mine | 1),
        }
        side = RECIPE.block_px
        variables = {
            "reflectance": (
                ("band", "y", "x"),
                da.from_array(pixels, chunks=(len(BANDS), side, side)),
            )
        }
        variables |= {
            name: (("y", "x"), da.from_array(layer, chunks=side)) for name, layer in layers.items()
        }
        cube.write_year(
            cube.Store(store),
            xr.Dataset(variables),
            cube.describe_build(site, year, grid, RECIPE, [scene]),
            b"",
            cube.BuildOptions(workers=2),
        )
        labels = xr.DataArray(
            mine[None], dims=("year", "y", "x"), coords={"year": [year], **make_coordinates(grid)}
        )
        cube.write_footprint(cube.Store(store), site.id, labels, origin="drawn")
        for y, x in list_corners():
            patch = patches / f"{y}_{x}"
            patch.mkdir(parents=True, exist_ok=True)
            np.save(patch / f"image_{year}.npy", pixels[:, y : y + SIZE, x : x + SIZE])
            np.save(patch / f"label_{year}.npy", mine[y : y + SIZE, x : x + SIZE])
    return store, patches


def make_coordinates(grid: Any) -> Any:
    """Return the grid's coordinates for xarray."""
    import odc.geo.xr

    return odc.geo.xr.xr_coords(grid)


def list_corners(step: int = SIZE) -> list[tuple[int, int]]:
    """List the upper left corners of patches.

    The last patch ends at the far border, like in the published loaders.
    """
    return list(itertools.product(window_starts(SIDE, SIZE, step), repeat=2))


class Patches:
    """Dataset in the release's layout: one file per patch and year."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / f"{y}_{x}" for y, x in list_corners()]

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> dict[str, Any]:
        kinds = {"reflectance": "image", "footprint": "label"}
        return {
            name: np.stack([np.load(self.folders[index] / f"{kind}_{year}.npy") for year in YEARS])
            for name, kind in kinds.items()
        }


def list_files(path: Path) -> list[Path]:
    """List the files of a folder, or the one file."""
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


def drop_cached_pages(path: Path) -> None:
    """Drop all pages of these files from memory, and check that they are gone."""
    os.sync()
    files = [p for p in list_files(path) if p.stat().st_size]
    for file_path in files:
        with file_path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cached_pages = sum(count_cached_pages(file_path) for file_path in files)
    if cached_pages:
        raise SystemExit(
            f"{cached_pages} pages of {path} are still cached: "
            "its file system does not drop pages. Set TMPDIR to a folder on a disk."
        )


def count_cached_pages(path: Path) -> int:
    """Count the cached pages of a file with mincore(2), which reads none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        content = np.frombuffer(mapped, np.uint8)
        flags = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(content.ctypes.data),
            ctypes.c_size_t(len(content)),
            ctypes.c_void_p(flags.ctypes.data),
        )
        del content
    if failed:
        raise SystemExit(f"{path}: mincore failed, so cached pages are unknown")
    return int((flags & 1).sum())


def measure_speed(dataset: Any) -> float:
    """Read the whole dataset in random order. Returns samples per second.

    The time includes the start of the workers.
    """
    start = time.perf_counter()
    for _ in DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS):
        pass
    return len(dataset) / (time.perf_counter() - start)


def measure_disk_use(path: Path) -> tuple[int, int]:
    """Return the bytes on disk and the number of files."""
    files = [p.stat() for p in list_files(path)]
    return sum(f.st_blocks * 512 for f in files), len(files)


def compare_layouts(folder: Path, rounds: int) -> dict[str, Any]:
    """Read all layouts in turn, cold and warm."""
    store, patches = write_layouts(folder)
    layouts = {"packed": folder / "cubes.zarr.zip", "built": store, "patches": patches}
    start = time.perf_counter()
    cube.pack(cube.Store(store), layouts["packed"])
    packing_s = time.perf_counter() - start
    speeds: dict[str, list[float]] = {}
    for round_number in range(rounds):
        for name, path in layouts.items():
            dataset = (
                Patches(path)
                if name == "patches"
                else cube.CubeDataset(
                    cube.Store(path), length=len(list_corners()), seed=round_number
                )
            )
            drop_cached_pages(path)
            speeds.setdefault(f"{name}_cold", []).append(measure_speed(dataset))
            speeds.setdefault(f"{name}_warm", []).append(measure_speed(dataset))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    sizes = {
        name: dict(zip(("bytes", "files"), measure_disk_use(path), strict=True))
        for name, path in layouts.items()
    }
    ratios = {}
    rows = []
    for figure, values in (
        ("cold", {name: medians[f"{name}_cold"] for name in layouts}),
        ("warm", {name: medians[f"{name}_warm"] for name in layouts}),
        ("bytes", {name: sizes[name]["bytes"] for name in layouts}),
        ("files", {name: sizes[name]["files"] for name in layouts}),
    ):
        ratios[f"{figure}_ratio"] = values["packed"] / values["patches"]
        ratios[f"built_{figure}_ratio"] = values["built"] / values["patches"]
        title = {"cold": "samples/s, cold", "warm": "samples/s, warm", "bytes": "MB on disk"}.get(
            figure, figure
        )
        columns = [v / 1e6 if figure == "bytes" else v for v in values.values()]
        rows.append((title, *columns, ratios[f"{figure}_ratio"], ratios[f"built_{figure}_ratio"]))
    print(format_table(("what", *layouts, "packed / patches", "built / patches"), rows))
    print(f"packing: {sizes['packed']['bytes'] / 1e6 / packing_s:.0f} MB/s, checksum included")
    return {**ratios, "samples_per_s": medians, "rounds": speeds, "packing_s": packing_s, **sizes}


def measure_compressions(folder: Path) -> dict[str, Any]:
    """Measure chunk sizes and compressions.

    Returns size, CPU time per window, and CPU speed of reading a whole site and of writing it.
    """
    pixels = np.stack(
        [draw_year(ground, year) for ground in [draw_land(1280)] for year in YEARS[:2]]
    )
    rng = np.random.default_rng(0)
    corners = [tuple(int(v) for v in rng.integers(0, 1280 - SIZE, 2)) for _ in range(40)]  # (y, x)
    rows = []
    for chunk, (name, codec) in itertools.product((64, 80, 128, 160, 256), COMPRESSIONS.items()):
        path = folder / f"{chunk}_{name}"
        side = 1024 // chunk * chunk
        start = time.process_time()
        layout = {
            "chunks": (1, 10, chunk, chunk),
            "shards": (1, 10, side, side),
            "compressors": codec,
        }
        array = zarr.create_array(
            path, name="reflectance", shape=pixels.shape, dtype="u2", fill_value=0, **layout
        )
        array[:] = pixels
        write_s = time.process_time() - start
        array = zarr.open_array(path / "reflectance")
        site_s = []
        window_s = []
        reader = Pixels.open(cube.Store(path), "reflectance")
        for _ in range(3):
            start = time.process_time()
            array[:]
            site_s.append(time.process_time() - start)
            start = time.process_time()
            for y, x in corners:
                reader.cut(range(2), y, x, SIZE)
            window_s.append((time.process_time() - start) / len(corners) / 2)
        size = measure_disk_use(path)[0] / pixels.nbytes
        megabytes = pixels.nbytes / 1e6
        print(".", end="", flush=True)
        rows.append(
            (chunk, name, size, min(window_s) * 1e3, megabytes / min(site_s), megabytes / write_s)
        )
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
