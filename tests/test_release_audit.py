"""An audit of an imported archive finds what was planted, and nothing else."""

from __future__ import annotations

import json
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
from click.testing import CliRunner
from rasterio.errors import NotGeoreferencedWarning

from known_archives import (
    KNOWN,
    NAMES,
    SHAPE,
    SITES,
    UPRIGHT,
    changed,
    image,
    imported,
    label,
    make_archive,
    spoil,
)
from minecube import release
from minecube.catalog import BANDS, load_releases, load_sites
from minecube.cli import cli
from minecube.errors import ReleaseError
from minecube.release import audit as auditing
from minecube.simulate.release import encode_tiff


@pytest.fixture(autouse=True)
def _labels_have_no_place():
    warnings.simplefilter("ignore", NotGeoreferencedWarning)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("release"))


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
