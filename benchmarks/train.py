"""Whether cutting windows or the network takes the time of training.

    python benchmarks/train.py --store cubes.zarr [--sites 'A_*'] [--model unet-small ...] [--preset cpu] [--device cpu]
                               [--workers 0] [--json FILE]

For each model: windows a second of the loader alone, of the training step alone (the same batch again and again), and of both
together, as in training. `loader_share` is the loader's processor time of a window, as a share of loader and step, one process
doing both: a busy machine moves the speeds, but hardly this. On a GPU it is `end_to_end_fraction` that counts: both together
against the step alone.
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
"""Of each measurement, after one that is not counted."""


def main() -> None:
    """Measure each model and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True)
    parser.add_argument("--sites", default="*")
    parser.add_argument("--model", nargs="+", default=["unet-small"])
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    print(machine, flush=True)
    sites = [
        name
        for name in cube.list_sites(cube.Store(asked.store))
        if fnmatch.fnmatchcase(name, asked.sites)
    ]
    figures = {}
    for name in asked.model:
        card = load_models()[name]
        view = {"mapping": "year", "change": "pair", "series": "series"}[card.task]
        figures[name] = measured(
            card,
            load_presets()[asked.preset],
            cube.CubeDataset(cube.Store(asked.store), sites, view=view),
            asked,
        )
    headings = list(next(iter(figures.values())))
    print(
        format_table(
            ["model", *headings],
            [[name, *(found[h] for h in headings)] for name, found in figures.items()],
        )
    )
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(
            json.dumps({"machine": machine, "models": figures}, indent=2) + "\n", encoding="utf-8"
        )


def measured(
    card: ModelCard, settings: TrainingSettings, source: Any, asked: argparse.Namespace
) -> dict[str, float]:
    """The figures of one model."""
    start = time.perf_counter()
    surveyed = train.survey_source(source, card, settings)
    survey_s = time.perf_counter() - start
    windows = train.Windows(source, card, settings, surveyed)
    place = find_device(asked.device)
    network = models.build(card).to(place).train()
    optimiser = torch.optim.Adam(network.parameters())

    def batches() -> Any:
        keys = [
            [(0, step * settings.batch + n) for n in range(settings.batch)]
            for step in range(STEPS + 1)
        ]
        return DataLoader(
            windows, batch_sampler=keys, num_workers=asked.workers, pin_memory=place.type == "cuda"
        )  # type: ignore[arg-type]

    def stepped(batch: Any) -> None:
        train_step(
            network, optimiser, [part.to(place, non_blocking=True) for part in batch], windows
        )

    def speed(stream: Any, use: Any) -> tuple[float, float]:
        """Windows a second, and this process's processor seconds a window."""
        stream = iter(stream)
        use(next(stream))
        wall, processor = time.perf_counter(), time.process_time()
        for batch in stream:
            use(batch)
        counted = STEPS * settings.batch
        return counted / (time.perf_counter() - wall), (time.process_time() - processor) / counted

    loader, cutting = speed(batches(), lambda _: None)
    same = next(iter(batches()))
    step, learning = speed([same] * (STEPS + 1), stepped)
    both, _ = speed(batches(), stepped)
    return {
        "survey_s": round(survey_s, 2),
        "loader_per_s": round(loader, 1),
        "step_per_s": round(step, 1),
        "both_per_s": round(both, 1),
        "loader_share": round(cutting / (cutting + learning), 3),
        "end_to_end_fraction": round(both / step, 3),
    }


if __name__ == "__main__":
    main()
