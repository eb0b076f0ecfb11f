"""Survey files of mine polygons, and compare mappers: the job of `minecube polygons`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import pandas as pd
import shapely
from odc.geo.geobox import GeoBox

from minecube import labels
from minecube.catalog import Site
from minecube.errors import LabelError
from minecube.grid import grid_of
from minecube.places import Place

LARGEST_PX = 20_000
"""Largest side of a grid made for polygons without a known site.

Larger grids span countries, not mines.
"""
FAR_FROM_SITE = "elsewhere"
"""Finding for a polygon far from the site that it names."""


@dataclass(frozen=True)
class PolygonFile:
    """A file of polygons."""

    path: Place
    layer: str | None = None
    """Layer, if several layers have polygons."""


@dataclass(frozen=True, kw_only=True)
class SurveyRules:
    """Rules of a survey."""

    areas: Mapping[str, shapely.Geometry]
    """Site -> its area in longitude and latitude. Polygons far from their site are reported."""
    mapper_column: str | None = None
    """Column with the mapper of each row. Polygons of several mappers may overlap."""
    min_width_m: float = labels.MIN_WIDTH_M
    """Narrower parts are removed, narrower holes are filled."""


@dataclass(frozen=True)
class PolygonSurvey:
    """Findings and repaired polygons of one or two files."""

    files: tuple[PolygonFile, ...]
    names: tuple[str, ...]
    """Distinct short names of the files."""
    surveys: tuple[labels.RepairedPolygons, ...]
    rules: SurveyRules

    @property
    def findings(self) -> pd.DataFrame:
        """Findings of all files, with the column `file`."""
        tables = [
            survey.findings.assign(file=name)
            for name, survey in zip(self.names, self.surveys, strict=True)
        ]
        return pd.concat(tables, ignore_index=True)

    @property
    def repaired(self) -> gpd.GeoDataFrame:
        """Repaired polygons of the main file."""
        return self.surveys[0].polygons

    @property
    def mapped_areas(self) -> pd.DataFrame:
        """Area of the repaired polygons, as `labels.tabulate_areas`."""
        return labels.tabulate_areas(self.repaired, self.rules.mapper_column)

    def content(self, agreement: pd.DataFrame | None) -> dict[str, Any]:
        """Return findings, areas and a comparison as nested dictionaries for JSON."""
        comparison: list[dict[str, Any]] = []
        if agreement is not None:
            comparison = _to_records(agreement)
        return {
            "files": self._describe_files(),
            "rules": {"min_width_m": self.rules.min_width_m, "near_m": labels.MISPLACED_M},
            "findings": _to_records(self.findings),
            "areas": _to_records(self.mapped_areas),
            "comparison": comparison,
        }

    def _describe_files(self) -> dict[str, dict[str, object]]:
        files: dict[str, dict[str, object]] = {}
        for file, name, survey in zip(self.files, self.names, self.surveys, strict=True):
            key = name
            if name == file.path.name:
                key = str(file.path)
            files[key] = {
                "rows": survey.rows,
                "kept": len(survey.polygons),
                "crs": survey.polygons.crs.to_string(),
            }
        return files


def read_areas(sites: Sequence[Site]) -> dict[str, shapely.Geometry]:
    """Return the polygons of sites, by id, in longitude and latitude.

    Sites without a polygon in the catalogue are left out.
    """
    return {
        site.id: shapely.geometry.shape(site.geometry)
        for site in sites
        if site.geometry is not None
    }


def survey_files(files: Sequence[PolygonFile], rules: SurveyRules) -> PolygonSurvey:
    """Check and repair the main file of polygons, and optionally a second mapper's file.

    Raises LabelError if a file cannot be read, or if both files are the same.
    """
    surveys = tuple(
        labels.repair_polygons(
            file.path,
            layer=file.layer,
            sites=rules.areas,
            by=rules.mapper_column,
            min_width_m=rules.min_width_m,
        )
        for file in files
    )
    return PolygonSurvey(tuple(files), _distinct_names(files), surveys, rules)


def compare_mappers(survey: PolygonSurvey, sites: Sequence[Site]) -> pd.DataFrame:
    """Compare the polygons of two files, or of the mappers in one file.

    Each site is compared on its grid. Without sites, each site's polygons get a grid around them.

    Returns the table of `labels.compare_mappers`: one row per site, year and pair of mappers.

    Raises LabelError if there are no two mappers of a site and year.
    """
    if len(survey.files) > 1:
        mappers = {
            name: each.polygons for name, each in zip(survey.names, survey.surveys, strict=True)
        }
    else:
        mappers = _split_by_mapper(survey.repaired, str(survey.rules.mapper_column))
    placed = [site for site in sites if site.geometry is not None]
    grids = {site.id: grid_of(site) for site in placed} or _grids_around(mappers)
    agreement = labels.compare_mappers(mappers, grids)
    if agreement.empty:
        raise LabelError(
            f"{survey.files[0].path}: nothing to compare: "
            f"no site and year has polygons of two of {', '.join(mappers)}"
        )
    return agreement


def _distinct_names(files: Sequence[PolygonFile]) -> tuple[str, ...]:
    """Return distinct short names of files, with layers if a file occurs twice.

    Raises LabelError if one layer occurs twice.
    """
    candidates = (
        tuple(file.path.name for file in files),
        tuple(str(file.path) for file in files),
        tuple(f"{file.path}:{file.layer}" for file in files),
    )
    for names in candidates:
        if len(set(names)) == len(names):
            return names
    raise LabelError(
        f"{files[0].path}: the same polygons twice; name another file, or another --compare-layer"
    )


def _split_by_mapper(polygons: gpd.GeoDataFrame, column: str) -> dict[str, gpd.GeoDataFrame]:
    mappers = {str(name): rows for name, rows in polygons.groupby(column)}
    if len(mappers) < 2:
        raise LabelError(
            f"column {column!r} names {', '.join(mappers) or 'no mapper'} only; "
            "a comparison takes two mappers"
        )
    return mappers


def _grids_around(mappers: Mapping[str, gpd.GeoDataFrame]) -> dict[str, GeoBox]:
    """Make a grid around each site's polygons, for polygons without given site areas."""
    tables = list(mappers.values())
    if all(labels.mark_rows_without_site(table).all() for table in tables):
        tables = [table.assign(site="all") for table in tables]
    else:
        tables = [table.assign(site=table.get("site")) for table in tables]
    polygons = pd.concat(table[["site", "geometry"]].to_crs(4326) for table in tables)
    grids = {}
    for site, rows in polygons.groupby("site"):
        box = shapely.box(*rows.total_bounds)
        grid = grid_of(Site(id="around", geometry=box))
        if max(grid.shape) > LARGEST_PX:
            raise LabelError(
                f"the polygons of site {site!r} spread over {max(grid.shape) // 100} km; name the "
                "sites they are of (--sites, and a column `site`), "
                "so that each is compared on its own grid"
            )
        grids[str(site)] = grid
    return grids


def _to_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert a table to records for JSON, with null for missing values."""
    records: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=9))
    return records
