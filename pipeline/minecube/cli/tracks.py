"""Subcommand tracks: smooth predictions through time, and date events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from minecube.cli.bars import progress_bar
from minecube.cli.options import StoreSites, collect_options, sites_option, writable_store_option
from minecube.cli.parameters import FiniteRange, OutFolder, RatesMethod
from minecube.errors import CatalogError
from minecube.jobs.tables import format_table
from minecube.jobs.tracks import SUFFIX, SmoothedSites, choose_rates, read_maps, smooth_sites
from minecube.places import Place, outgoing
from minecube.tracks.smoothing import TEMPER


@click.command()
@writable_store_option
@sites_option
@click.option(
    "--model",
    default="unet-small",
    show_default=True,
    help="Name of a prediction, or id of a model that has one prediction. =NAME: exactly that name.",
)
@click.option(
    "--rates",
    "method",
    type=RatesMethod(),
    default="learned",
    show_default=True,
    help="Yearly probabilities that a pixel opens and closes. learned: estimate from these "
    "maps. labels or labels:SITES: count in the store's footprints, preferably those of "
    "training sites. Or two numbers: opening,closing.",
)
@click.option(
    "--temper",
    type=FiniteRange(0, 1, min_open=True),
    default=TEMPER,
    show_default=True,
    help="Weight of each year's map. 1: errors of different years are independent. A smaller "
    "weight smooths more.",
)
@click.option("--out", type=OutFolder(), required=True, help="Folder for layers and tables.")
@collect_options
def tracks(
    sites: StoreSites,
    model: str,
    method: str | tuple[float, float],
    temper: float,
    out: Place,
) -> None:
    """Smooth a model's yearly maps through time, and date openings, growth and reclamation.

    The smoothed probability is stored as prediction MODEL+hmm, for `score` and `export`. --out
    gets layers of each site as GeoTIFF (onset, end, reclaimed, kind, flips), areas.csv (by year,
    with 95 % intervals) and sites.csv. All years of one site are in memory at once.

    \b
    Examples:
      minecube tracks --store cubes.zarr --sites 'Germany_*' --model unet-small --out tracks
      minecube tracks --store cubes.zarr --rates 'labels:Germany_1,Germany_3' --out tracks
      minecube score --store cubes.zarr --sites Germany_2 --model unet-small+hmm
    """
    names = sites.names()
    if model.endswith(SUFFIX):
        raise CatalogError(
            f"--model {model}: the map is smoothed already; name the map without {SUFFIX}"
        )
    prediction = sites.prediction(names, model)
    maps = read_maps(sites.store, names, prediction)
    rates = choose_rates(sites.store, maps, method, temper)
    smoothed = SmoothedSites(prediction, maps, rates)
    with outgoing(out) as folder, progress_bar("smoothing", len(names), "sites") as bar:
        summaries = smooth_sites(sites.store, smoothed, folder, bar.advance)
    _print_summaries(summaries)
    click.echo(
        f"\nrates per year: opening {rates.opening:.3g}, closing {rates.closing:.3g}; "
        f"prior divided out {rates.prior:.3g}\n"
        f"{sites.store}, group SITE/predictions/{prediction}{SUFFIX}; "
        f"{out}/areas.csv, sites.csv, SITE/SITE_onset.tif ..."
    )


def _print_summaries(summaries: Sequence[Mapping[str, Any]]) -> None:
    headings: tuple[str, ...] = ("site", "opened", "ha at first", "ha finally", "95 %", "ha/year")
    headings += ("expansion", "reclaimed ha", "flips raw", "flips")
    rows = [
        (
            summary["site"],
            _format_opening(summary),
            summary["first_ha"],
            summary["last_ha"],
            f"{summary['last_low_ha']:.4g}-{summary['last_high_ha']:.4g}",
            summary["growth_ha_per_year"],
            _format_growth(summary),
            summary["reclaimed_ha"],
            summary["flip_rate_raw"],
            summary["flip_rate"],
        )
        for summary in summaries
    ]
    click.echo(format_table(headings, rows))


def _format_opening(summary: Mapping[str, Any]) -> str:
    if not summary["opened"]:
        return "never"
    if summary["there_at_first"]:
        return f"<= {summary['opened']}"
    return str(summary["opened"])


def _format_growth(summary: Mapping[str, Any]) -> str:
    if not summary["largest_year"]:
        return "none"
    return f"{summary['expansion']}, {summary['largest_share']:.0%} in {summary['largest_year']}"
