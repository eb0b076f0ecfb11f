"""A whole dataset in one file: sites, years, inputs, methods, results and where to run.

`load_dataset` reads a `dataset.yaml`. Its errors name the line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from minecube.catalog.conversion import SET_BY_LOADER, build
from minecube.catalog.fields import FieldError, check_field, need, need_name
from minecube.catalog.loaders import describe_yaml_error, read_unique_yaml
from minecube.catalog.mission import FIRST_YEAR
from minecube.catalog.years import parse_years
from minecube.errors import CatalogError, MinecubeError

T = TypeVar("T")

TEMPLATE = """\
# A dataset of annual cubes, maps and scores. Build it with: minecube run dataset.yaml
# Paths are relative to this file. Every key is explained in docs/operations.md.
id: my-mines              # the name in messages and notifications
sites: my_mines.geojson   # a file with one polygon per site, or names of the catalogue
years: 2019-2023
sources: [earth-search]   # in order of preference: catalog/sources.yaml
store: cubes.zarr         # a folder, or a URL such as s3://bucket/cubes.zarr
results: results          # folder of audits, tracks, scores and exports
#recipe: annual-median    # catalog/recipes.yaml
#margin: 300              # metres of ground around each polygon
#catalog: .               # folder with your own sources.yaml, recipes.yaml, models.yaml
#scenes: cubes.zarr-scenes # folder of scene lists
#min_read_completeness: 1.0
#on_offset_conflict: drop # drop, warn, fix or fail

#labels:                  # mine polygons to draw on the cubes
#  file: mines.gpkg
#  layer: mines_2019      # only if several layers have polygons

#models:                  # networks that map the mines
#  - file: model.pt       # a trained model, or the name of a model with weights
#    name: unet           # name of its maps in the store

#tracks:                  # maps smoothed through time, openings and areas
#  rates: learned         # learned, labels, or opening,closing per year such as 0.01,0.005

#score: {baselines: true} # compares all maps with the labels

#export:
#  formats: [cog]         # cog, netcdf, zarr, zarr2
#  model: unet            # maps to export with the cubes

#engine: local            # catalog/clusters.yaml
#workers: 2               # processes on this machine; by default one per core
#publish: releases        # Icechunk repository for finished versions
#prices: prices.yaml      # costs per request, gigabyte and core-hour

#notify:                  # gets the summary as JSON
#  command: mail -s minecube me@example.org
#  webhook: https://example.org/hook
"""
"""Commented `dataset.yaml`, as `minecube run --init` writes it."""
_POLICIES = ("drop", "warn", "fix", "fail")
_FORMATS = ("cog", "netcdf", "zarr", "zarr2")


@dataclass(frozen=True, kw_only=True)
class LabelInput:
    """Mine polygons to draw on the cubes."""

    file: str
    layer: str | None = None
    """Layer of the file, if several layers have polygons."""


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """A network that maps the mines."""

    file: str
    """File of a trained model, or name of a model with weights."""
    name: str
    """Name of its maps in the store."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        need_name(self.name, "name")


@dataclass(frozen=True, kw_only=True)
class TracksInput:
    """How maps are smoothed through time."""

    rates: str = "learned"
    """learned, labels, labels:SITES, or probabilities of opening and closing per year."""

    def __post_init__(self) -> None:
        is_method = re.fullmatch(r"learned|labels(:.+)?|[\d.e-]+\s*,\s*[\d.e-]+", self.rates)
        check_field(is_method, self, "rates", "learned, labels, labels:SITES or opening,closing")

    def method(self) -> str | tuple[float, float]:
        """Return the rates as `jobs.tracks.choose_rates` takes them."""
        if self.rates.startswith(("learned", "labels")):
            return self.rates
        opening, closing = map(float, self.rates.split(","))
        return opening, closing


@dataclass(frozen=True, kw_only=True)
class ScoreInput:
    """How maps are compared with labels."""

    baselines: bool = False
    """Whether to score trivial baselines, too."""


@dataclass(frozen=True, kw_only=True)
class ExportInput:
    """What to export."""

    formats: tuple[str, ...] = ("cog",)
    model: str | None = None
    """Name of the maps to export with the cubes: one of `models`, or its smoothed maps (+hmm)."""
    min_area_m2: float = 0

    def __post_init__(self) -> None:
        fits = self.formats and set(self.formats) <= set(_FORMATS)
        check_field(fits, self, "formats", f"some of {', '.join(_FORMATS)}")
        check_field(self.min_area_m2 >= 0, self, "min_area_m2", "0 or more")


@dataclass(frozen=True, kw_only=True)
class Notification:
    """Who gets the summary of a run."""

    command: str | None = None
    """Shell command; it reads the summary from standard input."""
    webhook: str | None = dataclasses.field(default=None, repr=False)
    """URL that receives the summary by POST. Its path is often a secret."""
    stall_minutes: float = 60
    """A run without a finished task for this long has stalled."""

    def __post_init__(self) -> None:
        need(self.command or self.webhook, "command", "a command or a webhook, found neither")
        is_url = self.webhook is None or re.match("https?://", self.webhook)
        check_field(is_url, self, "webhook", "a URL")
        check_field(self.stall_minutes > 0, self, "stall_minutes", "a number above 0")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A whole dataset. Relative paths have been resolved against the folder of its file."""

    id: str
    sites: str
    """Names of sites, comma-separated, * allowed; or a file with one polygon per site."""
    years: tuple[int, ...]
    sources: tuple[str, ...]
    """Ids, in order of preference."""
    store: str
    results: str
    """Folder of audits, tracks, scores and exports."""
    sites_layer: str | None = None
    recipe: str = "annual-median"
    margin: float | None = None
    catalog: str | None = None
    scenes: str | None = None
    """Folder of scene lists; by default next to the store."""
    min_read_completeness: float = 1.0
    on_offset_conflict: str = "drop"
    labels: LabelInput | None = None
    models: tuple[ModelInput, ...] = ()
    tracks: TracksInput | None = None
    score: ScoreInput | None = None
    export: ExportInput | None = None
    engine: str = "local"
    workers: int | None = None
    """Processes on this machine; None: one per core."""
    publish: str | None = None
    """Icechunk repository for finished versions."""
    prices: str | None = None
    """YAML file of `composite.plan.Terms`."""
    notify: Notification | None = None
    file: str | None = dataclasses.field(
        default=None, compare=False, repr=False, metadata={SET_BY_LOADER: True}
    )
    """The `dataset.yaml` that it was loaded from. Errors name its lines."""

    @contextmanager
    def naming_line(self, key: str, index: int | None = None) -> Iterator[None]:
        """Add the line of a key to errors, or that of one entry of its list.

        Use it where the value of the key is checked after the file was loaded.
        """
        try:
            yield
        except MinecubeError as error:
            if self.file is not None and (line := _find_line(Path(self.file), key, index)):
                error.args = (f"{self.file}, line {line}: {error}",)
            raise

    def __post_init__(self) -> None:
        need_name(self.id, "id")
        fits = bool(self.years) and min(self.years) >= FIRST_YEAR
        check_field(fits, self, "years", f"years from {FIRST_YEAR} on, such as 2019-2023")
        fits = bool(self.sources) and len(set(self.sources)) == len(self.sources)
        check_field(fits, self, "sources", "at least one source, each once")
        check_field(0 <= self.min_read_completeness <= 1, self, "min_read_completeness", "0..1")
        fits = self.on_offset_conflict in _POLICIES
        check_field(fits, self, "on_offset_conflict", f"one of {', '.join(_POLICIES)}")
        check_field(self.workers is None or self.workers >= 1, self, "workers", "1 or more")
        is_other_url = "://" in (self.publish or "") and not str(self.publish).startswith("s3://")
        check_field(not is_other_url, self, "publish", "a folder or s3://bucket/prefix")
        names = [model.name for model in self.models]
        need(len(set(names)) == len(names), "models", f"names that differ, found {names}")
        self._check_uses(names)

    def _check_uses(self, names: list[str]) -> None:
        """Check that steps have the maps and labels that they need."""
        need(self.tracks is None or names, "tracks", "an entry in `models` to smooth, found none")
        if self.score is not None:
            need(names, "score", "an entry in `models` to score, found none")
            need(self.labels, "score", "`labels` to compare with, found none")
        smoothed = [f"{name}+hmm" for name in names if self.tracks]
        if self.export is not None and self.export.model is not None:
            fits = self.export.model in (*names, *smoothed)
            listed = ", ".join([*names, *smoothed]) or "no model here"
            need(fits, "export", f"a model of {listed}, found {self.export.model!r}")


_SECTIONS: Mapping[str, type[Any]] = {
    "labels": LabelInput,
    "tracks": TracksInput,
    "score": ScoreInput,
    "export": ExportInput,
    "notify": Notification,
}
_PATHS = ("store", "results", "scenes", "catalog", "publish", "prices")


def load_dataset(path: Path) -> Dataset:
    """Load a `dataset.yaml`. Raises CatalogError with the line of a wrong key or value."""
    try:
        text = path.read_text(encoding="utf-8")
        content = read_unique_yaml(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise CatalogError(
            f"{path}: cannot be read as a dataset: {describe_yaml_error(error)}; "
            "`minecube run --init` writes a commented one"
        ) from error
    if not isinstance(content, Mapping):
        raise CatalogError(
            f"{path}: expected keys such as sites and years, found {type(content).__name__}; "
            "`minecube run --init` writes a commented one"
        )
    reader = _Reader(path)
    entry: dict[str, Any] = {"results": "results", **content}
    _read_years(entry, reader, node)
    for name, section in _SECTIONS.items():
        if entry.get(name) is not None:
            entry[name] = reader.build(section, entry[name], _value_of(node, name), name)
    if isinstance(entry.get("models"), list):
        nodes = _value_of(node, "models").value
        entry["models"] = tuple(
            reader.build(ModelInput, fields, nodes[index], "models")
            for index, fields in enumerate(entry["models"])
        )
    dataset = reader.build(Dataset, entry, node, "")
    resolved = _resolve(dataset, path.resolve().parent)
    return dataclasses.replace(resolved, file=str(path))


def _find_line(path: Path, key: str, index: int | None) -> int | None:
    """Find the line of a key; None if the file lacks it, or is not on this machine."""
    try:
        node: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        name, value = next(pair for pair in node.value if pair[0].value == key)
    except (OSError, ValueError, yaml.YAMLError, StopIteration):
        return None
    place = name if index is None else value.value[index]
    return int(place.start_mark.line) + 1


def _read_years(entry: dict[str, Any], reader: _Reader, node: Any) -> None:
    """Turn the text or number of `years` into a list."""
    years = entry.get("years")
    if isinstance(years, str | int) and not isinstance(years, bool):
        try:
            entry["years"] = parse_years(str(years))
        except ValueError as error:
            raise reader.error(f"field 'years': {error}", node, "years") from error


@dataclass(frozen=True)
class _Reader:
    """Builds values from parts of a file, and names lines in errors."""

    path: Path

    def build(self, cls: type[T], entry: Any, node: Any, name: str) -> T:
        """Build a value from a mapping. `node` is its place in the file, `name` its key."""
        if not isinstance(entry, Mapping):
            raise self.error(f"field {name!r}: expected keys, found {entry!r}", node)
        try:
            return build(cls, entry)
        except FieldError as error:
            field = re.match(r"field '(.*?)'", str(error))
            raise self.error(str(error), node, field[1] if field else "") from error

    def error(self, text: str, node: Any, key: str = "") -> CatalogError:
        """Make an error with the line of a key, or of the node itself."""
        mark = node.start_mark
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.value == key:
                mark = key_node.start_mark
        return CatalogError(f"{self.path}, line {mark.line + 1}: {text}")


def _value_of(node: Any, key: str) -> Any:
    """Return the node of a key's value."""
    return next(value for key_node, value in node.value if key_node.value == key)


def _resolve(dataset: Dataset, folder: Path) -> Dataset:
    """Make paths independent of the current folder. URLs and names stay."""
    paths: dict[str, Any] = {
        name: _resolve_path(getattr(dataset, name), folder)
        for name in _PATHS
        if getattr(dataset, name) is not None
    }
    if Path(dataset.sites).suffix:
        paths["sites"] = _resolve_path(dataset.sites, folder)
    labels = dataset.labels
    if labels is not None:
        labels = dataclasses.replace(labels, file=_resolve_path(labels.file, folder))
    models = tuple(
        dataclasses.replace(model, file=_resolve_path(model.file, folder))
        if (folder / model.file).exists() or Path(model.file).suffix
        else model
        for model in dataset.models
    )
    return dataclasses.replace(dataset, **paths, labels=labels, models=models)


def _resolve_path(text: str, folder: Path) -> str:
    if "://" in text:
        return text
    return str(folder / text)
