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
import numpy.typing as npt
import pystac

from minecube.errors import SceneError
from minecube.scenes.looks import CLEAR, Look

log = logging.getLogger(__name__)

POLICIES = ("warn", "fix", "drop", "fail")
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
# reported with _ALIKE 200 to 400, _NEAR 200 to 300, _ENOUGH 10 to 40 or _BLACK -400 to -200. Hardly
# fewer wrong scenes are found.
_ALIKE = 300  # cloud brightening B12 by 1000 brightens B02 by 2400
_NEAR = 250  # 98 % of right steps lie in -60 to 250; with 400, thin cloud gives false conflicts
_CONTRAST = 0.87  # contrast left by a veil adding 750 is less: (1 - 0.075) ** 2
_ENOUGH = 20  # pixels needed for a comparison
_BLACK = -300  # reflectance x 10000; correct water and shade may lie below 0
_LEAF, _GREEN = 1000, 0.05  # vegetation: upper limit in blue or red, least share of the ground
_MOST = 0.25  # share of wrong decisions, if only the decisions can give the level
_ROUNDS = 4  # of comparing and moving; enough even if every offset is wrong

Float = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
UInt16 = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Check:
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
        there = f"{self.step:+.0f} against the scenes around it"
        return f"{self.scene}: offset {self.offset} contradicts its pixels, {there}; {self.should_be} would fit"


def check_offsets(scenes: Sequence[pystac.Item], look: Look) -> list[Check]:
    """Check the offset of each scene, in the given order, from a coarse look.

    All steps stay None if the look has fewer than two bands, or neither a blue nor a red band.
    """
    offsets = np.array([int(s.properties["minecube:offset"]) for s in scenes])
    carried, above = np.full((2, len(scenes)), np.nan)
    if scenes and len(look.bands) > 1 and not _DARK_BANDS.isdisjoint(look.bands):
        takes = [s.properties["minecube:datatake"] for s in scenes]
        carried, above = carried_by(look.stored, look.scl, offsets, takes)
    checks = []
    for scene, offset, carries, step in zip(
        scenes, offsets.tolist(), carried, above + offsets, strict=True
    ):
        conflict = bool(np.isfinite(carries) and carries != -offset)
        checks.append(
            Check(
                scene=scene.id,
                offset=offset,
                step=round(float(step), 1) if np.isfinite(carries) else None,
                conflict=conflict,
                should_be=-int(carries) if conflict else None,
            )
        )
    return checks


def resolve(
    scenes: Sequence[pystac.Item], checks: Sequence[Check], policy: str
) -> list[pystac.Item]:
    """Apply the policy to scenes in conflict, and log a warning for each.

    Raises:
        SceneError: the policy is `fail` and there is a conflict, or no scene is left.
    """
    conflicts = [c for c in checks if c.conflict]
    for check in conflicts:
        log.warning(
            "%s (%s)",
            check,
            {"warn": "kept as it is", "fix": "mended", "drop": "left out"}.get(policy, policy),
        )
    if conflicts and policy == "fail":
        raise SceneError(
            f"{len(conflicts)} of {len(scenes)} scenes have an offset that contradicts their pixels, first {conflicts[0]}; "
            "see --on-offset-conflict for what else can be done with them"
        )
    kept = []
    for scene, check in zip(scenes, checks, strict=True):
        if not check.conflict or policy == "warn":
            kept.append(scene)
        elif policy == "fix":
            mended = scene.clone()
            mended.properties["minecube:offset"] = check.should_be
            mended.properties["minecube:offset_reason"] += (
                f"; but its pixels say {check.should_be} (step {check.step})"
            )
            kept.append(mended)
    if conflicts and not kept:
        raise SceneError(
            f"the offsets of all {len(scenes)} scenes contradict their pixels, first {conflicts[0]}; see --on-offset-conflict"
        )
    return kept


def as_rows(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Return the conflicts as plain JSON, for provenance."""
    return [
        {"scene": c.scene, "offset": c.offset, "step": c.step, "should_be": c.should_be}
        for c in checks
        if c.conflict
    ]


def carried_by(
    stored: Float, scl: UInt16, offsets: Ints, overpass: Sequence[str]
) -> tuple[Floats, Floats]:
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
    dark = np.array([_darkest(s) for s in stored])
    black = dark < OFFSET + _BLACK
    level, step = levels(stored, clear, black, -offsets // OFFSET)
    told, (carried, above), base = np.isfinite(level), np.full((2, len(stored)), np.nan), 0.0
    if told.any():
        level -= np.nanmin(level)
        use = clear & told[:, None]
        base = _darkest(_quartile(_ranked(_less(stored, level), use), use.sum(axis=0)))
        green = 2 * ((scl == _VEGETATION) & use).sum(axis=0) > use.sum(axis=0)
        shift = lowest(
            base, green.sum() / max(use.any(axis=0).sum(), 1), level[told], offsets[told]
        )
        base -= OFFSET * np.nan_to_num(shift)
        carried = OFFSET * (level + shift)
        above = carried + step
        carried[black & (carried > 0)] = np.nan  # the scene's own pixels contradict each other
    impossible = np.isfinite(carried) & ~np.isin(carried, (0, OFFSET))
    carried[impossible] = np.nan
    lone = black & np.isnan(above)
    carried[lone], above[lone] = 0, dark[lone] - np.nan_to_num(base)
    _tell_by_overpass(stored, overpass, carried, above)
    return carried, np.where(np.isfinite(carried), above, np.nan)


def levels(stored: Float, clear: Bool, black: Bool, decided: Ints) -> tuple[Floats, Floats]:
    """Group scenes by brightness, in thousands, and return each scene's step from its group.

    Levels start from the decisions, but from 0 if less 1000 would be darker than black.
    Unknown scenes have NaN.
    """
    level = np.where(black, 0, decided).astype(np.float64)
    for _ in range(_ROUNDS):
        step = steps(_less(stored, level), clear)
        near = np.rint(step / OFFSET)
        told = (np.abs(near) <= 1) & (np.abs(step - OFFSET * near) <= _NEAR)
        up, down = told & (near > 0), told & (near < 0)
        moved = up if up.any() else down  # moving both at once would swap two scenes forever
        level[moved] += near[moved]
        if not moved.any():
            break
    return np.where((np.abs(step) <= _NEAR) | (black & np.isnan(step)), level, np.nan), step


def steps(ground: Float, clear: Bool) -> Floats:
    """Return each scene's excess brightness over the other scenes, for [scene, band, pixel].

    NaN marks scenes with too few comparable pixels, too much spread, or a veil.
    """
    found = np.full(len(ground), np.nan)
    if len(ground) < 2:
        return found
    ranked, counts = _ranked(ground, clear), clear.sum(axis=0)
    below, above = (_quartile(ranked, counts - 1, further) for further in (0, 1))
    for n, ours in enumerate(ground):
        # The lower quartile without this scene. A scene at or below it shifts it by one rank.
        theirs = np.where(ours <= below, above, below)
        moved = np.where(clear[n] & (counts > 1), ours - theirs, np.float32(np.nan))
        alike = np.ptp(moved, axis=0) <= _ALIKE
        if alike.sum() >= _ENOUGH:
            low, middle, high = np.percentile(moved[:, alike].mean(axis=0), (25, 50, 75))
            veiled = middle > _NEAR and ours[:, alike].std() < _CONTRAST * theirs[:, alike].std()
            found[n] = middle if high - low <= _ALIKE and not veiled else np.nan
    return found


def lowest(dark: float, green: float, level: Floats, offsets: Ints) -> float:
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
    wrong = {
        shift: float(np.mean(offsets != -OFFSET * (level + shift))) for shift in (0.0, 1.0, -1.0)
    }
    best = min(wrong, key=lambda shift: wrong[shift])
    return best if wrong[best] <= _MOST else np.nan


def _tell_by_overpass(
    stored: Float, overpass: Sequence[str], carried: Floats, above: Floats
) -> None:
    """Fill in unknown scenes from other scenes of the overpass, in place.

    Two rounds let a scene learn from another by way of a third.
    """
    pairs = [
        (a, b)
        for a, b in itertools.permutations(range(len(stored)), 2)
        if overpass[a] == overpass[b]
    ]
    apart = {(a, b): _apart(stored[a], stored[b]) for a, b in pairs if np.isnan(carried[a])}
    for _, ((a, b), by) in itertools.product(range(2), apart.items()):
        if np.isnan(by) or np.isfinite(carried[a]):
            continue
        if round(by / OFFSET):
            carried[a], above[a] = (OFFSET, by) if by > 0 else (0, 0)
        elif np.isfinite(carried[b]):
            carried[a], above[a] = carried[b], above[b] + by


def _apart(ours: Float, theirs: Float) -> float:
    """Return one scene's excess over another of its overpass, about -1000, 0 or 1000, else NaN."""
    both = np.isfinite(ours[0]) & np.isfinite(theirs[0])
    if both.sum() < _ENOUGH:
        return np.nan
    moved = np.median(ours[:, both] - theirs[:, both], axis=1)
    near = np.clip(np.rint(moved.mean() / OFFSET), -1, 1)
    return float(moved.mean()) if (np.abs(moved - OFFSET * near) <= _NEAR).all() else np.nan


def _less(stored: Float, level: Floats) -> Float:
    """Subtract each scene's level from [scene, band, pixel]. NaN levels give NaN."""
    return stored - OFFSET * level.astype(np.float32)[:, None, None]


def _ranked(ground: Float, clear: Bool) -> Float:
    """Sort the clear values of [scene, band, pixel] along the scenes, NaN last."""
    return np.sort(np.where(clear[:, None], ground, np.float32(np.nan)), axis=0)


def _quartile(ranked: Float, counts: Ints, further: int = 0) -> Float:
    """Return the lower quartile of the first `counts` [pixel] ranks, as [band, pixel].

    `further` selects a later rank.
    """
    at = np.minimum(np.maximum(counts - 1, 0) // 4 + further, len(ranked) - 1)
    there: Float = np.take_along_axis(ranked, at[None, None], axis=0)[0]
    return there


def _darkest(seen: Float) -> float:
    """Return the lowest band's 2nd percentile of [band, pixel], NaN for too few pixels."""
    finite = np.isfinite(seen[0])
    return (
        float(np.percentile(seen[:, finite], 2, axis=1).min())
        if finite.sum() >= _ENOUGH
        else np.nan
    )
