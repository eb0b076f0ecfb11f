"""Subcommand bench: train, apply and score networks on one split, and write two tables."""

from __future__ import annotations

import fnmatch
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import pandas as pd

from minecube import cube, metrics, models, tracks
from minecube import train as training
from minecube.catalog import ModelCard, Settings, as_dict, pick
from minecube.cli import common
from minecube.cli.common import (
    SEED,
    OutFolder,
    SiteChoice,
    catalog_option,
    progress_bar,
    sites_layer_option,
    stored_sites,
    with_layer,
    writable_store_option,
)
from minecube.cli.learn import state_of, train_network
from minecube.cli.predict import map_site
from minecube.cli.score import (
    Counted,
    Tables,
    baselines_of,
    cell,
    latex,
    markdown,
    score_site,
    write,
    write_all,
)
from minecube.cli.tracks import SUFFIX, write_smoothed
from minecube.errors import CatalogError, ModelError

MAPPING = ("f1", "iou", "ca_tiou", "tiou_s", "tiou_c", "bc", "sc", "scs", "boundary_f1")
CHANGE = ("change_f1", "change_iou", "change_precision", "change_recall", "change_auprc")
GAPS = (1, 3, 5, 9)
"""Years between the images of a pair, for the F1 columns in the table of change."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Names of sites; no site is in two parts."""

    train: list[str]
    valid: list[str]
    test: list[str]


@click.command()
@writable_store_option
@click.option(
    "--train",
    "train_sites",
    required=True,
    callback=with_layer,
    help="Training sites: names, comma-separated, * allowed; or a file of polygons.",
)
@click.option(
    "--valid",
    "valid_sites",
    required=True,
    callback=with_layer,
    help="Validation sites, named like --train. Their F1 chooses the best epoch.",
)
@click.option(
    "--test",
    "test_sites",
    required=True,
    callback=with_layer,
    help="Test sites, named like --train. They are mapped and scored, and never trained on.",
)
@sites_layer_option("--layer", "--sites-layer")
@catalog_option
@click.option(
    "--models",
    "wanted",
    default="*-small",
    show_default=True,
    help="Names of networks, comma-separated, * allowed.",
)
@click.option(
    "--preset",
    "preset_id",
    default="cpu",
    show_default=True,
    help="Training settings (catalog/presets.yaml).",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of weights, windows and augmentation.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--out", type=OutFolder(), required=True, help="Folder for models and tables.")
def bench(
    store: cube.Store,
    train_sites: SiteChoice,
    valid_sites: SiteChoice,
    test_sites: SiteChoice,
    catalog: Path | None,
    wanted: str,
    preset_id: str,
    seed: int,
    device: str,
    out: Path,
) -> None:
    """Train, apply and score several networks on one split, and tabulate their scores.

    Networks that map footprints are scored twice: their maps, and the maps smoothed through time
    (NAME+hmm). Trivial baselines are scored, too. An interrupted run resumes when you run it again.

    \b
    Example:
      minecube bench --store cubes.zarr --train 'train_*' --valid 'valid_*' --test 'test_*' --out bench
    """
    split = _split(store, train_sites, valid_sites, test_sites)
    cards = _chosen(common.models(catalog), wanted)
    settings = pick(common.presets(catalog), preset_id, "preset")
    compute = models.Compute(device=device)
    compute.place()
    _agree(
        out / "bench.json",
        {"store": str(store), **asdict(split), "settings": as_dict(settings), "seed": seed},
    )
    below = {site: baselines_of(store, site) for site in split.test}  # fails early without labels
    took = {}
    predictions: dict[str, str] = {}
    for number, card in enumerate(cards, start=1):
        click.echo(f"{number} of {len(cards)}: {card.id}", err=True)
        run = training.Run(seed=seed, device=device, resume=True)
        took[card.id], prediction = _run(store, split, card, settings, run, compute, out)
        predictions[card.id] = prediction
        if card.task != "change":
            predictions[card.id + SUFFIX] = prediction + SUFFIX
    counted: Counted = {name: {} for name in predictions}
    with progress_bar("scoring", len(split.test)) as advance:
        for site in split.test:
            for name, prediction in predictions.items():
                counted[name][site] = score_site(store, site, prediction)
            for name, scores in below[site].items():
                counted.setdefault(name, {})[site] = scores
            advance(note=site)
    for path in written(store, Tables.of(counted, compared(cards)), cards, took, out, predictions):
        click.echo(path)
    click.echo("\n" + (out / "mapping.md").read_text(encoding="utf-8"))
    click.echo((out / "change.md").read_text(encoding="utf-8"))


def compared(cards: Sequence[ModelCard]) -> list[tuple[str, str]]:
    """List models to compare: smoothed with raw maps, and series models with all others."""
    smoothed = [(c.id + SUFFIX, c.id) for c in cards if c.task != "change"]
    return smoothed + [
        (a.id, b.id) for a in cards if a.task == "series" for b in cards if a is not b
    ]


def _split(store: cube.Store, train: SiteChoice, valid: SiteChoice, test: SiteChoice) -> Split:
    split = Split(
        train=stored_sites(store, train),
        valid=stored_sites(store, valid),
        test=stored_sites(store, test),
    )
    parts = [*split.train, *split.valid, *split.test]
    twice = sorted({name for name in parts if parts.count(name) > 1})
    if twice:
        raise CatalogError(
            f"{', '.join(twice)}: expected each site in one part of the split; a score on ground that was learnt from says "
            "nothing of other ground"
        )
    return split


def _chosen(known: Mapping[str, ModelCard], wanted: str) -> list[ModelCard]:
    patterns = [pattern.strip() for pattern in wanted.split(",")]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise CatalogError(f"unknown model {pattern!r}; `minecube models` lists what there is")
    return [
        card for name, card in known.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)
    ]


def _agree(path: Path, asked: Mapping[str, Any]) -> None:
    """Raise CatalogError if the folder has a benchmark with other settings.

    A new folder gets these settings.
    """
    if path.exists():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise CatalogError(
                f"{path}: is not what `minecube bench` writes; remove it, or name another --out"
            ) from error
        different = [
            name for name in asked if before.get(name) != json.loads(json.dumps(asked[name]))
        ]
        if different:
            raise CatalogError(
                f"{path}: is of a benchmark with other {', '.join(different)}; two of them in one table cannot be compared, so "
                "name another --out"
            )
        return
    write(path, json.dumps(asked, indent=2) + "\n")


def _run(
    store: cube.Store,
    split: Split,
    card: ModelCard,
    settings: Settings,
    run: training.Run,
    compute: models.Compute,
    out: Path,
) -> tuple[dict[str, float], str]:
    """Train a network if needed, map the test sites, and smooth the maps.

    Returns seconds of each step and other numbers, and the name of the prediction.
    """
    file, times = out / "models" / f"{card.id}.pt", out / "models" / f"{card.id}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    took: dict[str, float] = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
    if not file.exists():
        start = time.monotonic()
        run = replace(run, checkpoint=state_of(file))
        fitted = train_network(store, split.train, split.valid, card, settings, run)
        models.save(fitted.trained, file)
        state_of(file).unlink()
        took |= {
            "train_s": time.monotonic() - start,
            "valid_f1": fitted.best.f1,
            "epoch": fitted.best.epoch,
        }
    trained = models.load(file)
    if trained.card != card:
        raise ModelError(
            f"{file}: was trained by another card of that name; remove it, or name another --out"
        )
    mapper = models.Mapper(trained, compute)
    prediction = cube.choose_name(store, split.test, mapper.about, mapper.name)
    mapped = [map_site(store, site, mapper, prediction=prediction) for site in split.test]
    if any(m.maps for m in mapped):
        took["map_s"] = sum(m.seconds for m in mapped)
    took["parameters"] = sum(p.numel() for p in trained.network.parameters())
    write(times, json.dumps(took, indent=2) + "\n")
    if card.task != "change":
        _smooth(store, split.test, prediction)
    return took, prediction


def _smooth(store: cube.Store, sites: Sequence[str], prediction: str) -> None:
    maps = {site: cube.open_probability(store, site, prediction) for site in sites}
    rates = tracks.learn_rates(maps.values())
    for site, lazy in maps.items():
        about = {**lazy.attrs["model"], "rates": asdict(rates)}
        write_smoothed(store, site, prediction, tracks.smooth(lazy.compute(), rates), about)


def written(
    store: cube.Store,
    tables: Tables,
    cards: Sequence[ModelCard],
    took: Mapping[str, Mapping[str, float]],
    out: Path,
    predictions: Mapping[str, str],
) -> list[Path]:
    """Write the two tables, all scores and counts, and pictures of the best models.

    Returns the paths.

    `predictions` maps names in the tables to names in the store.
    """
    spread, pooled = tables.intervals, tables.pooled
    maps = [c.id for c in cards if c.task != "change"]
    changes = [c.id for c in cards if c.task == "change"]
    smoothed = [m + SUFFIX for m in maps]
    baselines = [name for name in tables.counted if name not in (*maps, *smoothed, *changes)]
    mapping, change = {}, {}
    for name in (*maps, *smoothed, *baselines):
        flips = ""
        if name not in baselines:
            drawn = (
                tracks.threshold(cube.open_probability(store, site, predictions[name]))
                for site in tables.counted[name]
            )
            flips = _number(tracks.flip_rate(*drawn), ".2%")
        mapping[name] = [
            _size(took.get(name)),
            *(cell(spread[name].loc[score]) for score in MAPPING),
            flips,
        ]
    for name in (*changes, *maps, *smoothed, *baselines):
        by_gap = metrics.by_gap(pooled[name]).get("change_f1", pd.Series())  # empty for one year
        scores = [
            cell(spread[name].loc[score]) if score in spread[name].index else "" for score in CHANGE
        ]
        change[name] = [_size(took.get(name)), *scores, *(_number(by_gap.get(g)) for g in GAPS)]
    paths = []
    for file, rows, names in (
        ("mapping", mapping, (*MAPPING, "flips")),
        ("change", change, (*CHANGE, *(f"F1, gap {gap}" for gap in GAPS))),
    ):
        of = pd.DataFrame.from_dict(
            rows, orient="index", columns=["M weights", *names]
        ).rename_axis("model")
        paths += [write(out / f"{file}.md", markdown(of)), write(out / f"{file}.tex", latex(of))]
    best = sorted(smoothed, key=lambda name: float(spread[name]["score"]["ca_tiou"]), reverse=True)[
        :3
    ]
    finest = sorted(
        changes, key=lambda name: float(spread[name]["score"]["change_f1"]), reverse=True
    )[:3]
    shown = [name for m in best for name in (m.removesuffix(SUFFIX), m)]
    return paths + write_all(tables, out / "scores", [*shown, *finest, *baselines])


def _number(score: float | None, form: str = ".3f") -> str:
    return "" if score is None else "n/a" if math.isnan(score) else format(score, form)


def _size(took: Mapping[str, float] | None) -> str:
    return f"{took['parameters'] / 1e6:.2f}" if took else ""
