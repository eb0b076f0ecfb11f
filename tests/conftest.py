"""A small archive whose pixels are known, and the real data where it is at hand."""

from __future__ import annotations

import logging
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from odc.geo.geobox import GeoBox

from known_scenes import Archive, site_of
from known_servers import write_band
from minecube import network, places
from minecube.catalog import Site
from minecube.reader import remote
from minecube.scenes import api as stac_api
from minecube.scenes import item_file

# The same examples each time: a run that fails can be repeated.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

REAL_DATA = Path(
    os.environ.get("MINECUBE_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data"
)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real products, kept outside the repository: CONTRIBUTING.md, Tests."""
    if not REAL_DATA.is_dir():
        pytest.skip("no real products: MINECUBE_REAL_DATA names no folder")
    return REAL_DATA


@pytest.fixture(autouse=True)
def our_log() -> None:
    """Undo what command lines of this process have set: the level and the handlers of our log."""
    ours = logging.getLogger("minecube")
    ours.setLevel(logging.NOTSET)
    ours.handlers = []


@pytest.fixture
def site() -> Site:
    """240 x 180 pixels, not square, so that a swap of x and y is seen."""
    return site_of("mine", 360000, 5600040, 240, 180)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "archive")


@pytest.fixture
def band(tmp_path: Path) -> tuple[Path, GeoBox, np.ndarray]:
    """A folder with a tiled file of one band, and its grid and pixels."""
    return write_band(tmp_path)


@pytest.fixture
def all_hosts_are_tried() -> None:
    """No host of an earlier test is remembered as unreachable."""
    network.forget_unreachable()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket of an S3 server of this process."""
    from moto.server import ThreadedMotoServer  # an import of seconds

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        endpoint = f"http://127.0.0.1:{port}"
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        # What is stored belongs to the process, not to the server.
        for method, path in (("POST", "moto-api/reset"), ("PUT", "mines")):
            urllib.request.urlopen(
                urllib.request.Request(f"{endpoint}/{path}", method=method), timeout=20
            )
        places._client.cache_clear()  # its clients know the server of an earlier test
        yield "s3://mines"
    finally:
        server.stop()


class Clock:
    """A clock that only pauses move, so that a busy machine changes no figure."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, seconds: float) -> bool:
        self.sleep(seconds)
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of everything that waits for a host."""
    still = Clock()
    for module in (network, stac_api, item_file, remote):
        monkeypatch.setattr(module, "time", still)
    monkeypatch.setattr(remote, "interruption", still)
    return still


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of torch: windows as small as the tests' are slower with more, far slower on a busy machine."""
    import torch  # which many tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated archive with its sites, for command lines. Tests must not change it."""
    from known_builds import make_world  # an import of seconds

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def built(world: Path) -> Path:
    """The cubes of that archive, built and labelled. Tests must not change them."""
    from known_builds import build_world

    return build_world(world)
