"""Compare mapping a cube end to end with running the network alone on the same windows.

    python benchmarks/predict.py [--json FILE] [--models a,b] [--rounds 3] [--seconds 8]
                                 [--device cpu] [--no-memory]

End to end is the path of `minecube predict`: read a store on disk, run the network, blend
overlaps, write maps and checksums. The network is prepared beforehand, as after the first site
of a run.

Alone, the network gets normalised windows in memory, and its logits are discarded. The script
first looks for the fastest way to run it: all cores on one call or one call per core, windows
per call, memory layout.

The two take turns, and each starts every other round. Ratios compare medians over the rounds.
`end_to_end_fraction` is time alone / time end to end, for the network as built. `minecube
predict` folds batch normalisation into convolutions on a CPU, which saves time. `folded` is the
same fraction with a folded network alone.

Mpx/s and km2/s count each pixel of a site once per map. Windows overlap by half, so the network
sees each pixel about four times. Memory is the peak while mapping ten years, minus the memory
in use before, by rows of the site.
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

WIDTH = 768
"""Width of the site in pixels."""
YEARS = tuple(range(2015, 2025))
RECIPE = Recipe(id="bench", title="default settings")
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Measure each model, then the memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    parser.add_argument(
        "--models", help="comma-separated model cards (default: all that end in -small)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds per model (3)")
    parser.add_argument(
        "--seconds", type=float, default=8, help="approximate duration of one run (8)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement")
    parser.add_argument("--peak", nargs=2, metavar=("STORE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    cards = load_models()
    if options.peak:
        print(measure_peak(*options.peak, cards))
        return
    names = (
        options.models.split(",")
        if options.models
        else [name for name in cards if name.endswith("-small")]
    )
    gpu = (
        f", {torch.cuda.get_device_name(options.device)}"
        if options.device.startswith("cuda")
        else ""
    )
    load = f"load {os.getloadavg()[0]:.1f}"
    machine = (
        f"{platform.machine()}, {CORES} cores{gpu}, {load}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(machine, flush=True)
    keep_memory()  # like `minecube predict`, and also for the network alone
    with tempfile.TemporaryDirectory() as folder:
        store = write_cube(Path(folder) / "cubes.zarr", WIDTH)
        results = {
            name: measure_model(store, cards[name], options.rounds, options.seconds, options.device)
            for name in names
        }
        figures = {
            "machine": machine,
            "end_to_end_fraction": {name: result["fraction"] for name, result in results.items()},
        }
        figures |= {"models": results}
        columns = ("fraction", "folded", "mpx_s", "km2_s", "windows_s", "alone")
        rows = [(name, *(result[key] for key in columns)) for name, result in results.items()]
        print(
            format_table(
                ("model", "fraction", "folded", "Mpx/s", "km2/s", "windows/s", "fastest way alone"),
                rows,
            )
        )
        if not options.no_memory:
            figures["memory_mb"] = measure_memory(Path(folder), names[0])
            print(format_table(("rows", "MB"), list(figures["memory_mb"].items())))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def write_cube(store: Path, height: int) -> str:
    """Write a cube of `height` x `WIDTH` pixels.

    Pixels vary over 60 m and 12 m like land, so that they compress like a real cube.
    """
    # The grid snaps outwards, so corners lie within its border pixels.
    corners = box(360025, 5600040 - height * 10 + 25, 360000 + WIDTH * 10 - 25, 5600015)
    to_degrees = Transformer.from_crs(32633, 4326, always_xy=True).transform
    site = Site(id="pit", geometry=shapely.transform(corners, to_degrees, interleaved=False))
    grid = grid_of(site)
    rng = np.random.default_rng(1)
    side = RECIPE.block_px
    coarse, fine = (
        ndimage.gaussian_filter(rng.standard_normal(grid.shape, dtype=np.float32), s)
        for s in (6, 1.2)
    )
    ground = 350 * coarse / coarse.std() + 120 * fine / fine.std()
    cube.create_site(cube.Store(store), site, grid, YEARS, RECIPE)
    properties = {
        "minecube:source": "s",
        "s2:processing_baseline": "05.00",
        "minecube:offset": 0,
        "minecube:offset_reason": "r",
    }
    scene = types.SimpleNamespace(id="a", properties=properties)
    for year in YEARS:
        noise = rng.standard_normal((len(BANDS), *grid.shape), dtype=np.float32)
        pixels = (
            (1200 + 150 * np.arange(len(BANDS))[:, None, None] + ground + 40 * noise)
            .clip(1, 10000)
            .astype(np.uint16)
        )
        ones = da.ones(tuple(grid.shape), chunks=side)
        layers = {"clear_count": ones.astype(np.uint16), "quality": ones.astype(np.uint8)}
        variables = {
            "reflectance": (
                ("band", "y", "x"),
                da.from_array(pixels, chunks=(len(BANDS), side, side)),
            )
        }
        variables |= {name: (("y", "x"), layer) for name, layer in layers.items()}
        cube.write_year(
            cube.Store(store),
            xr.Dataset(variables),
            cube.describe_build(site, year, grid, RECIPE, [scene]),
            b"",
        )
    return str(store)


def build_untrained(card: ModelCard) -> models.TrainedModel:
    """Build an untrained network, which is as fast as a trained one."""
    torch.manual_seed(0)
    bands = len(card.bands)
    return models.TrainedModel(
        card=card,
        network=models.build(card).eval(),
        mean=(1900.0,) * bands,
        std=(500.0,) * bands,
        sites=(),
    )


def time_end_to_end(store: str, mapper: models.Mapper, views: list[models.View]) -> float:
    """Map these views of a store. Returns seconds."""
    card = mapper.trained.card
    start = time.perf_counter()
    reflectance = cube.open_reflectance(cube.Store(store), "pit")
    prediction = cube.Prediction(
        model=card.id,
        views=views,
        origin=mapper.description,
        variable="change" if card.task == "change" else "probability",
        classes=card.classes,
    )
    written = cube.write_prediction(
        cube.Store(store),
        "pit",
        prediction,
        lambda todo: mapper.map_rows(reflectance, todo),
        overwrite=True,
    )
    assert written == views
    return time.perf_counter() - start


def cut_windows(store: str, trained: models.TrainedModel, views: list[models.View]) -> torch.Tensor:
    """Cut all windows of these views, in mapping order.

    Returns normalised float32 [n, time, band, y, x].
    """
    card = trained.card
    reflectance = cube.open_committed(cube.Store(store), "pit")["reflectance"].load()
    layout = Layout(reflectance.sizes["y"], reflectance.sizes["x"], card.window_px)
    side = card.window_px
    windows = []
    for view in views:
        image = (
            models.select_bands(reflectance, card)
            .sel(year=list(view))
            .to_numpy()[:, :, layout.rows][..., layout.columns]
        )
        for top, left in product(layout.tops, layout.lefts):
            windows.append(
                models.normalise(
                    image[..., top : top + side, left : left + side], trained.mean, trained.std
                )
            )
    return torch.from_numpy(np.stack(windows))


Way = Callable[[torch.Tensor], None]


def list_ways(
    trained: models.TrainedModel, device: str, window: torch.Tensor
) -> Iterator[tuple[str, Way]]:
    """List all ways to run a network over windows in memory, by name."""
    task = trained.card.task
    gpu = device.startswith("cuda")
    for layout in ("as built", "channels last", *(() if gpu else ("channels last, folded",))):
        network = build_untrained(trained.card).network.to(device)
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


def time_call(run: Callable[[], object]) -> float:
    """Run a function. Returns seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_model(
    store: str, card: ModelCard, rounds: int, seconds: float, device: str
) -> dict[str, Any]:
    """Measure one model alone and end to end, in turn."""
    trained = build_untrained(card)
    mapper = models.Mapper(trained, Compute(device=device))
    sizes = xr.open_zarr(store, group="pit", consolidated=False).sizes
    layout = Layout(sizes["y"], sizes["x"], card.window_px)
    windows_per_view = len(layout.tops) * len(layout.lefts)
    all_views = {
        "mapping": [(y,) for y in YEARS],
        "change": list(combinations(YEARS, 2)),
        "series": [YEARS],
    }[card.task]
    sample = cut_windows(store, trained, all_views[:1])
    sample = sample[: min(windows_per_view, 64)].to(device)
    speeds = {}
    for name, way in list_ways(trained, device, sample[:1]):
        way(sample[:8])
        seconds_taken = time_call(lambda way=way: way(sample[:16])) / 16
        is_slow = bool(speeds) and seconds_taken > 3 * min(speeds.values())
        repeats = 0 if is_slow else 2
        repeated = [time_call(lambda way=way: way(sample)) / len(sample) for _ in range(repeats)]
        speeds[name] = min([seconds_taken, *repeated])
    order = sorted(speeds, key=lambda name: speeds[name])
    unfolded = [name for name in order if not name.endswith("folded")]
    folded = [name for name in order if name.endswith("folded")]
    candidates = unfolded[:2] + folded[:1]
    count = min(max(round(seconds / speeds[candidates[0]] / windows_per_view), 1), len(all_views))
    views = all_views[:count]
    windows = cut_windows(store, trained, views).to(device)
    time_end_to_end(store, mapper, views[:1])
    chosen_ways = {
        name: way for name, way in list_ways(trained, device, sample[:1]) if name in candidates
    }
    alone_s: dict[str, list[float]] = {name: [] for name in candidates}
    end_to_end_s: list[float] = []
    for n in range(rounds):
        turns = [*((name, lambda name=name: chosen_ways[name](windows)) for name in candidates)]
        runs = [*turns, ("end to end", lambda: time_end_to_end(store, mapper, views))]
        for name, run in runs if n % 2 else reversed(runs):
            if name == "end to end":
                end_to_end_s.append(run())
            else:
                alone_s[name].append(time_call(run))
    medians = {name: statistics.median(times) for name, times in alone_s.items()}
    best_way = min(candidates[:2], key=lambda name: medians[name])
    seconds_taken = statistics.median(end_to_end_s)
    maps = sum(len(view) if card.task == "series" else 1 for view in views)
    mpx = maps * sizes["y"] * sizes["x"] / 1e6
    print(f"{card.id}: {medians[best_way] / seconds_taken:.3f}", flush=True)
    return {
        "fraction": medians[best_way] / seconds_taken,
        "folded": min(medians.values()) / seconds_taken,
        "mpx_s": mpx / seconds_taken,
        "km2_s": mpx * 100 / seconds_taken,
        "windows_s": len(windows) / seconds_taken,
        "alone": best_way,
        "maps": maps,
        "rounds": {"end to end": end_to_end_s, **alone_s},
        "tried_ms_a_window": {name: value * 1e3 for name, value in speeds.items()},
    }


def measure_memory(folder: Path, model: str) -> dict[str, float]:
    """Measure the MB that mapping needs, by rows of the site."""
    megabytes = {}
    for times in (1, 8):
        store = write_cube(folder / f"tall_{times}.zarr", times * WIDTH)
        command = [sys.executable, __file__, "--peak", store, model]
        megabytes[str(times * WIDTH)] = float(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
    return megabytes


def measure_peak(store: str, model: str, cards: dict[str, ModelCard]) -> float:
    """Map all years. Returns the peak memory in MB, minus the memory in use before."""
    card = cards[model]
    trained = build_untrained(card)
    views = models.list_views(card, YEARS)
    # A first call allocates the buffers that torch keeps.
    with torch.inference_mode():
        times = () if card.task == "mapping" else (2,)
        window = (*times, len(card.bands), card.window_px, card.window_px)
        trained.network(torch.zeros(1, *window))
    before = _read_megabytes("VmRSS")
    keep_memory()  # after `before`, which must not include freed memory
    time_end_to_end(store, models.Mapper(trained), views)
    return _read_megabytes("VmHWM") - before


def _read_megabytes(field: str) -> float:
    """Read a memory figure of this process from `/proc`.

    `getrusage` starts with the peak of the parent, which holds all windows.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
