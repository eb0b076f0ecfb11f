"""Check each scene's decided offset in the pixels. All scenes must agree about the ground.

Providers' flags are wrong on some scenes, and for months at a time. See Element 84's issues 66 and
71 in earth-search and 33 in cirrus-earth-search. A stored number is reflectance x 10000, with or
without 1000 on top. The pixels show the difference in four steps:

    step      Measure the scene's excess brightness over the lower quartile of the other scenes. Use
              pixels clear in both, with all bands moved alike to within 300. Take their median if
              their interquartile range is at most 300. A wrong offset moves all bands of all pixels
              by 1000. Haze, snow, shadow and seasons move bands differently. So scenes form groups
              1000 apart. A veil of cloud may move all bands alike if no band is short-wave
              infrared. But a veil reduces the ground's contrast, and an offset does not.
    level     Decide the level of the darkest group. It carries 0 if its darkest ground, less 1000,
              would be darker than black. This holds for any number of scenes. A single group
              carries 1000 if there is vegetation but nothing darker than 0.1, as leaves are. If
              neither test decides (bright desert, for example), choose the level contradicting the
              fewest decisions. If it contradicts more than a quarter, give no answer.
    dark      A scene without a step (cloud, snow, or a single scene) carries 0 if some of it, less
              1000, would be darker than black.
    overpass  Compare remaining scenes with another tile of their overpass, over the same ground or
              cloud. The two differ by 0 or by 1000, and then the brighter one carries 1000.

An all-cloud scene without a usable neighbour cannot be checked. Its step stays None, and it counts
as no conflict. The same applies to scenes with an impossible result. They have another fault.

The check needs a blue or red band. Only these have dark ground in every season. Without one of
them, every step stays None.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pystac

from minecube.arrays import Bool, Float32, Float64, Int64, UInt16
from minecube.errors import SceneError
from minecube.scenes.looks import CLEAR, Look

log = logging.getLogger(__name__)

CONFLICT_POLICIES = ("warn", "fix", "drop", "fail")
"""Treatment of a scene in conflict.

warn: keep it. fix: read it with the other offset. drop: leave it out. fail: fail the site-year.
"""
OFFSET = 1000
_VEGETATION = 4
# Leaves and water absorb blue and red light, so some ground stays below 0.07 there in every season.
# Such ground proves an offset of 0. Leaves reflect 0.2 to 0.5 in the near infrared and up to 0.1 in
# green. Short-wave infrared is dark over open water only. In these bands growth and drying may
# brighten all fields by as much as an offset does.
_DARK_BANDS = frozenset({"B01", "B02", "B04"})
# Measured on 11 simulated archives with 5040 scenes and 5 to 60 % wrong flags. No correct scene is
# reported with _MOST_SPREAD 200 to 400, _TOLERANCE 200 to 300, _FEWEST_PIXELS 10 to 40 or _BLACK
# -400 to -200. Hardly fewer wrong scenes are found.
_MOST_SPREAD = 300  # cloud brightening B12 by 1000 brightens B02 by 2400
# 98 % of right steps lie in -60 to 250. With 400, thin cloud gives false conflicts.
_TOLERANCE = 250
_CONTRAST = 0.87  # contrast left by a veil adding 750 is less: (1 - 0.075) ** 2
_FEWEST_PIXELS = 20  # pixels needed for a comparison
_BLACK = -300  # reflectance x 10000; correct water and shade may lie below 0
_LEAF = 1000  # vegetation: upper limit in blue or red
_GREEN = 0.05  # vegetation: least share of the ground
_MOST_WRONG = 0.25  # share of wrong decisions, if only the decisions can give the level
_ROUNDS = 4  # of comparing and moving; enough even if every offset is wrong


@dataclass(frozen=True, kw_only=True)
class OffsetCheck:
    """Result of the pixel check for one scene's offset."""

    scene: str
    offset: int
    """As decided by source, baseline and flags."""
    step: float | None
    """Excess brightness over the place, reflectance x 10000.

    Near 0 for a right offset, None if unknown.
    """
    conflict: bool
    should_be: int | None
    """The offset in agreement with the pixels. None without a conflict."""

    def __str__(self) -> str:
        return (
            f"{self.scene}: offset {self.offset} contradicts its pixels, "
            f"{self.step:+.0f} against the scenes around it; {self.should_be} would fit"
        )


def check_offsets(scenes: Sequence[pystac.Item], look: Look) -> list[OffsetCheck]:
    """Check the offset of each scene, in the given order, from a coarse look.

    All steps stay None if the look has fewer than two bands, or neither a blue nor a red band.
    """
    offsets = np.array([int(s.properties["minecube:offset"]) for s in scenes])
    carried, excess = np.full((2, len(scenes)), np.nan)
    if scenes and len(look.bands) > 1 and not _DARK_BANDS.isdisjoint(look.bands):
        datatakes = [s.properties["minecube:datatake"] for s in scenes]
        carried, excess = estimate_carried(look.stored, look.scl, offsets, datatakes)
    return [
        _compare(*scene_estimate)
        for scene_estimate in zip(scenes, offsets.tolist(), carried, excess + offsets, strict=True)
    ]


def _compare(scene: pystac.Item, offset: int, carried: float, step: float) -> OffsetCheck:
    """Compare the decided offset with the number carried by the pixels, NaN if unknown."""
    if not np.isfinite(carried):
        return OffsetCheck(scene=scene.id, offset=offset, step=None, conflict=False, should_be=None)
    conflict = bool(carried != -offset)
    return OffsetCheck(
        scene=scene.id,
        offset=offset,
        step=round(float(step), 1),
        conflict=conflict,
        should_be=-int(carried) if conflict else None,
    )


def resolve_conflicts(
    scenes: Sequence[pystac.Item], checks: Sequence[OffsetCheck], policy: str
) -> list[pystac.Item]:
    """Apply the policy to scenes in conflict, and log a warning for each.

    Raises:
        SceneError: the policy is `fail` and there is a conflict, or no scene is left.
    """
    conflicts = [c for c in checks if c.conflict]
    outcome = {"warn": "kept as it is", "fix": "mended", "drop": "left out"}.get(policy, policy)
    for check in conflicts:
        log.warning("%s (%s)", check, outcome)
    if conflicts and policy == "fail":
        raise SceneError(
            f"{len(conflicts)} of {len(scenes)} scenes have an offset that contradicts "
            f"their pixels, first {conflicts[0]}; "
            "choose warn, fix or drop with --on-offset-conflict"
        )
    resolved = []
    for scene, check in zip(scenes, checks, strict=True):
        if not check.conflict or policy == "warn":
            resolved.append(scene)
        elif policy == "fix":
            mended = scene.clone()
            mended.properties["minecube:offset"] = check.should_be
            mended.properties["minecube:offset_reason"] += (
                f"; but its pixels say {check.should_be} (step {check.step})"
            )
            resolved.append(mended)
    if conflicts and not resolved:
        raise SceneError(
            f"the offsets of all {len(scenes)} scenes contradict their pixels, "
            f"first {conflicts[0]}; choose warn or fix with --on-offset-conflict"
        )
    return resolved


def list_conflicts(checks: Sequence[OffsetCheck]) -> list[dict[str, Any]]:
    """Return the conflicts as plain JSON, for provenance."""
    return [
        {"scene": c.scene, "offset": c.offset, "step": c.step, "should_be": c.should_be}
        for c in checks
        if c.conflict
    ]


def estimate_carried(
    stored: Float32, scl: UInt16, offsets: Int64, overpass: Sequence[str]
) -> tuple[Float64, Float64]:
    """Estimate the number on top of reflectance in each scene, 0 or 1000, by the module's rules.

    Args:
        stored: Array [scene, band, pixel], two bands or more, NaN if not observed.
        scl: Array [scene, pixel].
        offsets: As decided, 0 or -1000.
        overpass: Equal for scenes of one overpass.

    Returns:
        The number per scene, and its brightness above the place without offset. NaN if unknown.
    """
    clear = np.isin(scl, CLEAR) & np.isfinite(stored[:, 0])
    dark = np.array([_measure_darkest(s) for s in stored])
    black = dark < OFFSET + _BLACK
    level, step = group_levels(stored, clear, black, -offsets // OFFSET)
    grouped = np.isfinite(level)
    carried, excess = np.full((2, len(stored)), np.nan)
    base = 0.0
    if grouped.any():
        level -= np.nanmin(level)
        comparable = clear & grouped[:, None]
        dates = comparable.sum(axis=0)
        base = _measure_darkest(
            _lower_quartile(_sort_clear(_subtract_level(stored, level), comparable), dates)
        )
        green = 2 * ((scl == _VEGETATION) & comparable).sum(axis=0) > dates
        green_share = green.sum() / max((dates > 0).sum(), 1)
        shift = decide_lowest_level(base, green_share, level[grouped], offsets[grouped])
        base -= OFFSET * np.nan_to_num(shift)
        carried = OFFSET * (level + shift)
        excess = carried + step
        carried[black & (carried > 0)] = np.nan  # the scene's own pixels contradict each other
    impossible = np.isfinite(carried) & ~np.isin(carried, (0, OFFSET))
    carried[impossible] = np.nan
    lone = black & np.isnan(excess)
    carried[lone] = 0
    excess[lone] = dark[lone] - np.nan_to_num(base)
    _fill_in_by_overpass(stored, overpass, carried, excess)
    return carried, np.where(np.isfinite(carried), excess, np.nan)


def group_levels(
    stored: Float32, clear: Bool, black: Bool, decided: Int64
) -> tuple[Float64, Float64]:
    """Group scenes by brightness, in thousands, and return each scene's step from its group.

    Levels start from the decisions, but from 0 if less 1000 would be darker than black.
    Unknown scenes have NaN.
    """
    level = np.where(black, 0, decided).astype(np.float64)
    for _ in range(_ROUNDS):
        step = measure_steps(_subtract_level(stored, level), clear)
        thousands = np.rint(step / OFFSET)
        is_clean = np.abs(step - OFFSET * thousands) <= _TOLERANCE
        moves = is_clean & (thousands == 1)
        if not moves.any():  # moving both ways at once would swap two scenes forever
            moves = is_clean & (thousands == -1)
        if not moves.any():
            break
        level[moves] += thousands[moves]
    return np.where((np.abs(step) <= _TOLERANCE) | (black & np.isnan(step)), level, np.nan), step


def measure_steps(ground: Float32, clear: Bool) -> Float64:
    """Return each scene's excess brightness over the other scenes, for [scene, band, pixel].

    NaN marks scenes with too few comparable pixels, too much spread, or a veil.
    """
    steps = np.full(len(ground), np.nan)
    if len(ground) < 2:
        return steps
    ranked = _sort_clear(ground, clear)
    counts = clear.sum(axis=0)
    quartile = _lower_quartile(ranked, counts - 1)
    next_rank = _lower_quartile(ranked, counts - 1, further=1)
    for n, scene in enumerate(ground):
        # The lower quartile without this scene. A scene at or below it shifts it by one rank.
        usual = np.where(scene <= quartile, next_rank, quartile)
        excess = np.where(clear[n] & (counts > 1), scene - usual, np.float32(np.nan))
        alike = np.ptp(excess, axis=0) <= _MOST_SPREAD
        if alike.sum() >= _FEWEST_PIXELS:
            low, median, high = np.percentile(excess[:, alike].mean(axis=0), (25, 50, 75))
            lacks_contrast = scene[:, alike].std() < _CONTRAST * usual[:, alike].std()
            is_veiled = median > _TOLERANCE and lacks_contrast
            if high - low <= _MOST_SPREAD and not is_veiled:
                steps[n] = median
    return steps


def decide_lowest_level(dark: float, green: float, level: Float64, offsets: Int64) -> float:
    """Return the number carried by the lowest group, in thousands, or NaN if unknown.

    Args:
        dark: The darkest ground, assuming an offset of 0 in the lowest group.
        green: Share of vegetation in the ground.
        level: The group of each scene, the lowest being 0.
        offsets: As decided.
    """
    if dark < OFFSET + _BLACK:
        return float((dark - _BLACK) // OFFSET)
    if dark >= _LEAF and green >= _GREEN and not level.any():
        return 1.0
    shifts = (0.0, 1.0, -1.0)
    wrong = [float(np.mean(offsets != -OFFSET * (level + shift))) for shift in shifts]
    if min(wrong) > _MOST_WRONG:
        return np.nan
    return shifts[wrong.index(min(wrong))]


def _fill_in_by_overpass(
    stored: Float32, overpass: Sequence[str], carried: Float64, excess: Float64
) -> None:
    """Fill in unknown scenes from other scenes of the overpass, in place.

    Two rounds let a scene learn from another by way of a third.
    """
    pairs = [
        (a, b)
        for a, b in itertools.permutations(range(len(stored)), 2)
        if overpass[a] == overpass[b]
    ]
    differences = {
        (a, b): _measure_difference(stored[a], stored[b]) for a, b in pairs if np.isnan(carried[a])
    }
    for _, ((a, b), difference) in itertools.product(range(2), differences.items()):
        if np.isnan(difference) or np.isfinite(carried[a]):
            continue
        if round(difference / OFFSET) > 0:
            carried[a] = OFFSET
            excess[a] = difference
        elif round(difference / OFFSET) < 0:
            carried[a] = 0
            excess[a] = 0
        elif np.isfinite(carried[b]):
            carried[a] = carried[b]
            excess[a] = excess[b] + difference


def _measure_difference(scene: Float32, neighbour: Float32) -> float:
    """Return one scene's excess over another of its overpass, about -1000, 0 or 1000, else NaN."""
    common = np.isfinite(scene[0]) & np.isfinite(neighbour[0])
    if common.sum() < _FEWEST_PIXELS:
        return np.nan
    by_band = np.median(scene[:, common] - neighbour[:, common], axis=1)
    thousands = np.clip(np.rint(by_band.mean() / OFFSET), -1, 1)
    if (np.abs(by_band - OFFSET * thousands) > _TOLERANCE).any():
        return np.nan
    return float(by_band.mean())


def _subtract_level(stored: Float32, level: Float64) -> Float32:
    """Subtract each scene's level from [scene, band, pixel]. NaN levels give NaN."""
    return stored - OFFSET * level.astype(np.float32)[:, None, None]


def _sort_clear(ground: Float32, clear: Bool) -> Float32:
    """Sort the clear values of [scene, band, pixel] along the scenes, NaN last."""
    return np.sort(np.where(clear[:, None], ground, np.float32(np.nan)), axis=0)


def _lower_quartile(ranked: Float32, counts: Int64, further: int = 0) -> Float32:
    """Return the lower quartile of the first `counts` [pixel] ranks, as [band, pixel].

    `further` selects a later rank.
    """
    rank = np.minimum(np.maximum(counts - 1, 0) // 4 + further, len(ranked) - 1)
    quartile: Float32 = np.take_along_axis(ranked, rank[None, None], axis=0)[0]
    return quartile


def _measure_darkest(stored: Float32) -> float:
    """Return the lowest band's 2nd percentile of [band, pixel], NaN for too few pixels."""
    observed = np.isfinite(stored[0])
    if observed.sum() < _FEWEST_PIXELS:
        return np.nan
    return float(np.percentile(stored[:, observed], 2, axis=1).min())
