"""An import of the published archive gives its labels, sites and years as they are."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning

from known_archives import (
    KNOWN,
    NAMES,
    SHAPE,
    SITES,
    SPLIT,
    UPRIGHT,
    YEARS,
    changed,
    drawn,
    image,
    imported,
    label,
    make_archive,
    spoil,
)
from known_builds import run_here
from minecube import release
from minecube.catalog import load_sites
from minecube.errors import ReleaseError
from minecube.grid import PIXEL_DEG
from minecube.places import Url
from minecube.release import audit as auditing
from minecube.simulate.release import encode_tiff


@pytest.fixture(autouse=True)
def _labels_have_no_place():
    warnings.simplefilter("ignore", NotGeoreferencedWarning)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("release"))


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


def test_an_import_goes_on_where_it_stopped(whole, tmp_path):
    """The sites that were read are not read again: their members are zeros by then."""
    imported(whole[0], tmp_path / "at_once")
    path = Path(shutil.copy(whole[0], tmp_path / "a.zip"))
    with zipfile.ZipFile(path) as content:
        last = min(m.header_offset for m in content.infolist() if "Portuga_2" in m.filename)
        assert all(m.header_offset >= last or "Germany" in m.filename for m in content.infolist())
    archive = release.Archive(str(path))
    os.truncate(path, last)
    with pytest.raises(
        ReleaseError, match=r"Portuga_2: .*it has become shorter.*; 2 sites are read, run again"
    ):
        release.import_release(archive, tmp_path / "resumed", KNOWN, SPLIT)
    assert not (tmp_path / "resumed" / "sites.geojson").exists()
    with pytest.raises(ReleaseError, match="holds no finished import"):
        release.open_import(tmp_path / "resumed")
    path.write_bytes(bytes(last) + whole[0].read_bytes()[last:])
    need_same_import(path, tmp_path)
    with zipfile.ZipFile(path) as content:
        directory = content.start_dir
    path.write_bytes(bytes(directory) + whole[0].read_bytes()[directory:])
    need_same_import(path, tmp_path)


def need_same_import(path, folder):
    """Import the archive into `resumed`, and compare its files with those of `at_once`."""
    archive = release.Archive(str(path))
    release.import_release(archive, folder / "resumed", KNOWN, SPLIT)
    files = sorted(p.name for p in (folder / "at_once").iterdir())
    assert sorted(p.name for p in (folder / "resumed").iterdir()) == files
    for name in set(files) - {"import.json"}:
        there = (folder / "at_once" / name).read_bytes()
        assert (folder / "resumed" / name).read_bytes() == there, name
    notes = [json.loads((folder / of / "import.json").read_text()) for of in ("at_once", "resumed")]
    assert {**notes[0], "archive": str(path)} == notes[1]


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


def test_labels_that_do_not_fit_are_left_out_and_empty_ones_are_known(whole, tmp_path):
    made = imported(changed(whole[0], tmp_path / "a.zip", spoil), tmp_path / "made")
    of_site = made.labels[made.labels["site"] == "Germany_1"]
    assert of_site[["year", "mapped"]].to_numpy().tolist() == [[2017, True]]
    assert set(made.changes["site"]) == {
        "Portuga_2"
    }  # Germany_10's two labels lie on different pixels
    assert of_site.geometry.iloc[0].area == pytest.approx(90 * 70 * PIXEL_DEG**2)


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


def test_an_import_that_was_damaged_is_said_to_be(whole, tmp_path):
    imported(whole[0], tmp_path / "made")
    (tmp_path / "made" / "sites.geojson").write_text("{")
    with pytest.raises(ReleaseError, match="holds no finished import"):
        release.open_import(tmp_path / "made")


def test_an_import_into_an_object_store(whole, tmp_path, bucket):
    """It has the same files as on disk, and other commands read them there."""
    run_here("release", "import", whole[0], "--out", tmp_path / "made", "--release", "eurominenet")
    place = Url(f"{bucket}/made")
    for _ in range(2):  # the second import finds the first one
        run_here("release", "import", whole[0], "--out", place)
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    stored = [entry["path"] for batch in place.client().list("made") for entry in batch]
    assert sorted(stored) == [f"made/{name}" for name in names]
    for name in names:
        assert (place / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    on_disk = run_here("release", "audit", tmp_path / "made", ok=1)
    assert run_here("release", "audit", place, ok=1) == on_disk
    _, err = run_here(
        "release", "import", "http://127.0.0.1:9/a.zip", "--download", "--out", place, ok=2
    )
    assert "--download keeps the archive in a local folder" in err
