"""Recipe of a composite: masks, fallbacks, reducers, and the resulting layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minecube.catalog.fields import check_field, need, need_bands, need_months
from minecube.catalog.mission import BANDS

FALLBACKS = {"ungrown": 2, "thin": 3, "cloud": 4, "wider-season": 5, "neighbour-year": 6}
"""Fallback steps for a pixel with too few clear observations -> numbers in the `quality` layer."""
QUALITY = (
    "no observation",
    "clear",
    "clear before the mask was grown",
    "thin cloud or shadow",
    "cloud in every observation",
    "clear in the wider season",
    "clear in a neighbouring year",
)
"""Meanings of the numbers in the `quality` layer. Numbers above 1 are fallbacks."""
REDUCERS = ("median", "geomedian", "best-pixel")
REMOVED_REDUCERS = ("percentile", "medoid", "max-ndvi")
"""Reducers of stores from earlier versions. These stores open; new composites are refused."""


@dataclass(frozen=True, kw_only=True)
class CompositeLayer:
    """A variable [y, x] of a composite, and [year, y, x] of a cube."""

    dtype: str
    long_name: str
    units: str = "1"


LAYERS = {
    "clear_count": CompositeLayer(dtype="uint16", long_name="clear observations behind each pixel"),
    "quality": CompositeLayer(dtype="uint8", long_name="how a pixel came about"),
    "emad": CompositeLayer(
        dtype="float32",
        long_name="median Euclidean distance of the observations from their geomedian, reflectance",
    ),
    "smad": CompositeLayer(dtype="float32", long_name="the same, cosine distance"),
    "bcmad": CompositeLayer(dtype="float32", long_name="the same, Bray-Curtis distance"),
    "day_of_year": CompositeLayer(
        dtype="uint16", long_name="day of the year of the one observation taken", units="d"
    ),
}
"""No data is 0 in integer layers and NaN in float layers."""


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """SCL classes hiding the ground, and corrections of their flags."""

    classes: tuple[int, ...]
    open_m: int = 0
    """First drop flagged specks narrower than this (roofs, bright roads)."""
    dilate_m: int = 0
    """Then grow the other flags by this radius, to cover the halo missed by SCL."""
    months: tuple[int, ...] = tuple(range(1, 13))
    """Calendar months of the rule: snow may be the ground in January, but not in July."""

    def __post_init__(self) -> None:
        _check_classes(self)
        need_months("months", self.months)
        for field, metres, largest in (
            ("open_m", self.open_m, 500),
            ("dilate_m", self.dilate_m, 1000),
        ):
            fits = 0 <= metres <= largest and metres % 20 == 0
            check_field(fits, self, field, f"multiples of the 20 m of SCL's pixels up to {largest}")


@dataclass(frozen=True, kw_only=True)
class BrightOverride:
    """Test for bright bare ground classified as cloud by SCL."""

    classes: tuple[int, ...] = (8, 9)
    """SCL classes confused with bright ground."""
    flagged: float = 0.6
    """Least share of dates with clear surroundings on which the pixel is still flagged."""
    around: float = 0.1
    """Surroundings are clear on a date if at most this share of them is flagged."""
    window_m: int = 600
    """Half width of the surroundings."""

    def __post_init__(self) -> None:
        _check_classes(self)
        check_field(0 < self.flagged <= 1, self, "flagged", "a share above 0 and up to 1")
        check_field(0 <= self.around < 1, self, "around", "a share from 0 to below 1")
        check_field(0 < self.window_m <= 5000, self, "window_m", "1..5000 metres")


def _check_classes(rule: MaskRule | BrightOverride) -> None:
    """Raise FieldError unless the classes of a rule are those of SCL."""
    fits = rule.classes and all(1 <= c <= 11 for c in rule.classes)
    check_field(fits, rule, "classes", "SCL 1..11")


@dataclass(frozen=True, kw_only=True)
class HazeTest:
    """Test for thin cloud over observations classified as clear: too much blue for their red."""

    excess: float = 0.025
    """Excess of blue - red / 2 over the pixel's own lower quartile of the year, in reflectance."""
    window_m: int = 60
    """Side of the averaging window of the excess."""
    date_excess: float | None = None
    """Limit of the median excess of a whole date, in reflectance; None: judge no date as a whole.

    Above the limit, the whole date counts as thin cloud. Below it, SCL's cirrus counts as clear.
    """

    def __post_init__(self) -> None:
        for field, value in (("excess", self.excess), ("date_excess", self.date_excess)):
            fits = value is None or 0 < value < 1
            check_field(fits, self, field, "a reflectance above 0 and below 1")
        check_field(0 < self.window_m <= 500, self, "window_m", "1..500 metres")


@dataclass(frozen=True, kw_only=True)
class BestPixel:
    """Score of an observation: a weighted sum of parts from 0 to 1."""

    day: int = 205
    """Best day of the year."""
    day_spread: float = 40.0
    """Distance in days from the best day at which the part for the day is exp(-1/2)."""
    cloud_distance_m: int = 1000
    """Distance from cloud or shadow at which the part for clouds reaches 1."""
    opacity: float = 0.05
    """Excess of haze (reflectance) at which the part for opacity is 0."""
    day_weight: float = 1.0
    cloud_weight: float = 1.0
    opacity_weight: float = 1.0
    sharpness_weight: float = 0.5

    def __post_init__(self) -> None:
        check_field(1 <= self.day <= 366, self, "day", "1..366")
        check_field(self.day_spread > 0, self, "day_spread", "days above 0")
        is_near = 0 < self.cloud_distance_m <= 2000
        check_field(is_near, self, "cloud_distance_m", "metres above 0 up to 2000")
        check_field(0 < self.opacity < 1, self, "opacity", "a reflectance above 0 and below 1")
        weights = (self.day_weight, self.cloud_weight, self.opacity_weight, self.sharpness_weight)
        fits = min(weights) >= 0 and sum(weights) > 0
        need(fits, "day_weight", f"weights of 0 or more, one above 0, found {weights}")


@dataclass(frozen=True, kw_only=True)
class Registration:
    """How to treat scenes displaced from the others."""

    most_px: float = 0.75
    """Shift in 10 m pixels beyond which `beyond` applies."""
    beyond: str = "shift"
    """record, drop or shift: record the shift, drop the scene, or shift it back."""

    def __post_init__(self) -> None:
        check_field(0 < self.most_px <= 5, self, "most_px", "pixels above 0 up to 5")
        is_known = self.beyond in ("record", "drop", "shift")
        check_field(is_known, self, "beyond", "record, drop or shift")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a composite."""

    id: str
    title: str
    bands: tuple[str, ...] = BANDS
    months: tuple[int, ...] = tuple(range(1, 13))
    """Calendar months of the scenes."""
    max_cloud_cover: float = 100.0
    """Scenes cloudier than this over the whole tile (percent) are not read."""
    min_dates: int = 1
    """Fewest dates of a year. A year with fewer dates is skipped, and `audit` reports it."""
    mask: tuple[MaskRule, ...] = ()
    bright_override: BrightOverride | None = None
    second_opinion: Any = None
    """A removed second cloud mask, for stores of earlier versions only."""
    haze: HazeTest | None = None
    """Needs B02 and B04 among the bands."""
    fallback: tuple[str, ...] = ("ungrown", "thin", "cloud")
    """Steps for a pixel with too few clear observations, in order: keys of `FALLBACKS`."""
    min_clear: int = 1
    """Clear observations below which a pixel also takes the clear steps.

    These are ungrown, wider-season and neighbour-year.
    """
    wider_months: tuple[int, ...] = ()
    """Additional months for the step wider-season."""
    max_clear_observations: int | None = None
    """Read only so many of a block's clearest dates, spread over the season; None: all.

    More dates are read if a pixel would have fewer than a third of this number.
    """
    registration: Registration | None = None
    """Comparison of the scenes with each other before they are read; None: no comparison."""
    reducer: str = "median"
    """Method to reduce the clear observations of a pixel to one value: one of `REDUCERS`."""
    percentile: float | None = None
    """Percentile, for the removed reducer percentile only."""
    best_pixel: BestPixel | None = None
    """Parts and weights of the score, for reducer best-pixel only."""
    block_px: int = 1024
    """Side of a Dask block and of a Zarr shard; a multiple of chunk_px."""
    chunk_px: int = 128
    """Side of a Zarr chunk, the smallest unit of reading."""

    def __post_init__(self) -> None:
        need_bands(self.bands)
        in_order = list(self.bands) == [band for band in BANDS if band in self.bands]
        need(in_order, "bands", f"in the order {', '.join(BANDS)}, each once")
        need_months("months", self.months)
        is_percent = 0 < self.max_cloud_cover <= 100
        check_field(is_percent, self, "max_cloud_cover", "percent above 0")
        check_field(self.min_dates >= 1, self, "min_dates", "1 or more")
        self._check_mask()
        self._check_reducer()
        fits = self.chunk_px > 0 and self.block_px > 0 and self.block_px % self.chunk_px == 0
        sides = f"{self.block_px} and {self.chunk_px}"
        need(fits, "block_px", f"a multiple of chunk_px, both above 0, found {sides}")
        expected = "a multiple of 8, so that 20 m pixels are whole"
        check_field(self.block_px % 8 == 0, self, "block_px", expected)

    def _check_mask(self) -> None:
        fits = not self.haze or {"B02", "B04"} <= set(self.bands)
        need(fits, "haze", "B02 and B04 among the bands, or null")
        if self.bright_override:
            hidden = {c for rule in self.mask for c in rule.classes}
            visible = sorted(set(self.bright_override.classes) - hidden)
            need(not visible, "bright_override", f"classes hidden by a mask rule, found {visible}")
        is_unique = len(set(self.fallback)) == len(self.fallback)
        fits = is_unique and set(self.fallback) <= FALLBACKS.keys()
        check_field(fits, self, "fallback", f"steps of {', '.join(FALLBACKS)}, each once")
        wider = "wider-season" in self.fallback
        need_months("wider_months", self.wider_months, at_least=int(wider))
        expected = "the step wider-season in fallback, or no months"
        need(wider or not self.wider_months, "wider_months", expected)
        repeated = sorted(set(self.wider_months) & set(self.months))
        expected = f"months that are not in months already, found {repeated}"
        need(not repeated, "wider_months", expected)
        adding = {"ungrown", "wider-season", "neighbour-year"} & set(self.fallback)
        fits = self.min_clear == 1 or (self.min_clear > 1 and bool(adding))
        expected = "1, or more and a fallback of ungrown, wider-season or neighbour-year"
        check_field(fits, self, "min_clear", expected)
        limit = self.max_clear_observations
        fits = limit is None or limit >= max(3, self.min_clear)
        expected = "at least 3 and min_clear, or null for all"
        check_field(fits, self, "max_clear_observations", expected)

    def _check_reducer(self) -> None:
        is_known = self.reducer in (*REDUCERS, *REMOVED_REDUCERS)
        check_field(is_known, self, "reducer", f"one of {', '.join(REDUCERS)}")
        for name in ("percentile", "best_pixel"):
            reducer = name.replace("_", "-")
            is_set = getattr(self, name) is not None
            expected = f"a value with reducer {reducer}, and with no other"
            need(is_set == (self.reducer == reducer), name, expected)
        fits = self.percentile is None or 0 <= self.percentile <= 100
        check_field(fits, self, "percentile", "0..100")
        needed = {"max-ndvi": {"B04", "B08"}, "best-pixel": {"B02", "B04"}}.get(self.reducer, set())
        expected = f"{' and '.join(sorted(needed))} for reducer {self.reducer}"
        need(needed <= set(self.bands), "bands", expected)

    @property
    def layers(self) -> dict[str, CompositeLayer]:
        """Layers of the composite next to `reflectance`, by name."""
        names = ["clear_count", "quality"]
        if self.reducer == "geomedian":
            names += ["emad", "smad", "bcmad"]
        if self.reducer in ("medoid", "best-pixel", "max-ndvi"):
            names.append("day_of_year")
        return {name: LAYERS[name] for name in names}
