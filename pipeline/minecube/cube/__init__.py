"""The Zarr store: one group per site. A site-year is built apart; its commit puts it in place.

    cubes.zarr/
      Germany_1/                   one xarray dataset: reflectance, the recipe's layers, footprint,
                                   footprint fraction
        builds/2020/               marker of a committed site-year, its provenance as attributes
          scenes                   its scene list, the bytes of a stac-geoparquet file
          reads                    outcome of every read, the bytes of a Parquet file
        builds/2020.RUN.new/       a site-year under construction (write/staging.py)
        predictions/unet-small-1a2b3c4d/   one xarray dataset per model: probability, or change
      .locks/                      locks of running writers (locks.py)

A site-year without a marker is not committed and has no pixels. A marker lists the size and SHA-256
of every object of its site-year, computed while writing. Labels and predictions keep theirs in
their own attributes. The site's group keeps a hash of its metadata. `verify` checks the store
against them.

    store = cube.Store("cubes.zarr")
    cube.open_committed(store, "Germany_1")

    store.py       a store, its objects and groups     write/sites.py        creates a site's group
    packed.py      reads a packed store                write/years.py        commits a site-year
    checksums.py   checksums while writing             write/options.py      options of a build
    locks.py       keeps two runs apart                write/blocks.py       computes blocks
    template.py    a site's group without pixels       write/staging.py      a year apart
    provenance.py  origin and name of a build          write/labels.py       writes footprints
    markers.py     markers of committed years          write/predictions.py  writes maps of models
    views.py       attributes of predictions           write/pack.py         packs into one zip
    listing.py     lists objects without Zarr          read/opening.py       opens cubes
    verify/        checks a store                      read/windows.py       windows for training
                                                       read/pixels.py        reads parts of arrays
                                                       read/shards.py        shards mapped to memory
                                                       read/commits.py       writes during a read
                                                       read/predictions.py   opens maps of models
                                                       read/names.py         finds a map by its name
"""

from __future__ import annotations

from minecube.cube.markers import builds, completeness_of, is_committed, reads
from minecube.cube.provenance import (
    build_id,
    leave_out,
    note_copies,
    provenance_of,
    used_scenes,
)
from minecube.cube.read.names import choose_name, find_prediction
from minecube.cube.read.opening import as_float, grid_and_years, open_committed, open_cube
from minecube.cube.read.predictions import mapped_by, open_change, open_probability
from minecube.cube.read.windows import VIEWS, CubeDataset, Window, open_reflectance
from minecube.cube.store import Store, sites
from minecube.cube.verify import UNFINISHED, Finding, Report, named_sites, verify
from minecube.cube.write.labels import write_footprint
from minecube.cube.write.options import BuildOptions
from minecube.cube.write.pack import Packing, pack
from minecube.cube.write.predictions import Prediction, write_prediction, write_probability
from minecube.cube.write.sites import check, create, margin_of
from minecube.cube.write.staging import is_begun, reads_so_far
from minecube.cube.write.years import settle, uncommit, write_year

__all__ = [
    "UNFINISHED",
    "VIEWS",
    "BuildOptions",
    "CubeDataset",
    "Finding",
    "Packing",
    "Prediction",
    "Report",
    "Store",
    "Window",
    "as_float",
    "build_id",
    "builds",
    "check",
    "choose_name",
    "completeness_of",
    "create",
    "find_prediction",
    "grid_and_years",
    "is_begun",
    "is_committed",
    "leave_out",
    "mapped_by",
    "margin_of",
    "named_sites",
    "note_copies",
    "open_change",
    "open_committed",
    "open_cube",
    "open_probability",
    "open_reflectance",
    "pack",
    "provenance_of",
    "reads",
    "reads_so_far",
    "settle",
    "sites",
    "uncommit",
    "used_scenes",
    "verify",
    "write_footprint",
    "write_prediction",
    "write_probability",
    "write_year",
]
