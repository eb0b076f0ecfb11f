"""STAC search to normalised, deduplicated scenes, saved as a stac-geoparquet snapshot before a pixel is read.

A scene is a `pystac.Item` whatever provider listed it: assets B02..B12 and SCL, `proj:code`, and under `minecube:` the
source, how to open it, the acquisition it belongs to, and the radiometric offset its pixels still carry, with the reason.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pystac
import pystac_client
import requests
import shapely
import stac_geoparquet.arrow
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from pystac_client.warnings import DoesNotConformTo
from shapely.geometry.base import BaseGeometry
from urllib3 import Retry

from minecube.catalog import FIRST_YEAR, Offset, Recipe, Site, Source
from minecube.errors import CubeError, SceneError
from minecube.grid import grid_of
from minecube.reader import stack

__all__ = [
    "acquisition",
    "belonging",
    "check_years",
    "deduplicate",
    "load",
    "normalise",
    "save",
    "search",
    "select",
    "solar_day",
    "stack",
]

log = logging.getLogger(__name__)

NATIVE_M = {"B02": 10, "B03": 10, "B04": 10, "B08": 10}
"""The mission's pixel sizes; every other band of the cube, and SCL, is 20 m."""
# POST too: pystac-client searches with it, and urllib3 leaves it out by default.
_API_FAULTS = (
    APIError,
    ClientTypeError,
    DoesNotConformTo,
    requests.RequestException,
    pystac.errors.STACError,
    # What the client makes of answers that are JSON, but no STAC.
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)
_RETRIES = Retry(total=5, backoff_factor=0.5, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)


def search(site: Site, year: int, source: Source) -> list[pystac.Item]:
    """All usable scenes of one calendar year over a site: normalised, deduplicated, ordered by time and id.

    Searched month by month, so that no page sequence is long enough to break; ids are counted once and compared with
    what the API says it has. Items that cannot be used are logged with the reason and left out.

    Raises:
        SceneError: the year lies outside the mission, the source does not answer, pages were lost, or nothing was found.
    """
    check_years([year])
    area = grid_of(site).geographic_extent.geom
    found = _search_api(source, area, year) if source.kind == "stac-api" else _search_file(source, area, year)
    scenes, refused = [], 0
    for item in found:
        try:
            scenes.append(normalise(item, source))
        except SceneError as error:
            refused += 1
            log.warning("%s", error)
        except (TypeError, ValueError, AttributeError, shapely.errors.ShapelyError) as error:
            refused += 1
            log.warning("item %s: is malformed (%s: %s), so it is refused", item.id, type(error).__name__, error)
    scenes = deduplicate(s for s in scenes if shapely.intersects(shapely.geometry.shape(s.geometry), area))
    if not scenes:
        box = ", ".join(f"{v:.3f}" for v in area.bounds)
        raise SceneError(
            f"no scene of {year} over {site.id} (west, south, east, north {box}) in {source.collection} at {source.href}: "
            f"{len(found)} listed, {refused} refused; try another year or --source, or check the site's polygon"
        )
    return scenes


def check_years(years: Iterable[int]) -> None:
    """Raises SceneError for a year in which Sentinel-2 took no image."""
    last = datetime.now(tz=UTC).year
    for year in years:
        if not FIRST_YEAR <= year <= last:
            raise SceneError(f"year {year}: expected {FIRST_YEAR}..{last}; Sentinel-2 has images of no other year")


def normalise(item: pystac.Item, source: Source) -> pystac.Item:
    """The item in the project's own terms, with nothing left that belongs to one provider.

    Raises:
        SceneError: it lacks geometry, time, projection, acquisition, baseline or a band; names item and reason.
    """
    day = solar_day(item)
    baseline = _baseline(item)
    offset, reason = _offset(item, baseline, source.offset)
    datatake, start = acquisition(item)
    assets = {}
    for band, key in source.assets.items():
        if key not in item.assets:
            raise SceneError(f"item {item.id}: has no asset {key!r} for {band}, so it is refused")
        asset = item.assets[key]
        href = asset.get_absolute_href() or asset.href
        size = source.resolution_m.get(band) or _pixel_size(asset) or NATIVE_M.get(band, 20)
        assets[band] = pystac.Asset(href, media_type=asset.media_type, roles=asset.roles, extra_fields={"gsd": size})
    return pystac.Item(
        id=item.id,
        geometry=item.geometry,
        bbox=list(shapely.geometry.shape(item.geometry).bounds),
        datetime=item.datetime,
        properties={
            "platform": str(item.properties.get("platform", "")).lower(),
            "eo:cloud_cover": float(item.properties.get("eo:cloud_cover") or 0.0),
            "proj:code": _epsg(item, source),
            "s2:mgrs_tile": _tile(item),
            "s2:processing_baseline": baseline,
            "minecube:source": source.id,
            "minecube:solar_day": day,
            "minecube:prefix": source.href_prefix,
            "minecube:gdal": dict(source.gdal),
            "minecube:datatake": datatake,
            "minecube:granule_start": start,
            "minecube:generated": _generated(item),
            "minecube:offset": offset,
            "minecube:offset_reason": reason,
        },
        assets=assets,
    )


def acquisition(item: pystac.Item) -> tuple[str, str]:
    """(datatake, start of its granule), equal for every baseline in which the acquisition was processed.

    The datatake is its id without the baseline suffix, `GS2A_20200302T102021_024515`; the start is the sensing start of the
    datastrip, which tells the two granules of a split datatake apart (Sentinel-2 PSD 14.9, section 3.4).
    """
    properties = item.properties
    datatake = properties.get("s2:datatake_id") or properties.get("eopf:datatake_id") or ""
    datastrip = properties.get("s2:datastrip_id") or properties.get("eopf:datastrip_id") or ""
    take = re.match(r"GS2[A-D]_\d{8}T\d{6}_\d{6}", datatake)
    start = re.search(r"_S(\d{8}T\d{6})", datastrip)
    if not take or not start:
        raise SceneError(
            f"item {item.id}: datatake {datatake!r} and datastrip {datastrip!r} do not name an acquisition, so copies of "
            "it could be counted twice; it is refused"
        )
    return take.group(), start.group(1)


def deduplicate(scenes: Iterable[pystac.Item]) -> list[pystac.Item]:
    """One scene per acquisition and tile, whatever the order they come in: the newest baseline, then the newest processing.

    The two granules of a split datatake start at different times and are both kept.
    """
    newest: dict[tuple[str, ...], pystac.Item] = {}
    for scene in scenes:
        p = scene.properties
        key = (p["minecube:datatake"], p["s2:mgrs_tile"], p["minecube:granule_start"])
        if key not in newest or _version(scene) > _version(newest[key]):
            newest[key] = scene
    return sorted(newest.values(), key=lambda s: (s.datetime, s.id))


def _version(scene: pystac.Item) -> tuple[str, str, str]:
    p = scene.properties
    return p["s2:processing_baseline"], p["minecube:generated"], scene.id


def select(scenes: Sequence[pystac.Item], recipe: Recipe) -> list[pystac.Item]:
    """The scenes a recipe uses: those of its months and not cloudier than it allows.

    Raises:
        SceneError: none is left; says how many there were and what to widen.
    """
    in_season = [s for s in scenes if s.datetime and s.datetime.month in recipe.months]
    chosen = [s for s in in_season if s.properties["eo:cloud_cover"] <= recipe.max_cloud_cover]
    if not chosen:
        raise SceneError(
            f"recipe {recipe.id!r} uses none of {len(scenes)} scenes: {len(in_season)} in months {list(recipe.months)}, "
            f"none of those at most {recipe.max_cloud_cover:g} % cloudy; widen months or max_cloud_cover in a recipe "
            "of your own"
        )
    return chosen


def belonging(scenes: Sequence[pystac.Item], site: Site, year: int, source: Source) -> list[pystac.Item]:
    """The scenes of a saved list, which must be of that year, source and place; a list of another would come out as zeros.

    Raises:
        SceneError: it is not; says how.
    """
    area = grid_of(site).geographic_extent.geom
    years = {s.datetime.year for s in scenes if s.datetime} - {year}
    sources = {s.properties["minecube:source"] for s in scenes} - {source.id}
    elsewhere = [s for s in scenes if not shapely.intersects(shapely.geometry.shape(s.geometry), area)]
    wrong = [f"of {y}" for y in years] + [f"from {s}" for s in sources] + [f"elsewhere ({s.id})" for s in elsewhere]
    if wrong:
        raise SceneError(
            f"the saved list for {site.id} {year} from {source.id} holds scenes {wrong[0]}; it belongs to something else, so "
            "remove it or name another folder"
        )
    return list(scenes)


def solar_day(item: pystac.Item) -> str:
    """The local solar date, YYYY-MM-DD: tiles and granules of one overpass share it, wherever on Earth midnight falls."""
    if item.datetime is None or item.geometry is None:
        raise SceneError(f"item {item.id}: has no {'geometry' if item.geometry is None else 'datetime'}, so it is refused")
    longitude = shapely.geometry.shape(item.geometry).centroid.x
    return (item.datetime + timedelta(hours=longitude / 15)).date().isoformat()


def save(scenes: Sequence[pystac.Item], path: Path) -> None:
    """Write scenes as stac-geoparquet, whole or not at all; raises CubeError where that cannot be written."""
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow([_for_parquet(s) for s in scenes])
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stac_geoparquet.arrow.to_parquet(table, part)
        part.replace(path)
    except OSError as error:
        raise CubeError(
            f"{path}: the scene list cannot be written ({error.strerror or error}); choose another folder"
        ) from error


def load(path: Path) -> list[pystac.Item]:
    """The scenes of a snapshot, as `save` was given them.

    Raises:
        SceneError: the file is missing, or is not a snapshot of normalised scenes.
    """
    items = _read_items(path)
    if any("minecube:offset" not in i.properties for i in items):
        raise SceneError(
            f"{path}: holds STAC items, but no scenes saved by minecube; name it as a source of kind stac-geoparquet"
        )
    for item in items:
        # Parquet knows one struct for all rows; a mapping that differs by source travels as text.
        item.properties["minecube:gdal"] = json.loads(item.properties["minecube:gdal"])
    return sorted(items, key=lambda s: (s.datetime, s.id))


def _for_parquet(scene: pystac.Item) -> dict[str, Any]:
    content = scene.to_dict(include_self_link=False)
    return {
        **content,
        "properties": {**content["properties"], "minecube:gdal": json.dumps(scene.properties["minecube:gdal"], sort_keys=True)},
    }


def _read_items(path: Path | str) -> list[pystac.Item]:
    try:
        table = pq.read_table(_fetched(path) if str(path).startswith(("http://", "https://")) else path)
        found = [pystac.Item.from_dict(d, migrate=False) for d in stac_geoparquet.arrow.stac_table_to_items(table)]
    except (OSError, ValueError, KeyError, TypeError) as error:  # requests' errors are OSErrors
        raise SceneError(f"{path}: cannot be read as stac-geoparquet ({error}); check the path, or search again") from error
    return found


def _fetched(url: Path | str) -> io.BytesIO:
    """A remote file as a whole: an index of scenes is small beside one scene."""
    answer = requests.get(str(url), timeout=60)
    answer.raise_for_status()
    return io.BytesIO(answer.content)


def _search_file(source: Source, area: BaseGeometry, year: int) -> list[pystac.Item]:
    found = []
    for item in _read_items(source.href):
        of_year = item.datetime is not None and item.datetime.year == year
        if of_year and item.geometry and shapely.intersects(shapely.geometry.shape(item.geometry), area):
            found.append(item)
    folder = source.href.rpartition("/")[0]  # a local one is absolute: the catalogue's loader sees to it
    for item in found:
        for asset in item.assets.values():
            if "://" not in asset.href and not asset.href.startswith("/"):
                asset.href = f"{folder}/{asset.href.removeprefix('./')}"
    return found


def _search_api(source: Source, area: BaseGeometry, year: int) -> list[pystac.Item]:
    by_id: dict[str, pystac.Item] = {}
    try:
        client = pystac_client.Client.open(source.href, stac_io=StacApiIO(max_retries=_RETRIES, timeout=60))
        for month in range(1, 13):
            asked = client.search(
                collections=[source.collection],
                intersects=shapely.geometry.mapping(area),
                datetime=f"{year}-{month:02d}",
                limit=100,
            )
            # Not migrated to the newest STAC: `normalise` reads old and new, and migration warns about what it cannot move.
            ids = {d["id"]: pystac.Item.from_dict(d, migrate=False) for d in asked.items_as_dicts()}
            matched = asked.matched()
            if matched is not None and matched != len(ids):
                raise SceneError(
                    f"{source.href}: says {matched} items match {year}-{month:02d}, its pages held {len(ids)}; scenes would be "
                    "missing without a trace, so nothing is built; search again"
                )
            by_id |= ids
    except _API_FAULTS as error:
        raise SceneError(f"{source.href}: the search for {year} failed ({error}); check the URL and the network") from error
    return list(by_id.values())


def _first(item: pystac.Item, *names: str) -> str:
    return next((str(item.properties[n]) for n in names if item.properties.get(n)), "")


def _product(item: pystac.Item) -> str:
    uri = _first(item, "s2:product_uri")
    return uri or (item.id if item.id.startswith("S2") and "_MSIL" in item.id else "")


def _baseline(item: pystac.Item) -> str:
    """NN.NN, from the properties or from the product's name (`_N0500_`)."""
    stated = re.fullmatch(r"(\d{1,2})\.(\d{1,2})", _first(item, "s2:processing_baseline", "processing:version"))
    named = re.search(r"_N(\d\d)(\d\d)_", _product(item))
    # 4.0 and 05.00 are both in use.
    baseline = f"{stated[1]:0>2}.{stated[2]:0<2}" if stated else f"{named[1]}.{named[2]}" if named else ""
    if baseline >= "99":
        raise SceneError(
            f"item {item.id}: baseline {baseline} marks a provider's own reprocessing, which is to be withdrawn; refused"
        )
    if not baseline:
        raise SceneError(
            f"item {item.id}: names no processing baseline NN.NN, so whether its pixels carry the offset of -1000 "
            "cannot be told; it is refused"
        )
    return baseline


def _offset(item: pystac.Item, baseline: str, rule: Offset) -> tuple[int, str]:
    """What to add to the pixels, and why. What the item declares as raster offset is not asked: it is wrong where applied."""
    if baseline < rule.from_baseline:
        return 0, f"baseline {baseline} is older than {rule.from_baseline}"
    if rule.applied_flag and item.properties.get(rule.applied_flag) is True:
        return 0, f"baseline {baseline}, {rule.applied_flag} is true"
    return rule.value, f"baseline {baseline} from {rule.from_baseline} on"


def _tile(item: pystac.Item) -> str:
    tile = _first(item, "s2:mgrs_tile", "grid:code").removeprefix("MGRS-")
    if not tile:
        parts = [str(item.properties.get(f"mgrs:{p}", "")) for p in ("utm_zone", "latitude_band", "grid_square")]
        tile = "".join(parts)
    named = re.search(r"_T(\d\d[C-X][A-Z]{2})[_.]", _product(item))
    tile = tile or (named.group(1) if named else "")
    match = re.fullmatch(r"(\d{1,2})([C-X][A-Z]{2})", tile)
    if not match:
        raise SceneError(f"item {item.id}: names no MGRS tile (found {tile!r}), so duplicates cannot be told; it is refused")
    return f"{int(match.group(1)):02d}{match.group(2)}"


def _epsg(item: pystac.Item, source: Source) -> str:
    """EPSG:NNNNN of the item or of its assets, which must agree."""
    shown: list[Mapping[str, Any]] = [item.properties]
    shown += [item.assets[k].extra_fields for k in source.assets.values() if k in item.assets]
    codes = set()
    for fields in shown:
        codes |= {str(fields.get(k)).removeprefix("EPSG:") for k in ("proj:code", "proj:epsg")}
    codes -= {"None"}
    if len(codes) != 1:
        raise SceneError(f"item {item.id}: expected one projection, found {sorted(codes) or 'none'}; it is refused")
    return f"EPSG:{codes.pop()}"


def _pixel_size(asset: pystac.Asset) -> int | None:
    transform = asset.extra_fields.get("proj:transform")
    if transform:
        return round(abs(float(transform[0])))
    for band in asset.extra_fields.get("raster:bands") or []:
        if band.get("spatial_resolution"):
            return round(float(band["spatial_resolution"]))
    stated = asset.extra_fields.get("gsd")
    return round(float(stated)) if stated else None


def _generated(item: pystac.Item) -> str:
    """When the product was made, for telling two processings in one baseline apart; as text that sorts by time."""
    named = re.search(r"_(\d{8}T\d{6})(?:\.SAFE)?$", _product(item))
    if named:
        return named.group(1)
    stated = _first(item, "s2:generation_time", "processing:datetime", "created")
    return re.sub(r"[^0-9T]", "", stated)[:15]
