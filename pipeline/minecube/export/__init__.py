"""Export cubes and footprints to common formats, with licence and citation of every input.

    images.py      Cloud Optimized GeoTIFFs, GeoParquet, GeoPackage
    stac.py        collection, items, stac-geoparquet
    netcdf.py      NetCDF following the CF conventions
    zarrs.py       Zarr with multiscales, Zarr v2
    croissant.py   data set description for machine learning
    publish.py     Icechunk, one tag per release
    year_order.py  ascending years of a release
    credits.py     sources and licences of the inputs
    layers.py      titles, nodata, scale and CF attributes of the variables
    stac_fields.py fields of STAC extensions
    files.py       drafts, checksums and hrefs

Each file or folder is written under a hidden name and then renamed. A full disk or a killed run
leaves no partial file. Module `publish` needs an extra package and is imported by its own name.
"""

from minecube.export.credits import (
    EUROMINENET,
    NOT_STATED,
    ORIGIN_SEPARATOR,
    Credit,
    format_credits,
    list_credits,
)
from minecube.export.croissant import write_croissant
from minecube.export.images import write_cogs, write_footprints, write_layers, write_table
from minecube.export.netcdf import write_netcdf
from minecube.export.stac import STAC_VERSION, Item, write_items, write_stac
from minecube.export.stac_fields import make_asset
from minecube.export.zarrs import write_zarr, write_zarr2

__all__ = [
    "EUROMINENET",
    "NOT_STATED",
    "ORIGIN_SEPARATOR",
    "STAC_VERSION",
    "Credit",
    "Item",
    "format_credits",
    "list_credits",
    "make_asset",
    "write_cogs",
    "write_croissant",
    "write_footprints",
    "write_items",
    "write_layers",
    "write_netcdf",
    "write_stac",
    "write_table",
    "write_zarr",
    "write_zarr2",
]
