"""Importing the published archive: how much of it is asked for, how long that takes, and whether what comes of it is whole.

Run as `python benchmarks/release.py [--json FILE]`. It makes an archive of 20 sites and ten years in the release's layout,
serves it on a loopback port with 20 ms before each answer, imports it, kills an import halfway and lets it go on, and reads the
same members with remotezip, one after the other, as its users would.
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
    """Make, import, kill, resume, compare; print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--side",
        type=int,
        default=480,
        help="pixels a side of the images; the release's have about 800",
    )
    parser.add_argument(
        "--stored", action="store_true", help="members lie in the archive as they are, not deflated"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        figures = measured(Path(place), asked.side, packed=not asked.stored)
    print(format_table(("figure", "value"), list(figures.items())))
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measured(place: Path, side: int, *, packed: bool) -> dict[str, Any]:
    """All figures, by name."""
    (place / "served").mkdir()
    path = place / "served" / "EuroMineNet.zip"
    masks = write_release(path, SITES, YEARS, shape=(side, side), packed=packed)
    with zipfile.ZipFile(path) as archive:
        labels = sum(m.compress_size for m in archive.infolist() if "/label/" in m.filename)
    size = path.stat().st_size
    with served(path.parent) as url:
        start = time.perf_counter()
        imported(f"{url}/EuroMineNet.zip", place / "at_once")
        seconds = time.perf_counter() - start
        asked = counts(url)
    with served(path.parent) as url:
        killed_halfway(url, place / "resumed", asked["requests"] // 2)
        before = counts(url)["bytes"]
        imported(f"{url}/EuroMineNet.zip", place / "resumed")
        again = counts(url)["bytes"]
    with served(path.parent) as url:
        start = time.perf_counter()
        one_by_one(f"{url}/EuroMineNet.zip")
        others_s, others = time.perf_counter() - start, counts(url)
    return {
        "archive_mb": round(size / 1e6, 1),
        "labels_mb": round(labels / 1e6, 2),
        "read_mb": round(asked["bytes"] / 1e6, 2),
        "requests": asked["requests"],
        "bytes_fraction_without_labels": round((asked["bytes"] - labels) / size, 5),
        "seconds": round(seconds, 1),
        "labels_identical": all(labels_of(place / "at_once", masks)),
        "resumed_identical": same(place / "at_once", place / "resumed"),
        "read_until_killed_mb": round(before / 1e6, 2),
        "read_after_mb": round((again - before) / 1e6, 2),
        "remotezip_seconds": round(others_s, 1),
        "remotezip_mb": round(others["bytes"] / 1e6, 2),
        "remotezip_requests": others["requests"],
    }


def imported(url: str, out: Path) -> None:
    """The command line's import."""
    subprocess.run(
        [*MINECUBE, "release", "import", url, "--out", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


MINECUBE = [sys.executable, "-c", "from minecube.cli import main; main()"]


def killed_halfway(url: str, out: Path, requests: int) -> None:
    """The same, killed once the server was asked so often."""
    process = subprocess.Popen(
        [*MINECUBE, "release", "import", f"{url}/EuroMineNet.zip", "--out", str(out)]
    )
    while process.poll() is None and counts(url)["requests"] < requests:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit("the import was over before it could be killed")


def one_by_one(url: str) -> None:
    """Labels, and of each image as much as its header takes, with remotezip."""
    with remotezip.RemoteZip(url) as archive:
        for member in archive.infolist():
            with archive.open(member) as content:
                content.read() if "/label/" in member.filename else content.read(16384)


def labels_of(folder: Path, masks: Masks) -> Iterator[bool]:
    """Whether polygons, drawn on their image's grid, are the labels that went in."""
    made = release.open_import(folder)
    rows, polygons = made.years.set_index(["site", "year"]), made.labels[~made.labels["mapped"]]
    for (site, year), mask in masks.items():
        row = rows.loc[(site, year)]
        own = polygons[(polygons["site"] == site) & (polygons["year"] == year)]
        drawn = features.rasterize(
            own.geometry, mask.shape, transform=Affine(*row["transform"]), default_value=255
        )
        yield bool(np.array_equal(drawn, mask))


def same(one: Path, other: Path) -> bool:
    """Whether two imports are the same files, but for the port in the archive's URL."""
    names = sorted(p.name for p in one.iterdir())
    tables = [n for n in names if n != "import.json"]
    abouts = [
        json.loads((folder / "import.json").read_text()) | {"archive": ""}
        for folder in (one, other)
    ]
    listed = sorted(p.name for p in other.iterdir()) == names
    return (
        listed
        and abouts[0] == abouts[1]
        and all((one / n).read_bytes() == (other / n).read_bytes() for n in tables)
    )


def counts(url: str) -> dict[str, int]:
    """What the server was asked, and gave."""
    with urllib.request.urlopen(f"{url}/counts") as answer:
        found: dict[str, int] = json.load(answer)
    return found


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """URL of the folder on a loopback port."""
    command = [sys.executable, str(SERVER), str(folder), "--delay", str(DELAY_S)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        if server.stdout is None:
            raise SystemExit("the server says no port")
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.terminate()
        server.communicate()


if __name__ == "__main__":
    main()
