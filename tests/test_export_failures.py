"""Exports that fail leave no partial file: a full disk, an unwritable folder, a kill."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import geopandas as gpd
import numpy as np
import pytest
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from minecube.catalog import BANDS
from minecube.errors import CubeError
from minecube.export import (
    write_cogs,
    write_footprints,
    write_netcdf,
    write_zarr,
    write_zarr2,
)
from minecube.export.files import open_draft

GRID = GeoBox((40, 60), Affine(10, 0, 399960, 0, -10, 5700000), "EPSG:32633")
WHOLE = {"f.nc": write_netcdf, "f.zarr": write_zarr, "f.v2.zarr": write_zarr2}
EVERY = ["cog", "f.parquet", "f.gpkg", *WHOLE]


def small_cube():
    rng = np.random.default_rng(0)
    reflectance = rng.integers(0, 65535, (2, len(BANDS), *GRID.shape), dtype=np.uint16)
    footprint = rng.choice(np.array([0, 1, 255], np.uint8), (2, *GRID.shape))
    variables = {
        "reflectance": (("year", "band", "y", "x"), reflectance),
        "footprint": (("year", "y", "x"), footprint),
    }
    return xr.Dataset(variables, {"year": [2020, 2021], "band": list(BANDS), **xr_coords(GRID)})


def footprints():
    shapes = [shapely.box(399960 + 10 * n, 5699000, 400960, 5700000) for n in range(2)]
    columns = {"site": ["pit"] * 2, "year": [2020, 2021], "area_m2": [1e6, 99e4]}
    return gpd.GeoDataFrame(columns, geometry=shapes, crs="EPSG:32633")


def write_anything(name, out):
    if name == "cog":
        write_cogs(small_cube(), GRID, out, "pit")
    elif name in WHOLE:
        WHOLE[name](small_cube(), GRID, out / name, "pit")
    else:
        write_footprints(footprints(), out / name)


@contextmanager
def small_disk():
    """No file may grow beyond 3000 bytes: what a full disk does, without filling one.

    Around the call alone: the limit is the process's, and the test runner writes its own log, which may be longer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", EVERY)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, name):
    with pytest.raises(CubeError, match="cannot be written") as error, small_disk():
        write_anything(name, tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_threads_write_after_another_one_failed_does_not_stay(tmp_path):
    """zarr and dask do not wait for their others."""
    begun = threading.Event()

    def late(part):
        for n in range(15):
            with suppress(FileNotFoundError):  # removed in between
                part.mkdir(parents=True, exist_ok=True)
                (part / f"chunk-{n}").write_text("late")
            begun.set()
            time.sleep(0.01)

    writers = []

    def fails():
        with open_draft(tmp_path / "f.zarr") as part:
            writers.append(threading.Thread(target=late, args=(part,)))
            writers[0].start()
            begun.wait(10)
            raise OSError(28, "No space left on device")

    with pytest.raises(CubeError, match="No space left"):
        fails()
    writers[0].join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EVERY)
def test_an_unwritable_folder_is_one_sentence(tmp_path, name):
    (tmp_path / "file").write_text(
        "a file where the folder should be"
    )  # root ignores permissions, so they cannot be tested
    with pytest.raises(CubeError, match="cannot be written"):
        write_anything(name, tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", EVERY)
def test_a_killed_export_leaves_no_half_file_and_the_next_one_tidies_up(tmp_path, name):
    dies = (
        "import os, signal, sys; from pathlib import Path; import importlib.util as u\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "spec = u.spec_from_file_location('me', sys.argv[1]); me = u.module_from_spec(spec); spec.loader.exec_module(me)\n"
        "me.write_anything(sys.argv[2], Path(sys.argv[3]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", dies, __file__, name, str(tmp_path)],
        check=False,
        stderr=subprocess.DEVNULL,
    )
    assert ran.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert left
    assert all(p.name.startswith(".") for p in left)
    write_anything(name, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
