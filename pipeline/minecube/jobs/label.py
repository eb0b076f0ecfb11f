"""Draw mine polygons on the grids of the cubes: the job of `minecube label`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import geopandas as gpd
import numpy as np
import pandas as pd
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube import cube, labels
from minecube import export as exporting
from minecube.codes import MINE, UNKNOWN
from minecube.errors import LabelError
from minecube.places import Place
from minecube.vectors import to_texts

MOST_NAMES = 8
"""Most label sources or sites listed by name."""
_KM2_PER_PIXEL = 1e-4


@dataclass(frozen=True)
class SiteLabels:
    """Polygons of one site, drawn on its grid."""

    site: str
    polygons: gpd.GeoDataFrame
    """Rows of the site on its grid."""
    footprint: xr.DataArray
    """[year, y, x] uint8: 1 mine, 0 background, 255 unknown."""
    fraction: xr.DataArray
    """[year, y, x] share of each pixel inside the mine; see `labels.rasterize_fraction`."""
    origin: str
    """Sources and licences of the polygons."""

    def mine_km2(self) -> dict[int, float | None]:
        """Return the mine area by year in km2; None for a year without labels."""
        areas: dict[int, float | None] = {}
        for year in self.footprint.year.values:
            mask = self.footprint.sel(year=year).values
            areas[int(year)] = None
            if (mask != UNKNOWN).any():
                areas[int(year)] = float((mask == MINE).sum()) * _KM2_PER_PIXEL
        return areas

    def write(self, store: cube.Store) -> None:
        """Write `footprint` and `footprint_fraction` to the site's cube.

        Raises CubeError if the store cannot be written.
        """
        cube.write_footprint(store, self.site, self.footprint, self.origin, self.fraction)


def draw_labels(
    polygons: gpd.GeoDataFrame,
    site: str,
    grid: GeoBox,
    years: Sequence[int],
    file: Place,
    origin: str | None = None,
) -> SiteLabels:
    """Draw the polygons of one site.

    Polygons of all sites come from `labels.read_polygons`. Rows without a site belong to every site.
    The file of the polygons is for errors and origins. `origin` has their sources and licences, by
    default from the columns, see `format_origin`.

    Raises LabelError if no row names this site or no site.
    """
    rows = polygons[
        labels.mark_rows_without_site(polygons) | labels.mark_rows_of_site(polygons, site)
    ]
    if rows.empty:
        names = ", ".join(sorted(polygons["site"].unique())[:MOST_NAMES])
        raise LabelError(f"{file}: no polygon of site {site!r}; its `site` column has {names}")
    rows = rows.loc[labels.place_on_grid(rows, grid).index]
    return SiteLabels(
        site=site,
        polygons=rows,
        footprint=labels.rasterize(rows, grid, years),
        fraction=labels.rasterize_fraction(rows, grid, years),
        origin=origin or format_origin(rows, file),
    )


@dataclass(frozen=True)
class UndrawnRows:
    """Rows of a file that are shared between sites or drawn nowhere."""

    unnamed: pd.Index
    """Rows without a site, drawn at each site that they overlap; empty if no row has a site."""
    unnamed_far: pd.Index
    """Rows without a site that overlap no site."""
    far: pd.Index
    """Rows that do not overlap the site that they name."""
    unknown_sites: dict[str, int]
    """Site without a cube -> number of its rows."""


def find_undrawn(
    polygons: gpd.GeoDataFrame, rows_by_site: Mapping[str, pd.Index], stored: Sequence[str]
) -> UndrawnRows:
    """Find rows that name no site, and rows drawn nowhere.

    `rows_by_site` has the index of `SiteLabels.polygons` for each labelled site. `stored` lists
    all sites of the store.
    """
    unnamed = labels.mark_rows_without_site(polygons)
    reaching = np.any([polygons.index.isin(rows) for rows in rows_by_site.values()], axis=0)
    labelled = [labels.mark_rows_of_site(polygons, site) for site in rows_by_site]
    far = ~unnamed & ~reaching & np.any(labelled, axis=0)
    unknown_sites: dict[str, int] = {}
    if "site" in polygons:
        unknown = polygons["site"][~unnamed & ~polygons["site"].isin(stored)]
        unknown_sites = unknown.value_counts().to_dict()
    return UndrawnRows(
        unnamed=polygons.index[unnamed & reaching & (not unnamed.all())],
        unnamed_far=polygons.index[unnamed & ~reaching],
        far=polygons.index[far],
        unknown_sites=unknown_sites,
    )


def format_origin(polygons: gpd.GeoDataFrame, file: Place) -> str:
    """Format the origins of polygons: `EuroMineNet (CC-BY-4.0) doi:10.14278/rodare.4656`.

    Uses the columns source, licence (or license) and doi. Without a source, the name of the file
    is the source.
    """
    columns = {str(name).lower(): name for name in polygons.columns}

    def read_column(*names: str) -> pd.Series:
        for name in names:
            if name in columns:
                return to_texts(polygons[columns[name]]).fillna("")
        return pd.Series("", polygons.index, dtype="string")

    origins = pd.DataFrame(
        {
            "source": read_column("source"),
            "licence": read_column("licence", "license"),
            "doi": read_column("doi"),
        }
    )
    if origins["source"].nunique() > MOST_NAMES:
        origins["source"] = ""  # some maps have one source per polygon
    rows = origins.drop_duplicates().sort_values(["source", "licence", "doi"])
    rows = rows.replace({"source": {"": file.name}})
    entries = [_format_entry(*map(str, row)) for row in rows.itertuples(index=False)]
    return exporting.ORIGIN_SEPARATOR.join(entries)


def _format_entry(source: str, licence: str, doi: str) -> str:
    # Always write a licence: otherwise brackets in a name would be read as one.
    entry = f"{source} ({licence or exporting.NOT_STATED})"
    if doi:
        entry += f" doi:{doi}"
    return entry
