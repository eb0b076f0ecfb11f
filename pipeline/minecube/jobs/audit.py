"""Compare the scenes that sources list with the passes expected from the orbits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from minecube import report, scenes
from minecube.catalog import Recipe, Site, Source
from minecube.errors import CubeError, ReadError, SceneError
from minecube.files import replacing
from minecube.grid import grid_of
from minecube.jobs import pixel_audit
from minecube.jobs.scene_lists import LISTING_LAG, load_or_search, path_of_list
from minecube.places import Place
from minecube.scenes import coverage

_SEARCHES = 4
"""Simultaneous searches. Their number depends on the API's latency, not on the cores."""


@dataclass(frozen=True)
class Unanswered:
    """A site-year without answer from a source."""

    site_year: str
    source: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """Listed and expected scenes of sites and years."""

    recipe: Recipe
    by_month: pd.DataFrame
    """One row per site, year, source and month; see `coverage.tabulate_coverage`. Empty without answers."""
    by_year: pd.DataFrame
    """One row per site, year and source. The last row of a site-year has all sources together."""
    requested: int
    """Number of site-years."""
    failed_searches: tuple[Unanswered, ...]

    @property
    def unanswered(self) -> int:
        """Number of site-years that could not be audited."""
        if self.by_year.empty:
            return self.requested
        return self.requested - len(self.by_year.groupby(["site", "year"]))

    @property
    def too_few(self) -> pd.DataFrame:
        """Site-years with fewer usable dates than the recipe needs."""
        if self.by_year.empty:
            return self.by_year
        combined = self.by_year.groupby(["site", "year"], sort=False).tail(1)
        return combined.query("state != 'ok'")


def audit_scenes(
    sites: Sequence[Site],
    years: Sequence[int],
    sources: Sequence[Source],
    recipe: Recipe,
    progress: Callable[[str], None] = lambda _: None,
    *,
    pixels: bool = False,
) -> Audit:
    """Search all site-years in all sources, and compare the scenes with the expected passes.

    With `pixels`, also checks the pixels of the usable scenes, and adds `pixel_audit.COLUMNS` to
    the table by year. Otherwise reads no pixels. The recipe's months and needed dates judge a
    site-year. `progress` gets the site-year and source of each search, and the reason of a failure.

    Raises:
        SceneError: a year is without Sentinel-2.
        CatalogError: a site has no polygon. With `pixels`, a source lacks a band or its keys.
    """
    scenes.check_years(years)
    if pixels:
        pixel_audit.check_sources(sources, recipe)
    for site in sites:
        grid_of(site)  # fail early for a site without polygon
    by_month: list[pd.DataFrame] = []
    by_year: list[pd.DataFrame] = []
    failed: list[Unanswered] = []
    for site in sites:
        listings, failures = _list_scenes(site, years, sources, progress)
        failed += failures
        if listings:
            months, totals = coverage.tabulate_coverage(listings, recipe, _last_listed_day())
            if pixels:
                counts, failures = _count_pixel_faults(site, listings, recipe, progress)
                failed += failures
                totals = totals.join(counts)
            by_month.append(months)
            by_year.append(totals)
    return Audit(
        recipe=recipe,
        by_month=_concatenate(by_month),
        by_year=_concatenate(by_year),
        requested=len(sites) * len(years),
        failed_searches=tuple(failed),
    )


def _count_pixel_faults(
    site: Site,
    listings: Sequence[coverage.Listing],
    recipe: Recipe,
    progress: Callable[[str], None],
) -> tuple[pd.DataFrame, list[Unanswered]]:
    """Count the faults in pixels, in the rows of `coverage.tabulate_coverage`.

    Years with a lost read have no counts, and are in the list instead.
    """
    tables: list[pd.DataFrame] = []
    failed: list[Unanswered] = []
    for of_year in coverage.group_by_year(listings):
        findings: dict[tuple[str, str], frozenset[str]] = {}
        failures: list[Unanswered] = []
        for listing in of_year:
            if listing.source == coverage.ALL_SOURCES:
                continue
            note = f"{listing.site} {listing.year}, pixels of {listing.source}"
            try:
                findings |= pixel_audit.find_faults(site, listing, recipe)
            except ReadError as error:
                site_year = f"{listing.site} {listing.year}"
                failures.append(Unanswered(site_year, listing.source, str(error)))
                note += f", failed: {error}"
            progress(note)
        table = pixel_audit.count_faults(of_year, findings, recipe)
        if failures:
            table.loc[:] = pd.NA
        tables.append(table)
        failed += failures
    return _concatenate(tables), failed


def judge_lists(
    site: Site, years: Sequence[int], sources: Sequence[Source], recipe: Recipe, folder: Place
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare a site's saved scene lists with the expected passes, without a search.

    Years without a saved list are left out. A list holds the scenes of all sources together.

    Returns the tables by month and by year, as in `Audit`.

    Raises:
        SceneError: a list belongs to another search.
    """
    listings = [
        coverage.Listing(
            site=site.id,
            year=year,
            source="+".join(source.id for source in sources),
            result=load_or_search(site, year, sources, folder),
        )
        for year in years
        if path_of_list(site, year, sources, folder).exists()
    ]
    if not listings:
        return pd.DataFrame(), pd.DataFrame()
    return coverage.tabulate_coverage(listings, recipe, _last_listed_day())


def _last_listed_day() -> date:
    return datetime.now(tz=UTC).date() - LISTING_LAG


def save_audit(audit: Audit, folder: Path) -> None:
    """Write audit.parquet (by month), audit.csv (by year) and audit.png.

    Each file is written completely or not at all. Raises CubeError if a file cannot be written.
    """
    writers: dict[str, Callable[..., Any]] = {
        "audit.parquet": audit.by_month.to_parquet,
        "audit.csv": audit.by_year.to_csv,
    }
    for name, write in writers.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as draft:
                write(draft, index=False)
        except OSError as error:
            raise CubeError(
                f"{path}: cannot be written ({error.strerror or error}); choose another --out"
            ) from error
    title = f"Usable dates by month, recipe {audit.recipe.id}"
    report.draw_coverage(audit.by_month, audit.by_year, folder / "audit.png", title)


def _concatenate(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    if not tables:
        return pd.DataFrame()
    return pd.concat(tables, ignore_index=True)


def _list_scenes(
    site: Site, years: Sequence[int], sources: Sequence[Source], progress: Callable[[str], None]
) -> tuple[list[coverage.Listing], list[Unanswered]]:
    """List the scenes of each source and year.

    A year with a missing answer is in the second list instead.
    """
    listings: list[coverage.Listing] = []
    unanswered: list[Unanswered] = []
    pool = ThreadPoolExecutor(max_workers=_SEARCHES)
    try:
        searches = {
            (year, source.id): pool.submit(_list_year, site, year, source)
            for year in years
            for source in sources
        }
        for year in years:
            answers: list[coverage.Listing] = []
            failures: list[Unanswered] = []
            for source in sources:
                note = f"{site.id} {year}, {source.id}"
                try:
                    answers.append(searches[year, source.id].result())
                except SceneError as error:
                    failures.append(Unanswered(f"{site.id} {year}", source.id, str(error)))
                    note += f", failed: {error}"
                progress(note)
            unanswered += failures
            if not failures:
                listings += answers
    finally:
        pool.shutdown(cancel_futures=True)
    return listings, unanswered


def _list_year(site: Site, year: int, source: Source) -> coverage.Listing:
    try:
        listed = scenes.search(site, year, source)
    except scenes.NoScenesError as error:
        listed = error.result
    return coverage.Listing(site=site.id, year=year, source=source.id, result=listed)
