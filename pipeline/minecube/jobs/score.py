"""Count agreements of predictions and labels: the job of `minecube score`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xarray as xr

from minecube import cube, metrics
from minecube.codes import HALF, UNKNOWN
from minecube.errors import CatalogError, CubeError, LabelError, ModelError
from minecube.places import Place

BLOCK_PX = 512
"""Rows per block. Blocks keep memory independent of a site's height."""

Counts = dict[str, dict[str, metrics.Counts]]
"""Model or baseline -> site -> counts."""


def count_sites(
    store: cube.Store,
    sites: Sequence[str],
    models: Sequence[str],
    *,
    baselines: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Counts:
    """Count predictions, and optionally trivial baselines, against the labels of all sites.

    Calls `progress` with each finished "site model".

    Raises:
        LabelError: a site has no label in any built year.
        CubeError: a model did not map a site's current build.
    """
    counts: Counts = {model: {} for model in models}
    for site in sites:
        for model in models:
            counts[model][site] = score_site(store, site, model)
            progress(f"{site} {model}")
        if baselines:
            for name, scores in score_baselines(store, site).items():
                counts.setdefault(name, {})[site] = scores
    return counts


def score_site(store: cube.Store, site: str, model: str) -> metrics.Counts:
    """Count a site's prediction against its labels, in blocks of rows.

    Handles footprints and change.

    Raises:
        LabelError: no built year has a label.
        CubeError: the model did not map the site's current build.
    """
    truth = _open_truth(store, site)
    if cube.read_variable(store, site, model) == "change":
        return _score_change(cube.open_change(store, site, model), truth)
    probability = cube.open_probability(store, site, model)
    years = _years_of(truth)
    missing = sorted(set(years) - set(_years_of(probability)))
    if missing:
        raise CubeError(
            f"{store}: {model!r} did not map {site} in {missing[0]}, which is labelled; "
            "run `minecube predict` again"
        )
    return _score_footprints(probability.sel(year=years), truth)


def score_baselines(store: cube.Store, site: str) -> dict[str, metrics.Counts]:
    """Count trivial baselines, by name. Raises LabelError as `score_site` does."""
    truth = _open_truth(store, site)
    years = _years_of(truth)
    scores: dict[str, metrics.Counts] = {}
    for rows, core in _blocks_of(truth):
        footprint = _read_rows(truth, rows)
        for name, prediction in metrics.make_baselines(footprint).items():
            block = metrics.count(prediction, footprint, years, core=core)
            scores[name] = scores.get(name, metrics.Counts()) + block
    return scores


def need_labels(store: cube.Store, sites: Sequence[str]) -> None:
    """Raise LabelError if a site has no label in any built year."""
    for site in sites:
        _open_truth(store, site)


def read_counts(path: Place) -> Counts:
    """Read counts from another run. Raises CatalogError if the file holds no counts."""
    try:
        content = json.loads(path.read_bytes())
        return {model: _parse_sites(sites) for model, sites in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError, ModelError) as error:
        raise CatalogError(
            f"{path}: expected counts.json as `minecube score --out` writes it ({error})"
        ) from error


def join_counts(counts: Counts, path: Place, joined: Counts, sites: Sequence[str]) -> None:
    """Add the counts of another run, from the file `path`, to `counts` in place.

    This run counts `sites` for each model of `counts`.

    Raises CatalogError if a site is counted twice, or will be counted here.
    """
    for model, scores in joined.items():
        counted = set(counts.get(model, ()))
        if model in counts:
            counted |= set(sites)
        repeated = sorted(set(scores) & counted)
        if repeated:
            raise CatalogError(
                f"{path}: {repeated[0]} of {model} is already counted; "
                "counting it again would weigh it twice, so choose other --sites"
            )
        counts.setdefault(model, {}).update(scores)


def _parse_sites(sites: dict[str, dict[str, object]]) -> dict[str, metrics.Counts]:
    return {site: metrics.Counts.of_json(scores) for site, scores in sites.items()}


def _score_change(change: xr.DataArray, truth: xr.DataArray) -> metrics.Counts:
    """Count maps of change [pair, class, y, x] against footprints [year, y, x]."""
    starts = change["first"].to_numpy().tolist()
    ends = change["second"].to_numpy().tolist()
    pairs = list(zip(starts, ends, strict=True))
    classes = [str(name) for name in change["class"].to_numpy()]
    years = _years_of(truth)
    total = metrics.Counts()
    for context, (core, _) in _blocks_of(truth):
        rows = slice(context.start + core.start, context.start + core.stop)
        block = change.isel(y=rows).transpose("pair", "class", "y", "x").to_numpy()
        footprint = truth.isel(y=rows).to_numpy()
        total += metrics.count_change(block, footprint, years, pairs, classes)
    return total


def _score_footprints(probability: xr.DataArray, truth: xr.DataArray) -> metrics.Counts:
    """Count probabilities x 250 against footprints, both uint8 [year, y, x]; 255 is unknown."""
    years = _years_of(truth)
    total = metrics.Counts()
    for rows, core in _blocks_of(truth):
        block = _read_rows(probability, rows)
        labelled = _read_rows(truth, rows)
        mapped = (block >= HALF).astype(np.uint8)
        mapped[block == UNKNOWN] = UNKNOWN
        total += metrics.count(mapped, labelled, years, core=core)
        total += metrics.count_probability(block, labelled, years, core=core)
    return total


def _open_truth(store: cube.Store, site: str) -> xr.DataArray:
    truth = cube.open_committed(store, site)["footprint"]
    if bool((truth == UNKNOWN).all()):
        raise LabelError(
            f"{store}: {site} has no footprint in any built year, so nothing can be scored; "
            "run `minecube label` first"
        )
    return truth


def _years_of(footprint: xr.DataArray) -> list[int]:
    return [int(year) for year in footprint.year]


def _read_rows(footprint: xr.DataArray, rows: slice) -> np.ndarray:
    return footprint.isel(y=rows).transpose("year", "y", "x").to_numpy()


def _blocks_of(truth: xr.DataArray) -> Iterator[tuple[slice, tuple[slice, slice]]]:
    """Yield rows to read, and the pixels to count within these rows."""
    height = truth.sizes["y"]
    for start in range(0, height, BLOCK_PX):
        stop = min(start + BLOCK_PX, height)
        top = max(start - metrics.MARGIN_PX, 0)
        bottom = min(stop + metrics.MARGIN_PX, height)
        yield slice(top, bottom), (slice(start - top, stop - top), slice(None))
