"""Dates on which the scene classification errs as a whole: a veil that it does not see, cirrus where there is none.

Sen2Cor calls thin cirrus clear on some dates, and clear ground cirrus on others, the clearest of a season among them. Both
show in the excess of haze, blue - red / 2 above the place's lower quartile of the year where SCL calls it clear (see
`HazeTest`), over a whole date:

    veiled      Over what SCL calls clear, the median excess is above `date_excess`; or its spread, between the lower and the
                upper quartile, is above twice as much. Bands see high cloud at places of their own, since they look from
                angles of their own, so that streaks of it are blue here and red there.
    no cirrus   Over what SCL calls cirrus, the excess has a median below `date_excess`, and 95 % of it below twice as much.

A scene that shows too few pixels is not told, and keeps its classification.
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

log = logging.getLogger(__name__)

SCL_IS = "minecube:scl"
"""Item property: `veiled` or `no cirrus`, how the classification errs over the whole scene."""
_CIRRUS = 10
_LEAST = 0.2  # share of the observed pixels that must be called cirrus before one asks whether they are
_ENOUGH, _LOOKS = 50, 3  # pixels that tell, each clear in so many scenes
_MEANT = {"veiled": "SCL misses thin cloud over the whole scene", "no cirrus": "SCL calls clear ground cirrus"}


def judged(scenes: Sequence[pystac.Item], look: Look, rule: HazeTest) -> list[pystac.Item]:
    """The scenes, those whose classification errs as a whole as copies that say how (`SCL_IS`), each with a line in the log."""
    verdicts = [""] * len(scenes)
    if {"B02", "B04"} <= set(look.bands) and rule.date_excess and scenes:
        offsets = np.array([scene.properties["minecube:offset"] for scene in scenes], np.float32)
        blue, red = (look.stored[:, look.bands.index(band)] + offsets[:, None] for band in ("B02", "B04"))
        verdicts = judge(((blue - red / 2) / 1e4).astype(np.float32), look.scl, rule.date_excess)
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
    """What was judged as plain JSON, for provenance: the errors alone."""
    return [{"scene": s.id, "scl": s.properties[SCL_IS]} for s in scenes if SCL_IS in s.properties]


def judge(haze: npt.NDArray[np.float32], scl: npt.NDArray[np.uint16], most: float) -> list[str]:
    """`veiled`, `no cirrus` or nothing of each scene.

    Args:
        haze: [scene, pixel], blue - red / 2, reflectance, NaN where not observed.
        scl: [scene, pixel].
        most: median excess of a date that is trusted.
    """
    observed = np.isfinite(haze)
    clear = np.isin(scl, CLEAR) & observed
    looks = clear.sum(axis=0)
    ranked = np.sort(np.where(clear, haze, np.float32(np.nan)), axis=0)
    usual = np.take_along_axis(ranked, np.maximum(looks - 1, 0)[None] // 4, axis=0)[0]
    excess, told = haze - usual, looks >= _LOOKS
    verdicts = []
    for above, is_clear, is_cirrus, seen in zip(excess, clear, (scl == _CIRRUS) & observed, observed, strict=True):
        verdict = ""
        if is_cirrus.sum() > _LEAST * seen.sum() and (is_cirrus & told).sum() >= _ENOUGH:
            middle, high = np.percentile(above[is_cirrus & told], (50, 95))
            verdict = "no cirrus" if middle < most and high < 2 * most else ""
        if not verdict and (is_clear & told).sum() >= _ENOUGH:
            low, middle, high = np.percentile(above[is_clear & told], (25, 50, 75))
            verdict = "veiled" if middle > most or high - low > 2 * most else ""
        verdicts.append(verdict)
    return verdicts
