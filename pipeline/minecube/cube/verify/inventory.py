"""Report missing and unexpected objects of a site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from minecube.cube.listing import parse_json
from minecube.cube.markers import is_staged
from minecube.cube.verify.findings import Finding
from minecube.cube.verify.state import SiteState, place_of
from minecube.cube.views import index_in

_GROUPS = {"zarr.json", "builds/zarr.json", "predictions/zarr.json"}


def find_missing(site: SiteState) -> Iterator[Finding]:
    """Report objects with a checksum that do not exist."""
    for key in sorted(set(site.checksums) - set(site.files)):
        if site.read(key) is not None:
            continue  # committed after the store was listed
        year, cure = site.year_and_cure(key)
        text = "is gone"
        if place_of(key):
            text = "is gone, and reads as if nothing were there"
        yield site.find("missing", key, text, cure, year)


def find_unexpected(site: SiteState) -> Iterator[Finding]:
    """Report objects without any record."""
    for key in sorted(set(site.files) - set(site.checksums) - _GROUPS):
        if is_staged(key) or _is_expected(site, key):
            continue
        year = site.year_of(key)
        if _is_label(site, key):
            text = "has no checksum: older than they are, or from elsewhere"
            yield site.find("unverifiable", key, text, "label", year)
        else:
            yield site.find("unexpected", key, "nothing that was written here", "remove", year)


def _is_expected(site: SiteState, key: str) -> bool:
    """Whether an object without a checksum belongs where it is."""
    folder, *parts = key.split("/")
    if folder == "builds" and parts[0].isdigit():
        return int(parts[0]) not in _years_with_checksums(site) or parts[1:] == ["zarr.json"]
    if folder == "predictions" and len(parts) > 1:
        return _is_expected_of_map(site, parts[0], parts[1:])
    if not _is_array(site, folder):
        return False
    if parts == ["zarr.json"]:
        return True
    if parts[:1] == ["c"] and _is_coordinate(parse_json(site.metadata[folder]), parts[1:]):
        return True
    if place_of(key) is None:
        return False
    year = site.year_of(key)
    if folder in site.built:  # of a year being built, or without checksums
        return year is not None and year not in _years_with_checksums(site)
    return year in site.labelling


def _is_label(site: SiteState, key: str) -> bool:
    variable = key.split("/")[0]
    return _is_array(site, variable) and variable not in site.built and place_of(key) is not None


def _is_array(site: SiteState, name: str) -> bool:
    arrays = {*site.expected, *site.description.get("arrays", {})}
    return name in site.metadata and (name in arrays or not site.description)


def _years_with_checksums(site: SiteState) -> set[int]:
    return {year for year, attrs in site.committed.items() if "checksums" in attrs}


def _is_expected_of_map(site: SiteState, name: str, parts: Sequence[str]) -> bool:
    """Whether an object of a prediction needs no checksum."""
    if name not in site.mapped or parts == ["zarr.json"]:
        return True
    index = index_in("/".join(parts))
    is_complete = index is None or site.mapped[name].get(index, True)
    return not is_complete


def _is_coordinate(metadata: Any, chunk: Sequence[str]) -> bool:
    """Whether these indices are those of a chunk of a coordinate."""
    try:
        shape = metadata["shape"]
        sides = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        last = [(length - 1) // side for length, side in zip(shape, sides, strict=True)]
        return len(last) < 3 and all(
            int(index) <= limit for index, limit in zip(chunk, last, strict=True)
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return False
