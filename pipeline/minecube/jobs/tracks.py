"""Smooth the maps of a store through time, and date events: the job of `minecube tracks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube import cube, export, tracks
from minecube.jobs.selection import SiteChoice, stored_sites
from minecube.tracks.smoothing import TEMPER

SUFFIX = "+hmm"
"""Suffix of a smoothed prediction's name."""
_M2_PER_HA = 1e4


@dataclass(frozen=True)
class Track:
    """Smoothed map, layers and tables of one site."""

    smoothed: xr.DataArray
    """[year, y, x] uint8: probability x 250, 255 unknown."""
    layers: xr.Dataset
    """[y, x] onset, end, reclaimed, kind and flips."""
    areas: pd.DataFrame
    """Area by year in m2, with 95 % intervals."""
    summary: dict[str, object]
    """Opening, areas in ha, growth in ha per year, and flip rates of the site."""


@dataclass(frozen=True)
class SmoothedSites:
    """Smoothed predictions of several sites."""

    model: str
    """Name of the prediction before smoothing."""
    maps: Mapping[str, xr.DataArray]
    """Site -> lazy probability [year, y, x] of the prediction."""
    rates: tracks.Rates


def read_maps(store: cube.Store, sites: Sequence[str], model: str) -> dict[str, xr.DataArray]:
    """Open a prediction of several sites, as lazy probabilities [year, y, x] by site.

    Raises CubeError if a site has no such prediction of its current builds.
    """
    return {site: cube.open_probability(store, site, model) for site in sites}


def choose_rates(
    store: cube.Store,
    maps: Mapping[str, xr.DataArray],
    method: str | tuple[float, float],
    temper: float = TEMPER,
) -> tracks.Rates:
    """Determine the yearly probabilities that a pixel opens and closes.

    The method is "learned" (estimate from these maps), "labels" or "labels:SITES" (count in the
    store's footprints), or the probabilities of opening and closing. `temper` is the weight of each
    year's map, above 0 and up to 1.

    Raises:
        CatalogError: the sites after "labels:" are not in the store.
        LabelError: the maps or footprints have too few years or labels.
    """
    if isinstance(method, tuple):
        opening, closing = method
        return tracks.make_rates(maps.values(), opening, closing, temper=temper)
    if method == "learned":
        return tracks.learn_rates(maps.values(), temper=temper)
    names = method.removeprefix("labels").removeprefix(":") or "*"
    labelled = stored_sites(store, SiteChoice(names))
    footprints = (cube.open_committed(store, name)["footprint"].load() for name in labelled)
    return tracks.learn_rates_from_labels(footprints, temper=temper)


def smooth_sites(
    store: cube.Store,
    sites: SmoothedSites,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, object]]:
    """Smooth the maps of sites, one site in memory at a time, and write all results.

    The smoothed maps go to the store. The folder gets layers of each site, areas.csv (by site and
    year) and sites.csv.

    Returns one row of `Track.summary` per site, with the column `site`. `progress` is called with
    the name of each finished site.

    Raises:
        LabelError: a map has one year only.
        CubeError: the store or the folder cannot be written.
    """
    areas: list[pd.DataFrame] = []
    summaries: list[dict[str, object]] = []
    for site in sites.maps:
        site_areas, summary = smooth_site(store, sites, site, folder)
        areas.append(site_areas)
        summaries.append(summary)
        progress(site)
    export.write_table(pd.concat(areas, ignore_index=True), folder / "areas.csv")
    export.write_table(pd.DataFrame(summaries), folder / "sites.csv")
    return summaries


def smooth_site(
    store: cube.Store, sites: SmoothedSites, site: str, folder: Path
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Smooth the map of one site. Writes its layers to FOLDER/SITE and its map to the store.

    Returns its areas by year, and its `Track.summary`, both with `site`.

    Raises as `smooth_sites` does.
    """
    lazy = sites.maps[site]
    grid = lazy.odc.geobox
    probability = lazy.compute()
    track = track_site(probability, grid, sites.rates)
    write_smoothed(store, sites, site, track.smoothed)
    export.write_layers(track.layers, probability, grid, folder / site, site)
    areas = track.areas.assign(site=site)[["site", *track.areas.columns]]
    return areas, {"site": site, **track.summary}


def track_site(probability: xr.DataArray, grid: GeoBox, rates: tracks.Rates) -> Track:
    """Smooth a site's map, and derive its events and areas.

    The map is [year, y, x] uint8 in memory: probability x 250, 255 unknown.

    Raises LabelError if the map has one year only.
    """
    smoothed = tracks.smooth(probability, rates)
    footprint = tracks.threshold(smoothed)
    layers = tracks.derive_events(footprint, smoothed)
    counted = tracks.compute_areas(footprint, grid)
    areas = counted.merge(tracks.estimate_areas(smoothed, probability, grid), on="year")
    start = areas.iloc[0]
    end = areas.iloc[-1]
    story = tracks.summarize_expansion(counted)
    reclaimed = layers["reclaimed"].expand_dims(year=[int(end["year"])])
    summary: dict[str, object] = {
        "opened": story.opened,
        "there_at_first": story.opened == int(start["year"]),
        "first_ha": start["area_m2"] / _M2_PER_HA,
        "last_ha": end["area_m2"] / _M2_PER_HA,
        "last_low_ha": end["low_m2"] / _M2_PER_HA,
        "last_high_ha": end["high_m2"] / _M2_PER_HA,
        "growth_ha_per_year": story.growth_m2_per_year / _M2_PER_HA,
        "expansion": story.kind,
        "largest_year": story.largest_year,
        "largest_share": story.largest_share,
        "reclaimed_ha": tracks.compute_areas(reclaimed, grid)["area_m2"][0] / _M2_PER_HA,
        "flip_rate_raw": tracks.compute_flip_rate(tracks.threshold(probability)),
        "flip_rate": tracks.compute_flip_rate(footprint),
    }
    return Track(smoothed, layers, areas, summary)


def write_smoothed(
    store: cube.Store, sites: SmoothedSites, site: str, smoothed_map: xr.DataArray
) -> None:
    """Write a smoothed map of one of the sites to the store as prediction MODEL+hmm.

    The map is [year, y, x] uint8: probability x 250, 255 unknown. It gets the card of the
    prediction before smoothing, with the rates.

    Raises CubeError if it cannot be written.
    """
    name = sites.model + SUFFIX
    card = {**sites.maps[site].attrs["model"], "rates": asdict(sites.rates), "id": name}
    cube.write_probability(store, site, name, smoothed_map, card, made_of=sites.model)
