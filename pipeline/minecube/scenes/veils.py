"""Find dates with a wrong scene classification (SCL): missed thin cirrus, or false cirrus.

Sen2Cor calls thin cirrus clear on some dates. On others it calls clear ground cirrus, even on the
clearest date of a season. The haze index blue - red / 2 shows both (see `HazeTest`). A date's
excess is the part of its index outside the pixel's usual range:

    usual       From the lowest to the highest of three values, widened by a tenth. These are the
                lower quartile of all dates, the lower of the two dates before, and the lower of the
                two dates after. The tenth allows for sun, view and moisture. A veil passes, but
                changed ground stays changed, so a new pit is no veil.
    veiled      In pixels called clear, the median excess is above `date_excess`. Or the upper
                quartile is, and exceeds the lower quartile by more than twice as much. Each band
                sees high cloud from its own angle, so streaks are blue here and red there.
    no cirrus   In pixels called cirrus, the median excess is below `date_excess`, and 95 % of the
                excess is below twice as much.

A scene with too few comparable pixels keeps its classification.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac

from minecube.catalog import HazeTest
from minecube.scenes.looks import CLEAR, Look

Float32 = npt.NDArray[np.float32]

log = logging.getLogger(__name__)

SCL_IS = "minecube:scl"
"""Item property with the error of the whole scene's classification: `veiled` or `no cirrus`."""
_CIRRUS = 10
_LEAST = 0.2  # least share of cirrus in the observed pixels for the test of false cirrus
_ENOUGH = 50  # pixels needed to judge a scene
_LOOKS = 3  # clear dates needed per pixel
_VARIES = np.float32(0.1)
"""Variation of clear ground's brightness between dates, as a share."""
_MEANT = {
    "veiled": "SCL misses thin cloud over the whole scene",
    "no cirrus": "SCL calls clear ground cirrus",
}


def judged(scenes: Sequence[pystac.Item], look: Look, rule: HazeTest) -> list[pystac.Item]:
    """Judge scenes by `rule`, and log each wrong classification.

    Returns:
        The scenes, with copies in place of wrong ones. The copies have the error in `SCL_IS`.
    """
    verdicts = [""] * len(scenes)
    if {"B02", "B04"} <= set(look.bands) and rule.date_excess and scenes:
        offsets = np.array([scene.properties["minecube:offset"] for scene in scenes], np.float32)
        blue, red = (
            look.stored[:, look.bands.index(band)] + offsets[:, None] for band in ("B02", "B04")
        )
        haze = ((blue - red / 2) / 1e4).astype(np.float32)
        days = [scene.properties["minecube:solar_day"] for scene in scenes]
        verdicts = judge(haze, look.scl, days, rule.date_excess)
    done = []
    for scene, verdict in zip(scenes, verdicts, strict=True):
        if verdict:
            log.info("%s: %s (mended)", scene.id, _MEANT[verdict])
            marked = scene.clone()
            marked.properties[SCL_IS] = verdict
            done.append(marked)
        else:
            done.append(scene)
    return done


def as_rows(scenes: Sequence[pystac.Item]) -> list[dict[str, Any]]:
    """Return the wrong classifications as plain JSON, for provenance."""
    return [{"scene": s.id, "scl": s.properties[SCL_IS]} for s in scenes if SCL_IS in s.properties]


def judge(
    haze: Float32, scl: npt.NDArray[np.uint16], days: Sequence[str], most: float
) -> list[str]:
    """Return `veiled`, `no cirrus` or an empty text for each scene.

    Args:
        haze: [scene, pixel], blue - red / 2, reflectance, NaN if not observed.
        scl: [scene, pixel].
        days: solar day of each scene, YYYY-MM-DD. Scenes of one day count once.
        most: largest median excess of a correct date.
    """
    observed = np.isfinite(haze)
    clear = np.isin(scl, CLEAR) & observed
    calendar, day_of = np.unique(np.asarray(days, dtype=str), return_inverse=True)
    of_days = np.full((len(calendar), haze.shape[1]), np.nan, np.float32)
    for day, seen in zip(day_of, np.where(clear, haze, np.float32(np.nan)), strict=True):
        of_days[day] = np.fmin(of_days[day], seen)
    lowest, highest = _usual(of_days)
    excess = haze - np.clip(haze, lowest[day_of], highest[day_of])
    comparable = np.isfinite(of_days).sum(axis=0) >= _LOOKS
    verdicts = []
    for above, is_clear, is_cirrus, seen in zip(
        excess, clear, (scl == _CIRRUS) & observed, observed, strict=True
    ):
        judgeable = comparable & np.isfinite(above)
        verdict = ""
        if is_cirrus.sum() > _LEAST * seen.sum() and (is_cirrus & judgeable).sum() >= _ENOUGH:
            middle, high = np.percentile(above[is_cirrus & judgeable], (50, 95))
            verdict = "no cirrus" if middle < most and high < 2 * most else ""
        if not verdict and (is_clear & judgeable).sum() >= _ENOUGH:
            low, middle, high = np.percentile(above[is_clear & judgeable], (25, 50, 75))
            streaked = high > most and high - low > 2 * most
            verdict = "veiled" if middle > most or streaked else ""
        verdicts.append(verdict)
    return verdicts


def _usual(haze: Float32) -> tuple[Float32, Float32]:
    """Return the lowest and highest usual index of each pixel on each day, [day, pixel].

    Args:
        haze: [day, pixel], NaN if not clear.

    Returns:
        Two arrays, NaN if no day is clear.
    """
    looks = np.isfinite(haze).sum(axis=0)
    ranked = np.sort(haze, axis=0)  # NaN last
    quartile = np.take_along_axis(ranked, np.maximum(looks - 1, 0)[None] // 4, axis=0)
    before = _lower_of_two_earlier(haze)
    after = _lower_of_two_earlier(haze[::-1])[::-1]
    lowest = np.fmin(quartile, np.fmin(before, after))
    highest = np.fmax(quartile, np.fmax(before, after))
    return lowest - _VARIES * np.abs(lowest), highest + _VARIES * np.abs(highest)


def _lower_of_two_earlier(haze: Float32) -> Float32:
    """Return the lower index of the two clear days before each day, [day, pixel]."""
    lower = np.full_like(haze, np.nan)
    last, last_but_one = np.full((2, haze.shape[1]), np.nan, np.float32)
    for day, today in enumerate(haze):
        lower[day] = np.fmin(last, last_but_one)
        clear = np.isfinite(today)
        last_but_one = np.where(clear, last, last_but_one)
        last = np.where(clear, today, last)
    return lower
