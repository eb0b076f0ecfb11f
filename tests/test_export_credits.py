"""Licence and citation of labels, by the origin that footprints state."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from minecube.catalog import BANDS
from minecube.export import (
    list_credits,
)

GRID = GeoBox((40, 60), Affine(10, 0, 399960, 0, -10, 5700000), "EPSG:32633")


def small_cube():
    rng = np.random.default_rng(0)
    reflectance = rng.integers(0, 65535, (2, len(BANDS), *GRID.shape), dtype=np.uint16)
    footprint = rng.choice(np.array([0, 1, 255], np.uint8), (2, *GRID.shape))
    variables = {
        "reflectance": (("year", "band", "y", "x"), reflectance),
        "footprint": (("year", "y", "x"), footprint),
    }
    return xr.Dataset(variables, {"year": [2020, 2021], "band": list(BANDS), **xr_coords(GRID)})


@pytest.mark.parametrize(
    ("origin", "name", "licence", "dois"),
    [
        (
            "EuroMineNet (CC BY 4.0)",
            "EuroMineNet",
            "CC-BY-4.0",
            ("10.14278/rodare.4656", "10.48550/arXiv.2510.14661"),
        ),
        (
            "maus (CC BY-SA 4.0) doi:10.1594/PANGAEA.942325",
            "maus",
            "CC-BY-SA-4.0",
            ("10.1594/PANGAEA.942325",),
        ),
        ("pits.gpkg", "pits.gpkg", "not stated", ()),
        ("pits.gpkg doi:10.5281/zenodo.1.", "pits.gpkg", "not stated", ("10.5281/zenodo.1",)),
        ("osm (ODbL-1.0)", "osm", "ODbL-1.0", ()),
        (
            "maus, tang (CC BY 4.0; CC BY-SA 4.0)",
            "maus, tang",
            "CC BY 4.0; CC BY-SA 4.0",
            (),
        ),  # neither is the licence of both
        ("mine (CC0)", "mine", "CC0-1.0", ()),
        ("half (open", "half (open", "not stated", ()),
        ("Maus et al. (2022) (CC BY-SA 4.0)", "Maus et al. (2022)", "CC-BY-SA-4.0", ()),
        ("Tang & Werner (2023) (not stated)", "Tang & Werner (2023)", "not stated", ()),
        (
            "eurominenet_corrected_by_us.gpkg (not stated)",
            "eurominenet_corrected_by_us.gpkg",
            "not stated",
            (),
        ),
        ("", "mine polygons of unstated origin", "not stated", ()),
    ],
)
def test_an_origin_says_name_licence_and_dois(origin, name, licence, dois):
    cube = small_cube()[["footprint"]]
    cube.footprint.attrs["origin"] = origin
    (credit,) = list_credits(cube)
    assert (credit.name, credit.licence, credit.dois) == (name, licence, dois)


def test_each_source_of_labels_is_credited():
    cube = small_cube()[["footprint"]]
    sources = (
        "EuroMineNet (CC-BY-4.0) doi:10.14278/rodare.4656",
        "OpenStreetMap (ODbL-1.0)",
        "osm.gpkg (not stated)",
    )
    cube.footprint.attrs["origin"] = " | ".join(sources)
    found = [(c.name, c.licence) for c in list_credits(cube)]
    assert found == [
        ("EuroMineNet", "CC-BY-4.0"),
        ("OpenStreetMap", "ODbL-1.0"),
        ("osm.gpkg", "not stated"),
    ]


def test_footprints_nobody_mapped_need_no_credit():
    cube = small_cube()
    cube.footprint[:] = 255
    assert [c.kind for c in list_credits(cube)] == ["imagery"]
