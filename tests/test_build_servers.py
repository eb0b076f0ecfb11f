"""A build reads from servers that fail or ask for signatures."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pyarrow.parquet as pq
import xarray as xr
import yaml
import zarr

from known_builds import args
from known_scenes import serve
from minecube import cube

# The main thread, which hears signals, is not the one that is given this; and it is not ignored, as in a shell's background.
ANOTHER_IS_GIVEN_IT = """
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
from minecube.cli import main
main()
"""


def name_server(folder, url, **source):
    """Let the copied archive's source name this server."""
    known = yaml.safe_load((folder / "archive" / "sources.yaml").read_text())
    known["sim-earth-search"] |= {"href": f"{url}/earth-search.parquet", **source}
    (folder / "archive" / "sources.yaml").write_text(yaml.safe_dump(known))


def test_an_interrupt_is_heard_while_a_server_is_in_trouble(world, tmp_path):
    """Every image is answered with 503, which is waited out for minutes; not after Ctrl-C, whatever thread is given it."""
    shutil.copytree(
        world / "archive", tmp_path / "archive", ignore=shutil.ignore_patterns("truth*")
    )
    shutil.copy(world / "sites.geojson", tmp_path)
    with serve(tmp_path / "archive", "--fail", 1) as url:
        name_server(tmp_path, url)
        command = [sys.executable, "-c", ANOTHER_IS_GIVEN_IT, "build"]
        build = subprocess.Popen(
            [*command, *map(str, args(tmp_path, tmp_path / "new.zarr"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        failed = 0
        while failed < 100 and build.poll() is None:  # it is in the midst of it
            time.sleep(0.2)
            with urllib.request.urlopen(f"{url}/counts") as answer:
                failed = json.load(answer)["failed"]
        build.send_signal(signal.SIGINT)
        start = time.monotonic()
        try:
            _, err = build.communicate(timeout=60)
        finally:
            build.kill()
            build.communicate()
    assert time.monotonic() - start < 30
    assert build.returncode == 130, err
    assert "interrupted; committed years are safe" in err
    assert cube.read_markers(cube.Store(tmp_path / "new.zarr"), "pit") == {}


LOUD = "import logging; logging.basicConfig(level=logging.DEBUG); from minecube.cli import main; main()"


def test_no_signature_is_written(world, built, tmp_path):
    """Tokens that expire during the build: nothing lost, and no file, log or line on the screen holds one."""
    shutil.copytree(world / "archive", tmp_path / "archive")
    shutil.copy(world / "sites.geojson", tmp_path)
    store = tmp_path / "cubes.zarr"
    with serve(tmp_path / "archive", "--token-life", 0.5, "--delay", 0.02) as url:
        access = {"kind": "planetary-computer", "href": f"{url}/token"}
        name_server(tmp_path, url, access=access)
        done = subprocess.run(
            [sys.executable, "-c", LOUD, "-v", "build", *map(str, args(tmp_path, store))],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "127.0.0.1" in done.stderr  # the log tells requests
    assert "sig=" not in done.stdout + done.stderr
    written = [p for p in tmp_path.rglob("*") if p.is_file() and "archive" not in p.parts]
    assert len(written) > 20
    assert not [p for p in written if b"sig=" in p.read_bytes()]
    for year in (2020, 2022):  # these are compressed
        for name in ("scenes", "reads"):
            assert not any(
                "sig=" in str(row) for row in rows_of(store, f"pit/builds/{year}/{name}")
            )
    for year in (2020, 2022):
        totals = cube.read_markers(cube.Store(store), "pit")[year]["reads"]
        assert (totals["lost"], totals["completeness"]) == (0, 1)
        assert totals["requests"] > 0
    a, b = (
        xr.open_zarr(s, group="pit", consolidated=False).drop_vars(
            ["footprint", "footprint_fraction"]
        )
        for s in (built, store)
    )
    xr.testing.assert_identical(a.drop_attrs().load(), b.drop_attrs().load())


def rows_of(store, path):
    """The rows of a Parquet file that is stored as an array of bytes."""
    content = zarr.open_array(store, path=path, mode="r")[:].tobytes()
    return pq.read_table(io.BytesIO(content)).to_pylist()
