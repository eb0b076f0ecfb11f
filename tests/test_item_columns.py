"""Files of items may have the columns of other tools, and bad columns are refused."""

from __future__ import annotations

import dataclasses
import decimal
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from known_items import LEFT, PLAIN, TOP, features_of, write_features
from known_scenes import grid_at, site_of
from minecube import scenes
from minecube.errors import SceneError
from minecube.scenes import parquet


def rewritten(archive, change, n=3):
    """A file of n items whose table was changed; what a search finds in it."""
    path = archive.root / "items.parquet"
    write_features(features_of(archive, n), path)
    table = pq.read_table(path)
    pq.write_table(change(table), path)
    return scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)


def column(name, values):
    """A change of a table: this column from its values, or from an array."""

    def change(table):
        found = values(table.column(name)) if callable(values) else values
        if name not in table.column_names:
            return table.append_column(name, found)
        return table.set_column(table.column_names.index(name), name, found)

    return change


def _as_map(assets):
    return pa.array(
        [list(row.items()) for row in assets.to_pylist()],
        pa.map_(pa.string(), assets.type.field(0).type),
    )


def _with_view(assets):
    fields = [
        field.with_type(pa.string_view()) if field.name == "href" else field
        for field in assets.type.field(0).type
    ]
    return pa.array(
        assets.to_pylist(),
        pa.struct([pa.field(asset.name, pa.struct(fields)) for asset in assets.type]),
    )


READ = {
    "string_view": ("id", lambda ids: ids.cast(pa.string_view())),
    "binary_view": (
        "geometry",
        lambda shapes: parquet.strip_extension(shapes).cast(pa.binary_view()),
    ),
    "string_view in assets": ("assets", _with_view),
    "assets as map": ("assets", _as_map),
    "assets as map of maps": (
        "assets",
        lambda assets: pa.array(
            [
                [(band, [("href", asset["href"])]) for band, asset in row.items()]
                for row in assets.to_pylist()
            ],
            pa.map_(pa.string(), pa.map_(pa.string(), pa.string())),
        ),
    ),
    "assets as JSON": (
        "assets",
        lambda assets: pa.array([json.dumps(row) for row in assets.to_pylist()]),
    ),
    "unknown zone": ("datetime", lambda times: times.cast(pa.timestamp("us", "Mars/Olympus"))),
    "unknown zone of another column": (
        "s2:seen",
        pa.array([0, 1, 2], pa.timestamp("ms", "Mars/Olympus")),
    ),
    "null types": ("type", pa.array(["Feature", None, None])),
    "null versions": ("stac_version", pa.array(["1.1.0", None, "1.0.0"])),
    "seven decimals": ("created", pa.array(["2020-07-06T00:00:00.1234567Z", None, "2020-07-06"])),
    "nine decimals": (
        "datetime",
        pa.array([f"2020-07-0{day}T10:00:00.000000789Z" for day in (5, 6, 7)]),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_files_of_items_as_other_tools_write_them(archive, case):
    """The days and bands of three items, by hand."""
    found = rewritten(archive, column(*READ[case]))
    assert found.refused == {}
    assert [str(s.datetime) for s in found.scenes] == [
        f"2020-07-0{day} 10:00:00+00:00" for day in (5, 6, 7)
    ]
    assert [sorted(s.assets) for s in found.scenes] == [["B04", "B11", "SCL"]] * 3
    assert all(Path(asset.href).is_file() for s in found.scenes for asset in s.assets.values())


UNREAD = {
    "geometry as list": (
        "geometry",
        pa.array([[[0.0, 1.0]]] * 3),
        r"expected WKB in column 'geometry', found list<",
    ),
    "geometry as struct": (
        "geometry",
        pa.array([{"type": "Point"}] * 3),
        r"expected WKB in column 'geometry', found struct<",
    ),
    "assets as list": (
        "assets",
        pa.array([["B04"]] * 3),
        r"expected structs with an href in column 'assets', found list<",
    ),
    "hrefs": (
        "assets",
        pa.array([{"B04": "a.tif"}] * 3),
        r"expected structs with an href in column 'assets', found struct<B04",
    ),
    "seconds": (
        "datetime",
        pa.array([1593943200] * 3),
        r"expected timestamps or ISO 8601 texts in column 'datetime', found int64",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_file_of_other_columns_is_refused_in_one_sentence(archive, case):
    name, values, reason = UNREAD[case]
    message = rf"items\.parquet: cannot be read as stac-geoparquet \({reason}.*\); write it again with stac-geoparquet$"
    with pytest.raises(SceneError, match=message):
        rewritten(archive, column(name, values))


def test_a_row_of_broken_json_is_refused_and_no_other(archive):
    def broken(assets):
        first, *others = [json.dumps(row) for row in assets.to_pylist()]
        return pa.array([first[:40], *others])

    found = rewritten(archive, column("assets", broken))
    assert len(found.scenes) == 2
    (reason,) = found.refused.values()
    assert """: expected an object of assets, found '{"B""" in reason
    assert reason.endswith("; it is refused")


def test_times_that_are_not_iso_are_refused_with_what_was_found(archive, caplog):
    """One line for all of them."""
    times = pa.array(["05.07.2020 10:00", "2020-07-06T10:00:00Z", "07.07.2020 10:00"])
    found = rewritten(archive, column("datetime", times))
    assert [str(s.datetime) for s in found.scenes] == ["2020-07-06 10:00:00+00:00"]
    expected = "expected a datetime in ISO 8601 such as 2022-04-10T10:20:00Z, found"
    assert [reason.partition(": ")[2] for reason in found.refused.values()] == [
        f"{expected} '05.07.2020 10:00'; it is refused",
        f"{expected} '07.07.2020 10:00'; it is refused",
    ]
    assert len([line for line in caplog.messages if expected in line]) == 1


def test_decimals_are_numbers(archive):
    """A column of DECIMAL, as databases write it: 95 % is no unknown cover, and 33.00 is zone 33."""
    percent = pa.array(
        [decimal.Decimal("95.0"), decimal.Decimal("12.5"), None], pa.decimal128(10, 1)
    )
    found = rewritten(archive, column("eo:cloud_cover", percent))
    assert [s.properties["eo:cloud_cover"] for s in found.scenes] == [95.0, 12.5, None]
    assert (
        len(scenes.select_usable(found.scenes, dataclasses.replace(PLAIN, max_cloud_cover=60))) == 2
    )
    item = archive.item(
        "2022-07-05T10:00:00", grid_at(LEFT, TOP, 60, 60), {"B04": 1, "B11": 1}, baseline="05.00"
    )
    del item.properties["s2:mgrs_tile"]
    item.properties |= {
        "mgrs:utm_zone": decimal.Decimal("33.00"),
        "mgrs:latitude_band": "U",
        "mgrs:grid_square": "UR",
        "earthsearch:boa_offset_applied": decimal.Decimal("1.00"),
        "proj:epsg": decimal.Decimal("32633.00"),
        "sat:relative_orbit": np.float16(22),
    }
    scene = scenes.normalise(item, archive.source).properties
    assert (scene["s2:mgrs_tile"], scene["minecube:offset"], scene["sat:relative_orbit"]) == (
        "33UUR",
        0,
        22,
    )
    item.properties["proj:epsg"] = decimal.Decimal("32632.00")
    with pytest.raises(
        SceneError, match="expected one projection, EPSG:32633 of its tile 33UUR, found EPSG:32632"
    ):
        scenes.normalise(item, archive.source)
