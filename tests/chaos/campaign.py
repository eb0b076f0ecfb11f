"""Run pairs of commands on one store at the same moment, and count what is damaged, lost or reported wrongly.

    python tests/chaos/campaign.py --pairs 200 --json tally.json            # in a folder and on an S3 server of its own
    python tests/chaos/campaign.py --pairs 20 --where folder

Each pair starts in two processes that wait for each other. Beforehand, the two commands run alone and one after the other,
in both orders. Afterwards `verify` must find nothing. Each site-year, label and map must be what it was in one of these runs.
What a command makes must be there if it exited with 0. A command that failed must say why in one sentence. The last part reads
one year while it is overwritten (`--reads`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import types
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import stac_geoparquet.arrow
import torch
from moto.server import ThreadedMotoServer
from obstore.store import from_url

from minecube import cube, models
from minecube.catalog import ModelCard
from minecube.cli import main
from minecube.errors import CubeError

spec = importlib.util.spec_from_file_location("conftest", Path(__file__).parents[1] / "conftest.py")
assert spec
assert spec.loader
conftest = importlib.util.module_from_spec(spec)
sys.modules["conftest"] = conftest
spec.loader.exec_module(conftest)

YEARS = (2019, 2020, 2021, 2022)
# Processes are forked from a server that has imported everything, and has no threads.
_FORK = multiprocessing.get_context("forkserver")
_COMMANDS = [f"minecube.cli.{name}" for name in ("build", "label", "predict", "verify")]
_FORK.set_forkserver_preload(["torch", "moto.server", *_COMMANDS])


@dataclass(frozen=True)
class World:
    """Files that the commands need."""

    root: Path

    def build(self, years: str, scenes: str = "a", sites: str = "sites", *more: str) -> list[str]:
        """A build of these years from scene list `a` or `b`."""
        where = [
            "--catalog",
            str(self.root),
            "--sites",
            str(self.root / f"{sites}.geojson"),
            "--source",
            f"mine-{scenes}",
        ]
        return [
            "build",
            *where,
            "--years",
            years,
            "--scenes",
            str(self.root / f"lists-{scenes}"),
            *more,
        ]

    def label(self, which: str) -> list[str]:
        """Labels of polygons `a` or `b`."""
        return [
            "label",
            "--sites",
            "pit",
            "--polygons",
            str(self.root / f"polygons-{which}.geojson"),
        ]

    def predict(self, which: str, *more: str) -> list[str]:
        """A map of model `a` or `b`."""
        return ["predict", "--model", str(self.root / f"{which}.pt"), *more]


def make_world(root: Path) -> World:
    """Write scenes of two sources that differ by 60, sites, polygons and models."""
    pit = conftest.site_of("pit", 360000, 5600040, 48, 48)
    pond = conftest.site_of("pond", 363000, 5600040, 48, 48)
    for name, sites in (("sites", [pit, pond]), ("pit", [pit]), ("pond", [pond])):
        about = {"name": [s.id for s in sites], "margin": [0] * len(sites)}
        frame = gpd.GeoDataFrame(about, geometry=[s.geometry for s in sites], crs=4326)
        frame.to_file(root / f"{name}.geojson")
    bands = tuple(conftest.BANDS)
    texture = np.random.default_rng(0).integers(150, 2500, (10, 120, 420)).astype(np.uint16)
    sources = {}
    for letter, more in (("a", 0), ("b", 60)):
        archive = conftest.Archive(root / f"archive-{letter}", bands=bands)
        items = []
        for year in YEARS:
            for month in (5, 6, 7):
                grid = conftest.grid_at(359400, 5600640, 420, 120)
                pixels = {}
                for band, values in zip(bands, texture, strict=True):
                    step = conftest.NATIVE[band] // 10
                    pixels[band] = values[::step, ::step] + np.uint16(more + year - 2000)
                items.append(
                    archive.item(f"{year}-{month:02d}-0{month}T10:00:00", grid, pixels).to_dict()
                )
        path = root / f"items-{letter}.parquet"
        stac_geoparquet.arrow.to_parquet(
            stac_geoparquet.arrow.parse_stac_items_to_arrow(items), path
        )
        assets = {band: band for band in (*bands, "SCL")}
        sources[f"mine-{letter}"] = {
            "title": letter,
            "kind": "stac-geoparquet",
            "href": path.name,
            "collection": "test",
        }
        sources[f"mine-{letter}"] |= {"licence": "none", "assets": assets}
        frame = gpd.GeoDataFrame(
            geometry=[pit.geometry.buffer(-0.0005 if more else -0.001)], crs=4326
        )
        frame["site"] = "pit"
        frame.to_file(root / f"polygons-{letter}.geojson")
        torch.manual_seed(more)
        card = ModelCard(
            id="tiny",
            title="t",
            architecture="unet",
            options={"width": 2, "depth": 1},
            window_px=32,
            multiple_px=2,
        )
        mean = (1500.0,) * len(card.bands)
        trained = models.TrainedModel(
            card=card, network=models.build(card).eval(), mean=mean, std=mean, sites=("x",)
        )
        models.save(trained, root / f"{letter}.pt")
    (root / "sources.yaml").write_text(json.dumps(sources))
    return World(root)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def run(words: Sequence[str], store: str, gate: Any = None, delay_s: float = 0.0) -> Ended:
    """Run a command in a forked process, once `gate` opens."""
    with tempfile.TemporaryDirectory() as folder:
        process = _start(words, store, Path(folder), gate, delay_s)
        process.join(120)
        return _ended(process, Path(folder))


def run_pair(
    first: Sequence[str], second: Sequence[str], store: str, delay_s: float
) -> list[Ended]:
    """Run two commands that start at the same moment, the second `delay_s` later."""
    gate = _FORK.Barrier(2)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        started = [
            _start(first, store, Path(one), gate, 0.0),
            _start(second, store, Path(other), gate, delay_s),
        ]
        for process in started:
            process.join(120)
        return [
            _ended(process, Path(folder))
            for process, folder in zip(started, (one, other), strict=True)
        ]


def _start(words: Sequence[str], store: str, folder: Path, gate: Any, delay_s: float) -> Any:
    process = _FORK.Process(
        target=_command, args=([*words, "--store", store], folder, gate, delay_s, dict(os.environ))
    )
    process.start()
    return process


def _command(
    words: Sequence[str], folder: Path, gate: Any, delay_s: float, environment: dict[str, str]
) -> None:
    """Run a command in this process, which ends with it."""
    os.environ |= environment  # the server that forks keeps that of its start, before there was an object store
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    torch.set_num_threads(1)
    if gate is not None:
        gate.wait()
    time.sleep(delay_s)
    code = 99
    try:
        main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(process: Any, folder: Path) -> Ended:
    if process.exitcode is None:
        process.kill()
        process.join()
    return Ended(process.exitcode, (folder / "out").read_text(), (folder / "err").read_text())


def pixels_of(store: str) -> dict[str, str]:
    """What a reader sees of a store: a hash for each committed site-year, its labels, and each map."""
    seen: dict[str, str] = {}
    for site in cube.list_sites(cube.Store(store)):
        years = list(cube.read_markers(cube.Store(store), site))
        if not years:
            continue
        opened = cube.open_committed(cube.Store(store), site).load()
        for year in years:
            one = opened.sel(year=year)
            seen[f"{site} {year}"] = _hash(one.reflectance, one.clear_count, one.quality)
        seen[f"{site} labels"] = _hash(
            opened.footprint.isel(year=0), opened.footprint_fraction.isel(year=0)
        )
        for name in _maps(store, site):
            with contextlib.suppress(
                CubeError
            ):  # unfinished, or of an earlier build: not read either
                seen[f"{site} {name}"] = _hash(
                    cube.open_probability(cube.Store(store), site, name).sel(year=years[0])
                )
    return seen


def _maps(store: str, site: str) -> list[str]:
    found = (
        cube.Store(store)
        .open_objects()
        .list_with_delimiter(f"{site}/predictions")["common_prefixes"]
    )
    return [path.rstrip("/").rpartition("/")[2] for path in found]


def _hash(*arrays: Any) -> str:
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(a.to_numpy()).tobytes() for a in arrays)
    ).hexdigest()[:12]


@dataclass(frozen=True)
class Pair:
    """Two commands, and the store they begin with."""

    name: str
    before: str
    """empty, or built: 2019 of two sites, with labels."""
    first: list[str]
    second: list[str]


def pairs_of(world: World, out: Path) -> list[Pair]:
    """All kinds of pairs."""
    same = ["--name", "net"]
    replace = ["--overwrite"]
    pit = world.build("2019", "a", "pit")
    over_a = world.build("2019", "a", "pit", *replace)
    over_b = world.build("2019", "b", "pit", *replace)
    return [
        Pair("create one site twice", "empty", pit, pit),
        Pair("overwrite two ways", "built", over_a, over_b),
        Pair(
            "predict with two models under one name",
            "built",
            world.predict("a", *same),
            world.predict("b", *same),
        ),
        Pair("label two ways", "built", world.label("a"), world.label("b")),
        Pair(
            "extend by two years",
            "built",
            world.build("2020", "a", "pit"),
            world.build("2021", "a", "pit"),
        ),
        Pair("verify and overwrite", "built", ["verify"], over_b),
        Pair("create two sites", "empty", pit, world.build("2019", "a", "pond")),
        Pair("extend by the same year", "built", world.build("2020"), world.build("2020")),
        Pair("build two ways", "empty", pit, world.build("2019", "b", "pit")),
        Pair("label and extend", "built", world.label("b"), world.build("2020", "a", "pit")),
        Pair("label and overwrite", "built", world.label("b"), over_b),
        Pair("predict with one model", "built", world.predict("a"), world.predict("a")),
        Pair("predict with two models", "built", world.predict("a"), world.predict("b")),
        Pair("predict and overwrite", "built", world.predict("a"), over_b),
        Pair("pack and overwrite", "built", ["pack", "--out", str(out / "packed.zip")], over_b),
        Pair("verify and predict", "built", ["verify"], world.predict("b")),
    ]


def is_one_sentence(ended: Ended) -> bool:
    """Whether a command that failed says why, without a traceback."""
    lines = [line for line in ended.err.splitlines() if line.startswith("error:")]
    return ended.code in (1, 2) and bool(lines) and "Traceback" not in ended.err


@dataclass(frozen=True)
class Known:
    """What a pair may leave: states of the store after runs that did not meet."""

    before: dict[str, str]
    alone: tuple[dict[str, str], dict[str, str]]
    """After the first command alone, and after the second."""
    in_turn: list[dict[str, str]]
    """After both, in either order."""

    def values(self, name: str) -> set[str | None]:
        """What may be seen under a name."""
        return {state.get(name) for state in (self.before, *self.alone, *self.in_turn)}

    def wanted(self, which: int) -> dict[str, set[str | None]]:
        """By name: what may be seen of what a command makes, once it has exited with 0."""
        made = {name for name, value in self.alone[which].items() if self.before.get(name) != value}
        return {
            name: {state.get(name) for state in (self.alone[which], *self.in_turn)} for name in made
        }


@dataclass
class Campaign:
    """Stores to begin with."""

    world: World
    place: Callable[[str], str]
    known: dict[str, Known]

    @classmethod
    def prepare(cls, world: World, place: Callable[[str], str]) -> Campaign:
        """Make the store that pairs begin with."""
        store = place("built")
        for words in (world.build("2019"), world.label("a")):
            ended = run(words, store)
            assert ended.code == 0, ended
        return cls(world, place, {})

    def know(self, pair: Pair) -> Known:
        """Run the commands of a pair alone, and in turn."""
        if pair.name not in self.known:
            before = pixels_of(self.place("built")) if pair.before == "built" else {}
            alone = (self._after(pair, [pair.first]), self._after(pair, [pair.second]))
            in_turn = [
                self._after(pair, [pair.first, pair.second]),
                self._after(pair, [pair.second, pair.first]),
            ]
            self.known[pair.name] = Known(before, alone, in_turn)
        return self.known[pair.name]

    def _after(self, pair: Pair, commands: Sequence[list[str]]) -> dict[str, str]:
        """What is seen of a store after commands that do not meet."""
        store = self._fresh(pair, "known")
        for words in commands:
            run(words, store)
        seen = pixels_of(store)
        remove_store(store)
        return seen

    def _fresh(self, pair: Pair, name: str) -> str:
        store = self.place(name)
        if pair.before == "built":
            copy_store(self.place("built"), store)
        return store

    def try_pair(self, pair: Pair, number: int, delay_s: float) -> dict[str, list[str]]:
        """Run a pair on a fresh store, and list what is damaged, lost or reported wrongly."""
        known = self.know(pair)
        store = self._fresh(pair, f"pair-{number}")
        ended = run_pair(pair.first, pair.second, store, delay_s)
        seen = pixels_of(store) if has_store(store) else {}
        found: dict[str, list[str]] = {"damaged": [], "lost": [], "dishonest_exits": []}
        if seen:
            report = cube.verify(cube.Store(store))
            found["damaged"] += [str(f) for f in report.findings if f.kind != "stale"]
        found["damaged"] += [
            f"{name} is of no command"
            for name, value in seen.items()
            if value not in known.values(name)
        ]
        found["lost"] += [
            name for name in known.before if name not in seen and None not in known.values(name)
        ]
        # Two builds may each leave a year to the other, and say so: nothing is lost if each is there.
        lacking = [
            n
            for which in (0, 1)
            for n, values in known.wanted(which).items()
            if seen.get(n) not in values
        ]
        if lacking and all(one.code for one in ended):
            found["lost"].append(f"both failed, without {lacking}: {ended}")
        for which, one in enumerate(ended):
            wrong = {
                name for name, values in known.wanted(which).items() if seen.get(name) not in values
            }
            if one.code == 0 and wrong:
                found["dishonest_exits"].append(f"exit 0 without {wrong}: {one.out}{one.err}")
            elif one.code != 0 and not is_one_sentence(one):
                found["dishonest_exits"].append(
                    f"exit {one.code}: {one.out[-500:]}{one.err[-3000:]}"
                )
        remove_store(store)
        return found


def has_store(store: str) -> bool:
    """Whether there is a site in a store."""
    try:
        return bool(cube.list_sites(cube.Store(store)))
    except CubeError:
        return False


def copy_store(source: str, target: str) -> None:
    """Copy all objects of a store."""
    folder = cube.Store(source).path
    if folder is not None:
        shutil.copytree(folder, target)
        return
    there = from_url(target)
    objects = cube.Store(source).open_objects()
    for batch in objects.list():
        for entry in batch:
            there.put(entry["path"], bytes(objects.get(entry["path"]).bytes()))


def remove_store(store: str) -> None:
    """Remove all objects of a store."""
    folder = cube.Store(store).path
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    objects = cube.Store(store).open_objects()
    paths = [entry["path"] for batch in objects.list() for entry in batch]
    for path in paths:
        objects.delete(path)


def read_during_overwrite(campaign: Campaign, reads: int) -> dict[str, int]:
    """Read a year while it is replaced again and again: reads, those refused, those with pixels of two builds, builds seen."""
    known = campaign.know(
        next(
            pair
            for pair in pairs_of(campaign.world, campaign.world.root)
            if pair.name == "overwrite two ways"
        )
    )
    store = campaign.place("read")
    copy_store(campaign.place("built"), store)
    writer = _FORK.Process(target=_overwrite_for_ever, args=(campaign.world, store))
    writer.start()
    tally: Counter[str] = Counter()
    seen = set()
    try:
        for _ in range(reads):
            try:
                opened = cube.open_committed(cube.Store(store), "pit").sel(year=2019)
                pixels = _hash(opened.reflectance, opened.clear_count, opened.quality)
            except CubeError:
                tally["refused"] += 1
                continue
            seen.add(pixels)
            tally["mixed"] += pixels not in known.values("pit 2019")
    finally:
        writer.kill()
        writer.join()
    return {
        "reads": reads,
        "refused": tally["refused"],
        "mixed_reads": tally["mixed"],
        "builds_seen": len(seen),
    }


def _overwrite_for_ever(world: World, store: str) -> None:
    sys.stdout = sys.stderr = io.StringIO()
    while True:
        for letter in "ba":
            with contextlib.suppress(SystemExit):
                main([*world.build("2019", letter, "pit", "--overwrite"), "--store", store])


@contextlib.contextmanager
def places(where: str, root: Path) -> Iterator[Callable[[str], str]]:
    """Names of stores in a folder, or on an S3 server that ends with the block."""
    if where == "folder":
        yield lambda name: str(root / f"{name}.zarr")
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }
    request = urllib.request.Request(f"http://127.0.0.1:{port}/chaos", method="PUT")
    urllib.request.urlopen(request, timeout=20)
    try:
        yield lambda name: f"s3://chaos/{name}.zarr"
    finally:
        server.stop()


def run_campaign(
    pairs: int, where: Sequence[str], seed: int, reads: int, root: Path
) -> dict[str, Any]:
    """Run so many pairs, shared out to the places, and return the tally."""
    world = make_world(root)
    kinds = pairs_of(world, root)
    delays = random.Random(seed)
    tally: dict[str, Any] = {
        "pairs": 0,
        "damaged": 0,
        "lost": 0,
        "dishonest_exits": 0,
        "examples": [],
    }
    for place_name in where:
        with places(place_name, root) as place:
            campaign = Campaign.prepare(world, place)
            for number in range(pairs // len(where)):
                pair = kinds[number % len(kinds)]
                delay_s = delays.choice((0.0, 0.0, delays.uniform(0, 0.3)))
                found = campaign.try_pair(pair, number, delay_s)
                wrong = ", ".join(what for what, each in found.items() if each)
                print(
                    f"{place_name} {number + 1}: {pair.name}{': ' if wrong else ''}{wrong}",
                    file=sys.stderr,
                    flush=True,
                )
                tally["pairs"] += 1
                for what, each in found.items():
                    tally[what] += bool(each)
                    tally["examples"] += [
                        f"{place_name}, {pair.name}: {what}: {text}" for text in each
                    ]
            if reads and place_name == "folder":
                tally |= read_during_overwrite(campaign, reads)
    return tally


def command_line() -> types.SimpleNamespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=200, help="pairs in all, shared out to the places"
    )
    parser.add_argument(
        "--reads", type=int, default=10_000, help="reads of a year that is being overwritten"
    )
    parser.add_argument("--where", default="folder,s3", help="folder, s3 or both")
    parser.add_argument("--seed", type=int, default=0, help="of the delays between two commands")
    parser.add_argument("--json", type=Path, help="write the tally to this file")
    return types.SimpleNamespace(**vars(parser.parse_args()))


if __name__ == "__main__":
    asked = command_line()
    with tempfile.TemporaryDirectory() as made_in:
        result = run_campaign(
            asked.pairs, asked.where.split(","), asked.seed, asked.reads, Path(made_in)
        )
    examples = result.pop("examples")
    for example in examples[:20]:
        print(example)
    print(json.dumps(result))
    if asked.json:
        asked.json.write_text(json.dumps({**result, "examples": examples}, indent=2) + "\n")
    sys.exit(
        any(result[what] for what in ("damaged", "lost", "dishonest_exits"))
        or result.get("mixed_reads", 0) > 0
    )
