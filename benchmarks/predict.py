"""Mapping a cube, Zarr -> network -> Zarr, against the network alone on the same windows.

    python benchmarks/predict.py [--json FILE] [--models a,b] [--rounds 3] [--seconds 8] [--device cpu] [--no-memory]

The network alone has its windows in memory already, normalised, and hands its logits to nobody. It is run in its best way on
this machine, which is looked for first: all cores on one call, or a call on each core; one window to a call, or a batch;
either layout of memory. End to end is `minecube predict`'s own path, with a store on disk read and written, overlap blended,
checksums taken; the network has been made ready, as for every site after the first of a run. Both take turns, and change who
begins. Ratios are of medians over the rounds: end_to_end_fraction is time alone / time end to end, of the network as it was
built. Mapping on a CPU folds batch normalisation into convolutions, which makes up for some of what it spends beside the
network: `folded` is the same fraction of the network folded, too. Mpx/s and km2/s count a site's pixels once for each map,
though windows overlap by half, so that the network sees each about four times.

Memory is the most that a process takes up while it maps ten years, less what it took up with all loaded, by rows of the site.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import shapely
import torch
import xarray as xr
from pyproj import Transformer
from scipy import ndimage
from shapely.geometry import box

from minecube import cube, models
from minecube.catalog import BANDS, ModelCard, Recipe, Site, load_models
from minecube.grid import grid_of
from minecube.jobs.memory import keep_memory
from minecube.jobs.tables import format_table
from minecube.models import Compute
from minecube.models.folding import fold_batch_norms
from minecube.models.layout import Layout

WIDTH, YEARS = 768, tuple(range(2015, 2025))
RECIPE = Recipe(id="bench", title="as the shipped ones")
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Each model in turn, then memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--models", help="cards, comma-separated; by default those whose name ends in -small"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=8, help="about how long one run is to take"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory")
    parser.add_argument("--peak", nargs=2, metavar=("STORE", "MODEL"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    cards = load_models()
    if asked.peak:
        print(peak(*asked.peak, cards))
        return
    names = (
        asked.models.split(",")
        if asked.models
        else [name for name in cards if name.endswith("-small")]
    )
    gpu = f", {torch.cuda.get_device_name(asked.device)}" if asked.device.startswith("cuda") else ""
    load = f"load {os.getloadavg()[0]:.1f}"
    machine = f"{platform.machine()}, {CORES} cores{gpu}, {load}, Python {platform.python_version()}, torch {torch.__version__}"
    print(machine, flush=True)
    keep_memory()  # as `minecube predict` does; the network alone has it, too
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder) / "cubes.zarr", WIDTH)
        found = {
            name: compared(store, cards[name], asked.rounds, asked.seconds, asked.device)
            for name in names
        }
        figures = {
            "machine": machine,
            "end_to_end_fraction": {name: of["fraction"] for name, of in found.items()},
        }
        figures |= {"models": found}
        shown = ("fraction", "folded", "mpx_s", "km2_s", "windows_s", "alone")
        rows = [(name, *(of[key] for key in shown)) for name, of in found.items()]
        print(
            format_table(
                ("model", "fraction", "folded", "Mpx/s", "km2/s", "windows/s", "best way alone"),
                rows,
            )
        )
        if not asked.no_memory:
            figures["memory_mb"] = memory(Path(folder), names[0])
            print(format_table(("rows", "MB"), list(figures["memory_mb"].items())))
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def make(store: Path, height: int) -> str:
    """A cube of that height, WIDTH wide; pixels alike over 60 m and 12 m, as land is, so that they pack as a cube's do."""
    corners = box(
        360025, 5600040 - height * 10 + 25, 360000 + WIDTH * 10 - 25, 5600015
    )  # snapped outwards to the grid
    move = Transformer.from_crs(32633, 4326, always_xy=True).transform
    site = Site(id="pit", geometry=shapely.transform(corners, move, interleaved=False))
    grid, rng, side = grid_of(site), np.random.default_rng(1), RECIPE.block_px
    coarse, fine = (
        ndimage.gaussian_filter(rng.standard_normal(grid.shape, dtype=np.float32), s)
        for s in (6, 1.2)
    )
    ground = 350 * coarse / coarse.std() + 120 * fine / fine.std()
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    told = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(id="a", properties=told)
    for year in YEARS:
        noise = rng.standard_normal((len(BANDS), *grid.shape), dtype=np.float32)
        pixels = (
            (1200 + 150 * np.arange(len(BANDS))[:, None, None] + ground + 40 * noise)
            .clip(1, 10000)
            .astype(np.uint16)
        )
        one = da.ones(tuple(grid.shape), chunks=side)
        layers = {"clear_count": one.astype(np.uint16), "quality": one.astype(np.uint8)}
        made = {
            "reflectance": (
                ("band", "y", "x"),
                da.from_array(pixels, chunks=(len(BANDS), side, side)),
            )
        }
        made |= {name: (("y", "x"), layer) for name, layer in layers.items()}
        cube.write_year(
            cube.Store(store),
            xr.Dataset(made),
            cube.describe_build(site, year, grid, RECIPE, [scene]),
            b"",
        )
    return str(store)


def untrained(card: ModelCard) -> models.TrainedModel:
    """The network as it is before training: as fast as after it."""
    torch.manual_seed(0)
    n = len(card.bands)
    return models.TrainedModel(
        card=card, network=models.build(card).eval(), mean=(1900.0,) * n, std=(500.0,) * n, sites=()
    )


def end_to_end(store: str, mapper: models.Mapper, views: list[models.View]) -> float:
    """Seconds that a store's maps take."""
    card = mapper.trained.card
    start = time.perf_counter()
    reflectance = cube.open_reflectance(cube.Store(store), "pit")
    prediction = cube.Prediction(
        model=card.id,
        views=views,
        about=mapper.about,
        variable="change" if card.task == "change" else "probability",
        classes=card.classes,
    )
    wrote = cube.write_prediction(
        cube.Store(store),
        "pit",
        prediction,
        lambda todo: mapper.rows(reflectance, todo),
        overwrite=True,
    )
    assert wrote == views
    return time.perf_counter() - start


def windows_of(store: str, trained: models.TrainedModel, views: list[models.View]) -> torch.Tensor:
    """All windows of these views [n, time, band, y, x], float32, normalised, in the order in which they are mapped."""
    card = trained.card
    reflectance = cube.open_committed(cube.Store(store), "pit")["reflectance"].load()
    layout = Layout(reflectance.sizes["y"], reflectance.sizes["x"], card.window_px)
    side, found = card.window_px, []
    for view in views:
        image = (
            models.select_bands(reflectance, card)
            .sel(year=list(view))
            .to_numpy()[:, :, layout.rows][..., layout.columns]
        )
        for top, left in product(layout.tops, layout.lefts):
            found.append(
                models.normalise(
                    image[..., top : top + side, left : left + side], trained.mean, trained.std
                )
            )
    return torch.from_numpy(np.stack(found))


Way = Callable[[torch.Tensor], None]


def ways(
    trained: models.TrainedModel, device: str, window: torch.Tensor
) -> Iterator[tuple[str, Way]]:
    """Each way to run a network over windows in memory, like this one."""
    task = trained.card.task
    gpu = device.startswith("cuda")
    for layout in ("as built", "channels last", *(() if gpu else ("channels last, folded",))):
        network = untrained(trained.card).network.to(device)
        if layout.endswith("folded"):
            fold_batch_norms(
                network, lambda network=network: models.compute_logits(network, task, window)
            )
        if layout.startswith("channels last"):
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def call(windows: torch.Tensor, network: torch.nn.Module = network) -> None:
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
                models.compute_logits(network, task, windows)

        def on_all_cores(windows: torch.Tensor, batch: int, call: Way = call) -> None:
            for at in range(0, len(windows), batch):
                call(windows[at : at + batch])
            if gpu:
                torch.cuda.synchronize()

        def on_each_core(windows: torch.Tensor, batch: int, call: Way = call) -> None:
            before = torch.get_num_threads()
            with ThreadPoolExecutor(
                CORES, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                list(
                    pool.map(
                        lambda at: call(windows[at : at + batch]), range(0, len(windows), batch)
                    )
                )
            torch.set_num_threads(before)

        for batch in (16, 64, 256) if gpu else (1, 4, 16):
            yield (
                f"all on one call, {batch} windows, {layout}",
                lambda w, b=batch, f=on_all_cores: f(w, b),
            )
        for batch in () if gpu else (1, 4, 8, 16):
            yield (
                f"a call a core, {batch} windows, {layout}",
                lambda w, b=batch, f=on_each_core: f(w, b),
            )


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compared(
    store: str, card: ModelCard, rounds: int, seconds: float, device: str
) -> dict[str, Any]:
    """One model, both ways in turn."""
    trained = untrained(card)
    mapper = models.Mapper(trained, Compute(device=device))
    sizes = xr.open_zarr(store, group="pit", consolidated=False).sizes
    layout = Layout(sizes["y"], sizes["x"], card.window_px)
    each = len(layout.tops) * len(layout.lefts)
    every = {
        "mapping": [(y,) for y in YEARS],
        "change": list(combinations(YEARS, 2)),
        "series": [YEARS],
    }[card.task]
    some = windows_of(store, trained, every[:1])
    some = some[: min(each, 64)].to(device)
    speeds = {}
    for name, way in ways(trained, device, some[:1]):
        way(some[:8])
        took = timed(lambda way=way: way(some[:16])) / 16
        hopeless = bool(speeds) and took > 3 * min(speeds.values())
        again = [] if hopeless else [timed(lambda way=way: way(some)) / len(some) for _ in range(2)]
        speeds[name] = min([took, *again])
    order = sorted(speeds, key=lambda name: speeds[name])
    best = [name for name in order if not name.endswith("folded")][:2] + [
        name for name in order if name.endswith("folded")
    ][:1]
    count = min(max(round(seconds / speeds[best[0]] / each), 1), len(every))
    views = every[:count]
    windows = windows_of(store, trained, views).to(device)
    end_to_end(store, mapper, views[:1])
    chosen = {name: way for name, way in ways(trained, device, some[:1]) if name in best}
    alone: dict[str, list[float]] = {name: [] for name in best}
    whole: list[float] = []
    for n in range(rounds):
        turns = [*((name, lambda name=name: chosen[name](windows)) for name in best)]
        runs = [*turns, ("end to end", lambda: end_to_end(store, mapper, views))]
        for name, run in runs if n % 2 else reversed(runs):
            (whole if name == "end to end" else alone[name]).append(
                run() if name == "end to end" else timed(run)
            )
    middle = {name: statistics.median(times) for name, times in alone.items()}
    way, took = min(best[:2], key=lambda name: middle[name]), statistics.median(whole)
    maps = sum(len(view) if card.task == "series" else 1 for view in views)
    mpx = maps * sizes["y"] * sizes["x"] / 1e6
    print(f"{card.id}: {middle[way] / took:.3f}", flush=True)
    return {
        "fraction": middle[way] / took,
        "folded": min(middle.values()) / took,
        "mpx_s": mpx / took,
        "km2_s": mpx * 100 / took,
        "windows_s": len(windows) / took,
        "alone": way,
        "maps": maps,
        "rounds": {"end to end": whole, **alone},
        "tried_ms_a_window": {name: value * 1e3 for name, value in speeds.items()},
    }


def memory(folder: Path, model: str) -> dict[str, float]:
    """MB that mapping takes, by the site's rows."""
    found = {}
    for times in (1, 8):
        store = make(folder / f"tall_{times}.zarr", times * WIDTH)
        ask = [sys.executable, __file__, "--peak", store, model]
        found[str(times * WIDTH)] = float(
            subprocess.run(ask, check=True, capture_output=True, text=True).stdout
        )
    return found


def peak(store: str, model: str, cards: dict[str, ModelCard]) -> float:
    """MB at most, more than before anything was mapped."""
    trained, card = untrained(cards[model]), cards[model]
    views = models.list_views(card, YEARS)
    with torch.inference_mode():  # what torch keeps for itself once it has computed
        trained.network(
            torch.zeros(
                1,
                *(() if card.task == "mapping" else (2,)),
                len(card.bands),
                card.window_px,
                card.window_px,
            )
        )
    before = _megabytes("VmRSS")
    keep_memory()  # only now, so that nothing freed is counted as taken up before
    end_to_end(store, models.Mapper(trained), views)
    return _megabytes("VmHWM") - before


def _megabytes(what: str) -> float:
    """Of this process. Not by getrusage: a child's most is at first what its parent has, which holds all windows."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


if __name__ == "__main__":
    main()
