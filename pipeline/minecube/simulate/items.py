"""Write STAC items of simulated pixels in the style of the providers.

Styles are Earth Search, Planetary Computer and CDSE. Ids, property names, extensions and asset keys
match the providers' real items. A property `minecube:simulated` marks simulated items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np

from minecube.catalog import BANDS, SCL
from minecube.simulate.faults import BandFault
from minecube.simulate.granules import Granule
from minecube.simulate.passes import OFFSET_DAY, epsg_of

Item = dict[str, Any]
STYLES = ("earth-search", "planetary-computer", "cdse")
"""Supported sources of the shipped catalogue."""
_BASELINES = (
    (date(2015, 1, 1), "02.14"),
    (date(2021, 3, 30), "03.01"),
    (OFFSET_DAY, "04.00"),
    (date(2022, 12, 6), "05.09"),
    (date(2023, 12, 13), "05.10"),
    (date(2024, 7, 23), "05.11"),
)
_BAND = {  # common name, title, centre and width in micrometres, from Earth Search
    "B02": ("blue", "Blue (band 2)", 0.49, 0.098),
    "B03": ("green", "Green (band 3)", 0.56, 0.045),
    "B04": ("red", "Red (band 4)", 0.665, 0.038),
    "B05": ("rededge", "Red edge 1 (band 5)", 0.704, 0.019),
    "B06": ("rededge", "Red edge 2 (band 6)", 0.74, 0.018),
    "B07": ("rededge", "Red edge 3 (band 7)", 0.783, 0.028),
    "B08": ("nir", "NIR 1 (band 8)", 0.842, 0.145),
    "B8A": ("nir08", "NIR 2 (band 8A)", 0.865, 0.033),
    "B11": ("swir16", "SWIR 1 (band 11)", 1.61, 0.143),
    "B12": ("swir22", "SWIR 2 (band 12)", 2.19, 0.242),
}
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_SCL_NAMES = {  # SCL class -> Earth Search's and Planetary Computer's property s2:<name>_percentage
    1: "saturated_defective_pixel",
    2: "dark_features",
    3: "cloud_shadow",
    4: "vegetation",
    5: "not_vegetated",
    6: "water",
    7: "unclassified",
    8: "medium_proba_clouds",
    9: "high_proba_clouds",
    10: "thin_cirrus",
    11: "snow_ice",
}


@dataclass(frozen=True, kw_only=True)
class Product:
    """One processing of a granule, as one provider lists it."""

    baseline: str
    offset: int
    """Offset in the pixels, added to reflectance x 10000."""
    generated: datetime
    sequence: int = 0
    facility: str = "2APS"
    old: bool = False
    """Pixels of the old processing: biased and misregistered."""
    flag: bool | None = None
    """Earth Search's flag for a removed offset; None if the flag is correct."""
    fault: BandFault | None = None
    """Fault of a band's values."""


def list_products(style: str, granule: Granule) -> list[Product]:
    """Return a provider's processings of a granule.

    Earth Search has removed the offset and flags the removal. Before the offset it lists
    acquisitions twice: as first processed and in baseline 05.00. CDSE has reprocessed them and
    always includes the offset. Planetary Computer has only the old baseline. Its pixels are clean
    here, otherwise no one could recover the truth from this provider.
    """
    overpass = granule.overpass
    # Distinguishes the halves of a split datatake.
    delay = timedelta(minutes=7 * granule.part)
    prompt = overpass.sensed + timedelta(hours=3, minutes=40) + delay
    reprocessed = datetime(2023, 3, 1) + (overpass.sensed - datetime(2015, 1, 1)) / 20 + delay
    baseline = max(entry for entry in _BASELINES if entry[0] <= overpass.day)[1]
    newest = Product(baseline=baseline, offset=1000, generated=prompt, sequence=granule.part)
    again = Product(baseline="05.00", offset=1000, generated=reprocessed, facility="S2RP")
    if overpass.day >= OFFSET_DAY:
        if style == "earth-search":
            return [replace(newest, offset=0)]
        return [newest]
    if style == "planetary-computer":
        late = prompt + timedelta(days=90)
        return [Product(baseline="02.12", offset=0, generated=late, facility="ESRI")]
    if style == "cdse":
        return [again]
    return [
        replace(newest, offset=0, facility="SGS_", old=True),
        replace(again, offset=0, sequence=granule.part + granule.parts),
    ]


def misflag(product: Product, rng: np.random.Generator) -> Product:
    """Give a product a wrong flag in one of two ways.

    The offset is removed but not flagged, or flagged but not removed.
    """
    if rng.random() < 0.5:
        return replace(product, flag=False)
    return replace(product, flag=True, offset=1000)


def make_item(
    style: str, granule: Granule, product: Product, assets: Mapping[str, str]
) -> tuple[Item, dict[str, str]]:
    """Build a provider's item, and map each band to its file name.

    `assets` is the source's mapping of bands to asset keys. Hrefs are `./<file name>`, relative to
    the item.
    """
    writer = _WRITERS[style]
    files = {band: _name_file(style, granule, band) for band in (*BANDS, SCL)}
    entries = {}
    for band, name in files.items():
        entries[assets[band]] = {
            "href": f"./{name}",
            "type": _COG,
            **writer.describe_asset(granule, band),
        }
    item = writer.describe_item(granule, product)
    item |= {
        "type": "Feature",
        "geometry": granule.geometry,
        "bbox": granule.bbox,
        "assets": entries,
        "collection": "sentinel-2-l2a",
        "links": [
            {
                "rel": "collection",
                "type": "application/json",
                "href": f"{writer.api}/collections/sentinel-2-l2a",
            }
        ],
    }
    item["properties"]["minecube:simulated"] = True
    return item, files


def _describe_earth_search(granule: Granule, product: Product) -> Item:
    tile = granule.tile.name
    zone = int(tile[:2])
    band = tile[2]
    square = tile[3:]
    name = (
        f"{granule.overpass.satellite}_{zone}{band}{square}"  # Earth Search does not pad the zone
        f"_{granule.sensed:%Y%m%d}_{product.sequence}_L2A"
    )
    created = _format_time(product.generated + timedelta(hours=2))
    offset_removed = product.baseline >= "04.00"
    if product.flag is not None:
        offset_removed = product.flag
    return {
        "stac_version": "1.0.0",
        "stac_extensions": _list_extensions(
            "eo/v1.1.0",
            "mgrs/v1.0.0",
            "grid/v1.0.0",
            "raster/v1.1.0",
            "view/v1.0.0",
            "projection/v1.1.0",
        ),
        "id": name,
        "properties": {
            "datetime": _format_time(granule.sensed),
            "created": created,
            "updated": created,
            "platform": f"sentinel-{granule.overpass.satellite[1:].lower()}",
            "constellation": "sentinel-2",
            "instruments": ["msi"],
            "eo:cloud_cover": granule.cloud_cover,
            "proj:epsg": epsg_of(granule.tile.box),
            "mgrs:utm_zone": zone,
            "mgrs:latitude_band": band,
            "mgrs:grid_square": square,
            "grid:code": f"MGRS-{zone}{band}{square}",
            "view:sun_azimuth": granule.azimuth,
            "view:sun_elevation": granule.elevation,
            **_describe_product(granule, product),
            "s2:sequence": str(product.sequence),
            "earthsearch:boa_offset_applied": offset_removed,
        },
    }


def _describe_planetary_computer(granule: Granule, product: Product) -> Item:
    uri = _name_product(granule, product)
    return {
        "stac_version": "1.0.0",
        "stac_extensions": _list_extensions("eo/v1.0.0", "sat/v1.0.0", "projection/v1.0.0"),
        "id": uri.replace(f"_N{product.baseline.replace('.', '')}", ""),
        "properties": {
            "datetime": _format_time(granule.overpass.start),
            "platform": f"Sentinel-{granule.overpass.satellite[1:]}",
            "constellation": "Sentinel 2",
            "instruments": ["msi"],
            "eo:cloud_cover": granule.cloud_cover,
            "proj:epsg": epsg_of(granule.tile.box),
            "sat:orbit_state": "descending",
            "sat:relative_orbit": granule.overpass.orbit,
            "s2:mgrs_tile": granule.tile.name,
            "s2:mean_solar_zenith": 90 - granule.elevation,
            "s2:mean_solar_azimuth": granule.azimuth,
            **_describe_product(granule, product),
        },
    }


def _describe_cdse(granule: Granule, product: Product) -> Item:
    start = _format_time(granule.overpass.start)
    return {
        "stac_version": "1.1.0",
        "stac_extensions": _list_extensions(
            "eo/v2.0.0",
            "raster/v2.0.0",
            "sat/v1.0.0",
            "projection/v2.0.0",
            "grid/v1.1.0",
            "view/v1.0.0",
            "processing/v1.2.0",
        ),
        "id": _name_product(granule, product),
        "properties": {
            "gsd": 10,
            "datetime": start,
            "start_datetime": start,
            "end_datetime": start,
            "created": _format_time(product.generated + timedelta(days=1)),
            "updated": _format_time(product.generated + timedelta(days=1)),
            "platform": f"sentinel-{granule.overpass.satellite[1:].lower()}",
            "constellation": "sentinel-2",
            "instruments": ["msi"],
            "grid:code": f"MGRS-{granule.tile.name}",
            "eo:cloud_cover": granule.cloud_cover,
            "eo:snow_cover": granule.percent(11),
            "view:sun_azimuth": granule.azimuth,
            "view:sun_elevation": granule.elevation,
            "sat:orbit_state": "descending",
            "sat:absolute_orbit": granule.overpass.absolute_orbit,
            "sat:relative_orbit": granule.overpass.orbit,
            "product:type": "S2MSI2A",
            "processing:level": "L2",
            "processing:version": product.baseline,
            "processing:datetime": _format_time(product.generated),
            "processing:facility": "ESA",
            "eopf:datatake_id": _name_datatake(granule, product),
            "eopf:datastrip_id": _name_datastrip(granule, product),
            "eopf:instrument_mode": "INS-NOBS",
        },
    }


def _describe_product(granule: Granule, product: Product) -> Item:
    """Return the product metadata used by both Earth Search and Planetary Computer."""
    granule_id = (
        f"{granule.overpass.satellite}_OPER_MSI_L2A_TL_{_name_run(product)}"
        f"_A{granule.overpass.absolute_orbit:06d}_T{granule.tile.name}_N{product.baseline}"
    )
    return {
        "s2:degraded_msi_data_percentage": 0.0,
        "s2:nodata_pixel_percentage": granule.percent(0),
        **{f"s2:{name}_percentage": granule.percent(value) for value, name in _SCL_NAMES.items()},
        "s2:product_type": "S2MSI2A",
        "s2:processing_baseline": product.baseline,
        "s2:product_uri": f"{_name_product(granule, product)}.SAFE",
        "s2:generation_time": _format_time(product.generated),
        "s2:datatake_id": _name_datatake(granule, product),
        "s2:datatake_type": "INS-NOBS",
        "s2:datastrip_id": _name_datastrip(granule, product),
        "s2:granule_id": granule_id,
    }


def _describe_earth_search_asset(granule: Granule, band: str) -> Item:
    size, shape, transform = granule.layout(band)
    place = {"proj:shape": shape, "proj:transform": transform, "roles": ["data", "reflectance"]}
    raster: Item = {
        "nodata": 0,
        "data_type": _data_type(band),
        "spatial_resolution": size,
    }
    if band == SCL:
        return {"title": "Scene classification map (SCL)", "raster:bands": [raster], **place}
    common, title, *_ = _BAND[band]
    # Like the provider, declare the offset although it was removed from the pixels.
    raster |= {"bits_per_sample": 15, "scale": 0.0001, "offset": -0.1}
    return {
        "title": f"{title} - {size}m",
        "eo:bands": [_describe_eo_band(common, band)],
        "gsd": size,
        "raster:bands": [raster],
        **place,
    }


def _describe_planetary_computer_asset(granule: Granule, band: str) -> Item:
    size, shape, transform = granule.layout(band)
    west, south, east, north = granule.tile.box.extent.boundingbox.bbox
    place = {
        "proj:shape": shape,
        "proj:transform": transform,
        "proj:bbox": [west, south, east, north],
        "gsd": size,
        "roles": ["data"],
    }
    if band == SCL:
        return {"title": "Scene classfication map (SCL)", **place}
    title = f"{_BAND[band][1]} - {size}m"
    return {"title": title, "eo:bands": [_describe_eo_band(band, band)], **place}


def _describe_eo_band(name: str, band: str) -> Item:
    common, title, centre, width = _BAND[band]
    return {
        "name": name,
        "common_name": common,
        "description": title,
        "center_wavelength": centre,
        "full_width_half_max": width,
    }


def _describe_cdse_asset(granule: Granule, band: str) -> Item:
    size, shape, transform = granule.layout(band)
    place = {
        "proj:code": f"EPSG:{epsg_of(granule.tile.box)}",
        "proj:bbox": list(granule.tile.box.extent.boundingbox.bbox),
        "proj:shape": shape,
        "proj:transform": transform,
        "gsd": size,
        "nodata": 0,
        "data_type": _data_type(band),
    }
    if band == SCL:
        return {
            "title": "Scene classfication map (SCL) - 20m",
            "roles": ["data", f"gsd:{size}m"],
            **place,
        }
    common, title, centre, width = _BAND[band]
    eo_band = {
        "name": band,
        "eo:common_name": common,
        "eo:center_wavelength": centre,
        "eo:full_width_half_max": width,
    }
    scaled = {"raster:scale": 0.0001, "raster:offset": -0.1}
    return {
        "title": f"{title} - {size}m",
        "bands": [eo_band],
        "roles": ["data", "reflectance", f"gsd:{size}m"],
        **scaled,
        **place,
    }


def _name_file(style: str, granule: Granule, band: str) -> str:
    if style == "earth-search":
        return f"{band}.tif"
    size = granule.layout(band)[0]
    return f"T{granule.tile.name}_{granule.overpass.start:%Y%m%dT%H%M%S}_{band}_{size}m.tif"


def _name_product(granule: Granule, product: Product) -> str:
    """Build the product name (Sentinel-2 PSD 14.9, section 3.4).

    S2A_MSIL2A_<datatake start>_N<baseline>_R<orbit>_T<tile>_<discriminator>
    """
    overpass = granule.overpass
    return (
        f"{overpass.satellite}_MSIL2A_{overpass.start:%Y%m%dT%H%M%S}"
        f"_N{product.baseline.replace('.', '')}_R{overpass.orbit:03d}"
        f"_T{granule.tile.name}_{product.generated:%Y%m%dT%H%M%S}"
    )


def _name_datatake(granule: Granule, product: Product) -> str:
    overpass = granule.overpass
    return (
        f"G{overpass.satellite}_{overpass.start:%Y%m%dT%H%M%S}"
        f"_{overpass.absolute_orbit:06d}_N{product.baseline}"
    )


def _name_datastrip(granule: Granule, product: Product) -> str:
    return (
        f"{granule.overpass.satellite}_OPER_MSI_L2A_DS_{_name_run(product)}"
        f"_S{granule.strip_start:%Y%m%dT%H%M%S}_N{product.baseline}"
    )


def _name_run(product: Product) -> str:
    return f"{product.facility}_{product.generated:%Y%m%dT%H%M%S}"


def _data_type(band: str) -> str:
    if band == SCL:
        return "uint8"
    return "uint16"


def _list_extensions(*names: str) -> list[str]:
    return [f"https://stac-extensions.github.io/{name}/schema.json" for name in names]


def _format_time(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%S.%f}Z"


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """One provider's way to write items."""

    api: str
    """Address of its STAC API."""
    describe_item: Callable[[Granule, Product], Item]
    """Write id, version, extensions and properties."""
    describe_asset: Callable[[Granule, str], Item]
    """Write the fields of one band's asset."""


_WRITERS = {
    "earth-search": _Writer(
        api="https://earth-search.aws.element84.com/v1",
        describe_item=_describe_earth_search,
        describe_asset=_describe_earth_search_asset,
    ),
    "planetary-computer": _Writer(
        api="https://planetarycomputer.microsoft.com/api/stac/v1",
        describe_item=_describe_planetary_computer,
        describe_asset=_describe_planetary_computer_asset,
    ),
    "cdse": _Writer(
        api="https://stac.dataspace.copernicus.eu/v1",
        describe_item=_describe_cdse,
        describe_asset=_describe_cdse_asset,
    ),
}
