"""Pictures are read back: which colour stands where, and what is drawn of what is not known."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from affine import Affine
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from scipy import ndimage

from minecube.errors import CubeError
from minecube.report import OUTLINES, draw_area_overview, draw_areas, draw_comparison, draw_strip
from minecube.report.style import BLUE, VERMILION

GRID = GeoBox((40, 60), Affine(10, 0, 399960, 0, -10, 5700000), "EPSG:32633")
BANDS = ["B02", "B03", "B04", "B08"]
YL_GN_BU = colormaps["YlGnBu"]
RED, WHITE, GREY = (255, 0, 0), (255, 255, 255), (217, 217, 217)
CYAN, MAGENTA = (tuple(round(255 * c) for c in to_rgb(colour)) for colour, _ in OUTLINES)


def red_cube(years):
    """All bright in B04 and dark in the others, so that the panels come out pure red."""
    reflectance = np.ones((len(years), len(BANDS), *GRID.shape), np.uint16)
    reflectance[:, BANDS.index("B04")] = 3000
    coords = {"year": list(years), "band": BANDS, **xr_coords(GRID)}
    clear = np.full((len(years), *GRID.shape), 9, np.uint16)
    return xr.Dataset(
        {
            "reflectance": (("year", "band", "y", "x"), reflectance),
            "clear_count": (("year", "y", "x"), clear),
        },
        coords,
    )


def square(years, rows, columns, value=1):
    mask = np.zeros((len(years), *GRID.shape), np.uint8)
    mask[:, rows, columns] = value
    return xr.DataArray(mask, {"year": list(years), **xr_coords(GRID)}, ("year", "y", "x"))


def read(path):
    return np.round(imread(path)[..., :3] * 255).astype(int)


def near(picture, colour, within=24):
    return (np.abs(picture - np.array(colour)) <= within).all(axis=-1)


def panels(picture, colour=RED):
    """The (rows, columns) of each panel, by the colour that fills it."""
    labels, count = ndimage.label(ndimage.binary_closing(near(picture, colour), iterations=3))
    found = ndimage.find_objects(labels)
    return [
        f
        for f, n in zip(
            found, ndimage.sum_labels(labels > 0, labels, range(1, count + 1)), strict=True
        )
        if n > 5000
    ]


def box_of(mask):
    rows, columns = np.nonzero(mask)
    return np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]) / np.repeat(
        mask.shape, 2
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        saved.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


# --- strip --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("years", "rows"), [(1, 1), (3, 1), (7, 2)])
def test_a_panel_a_year_in_the_sites_proportions(tmp_path, years, rows):
    draw_strip(red_cube(range(2018, 2018 + years)), {}, tmp_path / "s.png", "pit")
    found = panels(read(tmp_path / "s.png"))
    assert len(found) == years
    assert len({f[0].start for f in found}) == rows
    for y, x in found:
        assert (x.stop - x.start) / (y.stop - y.start) == pytest.approx(60 / 40, rel=0.03)


def test_outlines_lie_on_the_edges_of_the_masks(tmp_path):
    years = [2019, 2020]
    truth, predicted = (
        square(years, slice(10, 30), slice(6, 24)),
        square(years, slice(4, 12), slice(30, 60)),
    )
    draw_strip(red_cube(years), {"truth": truth, "predicted": predicted}, tmp_path / "s.png", "pit")
    picture = read(tmp_path / "s.png")
    assert len(panels(picture)) == 2
    for y, x in panels(picture):
        panel = picture[y, x]
        assert box_of(near(panel, CYAN)) == pytest.approx(
            np.array([10 / 40, 30 / 40, 6 / 60, 24 / 60]), abs=0.02
        )
        assert box_of(near(panel, MAGENTA)) == pytest.approx(
            np.array([4 / 40, 12 / 40, 30 / 60, 1]), abs=0.02
        )
        middle = panel[panel.shape[0] // 2, int(15 / 60 * panel.shape[1])]
        assert near(middle, RED)  # the mine itself stays visible


def test_two_outlines_that_agree_are_both_seen(tmp_path):
    mask = square([2020], slice(10, 30), slice(10, 50))
    draw_strip(red_cube([2020]), {"truth": mask, "predicted": mask}, tmp_path / "s.png", "pit")
    picture = read(tmp_path / "s.png")
    ((y, x),) = panels(picture)
    assert near(picture[y, x], CYAN, 60).sum() > 200
    assert near(picture[y, x], MAGENTA, 60).sum() > 100


def test_unknown_pixels_and_years_have_no_outline(tmp_path):
    unknown = square([2020], slice(10, 30), slice(10, 50), value=255)
    other_year = square([2019], slice(10, 30), slice(10, 50))
    draw_strip(
        red_cube([2020]), {"truth": unknown, "predicted": other_year}, tmp_path / "s.png", "pit"
    )
    picture = read(tmp_path / "s.png")
    ((y, x),) = panels(picture)
    assert not near(picture[y, x], CYAN, 60).any()
    assert not near(picture[y, x], MAGENTA, 60).any()


def test_what_was_not_observed_is_hatched_grey(tmp_path):
    cube = red_cube([2018, 2019, 2020])
    cube.reflectance.loc[{"year": 2019}] = 0
    cube.reflectance[2, :, :, :30] = 0
    draw_strip(cube, {}, tmp_path / "s.png", "pit")
    picture = read(tmp_path / "s.png")
    red = panels(picture)
    assert len(red) == 2
    full, half = (x.stop - x.start for _, x in sorted(red, key=lambda f: f[1].start))
    assert half / full == pytest.approx(0.5, abs=0.03)
    (y, x), _ = sorted(panels(picture, GREY), key=lambda f: f[1].start)
    missing = picture[y, x]
    assert near(missing, GREY).mean() > 0.3
    assert (missing.mean(axis=-1) < 200).mean() > 0.05  # the hatch
    assert missing.mean() > 150  # black would pass for water


def test_all_years_missing_is_a_picture_all_the_same(tmp_path):
    cube = red_cube([2018, 2019])
    cube.reflectance[:] = 0
    draw_strip(cube, {}, tmp_path / "s.png", "pit")
    assert len(panels(read(tmp_path / "s.png"), GREY)) == 2


def test_all_years_share_one_stretch(tmp_path):
    cube = red_cube([2019, 2020])
    cube.reflectance[0] = 800
    cube.reflectance[1] = 1600
    cube.reflectance[1, :, :20] = 800
    draw_strip(cube, {}, tmp_path / "s.png", "pit")
    picture = read(tmp_path / "s.png")
    height, width = picture.shape[:2]
    upper, lower = height // 3, 2 * height // 3
    dark, same, bright = (
        picture[upper, width // 4],
        picture[upper, 3 * width // 4],
        picture[lower, 3 * width // 4],
    )
    assert np.array_equal(dark, same)
    assert bright.mean() > dark.mean() + 50


def test_titles_say_year_and_clear_dates(tmp_path, figures):
    cube = red_cube([2019, 2020])
    cube.clear_count[0, :3] = 40  # the median is not moved by a few
    cube.reflectance.loc[{"year": 2020}] = 0
    draw_strip(
        cube, {"truth": square([2019], slice(0, 5), slice(0, 5))}, tmp_path / "s.png", "Pit of Most"
    )
    (figure,) = figures
    assert figure.get_suptitle() == "Pit of Most"
    titles = {(t.get_text(), t.get_horizontalalignment()) for t in figure.axes[0].texts}
    assert titles > {("2019", "left"), ("2020", "left")}
    assert titles > {("9 clear dates", "right"), ("no observation", "right")}
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["truth"]


def test_the_scale_bar_is_as_long_as_it_says(tmp_path, figures):
    draw_strip(red_cube([2020]), {}, tmp_path / "s.png", "pit")
    picture = read(tmp_path / "s.png")
    ((y, x),) = panels(picture)
    white = near(picture[y, x], WHITE, 2)
    longest = max(
        (white[row].sum() for row in range(int(0.92 * white.shape[0]), white.shape[0])), default=0
    )
    assert longest / white.shape[1] == pytest.approx(200 / 600, abs=0.02)
    assert "200 m" in [t.get_text() for t in figures[0].axes[0].texts]


# --- comparison ---------------------------------------------------------------------------------------------------------


def test_clouds_in_one_image_do_not_darken_the_others(tmp_path):
    ground = red_cube([2020]).reflectance.sel(year=2020)
    cloudy = ground.copy()
    cloudy[:, :30] = 9000
    draw_comparison(
        {"naive": cloudy, "composite": ground, "truth": ground}, tmp_path / "c.png", "pit, 2020"
    )
    picture = read(tmp_path / "c.png")
    heights = sorted(
        y.stop - y.start for y, _ in panels(picture)
    )  # of what is ground-coloured in each of the three
    assert heights[1] == heights[2]
    assert heights[0] / heights[1] == pytest.approx(1 / 4, abs=0.02)


def test_images_of_several_shapes_are_refused(tmp_path):
    ground = red_cube([2020]).reflectance.sel(year=2020)
    images = {"whole": ground, "part": ground[:, :, :20]}
    with pytest.raises(CubeError, match="pit: expected images of one shape"):
        draw_comparison(images, tmp_path / "c.png", "pit")
    assert not (tmp_path / "c.png").exists()


# --- areas --------------------------------------------------------------------------------------------------------------


def areas(scale=1.0):
    table = {
        "year": [2018, 2019, 2020],
        "area_m2": [4e4, 5e4, 6e4],
        "gain_m2": [np.nan, 2e4, 1e4],
        "loss_m2": [np.nan, 1e4, 0],
    }
    return pd.DataFrame(table) * [1, scale, scale, scale]


@pytest.mark.parametrize(
    ("scale", "unit", "shown"), [(1, "ha", [4, 5, 6]), (100, "km²", [4, 5, 6])]
)
def test_areas_are_drawn_in_readable_units(tmp_path, figures, scale, unit, shown):
    draw_areas(areas(scale), tmp_path / "a.png", "pit", areas(scale))
    above, below = figures[0].axes
    assert figures[0].get_suptitle() == "pit"
    mapped, truth = above.lines
    assert mapped.get_ydata() == pytest.approx(shown)
    assert truth.get_linestyle() == "--"
    assert above.get_ylabel() == f"mine area, {unit}"
    assert above.get_ylim()[0] == 0
    heights = [bar.get_height() for bar in below.patches]
    assert np.nan_to_num(heights) == pytest.approx([0, 2, 1, 0, -1, 0])
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == [
        "mapped",
        "truth",
        "gain",
        "loss",
    ]


def test_years_that_are_mostly_unknown_break_the_line(tmp_path, figures):
    table = areas().assign(area_m2=[4e4, 0, 6e4], unknown_m2=[0, 9e6, 100])
    draw_areas(table, tmp_path / "a.png", "pit")
    assert np.array_equal(figures[0].axes[0].lines[0].get_ydata(), [4, np.nan, 6], equal_nan=True)


def test_a_year_known_to_be_without_mine_is_zero(tmp_path, figures):
    table = areas().assign(area_m2=[0, 0, 0], unknown_m2=[0, 0, 0])
    draw_areas(table, tmp_path / "a.png", "pit")
    assert list(figures[0].axes[0].lines[0].get_ydata()) == [0, 0, 0]


# --- overview -----------------------------------------------------------------------------------------------------------


def grown(first, last, **columns):
    """Areas of two years, in km2."""
    return pd.DataFrame({"year": [2019, 2021], "area_m2": [1e6 * first, 1e6 * last], **columns})


def test_sites_are_rows_from_the_largest_to_the_unknown(tmp_path, figures):
    unknown = grown(0, 0, unknown_m2=[1e6, 1e6])
    sites = {"void": unknown, "small": grown(4, 1), "none": grown(0, 0), "large": grown(5, 20)}
    draw_area_overview(sites, tmp_path / "a.png")
    shares, ends, _ = figures[0].axes
    assert [name.get_text() for name in shares.get_yticklabels()] == [
        "large",
        "small",
        "none",
        "void",
    ]
    nan = np.nan
    drawn = shares.images[0].get_array().filled(nan)
    # 2020 is between the years of the table: nothing is known of it.
    assert np.array_equal(
        drawn, [[0.25, nan, 1], [1, nan, 0.25], [0, nan, 0], [nan, nan, nan]], equal_nan=True
    )
    lines = ends.collections[0].get_segments()
    assert [line[:, 0].tolist() for line in lines[:3]] == [[5, 20], [4, 1], [0, 0]]
    colours = [to_hex(colour) for colour in ends.collections[0].get_colors()]
    assert colours[:2] == [VERMILION, BLUE]


def test_the_last_known_year_counts(tmp_path, figures):
    mapped = grown(3, 0, unknown_m2=[0, 8e6])
    truth = {"pit": grown(3, 7), "other": grown(1, 1)}
    draw_area_overview({"pit": mapped}, tmp_path / "a.png", truth)
    ends = figures[0].axes[1]
    last, last_truth = (line.get_xdata() for line in ends.lines)
    assert last == pytest.approx([3])
    assert last_truth == pytest.approx([7])


def test_shades_lie_on_their_rows_and_years(tmp_path):
    """The darkest cells of the picture are in the year of the largest area."""
    draw_area_overview({f"pit_{n}": grown(0, 1 + n) for n in range(4)}, tmp_path / "a.png")
    dark = near(read(tmp_path / "a.png"), tuple(round(255 * c) for c in YL_GN_BU(1.0)[:3]), 2)
    dark[: dark.shape[0] // 2] = False  # the colour scale is at the top
    rows, columns = np.nonzero(dark)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    box = dark[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.mean() > 0.98  # the edges are blended with the background
    assert height == pytest.approx(4 * 0.17 * 120, abs=2)
    assert width == pytest.approx(3.6 * 120 / 3, abs=2)


def test_the_picture_of_many_sites_stays_small(tmp_path, figures):
    draw_area_overview({f"pit_{n}": grown(1, 2) for n in range(133)}, tmp_path / "named.png")
    draw_area_overview({f"pit_{n}": grown(1, 2) for n in range(600)}, tmp_path / "many.png")
    named, many = (figure.axes[0] for figure in figures)
    assert len(named.get_yticklabels()) == 133
    assert list(many.get_yticks()) == []
    assert "600 sites" in many.get_ylabel()
    assert len(read(tmp_path / "many.png")) < 4500


# --- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (
            lambda out: draw_strip(red_cube([2020]).sel(band=["B02", "B08"]), {}, out, "pit"),
            "found no B04, B03",
        ),
        (
            lambda out: draw_strip(
                red_cube([2020]), {"truth": square([2020], 0, 0)[:, 1:]}, out, "pit"
            ),
            "expected footprint 'truth' of 40 x 60 px like the cube, found 39 x 60",
        ),
        (lambda out: draw_area_overview({}, out), "no area to plot"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, draw, says):
    with pytest.raises(CubeError, match=says):
        draw(tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_and_a_full_disk_leave_nothing(tmp_path):
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(CubeError, match="cannot be written"):
        draw_areas(areas(), tmp_path / "file" / "a.png", "pit")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(CubeError, match="cannot be written"):
            draw_areas(areas(), tmp_path / "a.png", "pit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_global_state_of_pyplot_is_touched():
    code = "import sys, minecube.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
