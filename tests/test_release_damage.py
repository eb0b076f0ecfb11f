"""Members of an archive that are broken or far too large are named and left out."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning

from known_archives import (
    KNOWN,
    NAMES,
    SHAPE,
    SITES,
    UPRIGHT,
    changed,
    drawn,
    flipped,
    image,
    imported,
    label,
    make_archive,
)
from minecube import release
from minecube.errors import ReleaseError
from minecube.grid import PIXEL_DEG
from minecube.release import audit as auditing
from minecube.simulate.release import encode_tiff


@pytest.fixture(autouse=True)
def _labels_have_no_place():
    warnings.simplefilter("ignore", NotGeoreferencedWarning)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("release"))


def test_an_archive_that_was_cut_off(whole, tmp_path):
    (tmp_path / "cut.zip").write_bytes(whole[0].read_bytes()[:-5000])
    with pytest.raises(
        ReleaseError, match=r"expected a zip archive, found .* without a whole directory .* cut off"
    ):
        release.Archive(str(tmp_path / "cut.zip"))


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


def test_a_label_that_unpacks_to_far_more_than_its_image_is_refused_by_name(whole, tmp_path):
    """200 MB of zeros in 0.2 MB."""

    def bomb(members):
        members[label("Germany_1", 2015)] = bytes(200_000_000)

    path = changed(whole[0], tmp_path / "a.zip", bomb)
    tracemalloc.start()
    made = imported(path, tmp_path / "made")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    (problem,) = made.years["problem"].dropna()
    assert (
        problem
        == "label: expected at most 1,050,400 bytes for the image's 90 x 70 pixels, found 200,000,000"
    )
    refused = made.years[made.years["problem"].notna()]
    assert (refused["site"].tolist(), refused["year"].tolist()) == (["Germany_1"], [2015])


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


def test_a_label_of_other_pixels_than_its_image_is_not_read(whole, tmp_path):
    """Its header tells; values and mine pixels are unknown, since no pixel is read."""
    other = encode_tiff(np.zeros((1, 800, 800), np.uint8))
    made, problems = problems_of(
        whole, tmp_path, lambda m: m.update({label("Germany_1", 2015): other})
    )
    assert problems == {
        ("Germany_1", 2015): "label: expected the image's 90 x 70 pixels, found 800 x 800"
    }
    of_pixels = made.years.set_index(["site", "year"])[["label_values", "mine_px"]]
    assert of_pixels.loc[("Germany_1", 2015)].isna().all()
    assert of_pixels.drop(("Germany_1", 2015)).notna().all(axis=None)


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


def test_a_label_of_too_many_regions_makes_no_polygons(whole, tmp_path):
    shape = (460, 450)
    board = (np.indices(shape).sum(axis=0) % 2).astype(np.uint8) * np.uint8(255)
    seen = encode_tiff(np.ones((10, *shape), np.int16), crs="EPSG:4326", transform=UPRIGHT)
    members = {image("Germany_1", 2015): seen, label("Germany_1", 2015): encode_tiff(board[None])}
    _, problems = problems_of(whole, tmp_path, lambda m: m.update(members))
    assert problems == {
        ("Germany_1", 2015): "label: expected at most 100,000 regions of mine, found 103,500"
    }


def test_a_directory_that_is_too_large_is_not_read(tmp_path):
    """The end of the archive says that 65 MB of directory lie before it: a file with a hole."""
    size = 2**26 + 2**20
    with (tmp_path / "a.zip").open("wb") as file:
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, size, 0, 0))
    with pytest.raises(ReleaseError, match="expected at most 67,108,864 bytes, found"):
        release.Archive(str(tmp_path / "a.zip"))


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
