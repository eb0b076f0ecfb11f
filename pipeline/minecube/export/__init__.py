"""Cubes and footprints as files that other tools open, each with licence and citation of all it was made from.

    images.py     Cloud Optimized GeoTIFFs, GeoParquet, GeoPackage      stac.py       collection, items, stac-geoparquet
    netcdf.py     NetCDF by the CF conventions                          zarrs.py      Zarr with multiscales, Zarr v2
    croissant.py  a description for those who learn from them           publish.py    Icechunk, a tag a release
    credits.py    whose the inputs are, on what terms                   layers.py, files.py  what they share

Each file or folder is written under a hidden name and then renamed. A full disk or a killed run leaves no partial file.
`publish` needs an extra package and is imported by its own name.
"""

from minecube.export.credits import EUROMINENET, NOT_STATED, SEVERAL, Credit, credits_of, lines
from minecube.export.croissant import write_croissant
from minecube.export.images import write_cogs, write_footprints, write_layers, write_table
from minecube.export.layers import LAYERS, SPECTRUM, Layer
from minecube.export.netcdf import write_netcdf
from minecube.export.stac import write_stac
from minecube.export.zarrs import write_zarr, write_zarr2

__all__ = [
    "EUROMINENET",
    "LAYERS",
    "NOT_STATED",
    "SEVERAL",
    "SPECTRUM",
    "Credit",
    "Layer",
    "credits_of",
    "lines",
    "write_cogs",
    "write_croissant",
    "write_footprints",
    "write_layers",
    "write_netcdf",
    "write_stac",
    "write_table",
    "write_zarr",
    "write_zarr2",
]
