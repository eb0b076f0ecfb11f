"""Subcommand polygons: check, repair and compare mine polygons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import geopandas as gpd
import pandas as pd
import shapely
from odc.geo.geobox import GeoBox

from minecube import export as exporting
from minecube import labels
from minecube.catalog import Site
from minecube.cli.common import (
    FiniteRange,
    OutFile,
    SiteChoice,
    catalog_option,
    choose_sites,
    layer_option,
    sites_layer_option,
    table,
    with_layer,
)
from minecube.errors import CatalogError, LabelError
from minecube.files import replacing
from minecube.grid import grid_of
from minecube.vectors import SUFFIXES

SHOWN = 20
"""Most findings printed. The JSON has all."""
LARGEST_PX = 20_000
"""Largest side of a grid made for polygons without a known site.

Larger grids span countries, not mines.
"""


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@layer_option
@click.option(
    "--sites",
    "wanted",
    callback=with_layer,
    help="Names of sites, comma-separated, * allowed; or a file of sites. Polygons far from their site are reported.",
)
@sites_layer_option("--sites-layer")
@catalog_option
@click.option(
    "--compare",
    help="Compare mappers. Either the column with the mapper of each row, or a second file of polygons.",
)
@click.option(
    "--compare-layer",
    help="Layer of the second file, if several layers have polygons. * is allowed.",
)
@click.option(
    "--min-width",
    "min_width_m",
    type=FiniteRange(min=0),
    default=labels.MIN_WIDTH_M,
    show_default=True,
    help="Smallest width in metres. Narrower parts are removed, narrower holes are filled. 0 keeps everything.",
)
@click.option("--out", type=OutFile(), help="File for the repaired polygons (.parquet or .gpkg).")
@click.option("--json", "report", type=OutFile(), help="File for all findings.")
def polygons(
    file: Path,
    layer: str | None,
    wanted: SiteChoice | None,
    catalog: Path | None,
    compare: str | None,
    compare_layer: str | None,
    min_width_m: float,
    out: Path | None,
    report: Path | None,
) -> None:
    """Check and repair a file of mine polygons, and compare mappers.

    Reports invalid shapes, rows without area, duplicates, overlaps, slivers, holes, and polygons far from
    their site. If swapped coordinates explain the distance, the report says so. If several people mapped
    the same ground, name the column of the mapper (--compare); otherwise their polygons count as
    overlaps. Exits with 1 if a polygon is far from the site that it names.

    \b
    Examples:
      minecube polygons mines.gpkg --sites my_sites.geojson --out repaired.parquet
      minecube polygons maus_and_tang.gpkg --compare source --json report.json
    """
    chosen = {s.id: s for s in choose_sites(wanted, catalog)} if wanted else {}
    if out and out.suffix.lower() not in (".parquet", ".gpkg"):
        raise LabelError(
            f"{out}: expected a name in .parquet or .gpkg for the repaired polygons; choose one"
        )
    second = Path(compare) if compare and Path(compare).suffix.lower() in SUFFIXES else None
    by = compare if not second else None
    if compare_layer and not second:
        raise click.UsageError(
            "--compare-layer is of a second file of polygons; name that file with --compare"
        )
    areas = {
        s.id: shapely.geometry.shape(s.geometry) for s in chosen.values() if s.geometry is not None
    }
    if unplaced := sorted(set(chosen) - set(areas)):
        said = f"{', '.join(unplaced[:8])}{' and others' if unplaced[8:] else ''}: the catalogue has no place for them yet"
        if not areas:
            raise LabelError(
                f"{said}, so nothing can be compared with it; import their release (--catalog), or name a file"
            )
        click.echo(f"{said}; their polygons are not compared with it", err=True)
    files = [(file, layer), *([(second, compare_layer)] if second else [])]
    looked = [
        labels.survey(path, layer=name, sites=areas, by=by, min_width_m=min_width_m)
        for path, name in files
    ]
    names = _distinct_names(files)
    found = pd.concat(
        [s.findings.assign(file=name) for name, s in zip(names, looked, strict=True)],
        ignore_index=True,
    )
    for (path, _), each in zip(files, looked, strict=True):
        click.echo(
            f"{path}: {each.rows} rows, {len(each.polygons)} kept, {each.polygons.crs.to_string()}"
        )
    _show_findings(found)
    repaired = looked[0].polygons
    mapped = labels.mapped_areas(repaired, by)
    click.echo("\n" + _km2(mapped))
    agreement = None
    if compare:
        seconds = {name: s.polygons for name, s in zip(names, looked, strict=True)}
        mappers = seconds if second else _by_mapper(repaired, compare)
        grids = {i: grid_of(s) for i, s in chosen.items() if i in areas} or _grids_around(mappers)
        agreement = labels.compare(mappers, grids)
        if agreement.empty:
            raise LabelError(
                f"{file}: nothing to compare: no site and year has polygons of two of {', '.join(mappers)}"
            )
        click.echo(
            "\n"
            + _km2(
                agreement.drop(columns=["pixels_both", "pixels_either"]),
                always=("iou", "raster_iou"),
            )
        )
    if out:
        exporting.write_footprints(repaired, out)
    if report:
        content = {
            "files": {
                name if name != path.name else str(path): {
                    "rows": s.rows,
                    "kept": len(s.polygons),
                    "crs": s.polygons.crs.to_string(),
                }
                for (path, _), name, s in zip(files, names, looked, strict=True)
            },
            "rules": {"min_width_m": min_width_m, "near_m": labels.NEAR_M},
            "findings": _records(found),
            "areas": _records(mapped),
            "comparison": [] if agreement is None else _records(agreement),
        }
        _write_json(report, content)
    if (found["finding"] == "elsewhere").any():
        click.get_current_context().exit(1)


def _distinct_names(files: Sequence[tuple[Path, str | None]]) -> list[str]:
    """Return distinct short names of files, with layers if a file occurs twice.

    Raises LabelError if one layer occurs twice.
    """
    paths = [path for path, _ in files]
    for names in (
        [path.name for path in paths],
        [str(path) for path in paths],
        [f"{path}:{layer}" for path, layer in files],
    ):
        if len(set(names)) == len(names):
            return names
    raise LabelError(
        f"{paths[0]}: the same polygons twice; name another file, or another --compare-layer"
    )


def _by_mapper(found: gpd.GeoDataFrame, column: str) -> dict[str, gpd.GeoDataFrame]:
    mappers = {str(name): own for name, own in found.groupby(column)}
    if len(mappers) < 2:
        raise LabelError(
            f"column {column!r} names {', '.join(mappers) or 'no mapper'} only; a comparison takes two mappers"
        )
    return mappers


def _grids_around(mappers: Mapping[str, gpd.GeoDataFrame]) -> dict[str, GeoBox]:
    """Make a grid around each site's polygons, for polygons without given site areas."""
    unsited = all(labels.of_no_site(t).all() for t in mappers.values())
    named = [t.assign(site="all" if unsited else t.get("site")) for t in mappers.values()]
    sited = [t[["site", "geometry"]].to_crs(4326) for t in named]
    grids = {}
    for site, own in pd.concat(sited).groupby("site"):
        grid = grids[str(site)] = grid_of(
            Site(id="around", geometry=shapely.box(*own.total_bounds))
        )
        if max(grid.shape) > LARGEST_PX:
            raise LabelError(
                f"the polygons of site {site!r} spread over {max(grid.shape) // 100} km; name the sites they are of "
                "(--sites, and a column `site`), so that each is compared on its own grid"
            )
    return grids


def _show_findings(found: pd.DataFrame) -> None:
    if found.empty:
        click.echo("nothing to repair")
        return
    told = found[found["finding"] != "at no site"]  # most rows of a worldwide file
    if len(told):
        of_file = ["file"] if (found["file"] != found["file"].iloc[0]).any() else []
        columns = [*of_file, "finding", "row", "site", "years", "area_m2", "done", "about"]
        shown = told[columns].assign(area_m2=told["area_m2"].round().astype("int64"))
        click.echo("\n" + _without_empty(shown.head(SHOWN)))
    if len(told) > SHOWN or len(told) < len(found):
        counts = found.groupby(["finding", "done"])["area_m2"].agg(["size", "sum"]).reset_index()
        rows = [(f, done, n, round(area)) for f, done, n, area in counts.itertuples(index=False)]
        click.echo(
            f"\nin all, {len(found)} findings:\n"
            + table(("finding", "done", "rows", "area_m2"), rows)
        )


def _km2(frame: pd.DataFrame, always: Sequence[str] = ()) -> str:
    """Format the table with areas in km2; see `_without_empty`."""
    areas = {str(c): f"{str(c)[:-3]}_km2" for c in frame if str(c).endswith("_m2")}
    return _without_empty(
        frame.assign(**{c: frame[c] / 1e6 for c in areas}).rename(columns=areas), always
    )


def _without_empty(frame: pd.DataFrame, always: Sequence[str] = ()) -> str:
    """Format the table without its empty columns. Columns in `always` are shown even if they are empty."""
    shown = frame[
        [c for c in frame if c in always or (frame[c].notna() & (frame[c].astype(str) != "")).any()]
    ]
    rows = [tuple("-" if pd.isna(v) else v for v in row) for row in shown.itertuples(index=False)]
    return table([str(c) for c in shown], rows)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert a table to records for JSON, with null for missing values."""
    records: list[dict[str, Any]] = json.loads(frame.to_json(orient="records", double_precision=9))
    return records


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CatalogError(
            f"{path}: the report cannot be written ({error.strerror}); name another file"
        ) from error
