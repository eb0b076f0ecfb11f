"""A search of a stac-geoparquet file lists its items, local or remote, within limits of size."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pytest
import shapely
import stac_geoparquet.arrow

from known_items import LEFT, TOP, features_of, write_features
from known_scenes import grid_at, serve, site_of, unique_pixels
from minecube import scenes
from minecube.errors import SceneError
from minecube.scenes import item_file, parquet


@pytest.fixture
def served(tmp_path):
    """URL under which `tmp_path` is served with byte ranges."""
    with serve(tmp_path) as url:
        yield url


def test_a_remote_file_of_items_and_its_images(archive, tmp_path, served):
    """The index over HTTP, hrefs relative to it, pixels by range requests."""
    grid = grid_at(LEFT, TOP, 60, 60)
    item = archive.item("2020-07-05T10:00:00", grid, {"B04": unique_pixels(60, 60), "B11": 7})
    for asset in item.assets.values():
        asset.href = str(Path(asset.href).relative_to(tmp_path))
    table = stac_geoparquet.arrow.parse_stac_items_to_arrow([item.to_dict(transform_hrefs=False)])
    stac_geoparquet.arrow.to_parquet(table, tmp_path / "items.parquet")
    source = dataclasses.replace(archive.source, href=f"{served}/items.parquet")
    (scene,) = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, source).scenes
    assert scene.assets["B04"].href.startswith(served)
    np.testing.assert_array_equal(
        scenes.stack([scene], grid, ["B04"]).values[0, 0], unique_pixels(60, 60)
    )
    with pytest.raises(SceneError, match="cannot be read as stac-geoparquet"):
        scenes.search(
            site_of("s", LEFT, TOP, 60, 60),
            2020,
            dataclasses.replace(source, href=f"{served}/none.parquet"),
        )


def test_a_file_of_too_many_items_is_not_read(archive):
    """Its footer says enough: these files have nothing else."""
    folder, site = archive.root, site_of("s", LEFT, TOP, 60, 60)
    folder.mkdir()
    one = pa.table({"id": ["x" * 1_060_000]})
    many = pa.table({"id": pa.nulls(1_000_001, pa.string())})
    limits = "expected at most 1,000,000 items and 1,073,741,824 bytes"
    for table, groups, said in (
        (one, 1, r"\((?!expected at most)"),
        (many, 1, rf"\({limits}, found 1,000,001 and [\d,]+\)"),
        (one, 1024, rf"\({limits}, found 1,024 and 1,08\d,\d\d\d,\d\d\d\)"),
    ):
        path = folder / f"{table.num_rows}_{groups}.parquet"
        _write_footer(table, groups, path)
        source = dataclasses.replace(archive.source, href=str(path))
        with pytest.raises(SceneError, match=f"cannot be read as stac-geoparquet {said}"):
            scenes.search(site, 2020, source)


def _write_footer(table, groups, path):
    """The footer of a Parquet file that has the table so many times."""
    pq.write_table(table, path, use_dictionary=False, compression="zstd")
    footer, more = pq.read_metadata(path), pq.read_metadata(path)
    for _ in range(groups - 1):
        footer.append_row_groups(more)
    footer.write_metadata_file(path)


def test_a_file_is_measured_as_it_is_unpacked(tmp_path, monkeypatch):
    """A text of 10,000 letters in 5,000 rows: 50 MB unpacked, of which the file stores one copy."""
    monkeypatch.setattr(parquet, "MOST_BYTES", 5_000_000)
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"id": ["x" * 10_000] * 5000}), path)
    about = pq.read_metadata(path)
    assert sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups)) < 100_000
    usual = pa.default_memory_pool()
    measured = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(measured)
    try:
        with pytest.raises(
            SceneError,
            match=r"expected at most 1,000,000 items and 5,000,000 bytes, found 5,000 and \d",
        ):
            item_file.read_items(path)
    finally:
        pa.set_memory_pool(usual)
    assert 5_000_000 < measured.max_memory() < 15_000_000


def test_rows_of_a_file_are_the_items_that_its_library_reads(tmp_path, archive):
    """Nulls and nested lists included; times of another zone, which the library labels as UTC, are told in UTC."""
    features = features_of(archive)
    features[0]["properties"] |= {
        "created": "2020-07-06T01:02:03.456789Z",
        "eo:cloud_cover": None,
        "s2:lists": [[1, 2], []],
    }
    features[1]["assets"].pop("B11")
    features[1]["properties"]["none"] = None
    write_features(features, tmp_path / "items.parquet")
    library = list(
        stac_geoparquet.arrow.stac_table_to_items(pq.read_table(tmp_path / "items.parquet"))
    )
    read = item_file.read_items(tmp_path / "items.parquet")
    for item, expected in zip(read, library, strict=True):
        found = item.to_dict(include_self_link=False, transform_hrefs=False)
        for name in ("id", "geometry", "assets"):
            assert found[name] == expected[name]
        times = {"datetime", "created"}
        assert {k: v for k, v in found["properties"].items() if k not in times} == {
            k: v for k, v in expected["properties"].items() if k not in times
        }
        assert item.datetime == pystac.utils.str_to_datetime(expected["properties"]["datetime"])
        assert found["properties"]["created"] == expected["properties"]["created"]
    assert read[0].properties["created"] == "2020-07-06T01:02:03.456789Z"
    assert sorted(read[1].assets) == ["B04", "SCL"]

    table = pq.read_table(tmp_path / "items.parquet")
    there = table.column("datetime").cast(pa.timestamp("us", tz="Europe/Berlin"))
    table = table.set_column(table.column_names.index("datetime"), "datetime", there)
    pq.write_table(table, tmp_path / "berlin.parquet")
    assert [i.datetime for i in item_file.read_items(tmp_path / "berlin.parquet")] == [
        i.datetime for i in read
    ]

    # One nanosecond more, as pandas writes times: microseconds are kept.
    finer = (np.asarray(there.to_numpy(), "datetime64[ns]") + np.timedelta64(1, "ns")).tolist()
    column = pa.array(finer, type=pa.timestamp("ns", tz="UTC"))
    table = table.set_column(table.column_names.index("datetime"), "datetime", column)
    pq.write_table(table, tmp_path / "ns.parquet")
    assert [i.datetime for i in item_file.read_items(tmp_path / "ns.parquet")] == [
        i.datetime for i in read
    ]


def test_a_search_lists_what_a_loop_over_all_rows_lists(archive, tmp_path):
    """Places and years at random, more rows than a batch has, one of unknown time; in the order of the file."""
    feature, *_ = features_of(archive, 1)
    rng, n = np.random.default_rng(0), 2 * parquet._BATCH + 7
    west, south = rng.uniform(14, 16, n), rng.uniform(50, 52, n)
    footprints = shapely.box(west, south, west + 0.3, south + 0.2)
    days = [f"{year}-07-05T10:00:00Z" for year in rng.integers(2019, 2023, n)]
    features = []
    for number, day in enumerate(days):
        listed = copy.deepcopy(feature) | {"id": f"{number}"}
        listed["properties"] |= {"datetime": day, "start_datetime": day, "end_datetime": day}
        features.append(listed)
    features[5]["properties"]["datetime"] = None
    write_features(features, archive.root / "items.parquet", footprints)
    for west, south in ((14.2, 50.3), (15.1, 51.2), (13.0, 50.0)):
        area = shapely.box(west, south, west + 0.05, south + 0.05)
        for year in (2019, 2021, 2024):
            expected = [
                str(k)
                for k in range(n)
                if days[k][:4] == str(year) and footprints[k].intersects(area)
            ]
            assert [f["id"] for f in item_file.search_file(archive.source, area, year)] == expected


def _overwrite_rows(path):
    """Leave only the footer of a Parquet file, and its time of change."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        footer = int.from_bytes(file.read(4), "little")
        file.seek(4)
        file.write(bytes(status.st_size - 12 - footer))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_of_items_is_read_once_and_again_when_it_changes(archive):
    """Rows that are overwritten without a new time of change are not noticed."""
    features, site = features_of(archive), site_of("s", LEFT, TOP, 60, 60)
    path = archive.root / "items.parquet"
    write_features(features, path)
    for _ in range(2):
        assert len(scenes.search(site, 2020, archive.source).scenes) == 3
        _overwrite_rows(path)
    write_features(features[:2], path)
    assert len(scenes.search(site, 2020, archive.source).scenes) == 2


def test_a_remote_file_of_items_is_asked_for_changes_once_a_minute(archive, tmp_path, clock):
    """By size and ETag, which the test's server makes of time and size."""
    features = _beside_their_images(features_of(archive))
    path, site = tmp_path / "remote" / "items.parquet", site_of("s", LEFT, TOP, 60, 60)
    write_features(features, path)
    with serve(path.parent) as url:
        source = dataclasses.replace(archive.source, href=f"{url}/items.parquet")

        def found(_=None):
            return len(scenes.search(site, 2020, source).scenes)

        def requests():
            with urllib.request.urlopen(f"{url}/counts", timeout=20) as answer:
                return json.load(answer)["requests"]

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(found, range(8))) == [3] * 8
        assert requests() == 2  # for the version, and for the file
        clock.now += 61
        assert (found(), found(), requests()) == (3, 3, 3)
        write_features(features[:2], path)
        assert (found(), requests()) == (3, 3)
        clock.now += 61
        assert (found(), found(), requests()) == (2, 2, 5)


def test_a_remote_file_of_items_without_etag_is_read_again_once_a_minute(archive, tmp_path, clock):
    features = _beside_their_images(features_of(archive))
    path, site = tmp_path / "remote" / "items.parquet", site_of("s", LEFT, TOP, 60, 60)
    write_features(features, path)
    with serve_without_etag(path.parent) as (url, requests):
        source = dataclasses.replace(archive.source, href=f"{url}/items.parquet")
        for expected in (2, 4, 6):
            for _ in range(2):
                assert len(scenes.search(site, 2020, source).scenes) == 3
                assert len(requests) == expected  # for the version, and for the file
            clock.now += 61


def _beside_their_images(features):
    """The items with hrefs relative to their file."""
    for feature in features:
        for band, asset in feature["assets"].items():
            asset["href"] = f"{band}.tif"
    return features


@contextmanager
def serve_without_etag(folder):
    """URL of the folder with byte ranges, and the requests so far."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(args)

        def do_GET(self):
            content = (folder / self.path.lstrip("/")).read_bytes()
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part = content[first : last + 1]
            self.send_response(206)
            last = first + len(part) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def test_a_row_without_a_time_is_refused_by_name(archive):
    """Its year is unknown, so every search lists it: it is not lost."""
    features = features_of(archive)
    path = archive.root / "items.parquet"
    write_features(features, path)
    table = pq.read_table(path)
    times = table["datetime"].to_pylist()
    column = pa.array([None, *times[1:]], table.schema.field("datetime").type)
    pq.write_table(table.set_column(table.column_names.index("datetime"), "datetime", column), path)
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert len(found.scenes) == 2
    assert list(found.refused) == [features[0]["id"]]


def test_times_as_text_and_files_without_boxes_or_links(archive, tmp_path):
    """As tools other than stac-geoparquet write them."""
    features = features_of(archive)
    path = archive.root / "items.parquet"
    write_features(features, path)
    expected = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    table = pq.read_table(path).drop_columns(["bbox", "links", "type", "stac_version"])
    text = pa.array([f["properties"]["datetime"] for f in features])
    table = table.set_column(table.column_names.index("datetime"), "datetime", text)
    pq.write_table(table.append_column("created", pa.nulls(3, pa.string())), path)
    found = scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    assert [s.to_dict() for s in found.scenes] == [s.to_dict() for s in expected.scenes]
    assert len(found.scenes) == 3
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(scenes.NoScenesError, match="0 listed"):
        scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
    pq.write_table(table.drop_columns("geometry"), path)
    with pytest.raises(
        SceneError,
        match=r"items\.parquet: cannot be read as stac-geoparquet \(expected a column 'geometry'",
    ):
        scenes.search(site_of("s", LEFT, TOP, 60, 60), 2020, archive.source)
