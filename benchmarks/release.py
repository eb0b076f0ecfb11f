"""Measure the import of the published archive: bytes, requests, seconds, and correct labels.

Run `python benchmarks/release.py [--json FILE]`. The script makes an archive of 20 sites and ten
years in the release's layout. A loopback server delays each answer by 20 ms. The script imports
the archive, then kills another import halfway and resumes it. It also reads the same members
one by one with remotezip, as users of the archive would.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import remotezip
from affine import Affine
from rasterio import features

from minecube import release
from minecube.jobs.tables import format_table
from minecube.simulate.release import Masks, write_release

SITES = {
    f"{country}_{n}": (west + n * 0.5, north)
    for country, west, north in (("Germany", 8, 51), ("Spain", -6, 40))
    for n in range(1, 11)
}
YEARS = range(2015, 2025)
DELAY_S = 0.02
SERVER = Path(__file__).parents[1] / "tests" / "range_server.py"


def main() -> None:
    """Run the benchmark, print the figures and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--side",
        type=int,
        default=480,
        help="side of the images in pixels (480; about 800 in the release)",
    )
    parser.add_argument("--stored", action="store_true", help="store members without compression")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_import(Path(folder), options.side, compressed=not options.stored)
    print(format_table(("figure", "value"), list(figures.items())))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measure_import(folder: Path, side: int, *, compressed: bool) -> dict[str, Any]:
    """Measure everything. Returns the figures by name."""
    (folder / "served").mkdir()
    path = folder / "served" / "EuroMineNet.zip"
    masks = write_release(path, SITES, YEARS, shape=(side, side), packed=compressed)
    with zipfile.ZipFile(path) as archive:
        label_bytes = sum(m.compress_size for m in archive.infolist() if "/label/" in m.filename)
    archive_bytes = path.stat().st_size
    with serve_folder(path.parent) as url:
        start = time.perf_counter()
        import_release(f"{url}/EuroMineNet.zip", folder / "at_once")
        import_s = time.perf_counter() - start
        import_counts = fetch_counts(url)
    with serve_folder(path.parent) as url:
        kill_import(url, folder / "resumed", import_counts["requests"] // 2)
        killed_bytes = fetch_counts(url)["bytes"]
        import_release(f"{url}/EuroMineNet.zip", folder / "resumed")
        total_bytes = fetch_counts(url)["bytes"]
    with serve_folder(path.parent) as url:
        start = time.perf_counter()
        read_with_remotezip(f"{url}/EuroMineNet.zip")
        remotezip_s = time.perf_counter() - start
        remotezip_counts = fetch_counts(url)
    return {
        "archive_mb": round(archive_bytes / 1e6, 1),
        "labels_mb": round(label_bytes / 1e6, 2),
        "read_mb": round(import_counts["bytes"] / 1e6, 2),
        "requests": import_counts["requests"],
        "bytes_fraction_without_labels": round(
            (import_counts["bytes"] - label_bytes) / archive_bytes, 5
        ),
        "seconds": round(import_s, 1),
        "labels_identical": all(check_labels(folder / "at_once", masks)),
        "resumed_identical": have_equal_files(folder / "at_once", folder / "resumed"),
        "read_until_killed_mb": round(killed_bytes / 1e6, 2),
        "read_after_mb": round((total_bytes - killed_bytes) / 1e6, 2),
        "remotezip_seconds": round(remotezip_s, 1),
        "remotezip_mb": round(remotezip_counts["bytes"] / 1e6, 2),
        "remotezip_requests": remotezip_counts["requests"],
    }


def import_release(url: str, out: Path) -> None:
    """Import the archive with the command line."""
    subprocess.run(
        [*MINECUBE, "release", "import", url, "--out", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


MINECUBE = [sys.executable, "-c", "from minecube.cli import main; main()"]


def kill_import(url: str, out: Path, requests: int) -> None:
    """Start an import and kill it after this many requests."""
    process = subprocess.Popen(
        [*MINECUBE, "release", "import", f"{url}/EuroMineNet.zip", "--out", str(out)]
    )
    while process.poll() is None and fetch_counts(url)["requests"] < requests:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit("the import ended before it was killed; use a larger --side")


def read_with_remotezip(url: str) -> None:
    """Read all labels and the headers of all images with remotezip."""
    with remotezip.RemoteZip(url) as archive:
        for member in archive.infolist():
            with archive.open(member) as content:
                content.read() if "/label/" in member.filename else content.read(16384)


def check_labels(folder: Path, masks: Masks) -> Iterator[bool]:
    """Check for each site-year that rasterized polygons equal the original label."""
    imported_release = release.open_import(folder)
    rows = imported_release.years.set_index(["site", "year"])
    polygons = imported_release.labels[~imported_release.labels["mapped"]]
    for (site, year), mask in masks.items():
        row = rows.loc[(site, year)]
        site_year_polygons = polygons[(polygons["site"] == site) & (polygons["year"] == year)]
        drawn = features.rasterize(
            site_year_polygons.geometry,
            mask.shape,
            transform=Affine(*row["transform"]),
            default_value=255,
        )
        yield bool(np.array_equal(drawn, mask))


def have_equal_files(first: Path, second: Path) -> bool:
    """Check that two imports have equal files, except for the port in the archive's URL."""
    names = sorted(p.name for p in first.iterdir())
    tables = [name for name in names if name != "import.json"]
    descriptions = [
        json.loads((folder / "import.json").read_text()) | {"archive": ""}
        for folder in (first, second)
    ]
    has_same_names = sorted(p.name for p in second.iterdir()) == names
    return (
        has_same_names
        and descriptions[0] == descriptions[1]
        and all((first / name).read_bytes() == (second / name).read_bytes() for name in tables)
    )


def fetch_counts(url: str) -> dict[str, int]:
    """Return the server's counts of requests and bytes."""
    with urllib.request.urlopen(f"{url}/counts") as answer:
        result: dict[str, int] = json.load(answer)
    return result


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve a folder on a loopback port. Yields its URL."""
    command = [sys.executable, str(SERVER), str(folder), "--delay", str(DELAY_S)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        if server.stdout is None:
            raise SystemExit("the server printed no port")
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.terminate()
        server.communicate()


if __name__ == "__main__":
    main()
