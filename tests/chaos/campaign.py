"""Run pairs of commands on one store at the same moment, and count errors.

    python tests/chaos/campaign.py --pairs 200 --json tally.json
    python tests/chaos/campaign.py --pairs 20 --where folder

Stores are in a folder and on the script's own S3 server. The two commands of a pair run in two
processes that start together. The script first runs each command alone, and both in turn, in
both orders. It then checks the store of the pair:

- `verify` finds no damage.
- Each site-year, label and map equals its state in one of the separate runs.
- If a command exits with 0, its results are there.
- If a command fails, it reports the reason in one sentence.

Last, the script reads a year again and again while another process overwrites it (`--reads`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from typing import Any, NoReturn

import geopandas as gpd
import numpy as np
import stac_geoparquet.arrow
import torch
from moto.server import ThreadedMotoServer
from obstore.store import from_url

from minecube import cube, models
from minecube.catalog import BANDS, ModelCard
from minecube.cli import main
from minecube.errors import CubeError

# The tests of the folder above share these scenes.
sys.path.insert(0, str(Path(__file__).parents[1]))
from known_scenes import NATIVE, Archive, grid_at, site_of

YEARS = (2019, 2020, 2021, 2022)
# Processes fork from a server that has imported all modules and has no threads.
_FORK = multiprocessing.get_context("forkserver")
_COMMANDS = [f"minecube.cli.{name}" for name in ("build", "label", "predict", "verify")]
_FORK.set_forkserver_preload(["torch", "moto.server", *_COMMANDS])


@dataclass(frozen=True)
class World:
    """Files that the commands need."""

    root: Path

    def build(self, years: str, scenes: str = "a", sites: str = "sites", *more: str) -> list[str]:
        """Return the words of a build from scene list `a` or `b`."""
        inputs = [
            "--catalog",
            str(self.root),
            "--sites",
            str(self.root / f"{sites}.geojson"),
            "--source",
            f"mine-{scenes}",
        ]
        return [
            "build",
            *inputs,
            "--years",
            years,
            "--scenes",
            str(self.root / f"lists-{scenes}"),
            *more,
        ]

    def label(self, letter: str) -> list[str]:
        """Return the words that label with polygons `a` or `b`."""
        return [
            "label",
            "--sites",
            "pit",
            "--polygons",
            str(self.root / f"polygons-{letter}.geojson"),
        ]

    def predict(self, letter: str, *more: str) -> list[str]:
        """Return the words that map with model `a` or `b`."""
        return ["predict", "--model", str(self.root / f"{letter}.pt"), *more]


def make_world(root: Path) -> World:
    """Write scenes of two sources, sites, polygons and models.

    The pixels of the two sources differ by 60.
    """
    pit = site_of("pit", 360000, 5600040, 48, 48)
    pond = site_of("pond", 363000, 5600040, 48, 48)
    for name, sites in (("sites", [pit, pond]), ("pit", [pit]), ("pond", [pond])):
        columns = {"name": [s.id for s in sites], "margin": [0] * len(sites)}
        frame = gpd.GeoDataFrame(columns, geometry=[s.geometry for s in sites], crs=4326)
        frame.to_file(root / f"{name}.geojson")
    bands = tuple(BANDS)
    texture = np.random.default_rng(0).integers(150, 2500, (10, 120, 420)).astype(np.uint16)
    sources = {}
    for letter, increment in (("a", 0), ("b", 60)):
        archive = Archive(root / f"archive-{letter}", bands=bands)
        items = []
        for year in YEARS:
            for month in (5, 6, 7):
                grid = grid_at(359400, 5600640, 420, 120)
                pixels = {}
                for band, values in zip(bands, texture, strict=True):
                    step = NATIVE[band] // 10
                    pixels[band] = values[::step, ::step] + np.uint16(increment + year - 2000)
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
            geometry=[pit.geometry.buffer(-0.0005 if increment else -0.001)], crs=4326
        )
        frame["site"] = "pit"
        frame.to_file(root / f"polygons-{letter}.geojson")
        torch.manual_seed(increment)
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
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def run_command(
    words: Sequence[str], store: str, gate: Any = None, delay_s: float = 0.0
) -> CommandResult:
    """Run a command in a forked process as soon as `gate` opens."""
    with tempfile.TemporaryDirectory() as folder:
        process = _start(words, store, Path(folder), gate, delay_s)
        process.join(120)
        return _collect_result(process, Path(folder))


def run_pair(
    first: Sequence[str], second: Sequence[str], store: str, delay_s: float
) -> list[CommandResult]:
    """Start two commands at the same moment, the second `delay_s` later."""
    gate = _FORK.Barrier(2)
    with (
        tempfile.TemporaryDirectory() as first_folder,
        tempfile.TemporaryDirectory() as second_folder,
    ):
        processes = [
            _start(first, store, Path(first_folder), gate, 0.0),
            _start(second, store, Path(second_folder), gate, delay_s),
        ]
        for process in processes:
            process.join(120)
        return [
            _collect_result(process, Path(folder))
            for process, folder in zip(processes, (first_folder, second_folder), strict=True)
        ]


def _start(words: Sequence[str], store: str, folder: Path, gate: Any, delay_s: float) -> Any:
    process = _FORK.Process(
        target=_run_in_child,
        args=([*words, "--store", store], folder, gate, delay_s, dict(os.environ)),
    )
    process.start()
    return process


def _run_in_child(
    words: Sequence[str], folder: Path, gate: Any, delay_s: float, environment: dict[str, str]
) -> None:
    """Run a command and end this process with the command's exit code."""
    # The fork server started before the object store, so its environment is too old.
    os.environ |= environment
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    torch.set_num_threads(1)
    if gate is not None:
        gate.wait()
    time.sleep(delay_s)
    exit_with(words)


def exit_with(words: Sequence[str]) -> NoReturn:
    """Run a command, and end this process with its exit code."""
    code = 99
    try:
        main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _collect_result(process: Any, folder: Path) -> CommandResult:
    if process.exitcode is None:
        process.kill()
        process.join()
    return CommandResult(
        process.exitcode, (folder / "out").read_text(), (folder / "err").read_text()
    )


def hash_store(store: str) -> dict[str, str]:
    """Hash each committed site-year, the labels and each map of a store, as readers see them."""
    hashes: dict[str, str] = {}
    for site in cube.list_sites(cube.Store(store)):
        years = list(cube.read_markers(cube.Store(store), site))
        if not years:
            continue
        site_cube = cube.open_committed(cube.Store(store), site).load()
        for year in years:
            year_cube = site_cube.sel(year=year)
            hashes[f"{site} {year}"] = _hash(
                year_cube.reflectance, year_cube.clear_count, year_cube.quality
            )
        hashes[f"{site} labels"] = _hash(
            site_cube.footprint.isel(year=0), site_cube.footprint_fraction.isel(year=0)
        )
        for name in _list_maps(store, site):
            # Readers cannot open unfinished maps and maps of earlier builds.
            with contextlib.suppress(CubeError):
                hashes[f"{site} {name}"] = _hash(
                    cube.open_probability(cube.Store(store), site, name).sel(year=years[0])
                )
    return hashes


def _list_maps(store: str, site: str) -> list[str]:
    prefixes = (
        cube.Store(store)
        .open_objects()
        .list_with_delimiter(f"{site}/predictions")["common_prefixes"]
    )
    return [path.rstrip("/").rpartition("/")[2] for path in prefixes]


def _hash(*arrays: Any) -> str:
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(a.to_numpy()).tobytes() for a in arrays)
    ).hexdigest()[:12]


@dataclass(frozen=True)
class Pair:
    """Two commands and the store that they begin with."""

    name: str
    before: str
    """`empty`, or `built`: the year 2019 of two sites, with labels."""
    first: list[str]
    second: list[str]


def list_pairs(world: World, out: Path) -> list[Pair]:
    """List all kinds of pairs."""
    same_name = ["--name", "net"]
    overwrite = ["--overwrite"]
    pit = world.build("2019", "a", "pit")
    over_a = world.build("2019", "a", "pit", *overwrite)
    over_b = world.build("2019", "b", "pit", *overwrite)
    return [
        Pair("create one site twice", "empty", pit, pit),
        Pair("overwrite two ways", "built", over_a, over_b),
        Pair(
            "predict with two models under one name",
            "built",
            world.predict("a", *same_name),
            world.predict("b", *same_name),
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


def reports_one_error(result: CommandResult) -> bool:
    """Check that a failed command reports an error, without a traceback."""
    lines = [line for line in result.err.splitlines() if line.startswith("error:")]
    return result.code in (1, 2) and bool(lines) and "Traceback" not in result.err


@dataclass(frozen=True)
class KnownStates:
    """States of a store after runs of a pair's commands that do not overlap."""

    before: dict[str, str]
    after_one: tuple[dict[str, str], dict[str, str]]
    """State after the first command alone, and after the second alone."""
    after_both: list[dict[str, str]]
    """States after both commands, in either order."""

    def allowed_hashes(self, name: str) -> set[str | None]:
        """Return the allowed hashes of a name."""
        return {state.get(name) for state in (self.before, *self.after_one, *self.after_both)}

    def required_hashes(self, index: int) -> dict[str, set[str | None]]:
        """Return the required hashes of all results of a command that exits with 0, by name."""
        names = {
            name for name, value in self.after_one[index].items() if self.before.get(name) != value
        }
        return {
            name: {state.get(name) for state in (self.after_one[index], *self.after_both)}
            for name in names
        }


@dataclass
class Campaign:
    """Runs pairs on copies of one initial store."""

    world: World
    locate: Callable[[str], str]
    known_states: dict[str, KnownStates]

    @classmethod
    def prepare(cls, world: World, locate: Callable[[str], str]) -> Campaign:
        """Build the initial store."""
        store = locate("built")
        for words in (world.build("2019"), world.label("a")):
            result = run_command(words, store)
            assert result.code == 0, result
        return cls(world, locate, {})

    def find_known_states(self, pair: Pair) -> KnownStates:
        """Run the commands of a pair alone and in turn."""
        if pair.name not in self.known_states:
            before = hash_store(self.locate("built")) if pair.before == "built" else {}
            after_one = (
                self._hash_after(pair, [pair.first]),
                self._hash_after(pair, [pair.second]),
            )
            after_both = [
                self._hash_after(pair, [pair.first, pair.second]),
                self._hash_after(pair, [pair.second, pair.first]),
            ]
            self.known_states[pair.name] = KnownStates(before, after_one, after_both)
        return self.known_states[pair.name]

    def _hash_after(self, pair: Pair, commands: Sequence[list[str]]) -> dict[str, str]:
        """Hash a store after running commands one after the other."""
        store = self._make_store(pair, "known")
        for words in commands:
            run_command(words, store)
        hashes = hash_store(store)
        remove_store(store)
        return hashes

    def _make_store(self, pair: Pair, name: str) -> str:
        store = self.locate(name)
        if pair.before == "built":
            copy_store(self.locate("built"), store)
        return store

    def try_pair(self, pair: Pair, number: int, delay_s: float) -> dict[str, list[str]]:
        """Run a pair on a new store. Returns what is damaged, lost or reported wrongly."""
        known = self.find_known_states(pair)
        store = self._make_store(pair, f"pair-{number}")
        results = run_pair(pair.first, pair.second, store, delay_s)
        hashes = hash_store(store) if has_store(store) else {}
        problems: dict[str, list[str]] = {"damaged": [], "lost": [], "dishonest_exits": []}
        if hashes:
            report = cube.verify(cube.Store(store))
            problems["damaged"] += [str(f) for f in report.findings if f.kind != "stale"]
        problems["damaged"] += [
            f"{name} matches no command"
            for name, value in hashes.items()
            if value not in known.allowed_hashes(name)
        ]
        problems["lost"] += [
            name
            for name in known.before
            if name not in hashes and None not in known.allowed_hashes(name)
        ]
        # Two builds may both fail, because each leaves a year to the other.
        # That is no loss if all years are there.
        missing = [
            name
            for index in (0, 1)
            for name, values in known.required_hashes(index).items()
            if hashes.get(name) not in values
        ]
        if missing and all(command.code for command in results):
            problems["lost"].append(f"both failed, without {missing}: {results}")
        for index, command in enumerate(results):
            missing_results = {
                name
                for name, values in known.required_hashes(index).items()
                if hashes.get(name) not in values
            }
            if command.code == 0 and missing_results:
                problems["dishonest_exits"].append(
                    f"exit 0 without {missing_results}: {command.out}{command.err}"
                )
            elif command.code != 0 and not reports_one_error(command):
                problems["dishonest_exits"].append(
                    f"exit {command.code}: {command.out[-500:]}{command.err[-3000:]}"
                )
        remove_store(store)
        return problems


def has_store(store: str) -> bool:
    """Check whether a store has a site."""
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
    target_store = from_url(target)
    source_store = cube.Store(source).open_objects()
    for batch in source_store.list():
        for entry in batch:
            target_store.put(entry["path"], bytes(source_store.get(entry["path"]).bytes()))


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
    """Read a year many times while another process overwrites it.

    Returns the numbers of reads, refused reads, reads with mixed builds, and builds seen.
    """
    known = campaign.find_known_states(
        next(
            pair
            for pair in list_pairs(campaign.world, campaign.world.root)
            if pair.name == "overwrite two ways"
        )
    )
    store = campaign.locate("read")
    copy_store(campaign.locate("built"), store)
    writer = _FORK.Process(target=_overwrite_repeatedly, args=(campaign.world, store))
    writer.start()
    tally: Counter[str] = Counter()
    builds = set()
    try:
        for _ in range(reads):
            try:
                year_cube = cube.open_committed(cube.Store(store), "pit").sel(year=2019)
                pixels = _hash(year_cube.reflectance, year_cube.clear_count, year_cube.quality)
            except CubeError:
                tally["refused"] += 1
                continue
            builds.add(pixels)
            tally["mixed"] += pixels not in known.allowed_hashes("pit 2019")
    finally:
        writer.kill()
        writer.join()
    return {
        "reads": reads,
        "refused": tally["refused"],
        "mixed_reads": tally["mixed"],
        "builds_seen": len(builds),
    }


def _overwrite_repeatedly(world: World, store: str) -> None:
    sys.stdout = sys.stderr = io.StringIO()
    while True:
        for letter in "ba":
            with contextlib.suppress(SystemExit):
                main([*world.build("2019", letter, "pit", "--overwrite"), "--store", store])


@contextlib.contextmanager
def open_place(where: str, root: Path) -> Iterator[Callable[[str], str]]:
    """Start a folder or an S3 server for stores. Yields a function from name to address."""
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
    """Run pairs, divided evenly among the places. Returns the tally."""
    world = make_world(root)
    kinds = list_pairs(world, root)
    delays = random.Random(seed)
    tally: dict[str, Any] = {
        "pairs": 0,
        "damaged": 0,
        "lost": 0,
        "dishonest_exits": 0,
        "examples": [],
    }
    for place_name in where:
        with open_place(place_name, root) as locate:
            campaign = Campaign.prepare(world, locate)
            for number in range(pairs // len(where)):
                pair = kinds[number % len(kinds)]
                delay_s = delays.choice((0.0, 0.0, delays.uniform(0, 0.3)))
                problems = campaign.try_pair(pair, number, delay_s)
                kinds_of_problems = ", ".join(kind for kind, texts in problems.items() if texts)
                suffix = f": {kinds_of_problems}" if kinds_of_problems else ""
                print(
                    f"{place_name} {number + 1}: {pair.name}{suffix}",
                    file=sys.stderr,
                    flush=True,
                )
                tally["pairs"] += 1
                for kind, texts in problems.items():
                    tally[kind] += bool(texts)
                    tally["examples"] += [
                        f"{place_name}, {pair.name}: {kind}: {text}" for text in texts
                    ]
            if reads and place_name == "folder":
                tally |= read_during_overwrite(campaign, reads)
    return tally


def parse_options() -> types.SimpleNamespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=200, help="total number of pairs (200)")
    parser.add_argument(
        "--reads", type=int, default=10_000, help="reads of a year during overwrites (10000)"
    )
    parser.add_argument("--where", default="folder,s3", help="folder, s3 or both (folder,s3)")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the delays between commands (0)"
    )
    parser.add_argument("--json", type=Path, help="write the tally to this file")
    return types.SimpleNamespace(**vars(parser.parse_args()))


if __name__ == "__main__":
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder_name:
        tally = run_campaign(
            options.pairs, options.where.split(","), options.seed, options.reads, Path(folder_name)
        )
    examples = tally.pop("examples")
    for example in examples[:20]:
        print(example)
    print(json.dumps(tally))
    if options.json:
        options.json.write_text(json.dumps({**tally, "examples": examples}, indent=2) + "\n")
    sys.exit(
        any(tally[what] for what in ("damaged", "lost", "dishonest_exits"))
        or tally.get("mixed_reads", 0) > 0
    )
