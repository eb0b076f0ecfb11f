"""Check the content of objects: bytes against checksums, and pixels against each other."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from minecube.arrays import AnyArray, Bool
from minecube.catalog import FALLBACKS
from minecube.cube.checksums import size_and_sha256
from minecube.cube.listing import parse_json
from minecube.cube.provenance import list_used_scenes
from minecube.cube.verify.findings import Finding, describe_key
from minecube.cube.verify.state import Place, SiteState, open_array, place_of

_CLEAR_KINDS = (1, FALLBACKS["wider-season"], FALLBACKS["neighbour-year"])
"""Values of `quality` with observations counted in `clear_count`."""

Task = Callable[[], list[Finding]]


def places_by_sha256(sites: Sequence[SiteState]) -> dict[str, str]:
    """Map the SHA-256 of each written object to its site and key."""
    places = {}
    for site in sites:
        for key, (_, sha256) in site.checksums.items():
            places[sha256] = f"{site.name} {describe_key(key)}"
    return places


def content_tasks(site: SiteState, places: Mapping[str, str]) -> Iterator[Task]:
    """Yield checks of the objects' content. `places` is as from `places_by_sha256`."""
    blocks: dict[Place, list[str]] = {}
    for key in sorted({*site.checksums, *site.files}):
        place = place_of(key)
        if place is None:
            if key in site.checksums and key in site.files:
                yield partial(_check_object, site, key, places)
        elif key in site.checksums or site.year_at(place.index) in site.unsure:
            blocks.setdefault(place, []).append(key)
    for place, keys in sorted(blocks.items()):
        yield partial(_check_block, site, place, keys, places)
    for year in site.committed:
        yield partial(_check_records, site, year)


def _check_object(site: SiteState, key: str, places: Mapping[str, str]) -> list[Finding]:
    finding = _compare_bytes(site, key, site.read(key), places)
    return [] if finding is None else [finding]


def _compare_bytes(
    site: SiteState, key: str, content: Any, places: Mapping[str, str]
) -> Finding | None:
    """Compare an object's bytes with its checksum; None if they agree."""
    year, cure = site.year_and_cure(key)
    if content is None:
        return site.find("missing", key, "is gone", cure, year)
    if not isinstance(content, bytes):
        return site.find("damaged", key, f"cannot be read ({content})", cure, year)
    size, sha256 = size_and_sha256(content)
    expected = site.checksums[key]
    if [size, sha256] == expected:
        return None
    if sha256 in places:
        return site.find("foreign", key, f"is that of {places[sha256]}", cure, year)
    text = f"{size} of {expected[0]} bytes"
    if size == expected[0]:
        text = f"{size} bytes, of which some are not those written"
    return site.find("damaged", key, text, cure, year)


def _check_block(
    site: SiteState, place: Place, keys: Sequence[str], places: Mapping[str, str]
) -> list[Finding]:
    """Check a block of a year: the bytes of its shards, then its pixels against each other."""
    findings: list[Finding] = []
    pixels: dict[str, AnyArray] = {}
    for key in keys:
        if key not in site.files:
            continue
        shard = _check_shard(site, place, key, places)
        if isinstance(shard, Finding):
            findings.append(shard)
        else:
            pixels[_variable(key)] = shard
    year = site.year_at(place.index)
    block = f"block {place.row}/{place.column}"
    for name, values in pixels.items():
        attrs = parse_json(site.metadata[name])["attributes"]
        for text in _find_invalid(values, attrs):
            cure = site.cure_of(name)
            findings.append(site.find("contradictory", f"{name} {block}", text, cure, year))
    unreadable = {_variable(key) for key in keys} - set(pixels)
    if year in site.committed and not unreadable & site.built:
        built = {name: values for name, values in pixels.items() if name in site.built}
        findings += [
            site.find("contradictory", block, text, "build", year)
            for text in _find_disagreements(built)
        ]
    return findings


def _variable(key: str) -> str:
    return key.split("/")[0]


def _check_shard(
    site: SiteState, place: Place, key: str, places: Mapping[str, str]
) -> AnyArray | Finding:
    """Check a shard's bytes, and return its pixels."""
    content = site.read(key)
    if key in site.checksums or not isinstance(content, bytes):
        finding = _compare_bytes(site, key, content, places)
        if finding is not None:
            return finding
    name = _variable(key)
    try:
        return _decode(site.metadata[name], key.removeprefix(f"{name}/"), content, place)
    except Exception as error:  # zarr and its codecs may raise anything on damaged bytes
        year, cure = site.year_and_cure(key)
        text = f"cannot be decoded ({type(error).__name__}: {error})"
        return site.find("damaged", key, text, cure, year)


def _decode(metadata: bytes, key: str, content: bytes, place: Place) -> AnyArray:
    """Decode the pixels of one shard from its bytes: [..., row, column]."""
    array = open_array({"zarr.json": metadata, key: content})
    height, width = array.shards[-2:]
    rows = slice(place.row * height, (place.row + 1) * height)
    columns = slice(place.column * width, (place.column + 1) * width)
    pixels: AnyArray = array[(place.index, ..., rows, columns)]
    return pixels


def _find_invalid(values: AnyArray, attrs: Mapping[str, Any]) -> Iterator[str]:
    """Report invalid values of a variable with flags."""
    if "flag_values" not in attrs:
        return
    valid = {*attrs["flag_values"], attrs.get("nodata")}
    invalid = sorted(set(np.unique(values).tolist()) - valid)
    if invalid:
        yield f"expected {attrs['flag_values']} or {attrs.get('nodata')}, found {invalid[:5]}"


def _find_disagreements(pixels: Mapping[str, AnyArray]) -> Iterator[str]:
    """Report contradictions between a block's variables. A missing variable is all fill value."""
    if not pixels:
        return
    shape = next(iter(pixels.values())).shape[-2:]
    quality = pixels.get("quality", np.zeros(shape, np.uint8))
    reflectance = pixels.get("reflectance", np.zeros((1, *shape), np.uint16))
    clear_count = pixels.get("clear_count", np.zeros(shape, np.uint16))
    is_observed = quality > 0
    checks: dict[str, Bool] = {
        "have a quality, but no reflectance in some band": (
            is_observed & (reflectance == 0).any(axis=0)
        ),
        "have reflectance, but no quality": ~is_observed & (reflectance > 0).any(axis=0),
        "count clear observations where quality has no clear kind, or the other way round": (
            (clear_count > 0) != np.isin(quality, _CLEAR_KINDS)
        ),
    }
    for name, values in pixels.items():
        if name not in ("quality", "reflectance", "clear_count"):
            checks[f"have {name}, but no quality"] = ~is_observed & _has_value(values)
    for text, is_wrong in checks.items():
        if is_wrong.any():
            yield f"{int(is_wrong.sum())} pixels {text}"


def _has_value(values: AnyArray) -> Bool:
    """Return where a layer has another value than fill value."""
    if values.dtype.kind == "f":
        return np.isfinite(values)
    return values > 0


def _check_records(site: SiteState, year: int) -> list[Finding]:
    """Compare scene list and read counts with the marker."""
    marker = site.committed[year]
    findings = []
    for name in ("scenes", "reads"):
        path = f"builds/{year}/{name}"
        missing = set(site.checksums) - set(site.files)
        if marker.get(name) is None or any(key.startswith(f"{path}/") for key in missing):
            continue  # nothing to compare, or reported as missing
        columns = ["id"] if name == "scenes" else None
        try:
            content = io.BytesIO(bytes(site.values_of(path)))
            table = pd.read_parquet(content, columns=columns)
        except Exception as error:  # Parquet may raise anything on damaged bytes
            text = f"cannot be read as Parquet ({type(error).__name__})"
            findings.append(site.find("damaged", path, text, "build", year))
            continue
        if not _agrees(name, table, marker):
            text = f"is not of the {name} that the marker counts"
            findings.append(site.find("contradictory", path, text, "build", year))
    return findings


def _agrees(name: str, table: pd.DataFrame, marker: Mapping[str, Any]) -> bool:
    """Whether a scene list has the marker's scenes, or read counts have the marker's sums."""
    if name == "scenes":
        return sorted(table["id"]) == sorted(scene["id"] for scene in list_used_scenes(marker))
    counts = marker["reads"]
    columns = [column for column in ("planned", "lost") if column in counts and column in table]
    return all(int(table[column].sum()) == counts[column] for column in columns)
