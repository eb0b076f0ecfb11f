"""Subcommand tracks: smooth predictions through time, and date events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import pandas as pd
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube import cube, export
from minecube import tracks as tracking
from minecube.cli.common import (
    FiniteRange,
    OutFolder,
    SiteChoice,
    progress_bar,
    sites_option,
    stored_prediction,
    stored_sites,
    table,
    writable_store_option,
)
from minecube.errors import CatalogError
from minecube.tracks.smoothing import TEMPER, Kernel

SUFFIX = "+hmm"
"""Suffix of a smoothed prediction's name."""
HA = 1e4


class HowFast(click.ParamType[str | tuple[float, float]]):
    """The option --rates: learned, labels, labels:SITES, or two numbers."""

    name = "rates"

    def convert(
        self,
        value: str | tuple[float, float],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | tuple[float, float]:
        """Convert text to opening and closing per year, or return the word unchanged."""
        if (
            isinstance(value, tuple)
            or value in ("learned", "labels")
            or value.startswith("labels:")
        ):
            return value
        try:
            opening, closing = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(
                f"{value!r}: expected learned, labels, labels:SITES, or two chances per year such as 0.01,0.005",
                param,
                ctx,
            )
        return opening, closing


@dataclass(frozen=True)
class Track:
    """Smoothed map, layers and tables of one site."""

    smoothed: xr.DataArray
    layers: xr.Dataset
    areas: pd.DataFrame
    summary: dict[str, object]


@click.command()
@writable_store_option
@sites_option
@click.option(
    "--model",
    default="unet-small",
    show_default=True,
    help="Name of a prediction, or id of a model with only one. =NAME: exactly that name.",
)
@click.option(
    "--rates",
    type=HowFast(),
    default="learned",
    show_default=True,
    help="Yearly probabilities that a pixel opens and closes. learned: estimate from these "
    "maps. labels or labels:SITES: count in the store's footprints, best of training "
    "sites. Or two numbers: opening,closing.",
)
@click.option(
    "--temper",
    type=FiniteRange(0, 1, min_open=True),
    default=TEMPER,
    show_default=True,
    help="Weight of each year's map. 1: errors of different years are independent. Less smooths more.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device for the smoothing: cpu, or a GPU (cuda).",
)
@click.option("--out", type=OutFolder(), required=True, help="Folder for layers and tables.")
def tracks(
    store: cube.Store,
    wanted: SiteChoice,
    model: str,
    rates: str | tuple[float, float],
    temper: float,
    device: str,
    out: Path,
) -> None:
    """Smooth a model's yearly maps through time, and date openings, growth and reclamation.

    The smoothed probability is stored as prediction MODEL+hmm, for `score` and `export`. --out gets layers
    of each site as GeoTIFF (onset, end, reclaimed, kind, flips), areas.csv (by year, with 95 % intervals)
    and sites.csv. All years of one site are in memory at once.

    \b
    Examples:
      minecube tracks --store cubes.zarr --sites 'Germany_*' --model unet-small --out tracks
      minecube tracks --store cubes.zarr --rates 'labels:Germany_1,Germany_3' --out tracks
      minecube score --store cubes.zarr --sites Germany_2 --model unet-small+hmm
    """
    names = stored_sites(store, wanted)
    if model.endswith(SUFFIX):
        raise CatalogError(
            f"--model {model}: the map is smoothed already; name the map without {SUFFIX}"
        )
    kernel = _kernel(device)
    model = stored_prediction(store, names, model)
    maps = {name: cube.open_probability(store, name, model) for name in names}
    found = _rates(store, maps, rates, temper)
    tables: list[pd.DataFrame] = []
    rows: list[dict[str, object]] = []
    with progress_bar("smoothing", len(names)) as advance:
        for name, lazy in maps.items():
            grid, probability = lazy.odc.geobox, lazy.compute()
            track = follow(probability, grid, found, kernel)
            write_smoothed(
                store,
                name,
                model,
                track.smoothed,
                {**probability.attrs["model"], "rates": asdict(found)},
            )
            export.write_layers(track.layers, probability, grid, out / name, name)
            tables.append(track.areas.assign(site=name)[["site", *track.areas.columns]])
            rows.append({"site": name, **track.summary})
            advance(note=name)
    export.write_table(pd.concat(tables, ignore_index=True), out / "areas.csv")
    export.write_table(pd.DataFrame(rows), out / "sites.csv")
    click.echo(_shown(rows))
    click.echo(
        f"\nrates per year: opening {found.opening:.3g}, closing {found.closing:.3g}; prior divided out {found.prior:.3g}\n"
        f"{store}, group SITE/predictions/{model}{SUFFIX}; {out}/areas.csv, sites.csv, SITE/SITE_onset.tif ..."
    )


def follow(
    probability: xr.DataArray, grid: GeoBox, rates: tracking.Rates, kernel: Kernel | None = None
) -> Track:
    """Smooth a site's map (year, y, x), in memory, and derive its events and areas.

    Raises LabelError if the map has one year only.
    """
    smoothed = tracking.smooth(probability, rates, kernel)
    footprint = tracking.threshold(smoothed)
    layers = tracking.events(footprint, smoothed)
    counted = tracking.areas(footprint, grid)
    areas = counted.merge(tracking.expected_areas(smoothed, probability, grid), on="year")
    first, last = areas.iloc[0], areas.iloc[-1]
    story = tracking.expansion(counted)
    reclaimed = layers["reclaimed"].expand_dims(year=[int(last["year"])])
    summary: dict[str, object] = {
        "opened": story.opened,
        "there_at_first": story.opened == int(first["year"]),
        "first_ha": first["area_m2"] / HA,
        "last_ha": last["area_m2"] / HA,
        "last_low_ha": last["low_m2"] / HA,
        "last_high_ha": last["high_m2"] / HA,
        "growth_ha_per_year": story.growth_m2_per_year / HA,
        "expansion": story.kind,
        "largest_year": story.largest_year,
        "largest_share": story.largest_share,
        "reclaimed_ha": tracking.areas(reclaimed, grid)["area_m2"][0] / HA,
        "flip_rate_raw": tracking.flip_rate(tracking.threshold(probability)),
        "flip_rate": tracking.flip_rate(footprint),
    }
    return Track(smoothed, layers, areas, summary)


def write_smoothed(
    store: cube.Store, site: str, model: str, smoothed: xr.DataArray, card: Mapping[str, object]
) -> None:
    """Write a model's smoothed map to the store as MODEL+hmm.

    Raises CubeError if it cannot be written.
    """
    name = model + SUFFIX
    cube.write_probability(store, site, name, smoothed, {**card, "id": name}, made_of=model)


def _kernel(device: str) -> Kernel | None:
    if device == "cpu":
        return None
    try:
        from minecube.tracks.torch_smoothing import TorchSmoothing  # an extra, for GPUs only
    except ModuleNotFoundError as error:
        raise CatalogError("--device needs PyTorch: pip install 'minecube[torch]'") from error
    return TorchSmoothing(device).posterior


def _rates(
    store: cube.Store, maps: dict[str, xr.DataArray], how: str | tuple[float, float], temper: float
) -> tracking.Rates:
    if isinstance(how, tuple):
        return tracking.rates_given(maps.values(), *how, temper=temper)
    if how == "learned":
        return tracking.learn_rates(maps.values(), temper=temper)
    labelled = stored_sites(store, SiteChoice(how.removeprefix("labels").removeprefix(":") or "*"))
    footprints = (cube.open_committed(store, name)["footprint"].load() for name in labelled)
    return tracking.rates_from_labels(footprints, temper=temper)


def _shown(rows: Sequence[dict[str, object]]) -> str:
    headings = (
        "site",
        "opened",
        "ha at first",
        "ha finally",
        "95 %",
        "ha/year",
        "expansion",
        "reclaimed ha",
        "flips raw",
        "flips",
    )
    shown = []
    for row in rows:
        opened = (
            "never"
            if not row["opened"]
            else f"<= {row['opened']}"
            if row["there_at_first"]
            else str(row["opened"])
        )
        growth = (
            f"{row['expansion']}, {row['largest_share']:.0%} in {row['largest_year']}"
            if row["largest_year"]
            else "none"
        )
        between = f"{row['last_low_ha']:.4g}-{row['last_high_ha']:.4g}"
        ends = (row[k] for k in ("reclaimed_ha", "flip_rate_raw", "flip_rate"))
        shown.append(
            (
                row["site"],
                opened,
                row["first_ha"],
                row["last_ha"],
                between,
                row["growth_ha_per_year"],
                growth,
                *ends,
            )
        )
    return table(headings, shown)
