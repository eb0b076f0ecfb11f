"""STAC search to normalised, deduplicated scenes, saved as stac-geoparquet before pixels are read.

A scene is a `pystac.Item` in the project's own terms, for every provider. It has the assets
B02..B12 and SCL, and `proj:code`. Properties under `minecube:` hold the source, the access to its
files and the acquisition. They also hold the radiometric offset still in the pixels, with the
reason for it.

Search:
    site_year.py       Searches the scenes of a site-year in several sources.
    api.py             Lists the items of a STAC API.
    item_file.py       Lists the items of a stac-geoparquet file, with an index in memory.
    parquet.py         Reads the file into a table, within limits.
    features.py        Converts rows of the table to GeoJSON.

Item to scene:
    listed_item.py     Turns a listed feature into a pystac item.
    normalisation.py   Turns an item of any provider into a scene.
    item_values.py     Reads texts and numbers of an item, known or not.
    product.py         Reads tile, baseline, orbit and projection of an item.
    assets.py          Picks the files of the bands, and checks their names.
    offset_rule.py     Decides the offset by the rule of the source.
    acquisitions.py    Finds copies of one acquisition, and keeps the best one.
    footprints.py      Parses footprints, and compares them with an area.

List of scenes:
    selection.py       Selects the scenes for a recipe.
    snapshot.py        Saves the list of a site-year, with its hash.
    snapshot_checks.py Checks that a saved list belongs to a site-year and its sources.
    changes.py         Compares a saved list with a new search.
    coverage.py        Compares the scenes with the passes expected from the orbits.

Pixels:
    looks.py           Reads a thin sample of the scenes.
    offsets.py         Checks the decided offset in the pixels.
    veils.py           Finds dates with a wrong scene classification.
"""

from minecube.grid import grid_of
from minecube.reader import stack
from minecube.scenes.acquisitions import (
    deduplicate,
    find_copies,
    identify_acquisition,
    merge_sources,
)
from minecube.scenes.changes import SceneChange, compare_lists
from minecube.scenes.normalisation import normalise
from minecube.scenes.selection import (
    list_solar_days,
    mean_cloud_cover,
    need_dates,
    select,
    select_usable,
)
from minecube.scenes.site_year import NoScenesError, SearchResult, check_years, has_images, search
from minecube.scenes.snapshot_checks import check_saved_scenes

__all__ = [
    "NoScenesError",
    "SceneChange",
    "SearchResult",
    "check_saved_scenes",
    "check_years",
    "compare_lists",
    "deduplicate",
    "find_copies",
    "grid_of",
    "has_images",
    "identify_acquisition",
    "list_solar_days",
    "mean_cloud_cover",
    "merge_sources",
    "need_dates",
    "normalise",
    "search",
    "select",
    "select_usable",
    "stack",
]
