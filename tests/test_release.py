"""The published archive, read in place: what comes of it is what went in, few bytes are asked for, what is wrong is named."""

from __future__ import annotations

import json
import tracemalloc
import urllib.request
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from affine import Affine
from click.testing import CliRunner
from rasterio import features
from rasterio.errors import NotGeoreferencedWarning

from known_scenes import serve
from minecube import release
from minecube.catalog import BANDS, Release, Site, load_releases, load_sites
from minecube.cli import cli
from minecube.errors import ReleaseError
from minecube.grid import PIXEL_DEG
from minecube.network import RequestError
from minecube.release import archive as archive_module
from minecube.release import audit as auditing
from minecube.release import importing, sites
from minecube.release.ranges import LocalBytes
from minecube.simulate.release import encode_tiff, write_release

YEARS = (2015, 2016, 2017)
SITES = {"Germany_1": (12.0, 51.0), "Germany_10": (12.3, 51.2), "Portuga_2": (-8.0, 38.0)}
SHAPE = (90, 70)
KNOWN = Release(
    id="small",
    name="Small",
    title="small",
    citation="none",
    licence="CC-BY-4.0",
    doi="10.1/x",
    sites=3,
    years=YEARS,
)
SPLIT = [Site(id=name, country="Somewhere", split="train", labels="Small (free)") for name in SITES]
NAMES = {"train": list(SITES)}


@pytest.fixture(autouse=True)
def _labels_have_no_place():
    warnings.simplefilter("ignore", NotGeoreferencedWarning)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An archive without fault, and its masks."""
    path = tmp_path_factory.mktemp("release") / "EuroMineNet.zip"
    return path, write_release(path, SITES, YEARS, shape=SHAPE)


def changed(whole, path, change):
    """The archive with its members changed: a function of name -> content."""
    with zipfile.ZipFile(whole) as old:
        members = {name: old.read(name) for name in old.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name, content in members.items():
            new.writestr(name, content)
    return path


def imported(path, out, known=KNOWN, split=SPLIT):
    return release.import_release(release.Archive(str(path)), out, known, split)


def label(site, year):
    return f"EuroMineNet/{site}/label/Year{year}.tif"


def image(site, year):
    return f"EuroMineNet/{site}/image/Year{year}.tif"


def drawn(made, site, year):
    """The polygons of a site-year as pixels on its image's grid, by GDAL."""
    row = made.years.set_index(["site", "year"]).loc[(site, year)]
    own = made.labels[
        (made.labels["site"] == site) & (made.labels["year"] == year) & ~made.labels["mapped"]
    ]
    shape, place = (int(row["height"]), int(row["width"])), Affine(*row["transform"])
    return (
        features.rasterize(own.geometry, out_shape=shape, transform=place, default_value=255)
        if len(own)
        else np.zeros(shape)
    )


def test_labels_come_out_bit_identical(whole, tmp_path):
    path, masks = whole
    made = imported(path, tmp_path / "made")
    assert set(zip(made.years["site"], made.years["year"], strict=True)) == set(masks)
    for (site, year), mask in masks.items():
        np.testing.assert_array_equal(drawn(made, site, year), mask)
    assert made.years["mine_px"].tolist() == [
        int((masks[s, y] == 255).sum()) for s in SITES for y in YEARS
    ]
    assert made.years["problem"].isna().all()
    assert made.labels[["source", "licence", "doi"]].drop_duplicates().to_numpy().tolist() == [
        ["Small", "CC-BY-4.0", "10.1/x"]
    ]


def test_regions_that_meet_at_a_corner_are_valid_polygons(whole, tmp_path):
    board = np.kron(np.indices((9, 7)).sum(axis=0) % 2, np.ones((10, 10), int)).astype(
        np.uint8
    ) * np.uint8(255)

    def checked(members):
        members[label("Germany_1", 2015)] = encode_tiff(board[None])

    made = imported(changed(whole[0], tmp_path / "a.zip", checked), tmp_path / "made")
    assert made.labels.is_valid.all()
    np.testing.assert_array_equal(drawn(made, "Germany_1", 2015), board)


def test_sites_are_where_their_images_are(whole, tmp_path):
    imported(whole[0], tmp_path / "made")
    for site in load_sites(tmp_path / "made" / "sites.geojson", catalogue=True):
        west, north = SITES[site.id]
        height, width = (n * PIXEL_DEG for n in SHAPE)
        assert site.geometry.bounds == pytest.approx(
            (west, north - height, west + width, north), abs=1e-9
        )
        assert (site.split, site.country, site.years) == ("train", "Somewhere", YEARS)


def test_changes_are_counted_between_all_years(whole, tmp_path):
    path, masks = whole
    made = imported(path, tmp_path / "made").changes
    assert len(made) == len(SITES) * 3
    for row in made.itertuples():
        before, after = masks[row.site, row.year_1] == 255, masks[row.site, row.year_2] == 255
        assert (row.pixels, row.appeared, row.vanished) == (
            before.size,
            (after & ~before).sum(),
            (before & ~after).sum(),
        )


@pytest.mark.parametrize("packed", [True, False])
def test_few_bytes_are_asked_for(tmp_path, packed):
    """Of the release's own size, images would be 14 MB; here they are 1.8 MB, so that headers weigh eight times as much."""
    path = tmp_path / "served" / "EuroMineNet.zip"
    path.parent.mkdir()
    write_release(
        path, {"Germany_1": (12.0, 51.0)}, range(2015, 2020), shape=(320, 280), packed=packed
    )
    with zipfile.ZipFile(path) as content:
        labels = sum(m.compress_size for m in content.infolist() if "/label/" in m.filename)
    with serve(path.parent) as url:
        archive = release.Archive(f"{url}/EuroMineNet.zip")
        made = release.import_release(archive, tmp_path / "made", KNOWN, SPLIT)
        with urllib.request.urlopen(f"{url}/counts") as answer:
            requests = json.load(answer)["requests"]
    assert len(made.years) == 5
    assert archive.bytes.tally.requests == requests
    assert archive.bytes.tally.bytes - labels < 0.005 * path.stat().st_size
    assert (
        requests <= 3 + 1 + 5 * 3
    )  # the directory; labels, which lie apart here; two or three a header


def test_labels_side_by_side_are_one_request(whole, tmp_path):
    def by_kind(members):
        for name in sorted(members, key=lambda n: "/label/" in n):
            members[name] = members.pop(name)

    changed(whole[0], tmp_path / "sorted.zip", by_kind)
    with serve(tmp_path) as url:
        archive = release.Archive(f"{url}/sorted.zip")
        before = archive.bytes.tally.requests
        names = [n for n in archive.names() if "/label/" in n]
        content = dict(archive.read(names))
        assert archive.bytes.tally.requests == before + 1
    with zipfile.ZipFile(tmp_path / "sorted.zip") as plain:
        assert content == {n: plain.read(n) for n in names}


def test_a_header_that_is_lost_halfway_is_no_header(whole, monkeypatch):
    """GDAL is given zeros for what does not come: it must not be believed."""
    archive = release.Archive(str(whole[0]))
    fetch, asked = archive.bytes.fetch, []

    def once(start, length):
        asked.append(start)
        if len(asked) > 1:
            raise RequestError("the line is dead")
        return fetch(start, length)

    monkeypatch.setattr(archive.bytes, "fetch", once)
    with (
        pytest.raises(ReleaseError, match=r"cannot be read \(the line is dead\)"),
        archive.open_image(image("Germany_1", 2015)) as found,
    ):
        found.transform  # noqa: B018
    assert len(asked) > 1


def test_an_import_goes_on_where_it_stopped(whole, tmp_path, monkeypatch):
    imported(whole[0], tmp_path / "at_once")
    read, asked = sites.read_site, []

    def stops(archive, found, site):
        asked.append(site)
        if site == "Portuga_2" and len(asked) <= 3:
            raise ReleaseError("the line is dead")
        return read(archive, found, site)

    monkeypatch.setattr(importing, "read_site", stops)
    with pytest.raises(
        ReleaseError, match="Portuga_2: the line is dead; 2 sites are read, run again"
    ):
        imported(whole[0], tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "sites.geojson").exists()
    with pytest.raises(ReleaseError, match="holds no finished import"):
        release.open_import(tmp_path / "resumed")
    imported(whole[0], tmp_path / "resumed")
    assert sorted(asked) == [*sorted(SITES), "Portuga_2"]
    files = sorted(p.name for p in (tmp_path / "at_once").iterdir())
    assert sorted(p.name for p in (tmp_path / "resumed").iterdir()) == files
    for name in files:
        assert (tmp_path / "resumed" / name).read_bytes() == (
            tmp_path / "at_once" / name
        ).read_bytes(), name
    imported(whole[0], tmp_path / "resumed")
    assert len(asked) == 4


def test_a_folder_holds_one_archive(whole, tmp_path):
    imported(whole[0], tmp_path / "made")
    other = changed(
        whole[0], tmp_path / "other.zip", lambda members: members.pop(label("Germany_1", 2016))
    )
    with pytest.raises(ReleaseError, match="holds an import of another archive"):
        imported(other, tmp_path / "made")


def test_quirks_of_names(whole, tmp_path):
    def rename(members):
        members["EuroMineNet/Germany_1/label/Label2015.tif"] = members.pop(label("Germany_1", 2015))
        members["EuroMineNet/Germany_1/image/year2016.tif"] = members.pop(image("Germany_1", 2016))
        members["EuroMineNet/Germany_1/label/Label2017.tif"] = encode_tiff(
            np.zeros((1, 3, 3), np.uint8)
        )  # Year2017.tif is there
        members["__MACOSX/EuroMineNet/Germany_1/label/._Year2015.tif"] = b"x"
        members["EuroMineNet/readme.txt"] = b"x"

    made = imported(changed(whole[0], tmp_path / "a.zip", rename), tmp_path / "made")
    assert made.years["problem"].isna().all()
    for (site, year), mask in whole[1].items():
        np.testing.assert_array_equal(drawn(made, site, year), mask)
    assert made.about["renamed"] == [
        "EuroMineNet/Germany_1/image/year2016.tif",
        "EuroMineNet/Germany_1/label/Label2015.tif",
    ]
    assert made.about["twice"] == ["EuroMineNet/Germany_1/label/Label2017.tif"]
    assert made.about["strange"] == ["EuroMineNet/readme.txt"]
    found = auditing.audit_release(made, KNOWN, NAMES)
    assert [f.check for f in found] == ["name", "name", "repeated member", "strange member"]


def spoil(members):
    """Every fault that an audit is to find, each once."""
    masks = {}
    for name in [n for n in members if "/label/" in n]:
        with rasterio.MemoryFile(members[name]) as memory, memory.open() as src:
            masks[name] = src.read()
    members[label("Germany_1", 2015)] = encode_tiff(masks[label("Germany_1", 2015)][:, :-1])
    members[label("Germany_1", 2016)] = encode_tiff(masks[label("Germany_1", 2016)] // 255)
    members[label("Germany_1", 2017)] = encode_tiff(np.zeros_like(masks[label("Germany_1", 2017)]))
    del members[label("Germany_10", 2016)]
    with rasterio.MemoryFile(members[image("Germany_10", 2017)]) as memory, memory.open() as src:
        pixels, place = src.read(), src.transform
    moved = {"crs": "EPSG:4326", "transform": place @ Affine.translation(2, -1)}
    members[image("Germany_10", 2017)] = encode_tiff((pixels + 1000).astype(np.int16), **moved)
    jump = np.roll(masks[label("Portuga_2", 2017)], 30, axis=1)
    jump[:, :20] = 255
    members[label("Portuga_2", 2017)] = encode_tiff(jump)
    members["EuroMineNet/Spain_4/image/Year2015.tif"] = members[image("Portuga_2", 2015)]
    members["EuroMineNet/Spain_4/label/Label2015.tif"] = members[label("Portuga_2", 2015)]


def test_an_audit_finds_what_was_planted_and_nothing_else(whole, tmp_path):
    path = changed(whole[0], tmp_path / "a.zip", spoil)
    made = imported(path, tmp_path / "made")
    archive = release.Archive(str(path))
    facts = replace(KNOWN, excluded=("Spain_4",))
    # Spain_4 has the images of Portuga_2, and so lies where it lies; the split has it on the other side.
    split = {
        "train": ["Germany_1", *SITES],
        "test": ["Spain_4"],
        "val": ["Austria_1", "Germany_10"],
    }
    found = auditing.audit_release(made, facts, split, auditing.sum_pixels(archive, made.years))
    assert {(f.check, f.site, f.year) for f in found} == {
        ("name", "", 0),
        ("sites", "", 0),
        ("split", "", 0),
        ("split", "Germany_1", 0),
        ("split", "Germany_10", 0),
        ("split", "Spain_4", 0),
        ("split", "Austria_1", 0),
        ("repeated site", "Spain_4", 2015),
        ("year missing", "Spain_4", 2016),
        ("year missing", "Spain_4", 2017),
        ("year missing", "Germany_10", 2016),
        ("label", "Germany_1", 2015),
        ("label", "Germany_1", 2016),
        ("label empty", "Germany_1", 2017),
        ("grid", "Germany_10", 2017),
        ("offset", "Germany_10", 2017),
        ("neighbours", "Portuga_2", 0),
        ("label jump", "Portuga_2", 2017),
    }
    said = {(f.check, f.site, f.year): f.found for f in found}
    assert said["split", "Germany_1", 0] == "is named 2 times in train"
    assert said["split", "Germany_10", 0] == "is named in train and in val"
    assert (
        said["label", "Germany_1", 2015]
        == "expected the image's 90 x 70 pixels, found 89 x 70; it is left out"
    )
    assert (
        said["label", "Germany_1", 2016]
        == "expected the values 0 and 255, found 0, 1; it is left out"
    )
    assert (
        said["grid", "Germany_10", 2017]
        == "lies +2.00 pixels to the right and -1.00 down of the year before"
    )
    assert said["neighbours", "Portuga_2", 0] == "(train) overlaps Spain_4 (test)"


def test_an_audit_of_what_is_right_finds_nothing(whole, tmp_path):
    made = imported(whole[0], tmp_path / "made")
    pixels = auditing.sum_pixels(release.Archive(str(whole[0])), made.years)
    assert auditing.audit_release(made, KNOWN, NAMES, pixels) == []


def tables(whole, tmp_path, **changed_tables):
    """Findings of an import of which some tables are hand-made."""
    made = imported(whole[0], tmp_path / "made")
    pixels, split = changed_tables.pop("pixels", None), changed_tables.pop("split", NAMES)
    found = auditing.audit_release(replace(made, **changed_tables), KNOWN, split, pixels)
    return [(f.check, f.site, f.year) for f in found]


def test_neighbours_are_those_within_five_kilometres(whole, tmp_path):
    """Four squares of a kilometre in a row, 4.9 and 5.1 and 2 km apart; only what lies on both sides of the split counts."""
    starts = np.cumsum([0, 1000 + 4900, 1000 + 5100, 1000 + 2000])
    split = {"train": ["a", "c", "d", *SITES], "test": ["b"]}
    squares = [shapely.box(4_300_000 + x, 3_000_000, 4_301_000 + x, 3_001_000) for x in starts]
    sites = gpd.GeoDataFrame({"id": ["a", "b", "c", "d"]}, geometry=squares, crs=3035).to_crs(4326)
    found = tables(whole, tmp_path, sites=sites, split=split)
    assert [f for f in found if f[0] == "neighbours"] == [("neighbours", "a", 0)]


def test_offsets_step_where_all_bands_do(whole, tmp_path):
    lows = {
        2015: (200, 300),
        2016: (800, 950),
        2017: (1250, 1400),
        2018: (700, 850),
        2019: (1300, 900),
        2020: (1310, 1420),
    }
    rows = [
        ("a", y, b, 1, 0, 0, low)
        for y, of in lows.items()
        for b, low in zip(("B02", "B12"), of, strict=True)
    ]
    pixels = pd.DataFrame(rows, columns=["site", "year", "band", "pixels", "sum", "squares", "low"])
    assert tables(whole, tmp_path, pixels=pixels) == [("offset", "a", 2016), ("offset", "a", 2018)]


def test_labels_jump_from_one_year_to_the_next(whole, tmp_path):
    rows = [
        ("a", 2015, 2016, 100, 10, 0),
        ("a", 2016, 2017, 100, 5, 6),
        ("a", 2015, 2017, 100, 50, 0),
    ]
    changes = pd.DataFrame(
        rows, columns=["site", "year_1", "year_2", "pixels", "appeared", "vanished"]
    )
    assert tables(whole, tmp_path, changes=changes) == [("label jump", "a", 2017)]


def test_a_label_that_is_mine_everywhere(whole, tmp_path):
    def full(members):
        members[label("Portuga_2", 2016)] = encode_tiff(np.full((1, *SHAPE), 255, np.uint8))

    made = imported(changed(whole[0], tmp_path / "a.zip", full), tmp_path / "made")
    assert ("label full", "Portuga_2", 2016) in [
        (f.check, f.site, f.year) for f in auditing.audit_release(made, KNOWN, NAMES)
    ]


def test_pixels_without_an_observation_are_not_counted(whole, tmp_path):
    def holed(members):
        for site, year in whole[1]:
            pixels = np.full((10, *SHAPE), 7, np.int16)
            pixels[:, :30] = 0
            pixels[3:, 30:40] = 0  # seen, and dark
            members[image(site, year)] = encode_tiff(pixels, crs="EPSG:4326", transform=UPRIGHT)

    path = changed(whole[0], tmp_path / "a.zip", holed)
    bands = auditing.compute_band_statistics(
        auditing.sum_pixels(release.Archive(str(path)), imported(path, tmp_path / "made").years),
        KNOWN,
    )
    assert bands["mean"].round(4).tolist() == [7.0] * 3 + [round(7 * 50 / 60, 4)] * 7


def test_labels_that_do_not_fit_are_left_out_and_empty_ones_are_known(whole, tmp_path):
    made = imported(changed(whole[0], tmp_path / "a.zip", spoil), tmp_path / "made")
    of_site = made.labels[made.labels["site"] == "Germany_1"]
    assert of_site[["year", "mapped"]].to_numpy().tolist() == [[2017, True]]
    assert set(made.changes["site"]) == {
        "Portuga_2"
    }  # Germany_10's two labels lie on different pixels
    assert of_site.geometry.iloc[0].area == pytest.approx(90 * 70 * PIXEL_DEG**2)


UPRIGHT = Affine(PIXEL_DEG, 0, 12.0, 0, -PIXEL_DEG, 51.0)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ({"nodata": 0}, "expected EPSG:4326 and a place, found no CRS"),
        ({"crs": "EPSG:4326"}, "expected EPSG:4326 and a place, found EPSG:4326"),
        (
            {"crs": "EPSG:32633", "transform": UPRIGHT},
            "expected EPSG:4326 and a place, found EPSG:32633",
        ),
        (
            {"crs": "EPSG:4326", "transform": UPRIGHT @ Affine.rotation(3)},
            "expected north up, found a turned grid",
        ),
        (
            {"crs": "EPSG:4326", "transform": UPRIGHT @ Affine.scale(1, -1)},
            "expected north up, found a turned grid",
        ),
    ],
)
def test_images_without_a_place_give_their_label_none(whole, tmp_path, place, found):
    def misplaced(members):
        members[image("Germany_1", 2015)] = encode_tiff(np.ones((10, *SHAPE), np.int16), **place)

    made = imported(changed(whole[0], tmp_path / "a.zip", misplaced), tmp_path / "made")
    assert made.years.set_index(["site", "year"])["problem"].dropna().to_dict() == {
        ("Germany_1", 2015): f"image: {found}"
    }
    assert set(made.labels.loc[made.labels["site"] == "Germany_1", "year"]) == {2016, 2017}
    assert [(f.check, f.site, f.year) for f in auditing.audit_release(made, KNOWN, NAMES)] == [
        ("image", "Germany_1", 2015)
    ]
    assert made.sites.set_index("id").loc["Germany_1"].geometry.bounds == pytest.approx(
        (12.0, 51.0 - SHAPE[0] * PIXEL_DEG, 12.0 + SHAPE[1] * PIXEL_DEG, 51.0), abs=1e-9
    )


def test_band_statistics_are_those_of_all_pixels(whole, tmp_path):
    """Against numpy over every image at once; the published deviations are put right by the square root of 2."""
    made = imported(whole[0], tmp_path / "made")
    with zipfile.ZipFile(whole[0]) as archive:
        everything = []
        for name in (n for n in archive.namelist() if "/image/" in n):
            with rasterio.MemoryFile(archive.read(name)) as memory, memory.open() as src:
                everything.append(src.read().reshape(10, -1))
    pixels = np.concatenate(everything, axis=1).astype(np.float64)
    known = replace(
        KNOWN, band_mean=tuple(pixels.mean(axis=1)), band_std=tuple(pixels.std(axis=1) / 2**0.5)
    )
    sums = auditing.sum_pixels(release.Archive(str(whole[0])), made.years)
    bands = auditing.compute_band_statistics(sums, known)
    np.testing.assert_allclose(bands["mean"], pixels.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(bands["std"], pixels.std(axis=1), rtol=1e-9)
    np.testing.assert_allclose(bands["corrected_std"], bands["std"], rtol=1e-9)
    found = auditing.audit_release(made, known, NAMES, sums)
    assert [f.found.rpartition(", ")[2] for f in found] == [
        "which is the true one divided by the square root of 2"
    ] * 10
    wrong = auditing.audit_release(made, replace(known, band_std=(1.0,) * 10), NAMES, sums)
    assert all("not for the square root of 2" in f.found for f in wrong)
    assert list(bands.index) == list(BANDS)


def test_change_rates_are_ratios_of_sums():
    changes = pd.DataFrame(
        [("a", 2015, 2016, 100, 10, 0), ("b", 2015, 2016, 900, 0, 5)],
        columns=["site", "year_1", "year_2", "pixels", "appeared", "vanished"],
    )
    assert auditing.compute_change_rates(changes)["rate"].tolist() == [15 / 1000]


def test_an_archive_that_was_cut_off(whole, tmp_path):
    (tmp_path / "cut.zip").write_bytes(whole[0].read_bytes()[:-5000])
    with pytest.raises(
        ReleaseError, match=r"expected a zip archive, found .* without a whole directory .* cut off"
    ):
        release.Archive(str(tmp_path / "cut.zip"))


def flipped(whole, path, name):
    """The archive with one bit of a member turned over."""
    with zipfile.ZipFile(whole) as archive:
        member = archive.getinfo(name)
    content = bytearray(whole.read_bytes())
    content[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 0x10
    path.write_bytes(content)
    return path


def test_members_that_are_broken_are_named_and_left_out(whole, tmp_path):
    """In the archive as it was published, so that asking again would not help: one bit, no image at all, nothing, a secret."""

    def break_(members):
        members[image("Portuga_2", 2015)] = b"no image"
        members[label("Portuga_2", 2016)] = b""
        members[label("Portuga_2", 2017)] = b"II*\0 and then nothing"

    path = flipped(
        changed(whole[0], tmp_path / "a.zip", break_), tmp_path / "b.zip", label("Germany_10", 2016)
    )
    made = imported(path, tmp_path / "made")
    problems = made.years.set_index(["site", "year"])["problem"].dropna().to_dict()
    assert problems == {
        ("Germany_10", 2016): "label: is no image, or arrived broken",
        ("Portuga_2", 2015): "image: is no image, or arrived broken",
        ("Portuga_2", 2016): "label: is no image, or arrived broken",
        ("Portuga_2", 2017): "label: is no image, or arrived broken",
    }
    assert set(made.labels["site"]) == {"Germany_1", "Germany_10"}
    for site, year in (("Germany_1", 2015), ("Germany_10", 2015), ("Germany_10", 2017)):
        np.testing.assert_array_equal(drawn(made, site, year), whole[1][site, year])
    sums = auditing.sum_pixels(
        release.Archive(str(path)), made.years[made.years["image"] != image("Portuga_2", 2015)]
    )
    found = auditing.audit_release(made, KNOWN, NAMES, sums)
    assert {(f.site, f.year) for f in found if f.check in ("image", "label")} == set(problems)


@pytest.mark.parametrize("packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_that_break_are_none_of_pythons_errors(tmp_path, packed):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", packed) as made:
        made.writestr(
            "EuroMineNet/Spain_1/label/Year2015.tif", np.random.default_rng(0).bytes(5000)
        )
        made.writestr(
            "EuroMineNet/Spain_1/image/Year2015.tif", np.random.default_rng(0).bytes(5000)
        )
    path = tmp_path / "a.zip"
    for name in ("label", "image"):
        path = flipped(path, tmp_path / f"{name}.zip", f"EuroMineNet/Spain_1/{name}/Year2015.tif")
    with pytest.raises(ReleaseError, match="no image is georeferenced"):
        imported(path, tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_disk_that_fails_is_no_broken_member(whole, tmp_path):
    """A file that becomes shorter while it is read: nothing is left out for it."""
    path = tmp_path / "a.zip"
    path.write_bytes(whole[0].read_bytes())
    archive = release.Archive(str(path))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ReleaseError, match="it has become shorter"):
        release.import_release(archive, tmp_path / "made", KNOWN, SPLIT)


def test_a_line_that_breaks_is_not_taken_for_a_broken_member(whole, tmp_path, monkeypatch):
    """What could not be asked for is asked for again by the next run; nothing is left out for it."""
    fetch = LocalBytes.fetch

    def sometimes(self, start, length):
        if length == archive_module._FIRST:
            raise RequestError("HTTP 503, after 9 tries")
        return fetch(self, start, length)

    monkeypatch.setattr(LocalBytes, "fetch", sometimes)
    with pytest.raises(
        ReleaseError,
        match=r"cannot be read \(HTTP 503, after 9 tries\).* 0 sites are read, run again",
    ):
        imported(whole[0], tmp_path / "made")


def test_names_that_no_group_can_have_are_strange(whole, tmp_path):
    def rename(members):
        for name in [n for n in members if "Portuga_2" in n]:
            members[name.replace("Portuga_2", "North Macedonia_1")] = members.pop(name)
        members["./EuroMineNet/Spain_1/label/Year2015.tif"] = members[label("Germany_1", 2015)]
        members["EuroMineNet\\Spain_2\\label\\Year2015.tif"] = members[
            label("Germany_1", 2015)
        ]  # as some packers write

    made = imported(changed(whole[0], tmp_path / "a.zip", rename), tmp_path / "made")
    assert set(made.years["site"]) == {"Germany_1", "Germany_10", "Spain_1", "Spain_2"}
    assert len(made.about["strange"]) == 6


def test_a_catalogue_of_the_users_is_not_overwritten(whole, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sites.geojson").write_text("precious")
    with pytest.raises(ReleaseError, match=r"has a sites\.geojson that no import wrote"):
        imported(whole[0], tmp_path / "mine")
    assert (tmp_path / "mine" / "sites.geojson").read_text() == "precious"


def test_nothing_is_downloaded_into_a_catalogue_of_the_users(whole, tmp_path):
    (tmp_path / "sites.geojson").write_text("precious")
    with serve(whole[0].parent) as url:
        asked = [
            "release",
            "import",
            f"{url}/EuroMineNet.zip",
            "--download",
            "--out",
            str(tmp_path),
        ]
        done = CliRunner().invoke(cli, asked)
        with urllib.request.urlopen(f"{url}/counts") as answer:
            assert json.load(answer)["requests"] == 0
    assert done.exit_code == 2
    assert "has a sites.geojson that no import wrote" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["sites.geojson"]


def test_an_import_that_was_damaged_is_said_to_be(whole, tmp_path):
    imported(whole[0], tmp_path / "made")
    (tmp_path / "made" / "sites.geojson").write_text("{")
    with pytest.raises(ReleaseError, match="holds no finished import"):
        release.open_import(tmp_path / "made")


def test_a_split_of_the_users(tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a", "a"], "test": ["b"]}))
    assert auditing.read_split(tmp_path / "split.json") == {"train": ["a", "a"], "test": ["b"]}
    for wrong in ("[1]", "{", '{"train": [1]}', '{"train": []}', '{"train": "a"}'):
        (tmp_path / "split.json").write_text(wrong)
        with pytest.raises(ReleaseError, match="split"):
            auditing.read_split(tmp_path / "split.json")


FACTS = Path(__file__).parents[2] / "shared" / "data" / "eurominenet_facts" / "facts.json"


@pytest.mark.skipif(not FACTS.exists(), reason="../shared/data/eurominenet_facts is absent")
def test_the_published_split_is_the_catalogues():
    """132 distinct names for 133 sites, Germany_13 twice: as the authors' code lists them."""
    published = json.loads(FACTS.read_text())["released_split"]
    ours = auditing.select_split(load_releases()["eurominenet"], load_sites())
    assert {part: sorted(names) for part, names in ours.items()} == {
        part: sorted(names) for part, names in published.items()
    }


def test_a_server_without_ranges_needs_a_download(whole, tmp_path):
    with serve(whole[0].parent, "--no-ranges") as url:
        asked = ["release", "import", f"{url}/EuroMineNet.zip", "--out", str(tmp_path / "made")]
        refused = CliRunner().invoke(cli, asked)
        assert refused.exit_code == 2
        assert "does not answer byte ranges" in refused.output
        assert "--download" in refused.output
        assert not (tmp_path / "made").exists()
        done = CliRunner().invoke(cli, [*asked, "--download"])
    assert done.exit_code == 0, done.output
    made = release.open_import(tmp_path / "made")
    for (site, year), mask in whole[1].items():
        np.testing.assert_array_equal(drawn(made, site, year), mask)


def test_a_download_that_stops_short_is_none(whole, tmp_path):
    with (
        serve(whole[0].parent, "--truncate", 1) as url,
        pytest.raises(ReleaseError, match="cannot be downloaded"),
    ):
        release.download(f"{url}/EuroMineNet.zip", tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_the_command_line_says_what_came_of_it(whole, tmp_path):
    path = changed(whole[0], tmp_path / "a.zip", spoil)
    out, said = tmp_path / "made", tmp_path / "audit.json"
    done = CliRunner().invoke(cli, ["release", "import", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "4 sites, 10 site-years, 7 labels of 9" in done.output
    assert (
        "left out: Germany_1 2015: label: expected the image's 90 x 70 pixels, found 89 x 70"
        in done.output
    )
    listed = CliRunner().invoke(cli, ["sites", "--catalog", str(out), "--sites", "Germany_1"])
    assert "EPSG:32633" in listed.output  # which the shipped catalogue cannot say
    audited = CliRunner().invoke(
        cli, ["release", "audit", str(out), "--json", str(said), "--pixels", str(path)]
    )
    assert audited.exit_code == 1, audited.output
    assert "label empty" in audited.output
    content = json.loads(said.read_text())
    assert content["counts"]["label"] == 2
    assert content["counts"]["sites"] == 1
    assert {b["band"] for b in content["bands"]} == set(BANDS)
    other = CliRunner().invoke(cli, ["release", "audit", str(out), "--pixels", str(whole[0])])
    assert other.exit_code == 2
    assert "is not the archive" in other.output


def test_facts_of_the_real_release():
    known = load_releases()["eurominenet"]
    assert (known.sites, known.years) == (133, tuple(range(2015, 2025)))
    split = {s.id for s in load_sites() if (s.labels or "").startswith(known.name)}
    assert len(split) == 132
    assert set(known.repeated) <= split
    assert not set(known.excluded) & split


# Archives that somebody made to do harm: here they are harmless, and only say that they are large


def problems_of(whole, tmp_path, change):
    made = imported(changed(whole[0], tmp_path / "a.zip", change), tmp_path / "made")
    return made, made.years.set_index(["site", "year"])["problem"].dropna().to_dict()


def sparse(path, side=200_000, bands=1, **place):
    """A TIFF without a pixel, whose header says how many there are."""
    profile = {
        "count": bands,
        "dtype": "uint8",
        "tiled": True,
        "blockxsize": 4096,
        "blockysize": 4096,
    } | place
    with rasterio.open(
        path, "w", driver="GTiff", height=side, width=side, sparse_ok=True, BIGTIFF="YES", **profile
    ):
        pass
    assert path.stat().st_size < 100_000
    return path.read_bytes()


def test_a_label_that_unpacks_to_far_more_than_its_image_is_refused_by_name(
    whole, tmp_path, monkeypatch
):
    """200 MB of zeros in 0.2 MB."""

    def bomb(members):
        members[label("Germany_1", 2015)] = bytes(200_000_000)

    path = changed(whole[0], tmp_path / "a.zip", bomb)
    read = []
    monkeypatch.setattr(archive_module.Archive, "_unpack", unpacked_and_noted(read))
    tracemalloc.start()
    made = imported(path, tmp_path / "made")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    assert label("Germany_1", 2015) not in read
    assert label("Germany_1", 2016) in read
    (problem,) = made.years["problem"].dropna()
    assert (
        problem
        == "label: expected at most 1,050,400 bytes for the image's 90 x 70 pixels, found 200,000,000"
    )
    refused = made.years[made.years["problem"].notna()]
    assert (refused["site"].tolist(), refused["year"].tolist()) == (["Germany_1"], [2015])


def unpacked_and_noted(read):
    unpacked = archive_module.Archive._unpack

    def noted(self, member, length):
        read.append(member.filename)
        return unpacked(self, member, length)

    return noted


def test_a_label_of_more_pixels_than_any_image_is_not_read(whole, tmp_path):
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    huge = sparse(tmp_path / "huge.tif")
    tracemalloc.start()
    _, problems = problems_of(whole, tmp_path, lambda m: m.update({label("Germany_1", 2015): huge}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problems == {
        ("Germany_1", 2015): "label: expected at most 25,000,000 pixels, found 200,000 x 200,000"
    }
    assert peak < 30e6


def test_a_label_of_other_pixels_than_its_image_is_not_read(whole, tmp_path, monkeypatch):
    """Its header tells."""
    other = encode_tiff(np.zeros((1, 800, 800), np.uint8))
    monkeypatch.setattr(
        sites.np,
        "unique",
        lambda mask: pytest.fail("read") if mask.shape == (800, 800) else np.array([0]),
    )
    _, problems = problems_of(
        whole, tmp_path, lambda m: m.update({label("Germany_1", 2015): other})
    )
    assert problems == {
        ("Germany_1", 2015): "label: expected the image's 90 x 70 pixels, found 800 x 800"
    }


def test_an_image_of_more_pixels_than_allowed_is_not_read(whole, tmp_path):
    place = {"crs": "EPSG:4326", "transform": Affine(PIXEL_DEG, 0, 12, 0, -PIXEL_DEG, 51)}
    huge = sparse(tmp_path / "huge.tif", bands=10, **place)
    made, problems = problems_of(
        whole, tmp_path, lambda m: m.update({image("Germany_1", 2015): huge})
    )
    assert problems == {
        ("Germany_1", 2015): "image: expected at most 25,000,000 pixels, found 200,000 x 200,000"
    }
    tracemalloc.start()
    with pytest.raises(
        ReleaseError,
        match=r"Germany_1/image/Year2015\.tif is no image \(expected at most 25,000,000 pixels",
    ):
        auditing.sum_pixels(release.Archive(str(tmp_path / "a.zip")), made.years)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_images_and_labels_of_another_format_are_not_followed(whole, tmp_path):
    """A text that points at a file of ours, which GDAL alone would read."""
    (tmp_path / "ours.tif").write_bytes(encode_tiff(np.full((1, *SHAPE), 255, np.uint8)))
    source = f"<SimpleSource><SourceFilename>{tmp_path / 'ours.tif'}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    size = f'rasterXSize="{SHAPE[1]}" rasterYSize="{SHAPE[0]}"'
    virtual = f'<VRTDataset {size}><VRTRasterBand dataType="Byte" band="1">{source}</VRTRasterBand></VRTDataset>'.encode()
    with rasterio.MemoryFile(virtual) as memory, memory.open() as src:
        assert (src.read() == 255).all()
    names = {label("Germany_1", 2015): virtual, image("Germany_1", 2016): virtual}
    made, problems = problems_of(whole, tmp_path, lambda m: m.update(names))
    assert problems == {
        ("Germany_1", 2015): "label: is no image, or arrived broken",
        ("Germany_1", 2016): "image: is no image, or arrived broken",
    }
    assert set(made.labels[made.labels["site"] == "Germany_1"]["year"]) == {2017}
    with pytest.raises(ReleaseError, match=r"Year2016\.tif is no image \(expected a GeoTIFF"):
        auditing.sum_pixels(release.Archive(str(tmp_path / "a.zip")), made.years)


def test_a_label_of_too_many_regions_makes_no_polygons(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sites, "_MOST_REGIONS", 1000)
    board = (np.indices(SHAPE).sum(axis=0) % 2).astype(np.uint8) * np.uint8(255)
    _, problems = problems_of(
        whole, tmp_path, lambda m: m.update({label("Germany_1", 2015): encode_tiff(board[None])})
    )
    assert problems == {
        (
            "Germany_1",
            2015,
        ): f"label: expected at most 1,000 regions of mine, found {board.size // 2:,}"
    }


def test_a_directory_that_is_too_large_is_not_read(whole, monkeypatch):
    monkeypatch.setattr(archive_module, "_MOST_DIRECTORY", 100)
    with pytest.raises(ReleaseError, match="expected at most 100 bytes, found"):
        release.Archive(str(whole[0]))


def test_names_that_lead_out_of_a_folder_are_strange(whole, tmp_path):
    names = [
        "../../Spain_1/label/Year2015.tif",
        "/Spain_1/label/Year2015.tif",
        "a\\..\\Spain_1\\label\\Year2015.tif",
    ]

    def add(members):
        members |= dict.fromkeys(names, members[label("Germany_1", 2015)])

    made, problems = problems_of(whole, tmp_path, add)
    assert not problems
    assert sorted(made.about["strange"]) == sorted(names)
    assert set(made.years["site"]) == set(SITES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "made"]
