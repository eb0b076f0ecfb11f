"""Determine the rates of opening and closing for tracks, from the maps of all sites.

All sites of a dataset share one set of rates per model, also in a run of some sites or in a shard.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

import xarray as xr

from minecube.catalog.dataset import TracksInput
from minecube.cube.locks import hold
from minecube.cube.read.summaries import read_seals
from minecube.digests import sha256_of_json
from minecube.errors import BusyError, CubeError, MinecubeError
from minecube.jobs.runs.finished import forget_finished, note_finished, read_finished, read_notes
from minecube.jobs.runs.inputs import Inputs
from minecube.jobs.tracks import choose_rates, read_maps

log = logging.getLogger(__name__)

STEP = "rates"
"""Step of the notes on rates; each has the name of a model."""
_WAIT_S = 3600.0
"""Longest time to wait for another run that determines the same rates."""

Seals = Mapping[str, Mapping[str, str]]
"""Site -> model -> seal of its maps."""


def list_mapped(inputs: Inputs) -> Seals:
    """List the sites whose step `predict` is finished and whose maps are unchanged since."""
    models = [model.name for model in inputs.dataset.models]
    sites = list(inputs.sites)
    notes = read_notes(inputs.store, "predict", sites)
    paths = [f"{site}/predictions/{model}" for site in sites for model in models]
    seals = iter(read_seals(inputs.store, paths))
    mapped = {}
    for site in sites:
        maps = {model: next(seals) for model in models}
        if site in notes and notes[site]["outputs"] == sha256_of_json(maps):
            mapped[site] = maps
    return mapped


def update_rates(inputs: Inputs, mapped: Seals) -> bool:
    """Determine the rates of each model, unless they are known. Returns False while others do.

    If rates cannot be determined, the reason is logged, and the old ones are removed. The tracks
    of every site then fail.
    """
    for model in inputs.dataset.models:
        described = _describe(inputs, model.name, mapped)
        if _is_known(inputs, model.name, described):
            continue
        try:
            with hold(inputs.store, f"run/{STEP}/{model.name}", wait_s=_WAIT_S):
                if not _is_known(inputs, model.name, described):
                    _learn(inputs, model.name, list(mapped), described)
        except BusyError:
            return False
        except MinecubeError as error:
            log.warning("%s: no rates for tracks: %s", model.name, error)
            forget_finished(inputs.store, STEP, model.name)
    return True


def _describe(inputs: Inputs, model: str, mapped: Seals) -> str:
    settings = cast("TracksInput", inputs.dataset.tracks)
    labels: list[str] = []
    if settings.rates.startswith("labels"):
        labels = read_seals(inputs.store, [f"{site}/footprint" for site in inputs.sites])
    maps = {site: seals[model] for site, seals in mapped.items()}
    return sha256_of_json([settings.rates, labels, maps])


def _is_known(inputs: Inputs, model: str, described: str) -> bool:
    return bool(read_finished(inputs.store, STEP, model).get("inputs") == described)


def _learn(inputs: Inputs, model: str, sites: list[str], described: str) -> None:
    """Determine and note the rates of a model. Raises as `choose_rates`."""
    settings = cast("TracksInput", inputs.dataset.tracks)
    maps: dict[str, xr.DataArray] = {}
    for site in sites:
        try:
            maps |= read_maps(inputs.store, [site], model)
        except CubeError as error:  # its cubes are newer: `predict` failed for this site
            log.info("%s: its maps do not count for the rates: %s", site, error)
    rates = choose_rates(inputs.store, maps, settings.method())
    note_finished(inputs.store, STEP, model, described, asdict(rates))
