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

from minecube.cube.markers import (
    completeness_of,
    find_build,
    is_committed,
    read_counts,
    read_markers,
)
from minecube.cube.provenance import (
    VALUE_FAULTS,
    describe_build,
    hash_build,
    hash_inputs,
    leave_out,
    list_used_scenes,
    note_copies,
)
from minecube.cube.read.names import choose_name, find_prediction
from minecube.cube.read.opening import as_float, open_committed, open_cube, read_grid_and_years
from minecube.cube.read.predictions import open_change, open_probability, read_variable
from minecube.cube.read.windows import VIEWS, CubeDataset, WindowPlace, open_reflectance
from minecube.cube.store import Store, list_sites
from minecube.cube.verify import UNFINISHED, Finding, Report, named_sites, verify
from minecube.cube.write.labels import write_footprint
from minecube.cube.write.options import BuildOptions
from minecube.cube.write.pack import pack
from minecube.cube.write.predictions import Prediction, write_prediction, write_probability
from minecube.cube.write.sites import check_site, create_site, read_fitting_years, read_margin
from minecube.cube.write.staging import has_unfinished_build, read_initial_counts
from minecube.cube.write.years import finish_commit, withdraw_years, write_year

__all__ = [
    "UNFINISHED",
    "VALUE_FAULTS",
    "VIEWS",
    "BuildOptions",
    "CubeDataset",
    "Finding",
    "Prediction",
    "Report",
    "Store",
    "WindowPlace",
    "as_float",
    "check_site",
    "choose_name",
    "completeness_of",
    "create_site",
    "describe_build",
    "find_build",
    "find_prediction",
    "finish_commit",
    "has_unfinished_build",
    "hash_build",
    "hash_inputs",
    "is_committed",
    "leave_out",
    "list_sites",
    "list_used_scenes",
    "named_sites",
    "note_copies",
    "open_change",
    "open_committed",
    "open_cube",
    "open_probability",
    "open_reflectance",
    "pack",
    "read_counts",
    "read_fitting_years",
    "read_grid_and_years",
    "read_initial_counts",
    "read_margin",
    "read_markers",
    "read_variable",
    "verify",
    "withdraw_years",
    "write_footprint",
    "write_prediction",
    "write_probability",
    "write_year",
]
