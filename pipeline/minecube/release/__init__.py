"""Import, audit and re-create the published EuroMineNet archive.

    ranges.py     byte ranges of a file, local or remote
    archive.py    read a zip in place, by byte ranges
    members.py    recognise images and labels by name
    sites.py      read each site's images and labels
    importing.py  import the whole archive into a folder, or download it
    imported.py   open an import, rebuild its labels
    audit.py      check the archive and its split
    layout.py     write cubes in its layout and on its grids

An import is a folder, also usable as a catalogue (`--catalog`):

    sites.geojson     each site's area of interest, split and years; the area is the bounding box of
                      all its images
    labels.parquet    GeoParquet, EPSG:4326: site, year, mapped, geometry, source, licence, doi;
                      mine regions along pixel edges, and rows with `mapped` true: the extent of
                      the image, no mine outside the regions
    years.parquet     one row per site and year: names, grid of the image, size and values of the
                      label, problem
    changes.parquet   one row per site and pair of years: pixels compared, appeared, vanished
    import.json       the archive and its members with unexpected names; written last
"""

from minecube.release.archive import Archive
from minecube.release.imported import (
    Imported,
    check_same_archive,
    draw_label,
    map_placed_years,
    open_import,
    write_json,
)
from minecube.release.importing import download, import_release
from minecube.release.members import find_members

__all__ = [
    "Archive",
    "Imported",
    "check_same_archive",
    "download",
    "draw_label",
    "find_members",
    "import_release",
    "map_placed_years",
    "open_import",
    "write_json",
]
