"""Measure whether the loader or the network limits the speed of training.

    python benchmarks/train.py --store cubes.zarr [--sites 'A_*'] [--model unet-small ...]
                               [--preset cpu] [--device cpu] [--workers 0] [--json FILE]

For each model the script measures windows per second: of the loader alone, of the training step
alone (the same batch repeated), and of both together.

`loader_share` is the loader's part of the processor time per window, in one process. A busy
machine hardly changes this figure. On a GPU look at `end_to_end_fraction` instead: the speed of
both together divided by the speed of the step alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from minecube import cube, models, train
from minecube.catalog import ModelCard, TrainingSettings, load_models, load_presets
from minecube.device import find_device
from minecube.jobs.tables import format_table
from minecube.train.epochs import train_step

STEPS = 12
"""Counted steps per measurement. One uncounted step comes first."""


def main() -> None:
    """Measure each model and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="store with labelled cubes")
    parser.add_argument("--sites", default="*", help="pattern of site names (*)")
    parser.add_argument("--model", nargs="+", default=["unet-small"], help="model cards")
    parser.add_argument("--preset", default="cpu", help="training preset (cpu)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (0)")
    parser.add_argument("--json", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(machine, flush=True)
    sites = [
        name
        for name in cube.list_sites(cube.Store(options.store))
        if fnmatch.fnmatchcase(name, options.sites)
    ]
    figures = {}
    for name in options.model:
        card = load_models()[name]
        view = {"mapping": "year", "change": "pair", "series": "series"}[card.task]
        figures[name] = measure_model(
            card,
            load_presets()[options.preset],
            cube.CubeDataset(cube.Store(options.store), sites, view=view),
            options,
        )
    headings = list(next(iter(figures.values())))
    print(
        format_table(
            ["model", *headings],
            [
                [name, *(result[heading] for heading in headings)]
                for name, result in figures.items()
            ],
        )
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"machine": machine, "models": figures}, indent=2) + "\n", encoding="utf-8"
        )


def measure_model(
    card: ModelCard, settings: TrainingSettings, source: Any, options: argparse.Namespace
) -> dict[str, float]:
    """Measure one model."""
    start = time.perf_counter()
    survey = train.survey_source(source, card, settings)
    survey_s = time.perf_counter() - start
    windows = train.Windows(source, card, settings, survey)
    device = find_device(options.device)
    network = models.build(card).to(device).train()
    optimiser = torch.optim.Adam(network.parameters())

    def make_loader() -> Any:
        keys = [
            [(0, step * settings.batch + n) for n in range(settings.batch)]
            for step in range(STEPS + 1)
        ]
        return DataLoader(
            windows,
            batch_sampler=keys,
            num_workers=options.workers,
            pin_memory=device.type == "cuda",
        )  # type: ignore[arg-type]

    def run_step(batch: Any) -> None:
        train_step(
            network, optimiser, [part.to(device, non_blocking=True) for part in batch], windows
        )

    def measure_speed(batches: Any, process: Any) -> tuple[float, float]:
        """Return windows per second, and processor seconds per window in this process."""
        batches = iter(batches)
        process(next(batches))
        wall_start = time.perf_counter()
        processor_start = time.process_time()
        for batch in batches:
            process(batch)
        counted_windows = STEPS * settings.batch
        wall_s = time.perf_counter() - wall_start
        processor_s = time.process_time() - processor_start
        return counted_windows / wall_s, processor_s / counted_windows

    loader_speed, loader_cpu_s = measure_speed(make_loader(), lambda _: None)
    batch = next(iter(make_loader()))
    step_speed, step_cpu_s = measure_speed([batch] * (STEPS + 1), run_step)
    both_speed, _ = measure_speed(make_loader(), run_step)
    return {
        "survey_s": round(survey_s, 2),
        "loader_per_s": round(loader_speed, 1),
        "step_per_s": round(step_speed, 1),
        "both_per_s": round(both_speed, 1),
        "loader_share": round(loader_cpu_s / (loader_cpu_s + step_cpu_s), 3),
        "end_to_end_fraction": round(both_speed / step_speed, 3),
    }


if __name__ == "__main__":
    main()
