"""Footprints of every type that has an area are found, and others refuse their item."""

from __future__ import annotations

import json

import pystac
import pytest
import shapely
import shapely.affinity

from known_items import LEFT, TOP, features_of, write_features
from known_scenes import grid_at, site_of
from minecube import scenes
from minecube.errors import SceneError
from minecube.scenes.footprints import lies_over


def test_the_antimeridian(archive):
    """A tile across it: found by sites on both sides, by none half a world away, and of one day."""
    grid = grid_at(624000, 7500000, 600, 600, 32660)  # around 180 degrees at 67 north
    item = archive.item("2020-07-05T23:50:00", grid, {"B04": 1, "B11": 1}, tile="60WWV")
    west, south, east, north = item.bbox
    assert (west, east) == (-180, 180) or east - west > 300  # as naive software has it
    scene = scenes.normalise(item, archive.source)
    assert scene.geometry["type"] == "MultiPolygon"
    assert shapely.geometry.shape(scene.geometry).area < 0.2
    for x, hit in ((179.98, True), (-179.98, True), (0.0, False), (100.0, False)):
        area = shapely.box(x - 0.005, (south + north) / 2, x + 0.005, (south + north) / 2 + 0.005)
        assert lies_over(scene, area) is hit, x
    assert scene.properties["minecube:solar_day"] == "2020-07-06"
    # A footprint that is cut already stays as it is.
    assert scenes.normalise(
        pystac.Item.from_dict(scene.to_dict() | {"properties": item.to_dict()["properties"]}),
        archive.source,
    )


SQUARE = shapely.box(15.0, 51.44, 15.01, 51.45)
LINE = shapely.LineString([(14, 50), (16, 52)])
AREAS = {
    "polygon": SQUARE,
    "three dimensions": shapely.force_3d(SQUARE, 7.0),
    "multipolygon": shapely.MultiPolygon([SQUARE]),
    "collection": shapely.GeometryCollection([SQUARE, LINE]),
    "collection of collections": shapely.GeometryCollection(
        [shapely.GeometryCollection([shapely.MultiPolygon([SQUARE]), LINE])]
    ),
    "drawn twice": shapely.GeometryCollection([SQUARE, SQUARE]),
    "bow tie": shapely.Polygon([(15.0, 51.44), (15.01, 51.45), (15.01, 51.44), (15.0, 51.45)]),
}


NO_AREAS = {
    "null": None,
    "empty": shapely.Polygon(),
    "empty collection": shapely.GeometryCollection(),
    "point": shapely.Point(15.0, 51.44),
    "line": LINE,
    "collection of lines": shapely.GeometryCollection([LINE]),
    "metres": shapely.box(360000, 5600000, 361000, 5601000),
    "infinity": shapely.Polygon([(15.0, 51.44), (float("inf"), 51.45), (15.01, 51.44)]),
}


@pytest.mark.parametrize("kind", AREAS)
def test_footprints_of_every_type_that_has_an_area(archive, kind):
    """From a file and from an API; the area is that of the square, or of the two halves that a bow tie leaves."""
    features = features_of(archive)
    own = shapely.geometry.shape(features[0]["geometry"])
    moved = shapely.affinity.translate(
        AREAS[kind], own.centroid.x - 15.005, own.centroid.y - 51.445
    )
    write_features(features, archive.root / "items.parquet", [moved, own, own])
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert (len(found.scenes), found.refused) == (3, {})
    in_json = pystac.Item.from_dict(
        features[0] | {"geometry": json.loads(json.dumps(shapely.geometry.mapping(moved)))}
    )
    for scene in (found.scenes[0], scenes.normalise(in_json, archive.source)):
        footprint = shapely.geometry.shape(scene.geometry)
        assert footprint.geom_type in ("Polygon", "MultiPolygon")
        assert not footprint.has_z
        assert footprint.area == pytest.approx(5e-5 if kind == "bow tie" else 1e-4)


@pytest.mark.parametrize("kind", NO_AREAS)
def test_a_footprint_without_area_refuses_its_item_by_name_and_no_other(archive, kind):
    features = features_of(archive)
    own = shapely.geometry.shape(features[0]["geometry"])
    write_features(features, archive.root / "items.parquet", [own, NO_AREAS[kind], own])
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.id for s in found.scenes] == [features[0]["id"], features[2]["id"]]
    assert list(found.refused) == [features[1]["id"]]
    assert (
        "has no geometry with an area: expected polygons in longitude and latitude"
        in found.refused[features[1]["id"]]
    )


def _deep(depth):
    """A geometry of collections in collections."""
    geometry = {"type": "GeometryCollection", "geometries": []}
    for _ in range(depth):
        geometry = {"type": "GeometryCollection", "geometries": [geometry]}
    return geometry


MALFORMED = [
    {"type": "Polygon"},
    {"type": "Blob", "coordinates": []},
    {"type": "GeometryCollection", "geometries": [None]},
    {
        "type": "Polygon",
        "coordinates": [[[15.0, 51.44], [float("nan"), 51.45], [15.01, 51.44], [15.0, 51.44]]],
    },
    {
        "type": "Polygon",
        "coordinates": [[[15.0, 51.44], [None, 51.45], [15.01, 51.44], [15.0, 51.44]]],
    },
    {"coordinates": [1]},
    {},
    _deep(3000),
]


@pytest.mark.parametrize("geometry", MALFORMED)
def test_a_malformed_geometry_is_no_geometry(archive, geometry):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    item.geometry = geometry
    with pytest.raises(SceneError, match="has no geometry with an area"):
        scenes.normalise(item, archive.source)


def test_a_footprint_that_goes_on_beyond_180_degrees(archive):
    item = archive.item("2020-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1})
    for west in (179.0, -181.0):
        item.geometry = shapely.geometry.mapping(shapely.box(west, 60, west + 2, 61))
        scene = scenes.normalise(item, archive.source)
        assert shapely.geometry.shape(scene.geometry).area == pytest.approx(2)
        for x, hit in ((179.5, True), (-179.5, True), (178.5, False), (-178.5, False)):
            assert lies_over(scene, shapely.box(x - 0.1, 60.4, x + 0.1, 60.6)) is hit, (west, x)
