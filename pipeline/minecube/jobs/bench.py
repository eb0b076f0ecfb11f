"""Train, apply and score networks on one split, and write two tables.

An interrupted benchmark resumes: trained networks and finished maps are kept in the folder and the
store.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from minecube import cube, metrics, models, tracks, train
from minecube.catalog import ModelCard, TrainingSettings, as_dict
from minecube.errors import CatalogError, ModelError
from minecube.jobs.predict import MapOptions, map_site
from minecube.jobs.score import count_sites, need_labels
from minecube.jobs.score_tables import NOUN, ScoreTables, format_score, write_tables
from minecube.jobs.selection import SiteChoice, stored_sites
from minecube.jobs.tables import format_latex, format_markdown, write_json, write_text
from minecube.jobs.tracks import SUFFIX, SmoothedSites, read_maps, write_smoothed
from minecube.jobs.train import checkpoint_path, train_network
from minecube.places import Place, outgoing

MAPPING = ("f1", "iou", "ca_tiou", "tiou_s", "tiou_c", "bc", "sc", "scs", "boundary_f1")
"""Scores in the table of footprints."""
CHANGE = ("change_f1", "change_iou", "change_precision", "change_recall", "change_auprc")
"""Scores in the table of change."""
GAPS = (1, 3, 5, 9)
"""Years between the images of a pair, for the F1 columns in the table of change."""
_PICTURED = 3  # best networks of each kind in the pictures

Progress = Callable[[str, int, int, str], None]
"""Called with a step's title, the number of finished parts, of all parts, and a note."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Names of sites; no site is in two parts."""

    train: list[str]
    valid: list[str]
    test: list[str]

    def __post_init__(self) -> None:
        names = [*self.train, *self.valid, *self.test]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise CatalogError(
                f"{', '.join(repeated)}: expected each site in one part of the split; "
                "a score on ground that was learnt from says nothing of other ground"
            )


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Networks, sites and settings of a benchmark."""

    store: cube.Store
    split: Split
    cards: tuple[ModelCard, ...]
    """The networks."""
    settings: TrainingSettings
    """Epochs, windows and learning rate of each training."""
    seed: int = 0
    compute: models.Compute = field(default_factory=models.Compute)
    """Device for training and mapping."""
    folder: Place
    """Folder for models and tables."""

    @property
    def footprint_models(self) -> list[str]:
        """Networks that map footprints."""
        return [card.id for card in self.cards if card.task != "change"]

    @property
    def change_models(self) -> list[str]:
        """Networks that map changes."""
        return [card.id for card in self.cards if card.task == "change"]

    @property
    def smoothed_models(self) -> list[str]:
        """Names of the smoothed maps in the tables."""
        return [name + SUFFIX for name in self.footprint_models]


@dataclass(frozen=True)
class ModelRuns:
    """Results of training and mapping."""

    predictions: dict[str, str] = field(default_factory=dict)
    """Name in the tables -> name of the prediction in the store."""
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Network -> seconds of each step, validation F1 and number of parameters."""


def split_sites(store: cube.Store, train: SiteChoice, valid: SiteChoice, test: SiteChoice) -> Split:
    """Choose the sites of each part.

    Raises CatalogError if a name has no match, or if a site is in two parts.
    """
    return Split(
        train=stored_sites(store, train),
        valid=stored_sites(store, valid),
        test=stored_sites(store, test),
    )


def choose_models(cards: Mapping[str, ModelCard], patterns: str) -> tuple[ModelCard, ...]:
    """Choose model cards by comma-separated names, * allowed, in the order of the cards.

    Raises CatalogError for a pattern without a match.
    """
    names: set[str] = set()
    for text in patterns.split(","):
        pattern = text.strip()
        matches = fnmatch.filter(cards, pattern)
        if not matches:
            raise CatalogError(f"unknown model {pattern!r}; `minecube models` lists what there is")
        names.update(matches)
    return tuple(card for name, card in cards.items() if name in names)


def run_benchmark(
    benchmark: Benchmark,
    begin_model: Callable[[int, ModelCard], None] = lambda _number, _card: None,
    progress: Progress = lambda _title, _part, _total, _note: None,
) -> list[Place]:
    """Train and map each network, score all maps, and write tables, scores and pictures.

    Calls `begin_model` with each network and its number, from 1.

    Returns the paths of tables, scores and pictures. The tables are mapping.md and change.md.

    Raises:
        CatalogError: the folder has a benchmark with other settings, or cannot be written.
        ModelError: a network does not fit the cubes, or the device is missing.
        LabelError: a test site has no label in any built year.
    """
    benchmark.compute.find_device()
    _need_same_settings(benchmark)
    need_labels(benchmark.store, benchmark.split.test)
    runs = ModelRuns()
    for number, card in enumerate(benchmark.cards, start=1):
        begin_model(number, card)
        model = _train_once(benchmark, card, progress)
        prediction = _map_tests(benchmark, card, model, progress)
        runs.notes[card.id] = _read_notes(benchmark, card)
        runs.predictions[card.id] = prediction
        if card.task != "change":
            _smooth_tests(benchmark, prediction)
            runs.predictions[card.id + SUFFIX] = prediction + SUFFIX
    tables = _score_tests(benchmark, runs, progress)
    return write_benchmark(benchmark, tables, runs)


def list_comparisons(cards: Sequence[ModelCard]) -> list[tuple[str, str]]:
    """List models to compare: smoothed with raw maps, and series models with all others."""
    smoothed = [(card.id + SUFFIX, card.id) for card in cards if card.task != "change"]
    series = [card for card in cards if card.task == "series"]
    return smoothed + [(a.id, b.id) for a in series for b in cards if a is not b]


def write_benchmark(benchmark: Benchmark, tables: ScoreTables, runs: ModelRuns) -> list[Place]:
    """Write tables, all scores and counts, and pictures of the best models. Returns the paths.

    Raises CatalogError if a file cannot be written.
    """
    baselines = [name for name in tables.counts if name not in runs.predictions]
    footprints = [*benchmark.footprint_models, *benchmark.smoothed_models, *baselines]
    mapping = {
        name: [
            _parameters(runs, name),
            *_scores_of(tables, name, MAPPING),
            _flip_rate(benchmark.store, tables, runs, name),
        ]
        for name in footprints
    }
    change = {
        name: [
            _parameters(runs, name),
            *_scores_of(tables, name, CHANGE),
            *_gap_scores(tables, name),
        ]
        for name in (*benchmark.change_models, *footprints)
    }
    gaps = [f"F1, gap {gap}" for gap in GAPS]
    paths: list[Place] = [
        *_write_table(benchmark.folder / "mapping", mapping, (*MAPPING, "flips")),
        *_write_table(benchmark.folder / "change", change, (*CHANGE, *gaps)),
    ]
    pictured = [*_best_models(benchmark, tables), *baselines]
    with outgoing(benchmark.folder / "scores") as folder:
        written = write_tables(tables, folder, pictured)
    return [*paths, *(benchmark.folder / "scores" / path.name for path in written)]


def _need_same_settings(benchmark: Benchmark) -> None:
    """Raise CatalogError if the folder has a benchmark with other settings.

    A new folder gets these settings.
    """
    path = benchmark.folder / "bench.json"
    settings: dict[str, Any] = {
        "store": str(benchmark.store),
        **asdict(benchmark.split),
        "settings": as_dict(benchmark.settings),
        "seed": benchmark.seed,
    }
    text = json.dumps(settings, indent=2) + "\n"
    if not path.exists():
        write_text(path, text, NOUN)
        return
    try:
        stored = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CatalogError(
            f"{path}: is not what `minecube bench` writes; remove it, or name another --out"
        ) from error
    different = [name for name, value in json.loads(text).items() if stored.get(name) != value]
    if different:
        raise CatalogError(
            f"{path}: is of a benchmark with other {', '.join(different)}; "
            "two of them in one table cannot be compared, so name another --out"
        )


def _model_path(benchmark: Benchmark, card: ModelCard, suffix: str) -> Place:
    return benchmark.folder / "models" / f"{card.id}{suffix}"


def _read_notes(benchmark: Benchmark, card: ModelCard) -> dict[str, float]:
    path = _model_path(benchmark, card, ".json")
    if not path.exists():
        return {}
    notes: dict[str, float] = json.loads(path.read_bytes())
    return notes


def _add_notes(benchmark: Benchmark, card: ModelCard, **notes: float) -> None:
    path = _model_path(benchmark, card, ".json")
    write_json(path, _read_notes(benchmark, card) | notes, NOUN)


def _train_once(benchmark: Benchmark, card: ModelCard, progress: Progress) -> models.TrainedModel:
    """Train a network, unless the folder has it.

    Raises ModelError if the folder's network has another card of that name.
    """
    path = _model_path(benchmark, card, ".pt")
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        start = time.monotonic()
        state = checkpoint_path(path)
        run = train.TrainingOptions(
            seed=benchmark.seed,
            device=benchmark.compute.device,
            resume=True,
            checkpoint=state,
            progress=lambda step, steps, note: progress(f"training {card.id}", step, steps, note),
        )
        split = benchmark.split
        fitted = train_network(
            benchmark.store, split.train, split.valid, card, benchmark.settings, run
        )
        models.save(fitted.trained, path)
        state.unlink()
        seconds = time.monotonic() - start
        best = fitted.best
        _add_notes(benchmark, card, train_s=seconds, valid_f1=best.f1, epoch=best.epoch)
    trained = models.load(path)
    if trained.card != card:
        raise ModelError(
            f"{path}: was trained by another card of that name; remove it, or name another --out"
        )
    return trained


def _map_tests(
    benchmark: Benchmark, card: ModelCard, trained: models.TrainedModel, progress: Progress
) -> str:
    """Map the test sites. Returns the name of the prediction."""
    mapper = models.Mapper(trained, benchmark.compute)
    sites = benchmark.split.test
    prediction = cube.choose_name(benchmark.store, sites, mapper.description, mapper.name)
    maps = 0
    seconds = 0.0
    for site in sites:
        report = functools.partial(_report_mapping, progress, site)
        options = MapOptions(prediction=prediction)
        mapped = map_site(benchmark.store, site, mapper, options, report)
        maps += mapped.maps
        seconds += mapped.seconds
    if maps:
        _add_notes(benchmark, card, map_s=seconds)
    weights = sum(parameter.numel() for parameter in trained.network.parameters())
    _add_notes(benchmark, card, parameters=weights)
    return prediction


def _report_mapping(progress: Progress, site: str, windows: int, total: int) -> None:
    progress(f"mapping {site}", windows, total, "")


def _smooth_tests(benchmark: Benchmark, prediction: str) -> None:
    """Smooth the maps of the test sites with rates learned from them."""
    store = benchmark.store
    maps = read_maps(store, benchmark.split.test, prediction)
    sites = SmoothedSites(prediction, maps, tracks.learn_rates(maps.values()))
    for site, lazy in maps.items():
        write_smoothed(store, sites, site, tracks.smooth(lazy.compute(), sites.rates))


def _score_tests(benchmark: Benchmark, runs: ModelRuns, progress: Progress) -> ScoreTables:
    """Score all maps and trivial baselines on the test sites."""
    sites = benchmark.split.test
    names = {prediction: name for name, prediction in runs.predictions.items()}
    steps = len(sites) * len(names)
    finished: list[str] = []

    def report(note: str) -> None:
        finished.append(note)
        progress("scoring", len(finished), steps, note)

    counts = count_sites(benchmark.store, sites, list(names), baselines=True, progress=report)
    by_name = {names.get(prediction, prediction): scores for prediction, scores in counts.items()}
    return ScoreTables.from_counts(by_name, list_comparisons(benchmark.cards))


def _parameters(runs: ModelRuns, name: str) -> str:
    """Format a network's number of parameters in millions; "" for other names."""
    if name not in runs.notes:
        return ""
    return f"{runs.notes[name]['parameters'] / 1e6:.2f}"


def _scores_of(tables: ScoreTables, name: str, scores: Iterable[str]) -> list[str]:
    return [format_score(tables.intervals[name], score) for score in scores]


def _gap_scores(tables: ScoreTables, name: str) -> list[str]:
    by_gap = metrics.tabulate_gaps(tables.pooled[name])
    if "change_f1" not in by_gap:  # for one year
        return [""] * len(GAPS)
    return [_format_number(by_gap["change_f1"].get(gap), ".3f") for gap in GAPS]


def _flip_rate(store: cube.Store, tables: ScoreTables, runs: ModelRuns, name: str) -> str:
    """Format the flip rate of a prediction over all its sites; "" for a baseline."""
    if name not in runs.predictions:
        return ""
    maps = (
        tracks.threshold(cube.open_probability(store, site, runs.predictions[name]))
        for site in tables.counts[name]
    )
    return _format_number(tracks.compute_flip_rate(*maps), ".2%")


def _format_number(score: float | None, form: str) -> str:
    if score is None:
        return ""
    if math.isnan(score):
        return "n/a"
    return format(score, form)


def _write_table(path: Place, rows: dict[str, list[str]], columns: Sequence[str]) -> list[Place]:
    """Write a table in Markdown and LaTeX. Returns the paths."""
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["M weights", *columns])
    frame = frame.rename_axis("model")
    return [
        write_text(path.with_suffix(".md"), format_markdown(frame), NOUN),
        write_text(path.with_suffix(".tex"), format_latex(frame), NOUN),
    ]


def _best_models(benchmark: Benchmark, tables: ScoreTables) -> list[str]:
    """List the best smoothed maps, each after its raw map, and the best networks of change."""

    def rank(names: Sequence[str], score: str) -> list[str]:
        values = {name: float(tables.intervals[name]["score"][score]) for name in names}
        return sorted(names, key=values.__getitem__, reverse=True)[:_PICTURED]

    pictured: list[str] = []
    for name in rank(benchmark.smoothed_models, "ca_tiou"):
        pictured += [name.removesuffix(SUFFIX), name]
    return pictured + rank(benchmark.change_models, "change_f1")
