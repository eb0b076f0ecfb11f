"""Read sites, sources, recipes, models, presets and clusters from data files into frozen values.

Unknown keys are errors.

The shipped catalogue is `catalog/` of the checkout, or `_catalog` inside the wheel. Users extend it
by a folder with any of `sites.geojson`, `sources.yaml`, `recipes.yaml`, `models.yaml`,
`presets.yaml`, `clusters.yaml`. `catalog/README.md` describes every field.

    site.py          One mine.
    scene_source.py  A STAC API or a file of items.
    recipe.py        How a year is composited.
    model.py         A network, before and after training.
    training.py      How a network is trained.
    releases.py      A published dataset.
    cluster.py       Where a dataset runs.
    dataset.py       A whole dataset to run.
    years.py         Reads years from text.
    mission.py       Bands of Sentinel-2.
    fields.py        Checks of fields, and names of sites.
    loaders.py       Loads the YAML files.
    site_table.py    Loads a file of polygons as sites.
    conversion.py    Converts plain values to these types and back.
"""

from minecube.catalog.cluster import Cluster
from minecube.catalog.conversion import as_dict, rebuild_model_card, rebuild_recipe
from minecube.catalog.dataset import Dataset, load_dataset
from minecube.catalog.fields import make_id, match_ids
from minecube.catalog.loaders import (
    describe_yaml_error,
    load_clusters,
    load_models,
    load_presets,
    load_recipes,
    load_releases,
    load_sources,
    pick,
)
from minecube.catalog.mission import BANDS, FIRST_YEAR, NATIVE_M, SCL
from minecube.catalog.model import ModelCard, Weights
from minecube.catalog.recipe import (
    FALLBACKS,
    QUALITY,
    REDUCERS,
    BestPixel,
    BrightOverride,
    HazeTest,
    MaskRule,
    Recipe,
    Registration,
)
from minecube.catalog.releases import Release
from minecube.catalog.scene_source import ASSET_KEYS, Access, Offset, Source
from minecube.catalog.site import LARGEST_MARGIN_M, MARGIN_M, Site
from minecube.catalog.site_table import load_sites
from minecube.catalog.training import TrainingSettings
from minecube.catalog.years import format_years, parse_years

__all__ = [
    "ASSET_KEYS",
    "BANDS",
    "FALLBACKS",
    "FIRST_YEAR",
    "LARGEST_MARGIN_M",
    "MARGIN_M",
    "NATIVE_M",
    "QUALITY",
    "REDUCERS",
    "SCL",
    "Access",
    "BestPixel",
    "BrightOverride",
    "Cluster",
    "Dataset",
    "HazeTest",
    "MaskRule",
    "ModelCard",
    "Offset",
    "Recipe",
    "Registration",
    "Release",
    "Site",
    "Source",
    "TrainingSettings",
    "Weights",
    "as_dict",
    "describe_yaml_error",
    "format_years",
    "load_clusters",
    "load_dataset",
    "load_models",
    "load_presets",
    "load_recipes",
    "load_releases",
    "load_sites",
    "load_sources",
    "make_id",
    "match_ids",
    "parse_years",
    "pick",
    "rebuild_model_card",
    "rebuild_recipe",
]
