"""The steps of a run on whole sites: audit, label, predict, tracks, score and export.

Each step describes its inputs as plain JSON, does its work, and identifies its outputs. It is
finished if both descriptions are as in its note (`finished.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd

from minecube import cube, export
from minecube.catalog.dataset import ExportInput, LabelInput, ScoreInput
from minecube.cube.read.summaries import Commit, list_commits
from minecube.digests import sha256_of_json
from minecube.errors import CubeError, MinecubeError
from minecube.files import replacing
from minecube.jobs.audit import judge_lists
from minecube.jobs.export import ExportOptions, export_sites
from minecube.jobs.label import draw_labels
from minecube.jobs.runs.finished import forget_finished, note_finished, read_finished
from minecube.jobs.runs.inputs import Inputs, hash_file, identify_model, load_polygons
from minecube.jobs.runs.lookups import READERS
from minecube.jobs.scene_lists import path_of_list
from minecube.jobs.score import score_baselines, score_site
from minecube.jobs.tables import write_json
from minecube.jobs.tracks import SUFFIX, SmoothedSites, read_maps, smooth_site
from minecube.places import Place, list_files, outgoing, place_of
from minecube.tracks import Rates

Commits = Mapping[int, Commit]
"""Committed year -> its marker."""


def read_site_commits(inputs: Inputs, site: str) -> Commits:
    """Read the markers of a site's committed years, also of years that the dataset lacks."""
    return {year: commit for (_, year), commit in list_commits(inputs.store, [site]).items()}


@dataclass(frozen=True)
class SiteStep(ABC):
    """One step of one site."""

    inputs: Inputs
    site: str
    commits: Commits

    @abstractmethod
    def describe_inputs(self) -> Any:
        """Describe what the step is made from, as plain JSON."""

    def describe_content(self) -> Any:
        """Describe the same by content alone, if `describe_inputs` has times of files; else None.

        A copy of a dataset has other times. The content is read only if the times differ.
        """
        return None

    @abstractmethod
    def work(self, *, overwrite: bool) -> None:
        """Make the outputs. With `overwrite`, maps of other models are replaced."""

    @abstractmethod
    def identify_outputs(self) -> Any:
        """Return what shows that the outputs are there and the same, as plain JSON."""

    def seal(self, path: str) -> str:
        """Return the seal of one of the site's arrays or groups."""
        return self.inputs.lookup.read_seal(self.inputs.store, f"{self.site}/{path}")

    def builds(self) -> dict[int, str]:
        """Return the hash of each committed year."""
        return {year: commit.sha256 for year, commit in sorted(self.commits.items())}


def make_step(name: str, inputs: Inputs, site: str, commits: Commits) -> SiteStep:
    """Make the step of a site by its name."""
    return _CLASSES[name](inputs, site, commits)


def is_finished(name: str, step: SiteStep) -> bool:
    """Whether a step was made from the present inputs, and its outputs are still there."""
    note = step.inputs.lookup.read_note(step.inputs.store, name, step.site)
    if not note:
        return False
    if note["outputs"] != sha256_of_json(step.identify_outputs()):
        return False
    if note["inputs"] == sha256_of_json(step.describe_inputs()):
        return True
    content = step.describe_content() if note.get("content") else None
    return content is not None and bool(note["content"] == sha256_of_json(content))


def check_steps(inputs: Inputs, names: Sequence[str]) -> dict[str, dict[str, bool]]:
    """Map each step to each site, and whether it is finished, as `run` decides."""

    def check(site: str) -> list[bool]:
        try:
            commits = read_site_commits(inputs, site)
        except MinecubeError:  # a damaged marker, which is listed for its site-year
            return [False] * len(names)
        return [check_step(name, site, commits) for name in names]

    def check_step(name: str, site: str, commits: Commits) -> bool:
        try:
            return is_finished(name, make_step(name, inputs, site, commits))
        except (MinecubeError, OSError):  # a file that it was made from is gone, for example
            return False

    with ThreadPoolExecutor(1 if inputs.store.path else READERS) as pool:
        found = list(pool.map(check, inputs.sites))
    return {
        name: dict(zip(inputs.sites, states, strict=True))
        for name, states in zip(names, zip(*found, strict=True), strict=True)
    }


def finish_step(name: str, step: SiteStep, *, overwrite: bool) -> None:
    """Do a step unless it is finished, and note that it is."""
    if is_finished(name, step):  # by another run, just now
        return
    described = sha256_of_json(step.describe_inputs())
    content = step.describe_content()
    # Otherwise, half-made outputs would count as finished once the old inputs are back.
    forget_finished(step.inputs.store, name, step.site)
    step.work(overwrite=overwrite)
    outputs = sha256_of_json(step.identify_outputs())
    content_hash = None if content is None else sha256_of_json(content)
    note_finished(step.inputs.store, name, step.site, described, outputs, content_hash)


class _Audit(SiteStep):
    def describe_inputs(self) -> Any:
        job = self.inputs.job
        site = self.inputs.sites[self.site]
        years = self.inputs.dataset.years
        lists = [path_of_list(site, year, job.sources, job.snapshots) for year in years]
        times = [self.inputs.lookup.time_of_change(place) for place in lists]
        return {"recipe": job.recipe.id, "lists": times}

    def describe_content(self) -> Any:
        job = self.inputs.job
        site = self.inputs.sites[self.site]
        years = self.inputs.dataset.years
        hash_list = self.inputs.lookup.hash_list
        hashes = [hash_list(site, year, job.sources, job.snapshots) for year in years]
        return {"recipe": job.recipe.id, "lists": hashes}

    def work(self, *, overwrite: bool) -> None:
        del overwrite  # for maps
        job = self.inputs.job
        site = self.inputs.sites[self.site]
        years = self.inputs.dataset.years
        tables = judge_lists(site, years, job.sources, job.recipe, job.snapshots)
        for name, table in zip(("months", "years"), tables, strict=True):
            _write_parquet(table, self._folder() / f"{self.site}_{name}.parquet")

    def identify_outputs(self) -> Any:
        return self.inputs.lookup.exists(self._folder() / f"{self.site}_years.parquet")

    def _folder(self) -> Place:
        return self.inputs.results / "audit" / "sites"


class _Label(SiteStep):
    @property
    def source(self) -> LabelInput:
        return cast("LabelInput", self.inputs.dataset.labels)

    def describe_inputs(self) -> Any:
        years = sorted({*self.inputs.dataset.years, *self.commits})
        return {"file": hash_file(self.source.file), "layer": self.source.layer, "years": years}

    def work(self, *, overwrite: bool) -> None:
        del overwrite  # for maps
        grid, years = cube.read_grid_and_years(self.inputs.store, self.site)
        polygons = load_polygons(self.source, tuple(self.inputs.sites))
        drawing = draw_labels(polygons, self.site, grid, years, place_of(self.source.file))
        drawing.write(self.inputs.store)

    def identify_outputs(self) -> Any:
        return self.seal("footprint")


class _Predict(SiteStep):
    def describe_inputs(self) -> Any:
        models = self.inputs.dataset.models
        identities = {model.name: identify_model(self.inputs, model.file) for model in models}
        return {"models": identities, "builds": self.builds()}

    def work(self, *, overwrite: bool) -> None:
        from minecube.jobs.runs.mapping import map_with_all  # loads torch

        map_with_all(self.inputs, self.site, replace_models=overwrite)

    def identify_outputs(self) -> Any:
        models = self.inputs.dataset.models
        return {model.name: self.seal(f"predictions/{model.name}") for model in models}


class _Tracks(SiteStep):
    def describe_inputs(self) -> Any:
        models = self.inputs.dataset.models
        return {
            model.name: [
                self.seal(f"predictions/{model.name}"),
                self.inputs.lookup.read_note(self.inputs.store, "rates", model.name).get("outputs"),
            ]
            for model in models
        }

    def work(self, *, overwrite: bool) -> None:
        del overwrite  # for maps
        for model in self.inputs.dataset.models:
            note = read_finished(self.inputs.store, "rates", model.name)
            if not note:
                raise CubeError(
                    f"{self.inputs.store}: no rates of opening and closing for {model.name}; "
                    "run the step `predict` for all sites first"
                )
            maps = read_maps(self.inputs.store, [self.site], model.name)
            smoothed = SmoothedSites(model.name, maps, Rates(**note["outputs"]))
            folder = self._folder(model.name)
            with outgoing(folder) as local:
                areas, summary = smooth_site(self.inputs.store, smoothed, self.site, local.parent)
                export.write_table(areas, local / "areas.csv")
                export.write_table(pd.DataFrame([summary]), local / "summary.csv")

    def identify_outputs(self) -> Any:
        names = [model.name for model in self.inputs.dataset.models]
        return {
            name: [
                self.seal(f"predictions/{name}{SUFFIX}"),
                self.inputs.lookup.list_files(self._folder(name)),
            ]
            for name in names
        }

    def _folder(self, model: str) -> Place:
        return self.inputs.results / "tracks" / model / "sites" / self.site


class _Score(SiteStep):
    @property
    def settings(self) -> ScoreInput:
        return cast("ScoreInput", self.inputs.dataset.score)

    def _models(self) -> list[str]:
        """List the maps to score: of each model, raw and smoothed."""
        names = [model.name for model in self.inputs.dataset.models]
        if self.inputs.dataset.tracks is None:
            return names
        return [name for model in names for name in (model, model + SUFFIX)]

    def describe_inputs(self) -> Any:
        return {
            "baselines": self.settings.baselines,
            "labels": self.seal("footprint"),
            "maps": {name: self.seal(f"predictions/{name}") for name in self._models()},
        }

    def work(self, *, overwrite: bool) -> None:
        del overwrite  # for maps
        store = self.inputs.store
        counts = {name: score_site(store, self.site, name) for name in self._models()}
        if self.settings.baselines:
            counts |= score_baselines(store, self.site)
        content = {name: {self.site: score.to_json()} for name, score in counts.items()}
        with outgoing(counts_file(self.inputs, self.site)) as path:
            write_json(path, content, "the counts")

    def identify_outputs(self) -> Any:
        return self.inputs.lookup.exists(counts_file(self.inputs, self.site))


def counts_file(inputs: Inputs, site: str) -> Place:
    """Return the file with a site's counts, as `score --join` reads it."""
    return inputs.results / "scores" / "sites" / f"{site}.json"


class _Export(SiteStep):
    @property
    def settings(self) -> ExportInput:
        return cast("ExportInput", self.inputs.dataset.export)

    def describe_inputs(self) -> Any:
        model = self.settings.model
        return {
            "options": asdict(self.settings),
            "builds": self.builds(),
            "labels": self.seal("footprint"),
            "maps": "" if model is None else self.seal(f"predictions/{model}"),
        }

    def work(self, *, overwrite: bool) -> None:
        del overwrite  # for maps
        options = ExportOptions(**asdict(self.settings))
        with _replacing(self._folder()) as folder:
            export_sites(self.inputs.store, [self.site], folder, options)

    def identify_outputs(self) -> Any:
        return self.inputs.lookup.list_files(self._folder())

    def _folder(self) -> Place:
        return self.inputs.results / "export" / self.site


_CLASSES: Mapping[str, type[SiteStep]] = {
    "audit": _Audit,
    "label": _Label,
    "predict": _Predict,
    "tracks": _Tracks,
    "score": _Score,
    "export": _Export,
}


@contextmanager
def _replacing(place: Place) -> Iterator[Path]:
    """Yield a folder to fill. At the end it replaces the one at `place`, with all its files."""
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as draft:
            yield draft
        return
    old = set(list_files(place))
    with outgoing(place) as draft:
        yield draft
        new = set(list_files(draft))
    for name in old - new:
        (place / name).unlink()


def _write_parquet(table: pd.DataFrame, place: Place) -> None:
    try:
        with outgoing(place) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                table.to_parquet(draft, index=False)
    except OSError as error:
        raise CubeError(
            f"{place}: cannot be written ({error.strerror or error}); choose other `results`"
        ) from error
