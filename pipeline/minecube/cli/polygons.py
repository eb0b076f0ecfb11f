"""Subcommand polygons: check, repair and compare mine polygons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import click
import pandas as pd
import shapely

from minecube import export, labels
from minecube.catalog import Site
from minecube.cli.options import (
    add_layer,
    catalog_option,
    collect_options,
    layer_option,
    sites_layer_option,
)
from minecube.cli.parameters import FiniteRange, InFile, OutFile
from minecube.errors import LabelError
from minecube.jobs.polygons import (
    FAR_FROM_SITE,
    PolygonFile,
    PolygonSurvey,
    SurveyRules,
    compare_mappers,
    read_areas,
    survey_files,
)
from minecube.jobs.selection import SiteChoice, choose_sites
from minecube.jobs.tables import format_table, write_json
from minecube.places import Place, outgoing, place_of
from minecube.vectors import SUFFIXES

_SHOWN = 20
"""Most findings printed. The JSON has all."""
_LISTED = 8  # most sites named in a message


@dataclass(frozen=True)
class NamedSites:
    """Sites of the polygons: --sites and --catalog."""

    choice: SiteChoice | None
    catalog: Place | None

    def load(self) -> list[Site]:
        """Choose the sites; none without --sites."""
        if self.choice is None:
            return []
        return choose_sites(self.choice, self.catalog)


@dataclass(frozen=True)
class Comparison:
    """Mappers to compare: --compare and --compare-layer."""

    compare: str | None
    compare_layer: str | None

    def __post_init__(self) -> None:
        if self.compare_layer and not self.file:
            raise click.UsageError(
                "--compare-layer is of a second file of polygons; name that file with --compare"
            )

    @property
    def file(self) -> PolygonFile | None:
        """The second mapper's file, if --compare names a file."""
        if self.compare and PurePath(self.compare).suffix.lower() in SUFFIXES:
            return PolygonFile(place_of(self.compare), self.compare_layer)
        return None

    @property
    def column(self) -> str | None:
        """The column with the mapper of each row, if --compare names no file."""
        if self.file:
            return None
        return self.compare


@click.command()
@click.argument("path", metavar="FILE", type=InFile(exists=False))
@layer_option
@click.option(
    "--sites",
    "choice",
    callback=add_layer,
    help="Names of sites, comma-separated, * allowed; or a file of sites. Polygons far from "
    "their site are reported.",
)
@sites_layer_option("--sites-layer")
@catalog_option
@click.option(
    "--compare",
    help="Compare the people who mapped. Either the column that names them, or a second file of "
    "polygons.",
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
    help="Smallest width in metres. Narrower parts are removed, narrower holes are filled. 0 "
    "keeps everything.",
)
@click.option("--out", type=OutFile(), help="File for the repaired polygons (.parquet or .gpkg).")
@click.option("--json", "report", type=OutFile(), help="File for all findings.")
@collect_options
def polygons(
    file: PolygonFile,
    sites: NamedSites,
    comparison: Comparison,
    min_width_m: float,
    out: Place | None,
    report: Place | None,
) -> None:
    """Check and repair a file of mine polygons, and compare the people who mapped.

    Reports invalid shapes, rows without area, duplicates, overlaps, slivers, holes, and polygons
    far from their site. If swapped coordinates explain the distance, the report says so. If
    several people mapped the same ground, name the column of the mapper (--compare); otherwise
    their polygons count as overlaps. Exits with 1 if a polygon is far from the site that it
    names.

    \b
    Examples:
      minecube polygons mines.gpkg --sites my_sites.geojson --out repaired.parquet
      minecube polygons maus_and_tang.gpkg --compare source --json report.json
    """
    loaded = sites.load()
    if out and out.suffix.lower() not in (".parquet", ".gpkg"):
        raise LabelError(
            f"{out}: expected a name in .parquet or .gpkg for the repaired polygons; choose one"
        )
    rules = SurveyRules(
        areas=_need_areas(loaded), mapper_column=comparison.column, min_width_m=min_width_m
    )
    files = [file]
    if comparison.file:
        files.append(comparison.file)
    survey = survey_files(files, rules)
    _print_survey(survey)
    agreement = None
    if comparison.compare:
        agreement = compare_mappers(survey, loaded)
        columns = agreement.drop(columns=["pixels_both", "pixels_either"])
        click.echo("\n" + _table_in_km2(columns, always=("iou", "raster_iou")))
    if out:
        with outgoing(out) as path:
            export.write_footprints(survey.repaired, path)
    if report:
        write_json(report, survey.content(agreement), "the report")
    if (survey.findings["finding"] == FAR_FROM_SITE).any():
        click.get_current_context().exit(1)


def _need_areas(sites: Sequence[Site]) -> Mapping[str, shapely.Geometry]:
    """Return the sites' polygons, and print the sites without one.

    Raises LabelError if no site has a polygon.
    """
    areas = read_areas(sites)
    unplaced = sorted({site.id for site in sites} - set(areas))
    if not unplaced:
        return areas
    listed = ", ".join(unplaced[:_LISTED])
    if len(unplaced) > _LISTED:
        listed += " and others"
    text = f"{listed}: the catalogue has no place for them yet"
    if not areas:
        raise LabelError(
            f"{text}, so nothing can be compared with it; "
            "import their release (--catalog), or name a file"
        )
    click.echo(f"{text}; their polygons are not compared with it", err=True)
    return areas


def _print_survey(survey: PolygonSurvey) -> None:
    for file, each in zip(survey.files, survey.surveys, strict=True):
        crs = each.polygons.crs.to_string()
        click.echo(f"{file.path}: {each.rows} rows, {len(each.polygons)} kept, {crs}")
    _print_findings(survey.findings)
    click.echo("\n" + _table_in_km2(survey.mapped_areas))


def _print_findings(findings: pd.DataFrame) -> None:
    """Print the first findings, and the totals of all if some are not listed.

    Rows far from all sites are only counted: a worldwide file has thousands of them.
    """
    if findings.empty:
        click.echo("nothing to repair")
        return
    listed = findings[findings["finding"] != "at no site"]
    if len(listed):
        columns = ["finding", "row", "site", "years", "area_m2", "done", "about"]
        if (findings["file"] != findings["file"].iloc[0]).any():
            columns.insert(0, "file")
        rounded = listed[columns].assign(area_m2=listed["area_m2"].round().astype("int64"))
        click.echo("\n" + _table_without_empty(rounded.head(_SHOWN)))
    if len(listed) > _SHOWN or len(listed) < len(findings):
        counts = findings.groupby(["finding", "done"])["area_m2"].agg(["size", "sum"])
        rows = [(*key, size, round(area)) for key, size, area in counts.itertuples()]
        click.echo(
            f"\nin all, {len(findings)} findings:\n"
            + format_table(("finding", "done", "rows", "area_m2"), rows)
        )


def _table_in_km2(frame: pd.DataFrame, always: Sequence[str] = ()) -> str:
    """Format the table with areas in km2; see `_table_without_empty`."""
    areas = [str(name) for name in frame if str(name).endswith("_m2")]
    in_km2 = frame.assign(**{name: frame[name] / 1e6 for name in areas})
    names = {name: name.removesuffix("_m2") + "_km2" for name in areas}
    return _table_without_empty(in_km2.rename(columns=names), always)


def _table_without_empty(frame: pd.DataFrame, always: Sequence[str] = ()) -> str:
    """Format the table without its empty columns. Columns in `always` are never left out."""
    filled = frame.notna() & (frame.astype(str) != "")
    columns = [str(name) for name in frame if name in always or filled[name].any()]
    text = frame[columns].astype(object)
    rows = text.where(text.notna(), "-").itertuples(index=False)
    return format_table(columns, [tuple(row) for row in rows])
