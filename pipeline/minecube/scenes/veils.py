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
import pystac

from minecube.arrays import Float32, UInt16
from minecube.catalog import HazeTest
from minecube.scenes.looks import CLEAR, Look

log = logging.getLogger(__name__)

SCL_FAULT = "minecube:scl"
"""Item property with the error of the whole scene's classification: `veiled` or `no cirrus`."""
_CIRRUS = 10
_LEAST_CIRRUS = 0.2  # least share of cirrus in the observed pixels for the test of false cirrus
_FEWEST_PIXELS = 50  # pixels needed to judge a scene
_FEWEST_DATES = 3  # clear dates needed per pixel
_VARIATION = np.float32(0.1)
"""Variation of clear ground's brightness between dates, as a share."""
_EXPLANATIONS = {
    "veiled": "SCL misses thin cloud over the whole scene",
    "no cirrus": "SCL calls clear ground cirrus",
}


def mark_wrong_classifications(
    scenes: Sequence[pystac.Item], look: Look, rule: HazeTest
) -> list[pystac.Item]:
    """Judge scenes by `rule`, and log each wrong classification.

    Returns:
        The scenes, with copies in place of wrong ones. The copies have the error in `SCL_FAULT`.
    """
    verdicts = [""] * len(scenes)
    if {"B02", "B04"} <= set(look.bands) and rule.date_excess and scenes:
        offsets = np.array([scene.properties["minecube:offset"] for scene in scenes], np.float32)
        blue = look.stored[:, look.bands.index("B02")] + offsets[:, None]
        red = look.stored[:, look.bands.index("B04")] + offsets[:, None]
        haze = ((blue - red / 2) / 1e4).astype(np.float32)
        days = [scene.properties["minecube:solar_day"] for scene in scenes]
        verdicts = judge(haze, look.scl, days, rule.date_excess)
    judged_scenes = []
    for scene, verdict in zip(scenes, verdicts, strict=True):
        if verdict:
            log.info("%s: %s (mended)", scene.id, _EXPLANATIONS[verdict])
            scene = scene.clone()
            scene.properties[SCL_FAULT] = verdict
        judged_scenes.append(scene)
    return judged_scenes


def list_wrong_classifications(scenes: Sequence[pystac.Item]) -> list[dict[str, Any]]:
    """Return the wrong classifications as plain JSON, for provenance."""
    return [
        {"scene": s.id, "scl": s.properties[SCL_FAULT]} for s in scenes if SCL_FAULT in s.properties
    ]


def judge(haze: Float32, scl: UInt16, days: Sequence[str], date_excess: float) -> list[str]:
    """Return `veiled`, `no cirrus` or an empty text for each scene.

    Args:
        haze: [scene, pixel], blue - red / 2, reflectance, NaN if not observed.
        scl: [scene, pixel].
        days: solar day of each scene, YYYY-MM-DD. Scenes of one day count once.
        date_excess: largest median excess of a correct date.
    """
    observed = np.isfinite(haze)
    clear = np.isin(scl, CLEAR) & observed
    cirrus = (scl == _CIRRUS) & observed
    calendar, day_of = np.unique(np.asarray(days, dtype=str), return_inverse=True)
    haze_by_day = np.full((len(calendar), haze.shape[1]), np.nan, np.float32)
    for day, clear_haze in zip(day_of, np.where(clear, haze, np.float32(np.nan)), strict=True):
        haze_by_day[day] = np.fmin(haze_by_day[day], clear_haze)
    lowest, highest = _usual_range(haze_by_day)
    excess = haze - np.clip(haze, lowest[day_of], highest[day_of])
    judgeable = (np.isfinite(haze_by_day).sum(axis=0) >= _FEWEST_DATES) & np.isfinite(excess)
    verdicts = []
    for n in range(len(haze)):
        has_cirrus = cirrus[n].sum() > _LEAST_CIRRUS * observed[n].sum()
        excess_in_cirrus = excess[n, cirrus[n] & judgeable[n]]
        excess_in_clear = excess[n, clear[n] & judgeable[n]]
        if has_cirrus and _is_false_cirrus(excess_in_cirrus, date_excess):
            verdicts.append("no cirrus")
        elif _is_veiled(excess_in_clear, date_excess):
            verdicts.append("veiled")
        else:
            verdicts.append("")
    return verdicts


def _is_false_cirrus(excess: Float32, date_excess: float) -> bool:
    """Return whether pixels called cirrus have the haze of clear ground."""
    if len(excess) < _FEWEST_PIXELS:
        return False
    median, high = np.percentile(excess, (50, 95))
    return bool(median < date_excess and high < 2 * date_excess)


def _is_veiled(excess: Float32, date_excess: float) -> bool:
    """Return whether pixels called clear have the haze of thin cloud, evenly or in streaks."""
    if len(excess) < _FEWEST_PIXELS:
        return False
    low, median, high = np.percentile(excess, (25, 50, 75))
    is_streaked = high > date_excess and high - low > 2 * date_excess
    return bool(median > date_excess or is_streaked)


def _usual_range(haze: Float32) -> tuple[Float32, Float32]:
    """Return the lowest and highest usual index of each pixel on each day, [day, pixel].

    `haze` is [day, pixel], NaN if not clear. The results are NaN if no day is clear.
    """
    looks = np.isfinite(haze).sum(axis=0)
    ranked = np.sort(haze, axis=0)  # NaN last
    quartile = np.take_along_axis(ranked, np.maximum(looks - 1, 0)[None] // 4, axis=0)
    earlier = _lower_of_two_earlier(haze)
    later = _lower_of_two_earlier(haze[::-1])[::-1]
    lowest = np.fmin(quartile, np.fmin(earlier, later))
    highest = np.fmax(quartile, np.fmax(earlier, later))
    return lowest - _VARIATION * np.abs(lowest), highest + _VARIATION * np.abs(highest)


def _lower_of_two_earlier(haze: Float32) -> Float32:
    """Return the lower index of the two clear days before each day, [day, pixel]."""
    lower = np.full_like(haze, np.nan)
    newest, older = np.full((2, haze.shape[1]), np.nan, np.float32)
    for day, today in enumerate(haze):
        lower[day] = np.fmin(newest, older)
        clear = np.isfinite(today)
        older = np.where(clear, newest, older)
        newest = np.where(clear, today, newest)
    return lower
