"""Check the markers of committed years, and report unfinished builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minecube.cube.checksums import seal
from minecube.cube.listing import attributes_in
from minecube.cube.markers import PLACING, WITHDRAWN, is_staged, staged_year
from minecube.cube.provenance import describe_grid, hash_build, untitled
from minecube.cube.verify.findings import Finding
from minecube.cube.verify.state import SiteState, place_of


def check_markers(site: SiteState) -> Iterator[Finding]:
    """Check the marker of each year with a marker, with pixels, or under construction."""
    marked = {
        int(name) for folder, name, *_ in _split_keys(site) if folder == "builds" and name.isdigit()
    }
    if marked or "builds/zarr.json" in site.files:
        yield from site.check_empty_group("builds/zarr.json")
    staged = {name for folder, name, *_ in _split_keys(site) if is_staged(f"{folder}/{name}/")}
    for name in sorted(staged):
        # The year may have been committed since the store was listed.
        keys = [key for key in site.files if key.startswith(f"builds/{name}/")]
        if any(site.read(key) is not None for key in keys):
            text = "the year was being built"
            yield site.find_unfinished(f"builds/{name}", text, "build", staged_year(name))
    unfinished = {year for year in map(staged_year, staged) if year is not None}
    for year in sorted(marked | unfinished | _stored_years(site)):
        if year in marked or year not in unfinished or _marker(site, year) is not None:
            yield from _check_year(site, year)


def _split_keys(site: SiteState) -> list[list[str]]:
    """Return the parts of the keys of all objects in folders."""
    return [key.split("/") for key in site.files if "/" in key]


def _stored_years(site: SiteState) -> set[int]:
    """Return the years with a shard of a variable written by builds."""
    years = {site.year_of(key) for key in site.files if key.split("/")[0] in site.built}
    return {year for year in years if year is not None}


def _marker(site: SiteState, year: int) -> Any:
    """Read a marker, once."""
    key = _key_of(year)
    if key not in site.judged:
        site.judged[key] = site.read(key)
    return site.judged[key]


def _key_of(year: int) -> str:
    return f"builds/{year}/zarr.json"


def _check_year(site: SiteState, year: int) -> Iterator[Finding]:
    """Check a year's marker, if the year is committed."""
    key = _key_of(year)
    content = _marker(site, year)
    attrs = attributes_in(content)
    if attrs is None:
        site.committed[year] = {}
        text = "nothing says what the year is made of"
        if content is None:
            yield site.find("missing", key, f"pixels are there, but {text}", "build", year)
        else:
            yield site.find("damaged", key, f"cannot be understood, so {text}", "build", year)
    elif not attrs or ("building" in attrs and "build_id" not in attrs):
        return  # not built, or begun by an older version
    elif WITHDRAWN in attrs:
        yield site.find_unfinished(key, "the year was being withdrawn", "build", year)
    elif PLACING in attrs:
        yield site.find_unfinished(key, "the year was being put in place", "build", year)
    else:
        site.committed[year] = attrs
        yield from _check_marker(site, year, attrs)


def _check_marker(site: SiteState, year: int, attrs: Mapping[str, Any]) -> Iterator[Finding]:
    """Check the marker of a committed year against its hash, and against its place."""
    key = _key_of(year)
    if "sha256" not in attrs and "checksums" not in attrs and "build_id" in attrs:
        site.unsure.add(year)
        text = (
            "was built before checksums were kept; a flipped bit, or a shard that is gone, may not "
            "be seen"
        )
        yield site.find("unverifiable", key, text, "build", year)
    elif attrs != seal(attrs) or "build_id" not in attrs:
        site.committed[year] = {}
        yield site.find("damaged", key, "is not what was committed", "build", year)
        return
    else:
        site.checksums |= attrs["checksums"]
    try:
        build = hash_build(attrs)
    except (KeyError, TypeError, AttributeError):
        build = "none"
    if build != attrs["build_id"]:
        text = f"says it is build {attrs['build_id']}, but what it is made of is build {build}"
        yield site.find("damaged", key, text, "build", year)
    if (attrs.get("site"), attrs.get("year")) != (site.name, year):
        text = f"is that of {attrs.get('site')} {attrs.get('year')}"
        yield site.find("foreign", key, text, "build", year)
    if year not in site.years:
        text = f"the cube's years are {site.years}"
        yield site.find("contradictory", key, text, "site", year)
        return
    places = [place for place in map(place_of, attrs.get("checksums", ())) if place is not None]
    indices = {place.index for place in places}
    if indices - {site.years.index(year)}:
        text = f"its pixels are at {sorted(indices)} among the years {site.years}"
        yield site.find("contradictory", key, text, "site", year)
    if site.grid is not None:
        yield from _check_against_group(site, year, attrs)


def _check_against_group(site: SiteState, year: int, attrs: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare the recipe, grid and share of reads of a year with the group."""
    key = _key_of(year)
    if untitled(attrs.get("recipe", {})) != untitled(site.description["recipe"]):
        text = "was made by another recipe than the site's group"
        yield site.find("contradictory", key, text, "build", year)
    stored = attrs.get("grid", {})
    expected = describe_grid(site.grid)
    if any(stored.get(name) != value for name, value in expected.items()):
        text = "was made on another grid than the site's group"
        yield site.find("contradictory", key, text, "build", year)
    share = attrs.get("reads", {}).get("completeness", 1.0)
    noted = site.incomplete_reads.get(str(year), 1.0)
    if noted != share:
        text = f"incomplete_reads says {noted}, the marker {share}"
        yield site.find("contradictory", "zarr.json", text, "build", year)
