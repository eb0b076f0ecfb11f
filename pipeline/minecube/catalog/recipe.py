"""How a year of scenes becomes one image: masks, fallbacks, reducers, and the layers that come of them."""

from __future__ import annotations

from dataclasses import dataclass

from minecube.catalog.fields import BANDS, need, need_months

FALLBACKS = {"ungrown": 2, "thin": 3, "cloud": 4, "wider-season": 5, "neighbour-year": 6}
"""Steps that a pixel without enough clear observations may take, and their numbers in the `quality` layer."""
QUALITY = (
    "no observation",
    "clear",
    "clear before the mask was grown",
    "thin cloud or shadow",
    "cloud in every observation",
    "clear in the wider season",
    "clear in a neighbouring year",
)
"""What the numbers of the `quality` layer mean; anything above 1 is a fallback, for want of a clear observation."""
REDUCERS = ("median", "percentile", "geomedian", "medoid", "best-pixel", "max-ndvi")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A variable [y, x] of a composite, and [year, y, x] of a cube."""

    dtype: str
    long_name: str
    units: str = "1"


LAYERS = {
    "clear_count": Layer(dtype="uint16", long_name="clear observations behind each pixel"),
    "quality": Layer(dtype="uint8", long_name="how a pixel came about"),
    "emad": Layer(dtype="float32", long_name="median Euclidean distance of the observations from their geomedian, reflectance"),
    "smad": Layer(dtype="float32", long_name="the same, cosine distance"),
    "bcmad": Layer(dtype="float32", long_name="the same, Bray-Curtis distance"),
    "day_of_year": Layer(dtype="uint16", long_name="day of the year of the one observation taken", units="d"),
}
"""Of integers 0 is none, of floats NaN."""


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """Which SCL classes hide the ground, and how far their flags are mistrusted."""

    classes: tuple[int, ...]
    open_m: int = 0
    """Flagged specks narrower than this are dropped first: roofs, bright roads."""
    dilate_m: int = 0
    """Then the rest grows by this radius: the halo that SCL misses."""
    months: tuple[int, ...] = tuple(range(1, 13))
    """Calendar months in which the rule holds: snow in January may be the ground, in July it is not."""

    def __post_init__(self) -> None:
        need(self.classes and all(1 <= c <= 11 for c in self.classes), "classes", f"SCL 1..11, found {self.classes}")
        need_months("months", self.months)
        for field, value, most in (("open_m", self.open_m, 500), ("dilate_m", self.dilate_m, 1000)):
            fits = 0 <= value <= most and value % 20 == 0
            need(fits, field, f"multiples of the 20 m of SCL's pixels up to {most}, found {value}")


@dataclass(frozen=True, kw_only=True)
class BrightOverride:
    """When a pixel that SCL calls cloud is believed to be bright bare ground instead."""

    classes: tuple[int, ...] = (8, 9)
    """SCL classes that bright ground is mistaken for."""
    flagged: float = 0.6
    """Share of the dates that are clear around it on which the pixel is flagged nevertheless."""
    around: float = 0.1
    """A date is clear around a pixel where at most this share of its neighbourhood is flagged."""
    window_m: int = 600
    """Half width of the neighbourhood."""

    def __post_init__(self) -> None:
        need(self.classes and all(1 <= c <= 11 for c in self.classes), "classes", f"SCL 1..11, found {self.classes}")
        need(0 < self.flagged <= 1, "flagged", f"a share above 0 and up to 1, found {self.flagged}")
        need(0 <= self.around < 1, "around", f"a share from 0 to below 1, found {self.around}")
        need(0 < self.window_m <= 5000, "window_m", f"1..5000 metres, found {self.window_m}")


@dataclass(frozen=True, kw_only=True)
class HazeTest:
    """When a clear-looking observation is believed to be under thin cloud: blue brighter than red can explain."""

    excess: float = 0.025
    """By how much blue - red / 2 exceeds the pixel's own lower quartile of the year; reflectance."""
    window_m: int = 60
    """Side of the window over which the excess is averaged."""
    date_excess: float | None = None
    """The median excess over a whole date above which it is under thin cloud, and below which SCL's cirrus is none; None asks
    about no date."""

    def __post_init__(self) -> None:
        for field, value in (("excess", self.excess), ("date_excess", self.date_excess)):
            need(value is None or 0 < value < 1, field, f"a reflectance above 0 and below 1, found {value}")
        need(0 < self.window_m <= 500, "window_m", f"1..500 metres, found {self.window_m}")


@dataclass(frozen=True, kw_only=True)
class SecondOpinion:
    """A network's mask beside SCL's: what either calls cloud or shadow is not clear."""

    weights: tuple[str, ...]
    """Networks for omnicloudmask, exported by torch.export, neither of which is shipped; relative to `--catalog`."""
    classes: tuple[int, ...] = (1, 2, 3)
    """Of omnicloudmask, that hide the ground: 1 thick cloud, 2 thin cloud, 3 shadow."""
    dilate_m: int = 40
    """By which they grow."""

    def __post_init__(self) -> None:
        need(self.weights, "weights", "files of models, found none")
        need(self.classes and all(1 <= c <= 3 for c in self.classes), "classes", f"1..3, found {self.classes}")
        fits = 0 <= self.dilate_m <= 1000 and self.dilate_m % 20 == 0
        need(fits, "dilate_m", f"a multiple of 20 m up to 1000, found {self.dilate_m}")


@dataclass(frozen=True, kw_only=True)
class BestPixel:
    """What makes one observation better than another: parts from 0 to 1, and how much each weighs."""

    day: int = 205
    """Of the year, the best one."""
    day_spread: float = 40.0
    """Days from it at which that part has fallen to exp(-1/2)."""
    cloud_distance_m: int = 1000
    """From cloud or shadow, beyond which more distance is no better."""
    opacity: float = 0.05
    """Excess of haze (reflectance) at which that part is 0."""
    day_weight: float = 1.0
    cloud_weight: float = 1.0
    opacity_weight: float = 1.0
    sharpness_weight: float = 0.5

    def __post_init__(self) -> None:
        need(1 <= self.day <= 366, "day", f"1..366, found {self.day}")
        need(self.day_spread > 0, "day_spread", f"days above 0, found {self.day_spread}")
        need(0 < self.cloud_distance_m <= 2000, "cloud_distance_m", f"metres above 0 up to 2000, found {self.cloud_distance_m}")
        need(0 < self.opacity < 1, "opacity", f"a reflectance above 0 and below 1, found {self.opacity}")
        weights = (self.day_weight, self.cloud_weight, self.opacity_weight, self.sharpness_weight)
        need(min(weights) >= 0 and sum(weights) > 0, "day_weight", f"weights of 0 or more, one above 0, found {weights}")


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What is done about scenes that lie beside the others."""

    most_px: float = 0.75
    """Shift in 10 m pixels beyond which `beyond` applies."""
    beyond: str = "shift"
    """record, drop, or shift it back."""

    def __post_init__(self) -> None:
        need(0 < self.most_px <= 5, "most_px", f"pixels above 0 up to 5, found {self.most_px}")
        need(self.beyond in ("record", "drop", "shift"), "beyond", f"record, drop or shift, found {self.beyond!r}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a composite is made."""

    id: str
    title: str
    bands: tuple[str, ...] = BANDS
    months: tuple[int, ...] = tuple(range(1, 13))
    """Calendar months whose scenes count."""
    max_cloud_cover: float = 100.0
    """Scenes cloudier than this over the whole tile (percent) are not read."""
    min_dates: int = 1
    """Fewest dates a year is made of; one with fewer is not built, and `audit` names it."""
    mask: tuple[MaskRule, ...] = ()
    bright_override: BrightOverride | None = None
    second_opinion: SecondOpinion | None = None
    """Needs B03, B04 and B08 among the bands."""
    haze: HazeTest | None = None
    """Needs B02 and B04 among the bands."""
    fallback: tuple[str, ...] = ("ungrown", "thin", "cloud")
    """What a pixel without enough clear observations is made of, in order: of `FALLBACKS`."""
    min_clear: int = 1
    """Clear observations under which a pixel takes the steps that are clear, too: ungrown, wider-season, neighbour-year."""
    wider_months: tuple[int, ...] = ()
    """The months of wider-season, on top of `months`."""
    max_clear_observations: int | None = None
    """Clear dates to read of a block, the clearest, spread over the season; all by default."""
    registration: Registration | None = None
    """Scenes are compared with each other before they are read; not by default."""
    reducer: str = "median"
    """How the clear observations of a pixel become one: of `REDUCERS`."""
    percentile: float | None = None
    """Of reducer percentile."""
    best_pixel: BestPixel | None = None
    """Of reducer best-pixel."""
    block_px: int = 1024
    """Side of a Dask block and of a Zarr shard; a multiple of chunk_px."""
    chunk_px: int = 128
    """Side of a Zarr chunk, the least that is read."""

    def __post_init__(self) -> None:
        unknown = [b for b in self.bands if b not in BANDS]
        need(self.bands and not unknown, "bands", f"bands of {', '.join(BANDS)}, found {', '.join(unknown) or 'none'}")
        need(list(self.bands) == [b for b in BANDS if b in self.bands], "bands", f"in the order {', '.join(BANDS)}, each once")
        need_months("months", self.months)
        need(0 < self.max_cloud_cover <= 100, "max_cloud_cover", f"percent above 0, found {self.max_cloud_cover}")
        need(self.min_dates >= 1, "min_dates", f"1 or more, found {self.min_dates}")
        self._check_mask()
        self._check_reducer()
        fits = self.chunk_px > 0 and self.block_px > 0 and self.block_px % self.chunk_px == 0
        need(fits, "block_px", f"a multiple of chunk_px, both above 0, found {self.block_px} and {self.chunk_px}")
        need(self.block_px % 8 == 0, "block_px", f"a multiple of 8, so that 20 m pixels are whole, found {self.block_px}")

    def _check_mask(self) -> None:
        for field, needed in (("haze", {"B02", "B04"}), ("second_opinion", {"B03", "B04", "B08"})):
            fits = not getattr(self, field) or needed <= set(self.bands)
            need(fits, field, f"{' and '.join(sorted(needed))} among the bands, or null")
        if self.bright_override:
            masked = {c for rule in self.mask for c in rule.classes}
            others = sorted(set(self.bright_override.classes) - masked)
            need(not others, "bright_override", f"classes that a mask rule hides, found {others}, which none does")
        unknown = [s for s in self.fallback if s not in FALLBACKS]
        expected = f"steps of {', '.join(FALLBACKS)}, each once"
        need(not unknown and len(set(self.fallback)) == len(self.fallback), "fallback", f"{expected}, found {self.fallback}")
        wider = "wider-season" in self.fallback
        need_months("wider_months", self.wider_months, at_least=1 if wider else 0)
        need(wider or not self.wider_months, "wider_months", "the step wider-season in fallback, or no months")
        both = sorted(set(self.wider_months) & set(self.months))
        need(not both, "wider_months", f"months that are not in months already, found {both}")
        adding = {"ungrown", "wider-season", "neighbour-year"} & set(self.fallback)
        fits = self.min_clear == 1 or (self.min_clear > 1 and bool(adding))
        need(fits, "min_clear", f"1, or more and a fallback of ungrown, wider-season or neighbour-year, found {self.min_clear}")
        most = self.max_clear_observations
        fits = most is None or most >= max(3, self.min_clear)
        need(fits, "max_clear_observations", f"at least 3 and min_clear, or null for all, found {most}")

    def _check_reducer(self) -> None:
        need(self.reducer in REDUCERS, "reducer", f"one of {', '.join(REDUCERS)}, found {self.reducer!r}")
        for name in ("percentile", "best_pixel"):
            used, set_to = self.reducer == name.replace("_", "-"), getattr(self, name)
            need(used == (set_to is not None), name, f"a value with reducer {name.replace('_', '-')}, and with no other")
        need(self.percentile is None or 0 <= self.percentile <= 100, "percentile", f"0..100, found {self.percentile}")
        needed = {"max-ndvi": {"B04", "B08"}, "best-pixel": {"B02", "B04"}}.get(self.reducer, set())
        need(needed <= set(self.bands), "bands", f"{' and '.join(sorted(needed))}, which reducer {self.reducer} looks at")

    @property
    def layers(self) -> dict[str, Layer]:
        """What a composite holds beside `reflectance`, by name."""
        names = ["clear_count", "quality"]
        names += ["emad", "smad", "bcmad"] if self.reducer == "geomedian" else []
        names += ["day_of_year"] if self.reducer in ("medoid", "best-pixel", "max-ndvi") else []
        return {name: LAYERS[name] for name in names}
