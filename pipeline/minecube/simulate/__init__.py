"""Simulate a Sentinel-2 archive of real files, together with its ground truth.

    land (spectra, mine)  ground cover per year and its reflectance per day
    passes                overpass dates, and the tiles of each scene
    sky, observe          cloud, haze, shadow, snow, noise, and the scene classification
    faults                faults in the values of single bands
    granules, items       tiles and halves of datatakes in each provider's listing
    archive               COGs, STAC items, stac-geoparquet

Random numbers depend only on the seed, the site's id and the object's name. A scene is therefore
independent of other sites, years and styles, and of their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
from odc.geo.geobox import GeoBox

from minecube.arrays import UInt8
from minecube.catalog import FIRST_YEAR, Site, Source, load_sources
from minecube.errors import CatalogError
from minecube.files import replacing
from minecube.grid import grid_of, pad
from minecube.simulate.archive import write_index, write_item, write_sources
from minecube.simulate.faults import draw_fault
from minecube.simulate.granules import Granule, cut_granules
from minecube.simulate.items import STYLES, Item, Product, list_products, misflag
from minecube.simulate.land import Land, draw_ground, draw_land
from minecube.simulate.mine import draw_mine
from minecube.simulate.noise import Draw, make_generators
from minecube.simulate.observe import observe
from minecube.simulate.passes import (
    Overpass,
    Tile,
    count_possible_dates,
    displace_scene,
    lay_tiles,
    simulate_overpasses,
)
from minecube.simulate.truth import (
    burn_footprint,
    classify_sky,
    compute_reflectance,
    locate_site,
    write_year,
)

__all__ = ["World", "simulate_archive"]

MARGIN_M = 300
"""Margin of the scenes around the site."""
SPARSE_YEAR = 2015
"""The year of few dates: one satellite, from July on."""
_MIN_PX = 48
_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class World:
    """Settings of a simulation; invalid settings raise CatalogError."""

    years: tuple[int, ...]
    dates_per_year: int = 22
    """Acquisition dates from April to October."""
    sparse_dates: int = 7
    """Acquisition dates from April to October in `SPARSE_YEAR`."""
    winter_dates: int = 2
    """Additional dates in December to February, with snow."""
    styles: tuple[str, ...] = STYLES
    """Imitated providers."""
    one_style_per_site: bool = False
    """List each site in one style, in turn, instead of in every style."""
    wrong_flags: float = 0.0
    """Share of Earth Search items with a wrong offset flag, from baseline 04.00 on."""
    scl_errors: bool = False
    """Add SCL errors of real archives.

    Some whole dates are wrong, including the clearest one. Cloud edges are unclassified.
    """
    shifts: bool = False
    """Displace scenes by metres, as in real archives, more strongly before 2021-03-30."""
    value_faults: float = 0.0
    """Share of granules with a fault in one band's values (`faults.KINDS`)."""
    seed: int = 0

    def __post_init__(self) -> None:
        last = datetime.now(tz=UTC).year
        wrong = [y for y in self.years if not FIRST_YEAR <= y <= last]
        _need(self.years and not wrong, f"years within {FIRST_YEAR}..{last}", wrong or "none")
        _need(len(set(self.years)) == len(self.years), "every year once", self.years)
        _need(self.sparse_dates >= 1, "sparse_dates of at least 1", self.sparse_dates)
        _need(self.dates_per_year >= 1, "dates_per_year of at least 1", self.dates_per_year)
        _need(self.winter_dates >= 0, "winter_dates of at least 0", self.winter_dates)
        unknown = [s for s in self.styles if s not in STYLES]
        _need(
            self.styles and not unknown,
            f"styles of {', '.join(STYLES)}",
            ", ".join(unknown) or "none",
        )
        _need(len(set(self.styles)) == len(self.styles), "every style once", self.styles)
        _need(0 <= self.wrong_flags <= 1, "wrong_flags as a share, 0..1", self.wrong_flags)
        _need(0 <= self.value_faults <= 1, "value_faults as a share, 0..1", self.value_faults)
        _need(self.seed >= 0, "a seed of at least 0", self.seed)
        for year in self.years:
            possible = count_possible_dates(year)
            _need(
                self.dates(year) <= possible,
                f"at most {possible} dates in {year}, the times Sentinel-2 passed",
                self.dates(year),
            )

    def dates(self, year: int) -> int:
        """Return the number of acquisition dates in a year, without winter."""
        if year == SPARSE_YEAR:
            return self.sparse_dates
        return self.dates_per_year


def _need(condition: object, expected: str, value: object) -> None:
    if not condition:
        raise CatalogError(f"cannot simulate: expected {expected}, found {value}")


def simulate_archive(
    sites: Sequence[Site], out: Path, world: World, *, progress: Callable[[str], None] | None = None
) -> None:
    """Write an archive of the sites, as laid out in `archive`, and its ground truth.

        truth.zarr                one group per site:
            reflectance  uint16 (year, band, y, x), x 10000: the median over all April to October
                         dates, seen by a noise-free sensor through a clear sky; 20 m bands are
                         averaged to 20 m
            footprint    uint8 (year, y, x): 1 mine, 0 not
            sky          uint8 (time, y, x), by solar day: 0 not observed, 1 clear, 2 contaminated:
                         cloud, halo, thin cloud, haze, shadow or snow changes the reflectance of
                         a band by more than 0.02
        truth_footprints.parquet  the outlines behind `footprint`, EPSG:4326: site, year, geometry
        truth_offsets.parquet     the offset in the pixels of each item, added to reflectance x
                                  10000: style, id, carried, misflagged
        truth_values.parquet      items with a fault in one band's values: style, id, fault, band

    `out` appears only when it is complete.

    Raises:
        CatalogError: there is no site, a site has no area or is too small, ids repeat, or `out` is
            not empty or cannot be written.
    """
    _need(sites, "at least one site", "none")
    ids = [s.id for s in sites]
    _need(len(set(ids)) == len(ids), "every site once", ", ".join(ids))
    for site in sites:
        height, width = grid_of(site).shape
        _need(
            min(height, width) >= _MIN_PX,
            f"{site.id} to be {_MIN_PX} pixels a side or more",
            f"{width} x {height}",
        )
    _need(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"{out} to be a new or empty folder",
        "files in it; name another folder or remove it",
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as draft:
            draft.mkdir()
            _simulate_all(sites, draft, world, progress or (lambda _: None))
    except OSError as error:
        raise CatalogError(
            f"{out}: cannot be written ({error}); free some space or name another folder"
        ) from error


def _simulate_all(
    sites: Sequence[Site], out: Path, world: World, progress: Callable[[str], None]
) -> None:
    items: dict[str, list[Item]] = {}
    outlines = []
    offsets = []
    faults = []
    tile_names: set[str] = set()
    sources = load_sources()
    for site, own_style in zip(sites, itertools.cycle(world.styles)):
        styles = world.styles
        if world.one_style_per_site:
            styles = (own_style,)
        place = _prepare_place(site, world, [sources[style] for style in styles], tile_names)
        for year in sorted(world.years):
            for style, entries in _simulate_year(place, out, year, world).items():
                for item, product in entries:
                    items.setdefault(style, []).append(item)
                    misflagged = product.flag is not None
                    offsets.append((style, item["id"], product.offset, misflagged))
                    if product.fault is not None:
                        fault = product.fault
                        faults.append((style, item["id"], fault.kind, fault.band))
            outlines.append(_outline_mine(place, year))
            progress(f"{site.id} {year}")
    for style, style_items in items.items():
        write_index(out, style, style_items)
    write_sources(out, {style: sources[style] for style in items})
    pd.concat(outlines, ignore_index=True).to_parquet(out / "truth_footprints.parquet")
    pd.DataFrame(offsets, columns=["style", "id", "carried", "misflagged"]).to_parquet(
        out / "truth_offsets.parquet"
    )
    pd.DataFrame(faults, columns=["style", "id", "fault", "band"]).to_parquet(
        out / "truth_values.parquet"
    )


def _outline_mine(place: _Place, year: int) -> gpd.GeoDataFrame:
    """Return the mine's outline of a year in longitude and latitude, as one row."""
    mine = draw_mine(place.grid, place.draw, year)
    return gpd.GeoDataFrame(
        {"site": [place.site.id], "year": [year]}, geometry=[mine.footprint], crs=place.grid.crs
    ).to_crs(4326)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A site's properties shared by all years."""

    site: Site
    grid: GeoBox
    canvas: GeoBox
    draw: Draw
    land: Land
    tiles: list[Tile]
    sources: Sequence[Source]
    """The imitated providers."""


def _prepare_place(
    site: Site, world: World, sources: Sequence[Source], tile_names: set[str]
) -> _Place:
    """Draw a site's land and tiles; add the names of the tiles to the names in use."""
    grid = grid_of(site)
    canvas = pad(grid, MARGIN_M)
    draw = make_generators(world.seed, site.id)
    return _Place(
        site=site,
        grid=grid,
        canvas=canvas,
        draw=draw,
        land=draw_land(grid, canvas, draw),
        tiles=lay_tiles(grid, canvas, tile_names),
        sources=sources,
    )


def _simulate_year(
    place: _Place, out: Path, year: int, world: World
) -> dict[str, list[tuple[Item, Product]]]:
    """Write a site-year with its truth; return (item, product) pairs per style."""
    ground = draw_ground(place.land, year)
    passes = _simulate_overpasses(place, year, world)
    sky: dict[np.datetime64, UInt8] = {}
    items: dict[str, list[tuple[Item, Product]]] = {source.id: [] for source in place.sources}
    with ThreadPoolExecutor(_THREADS) as writers:
        writing: list[tuple[str, Product, Future[Item]]] = []
        for overpass in passes:
            observation = observe(place.draw, place.grid, place.canvas, ground, overpass)
            scene = (observation, overpass, place.tiles, place.grid, place.canvas)
            sky[np.datetime64(overpass.day, "ns")] = classify_sky(*scene)
            pieces = list(cut_granules(*scene))
            # One date is written while the next is computed, to limit memory.
            for style, product, item in writing:
                items[style].append((item.result(), product))
            writing = [
                (source.id, product, writers.submit(write_item, out, source, granule, product))
                for granule in pieces
                for source in place.sources
                for product in _listed_products(place, source, granule, world)
            ]
        for style, product, item in writing:
            items[style].append((item.result(), product))
    truth = (
        compute_reflectance(ground, passes, locate_site(place.grid, place.canvas)),
        burn_footprint(ground.mine, place.grid),
    )
    write_year(out / "truth.zarr", place.site.id, place.grid, year, truth, sky)
    return items


def _simulate_overpasses(place: _Place, year: int, world: World) -> list[Overpass]:
    longitude = place.grid.geographic_extent.centroid.coords[0][0]
    dates = world.dates(year)
    passes = simulate_overpasses(
        place.draw, longitude, year, dates, world.winter_dates, world.scl_errors
    )
    if world.shifts:
        return [displace_scene(overpass) for overpass in passes]
    return passes


def _listed_products(
    place: _Place, source: Source, granule: Granule, world: World
) -> list[Product]:
    """Return a provider's processings of a granule, some with a wrong flag or a faulty band."""
    listed = []
    rng = place.draw("values", granule.overpass.day, granule.tile.name, granule.part)
    fault = draw_fault(rng) if rng.random() < world.value_faults else None
    for product in list_products(source.id, granule):
        product = replace(product, fault=fault)
        flagged = source.offset.applied_flag and product.baseline >= source.offset.from_baseline
        rng = place.draw(
            "flag", granule.overpass.day, granule.tile.name, granule.part, product.baseline
        )
        if flagged and rng.random() < world.wrong_flags:
            listed.append(misflag(product, rng))
        else:
            listed.append(product)
    return listed
