"""The offset that was decided for each scene, checked in the pixels: scenes of one place must agree about its ground.

Providers' flags are wrong on some scenes, and for months at a time (Element 84's issues earth-search 66 and 71,
cirrus-earth-search 33). A stored number is reflectance x 10000, or that plus 1000; which of the two, pixels say:

    step      By how much a scene is brighter than the others are where it and they are clear: the median over the pixels on
              which all its bands moved alike, to within 300, if half of those agree as well. A wrong offset moves all bands
              of all pixels by 1000; haze, snow, shadow and seasons move them differently. So scenes fall into groups 1000
              apart, whichever of them are right. A veil of cloud may move all bands alike where none is of the short-wave
              infrared, but it takes the ground's contrast away, as no offset does.
    level     The darkest group carries nothing if its darkest ground, less 1000, would be darker than black, however few
              scenes it has. If not, and there is one group only, it carries 1000 if things grow and yet nothing is darker
              than 0.1, as leaves are. Where neither proves it, as on bright desert, the level is the one that contradicts
              the fewest decisions, and nothing is told if those are more than a quarter.
    dark      A scene that no step tells, under cloud or snow or alone, carries nothing if some of it, less 1000, would be
              darker than black.
    overpass  What is left is told by another tile of its overpass, which saw the same ground or cloud: where both have it
              they differ by nothing or by 1000, and then the brighter carries it.

A scene that is all cloud and has no such neighbour can be told by nobody: its step is None, and it is not accused. Nor is one
that would carry what no product carries: something else is wrong with it.

The check needs a blue or red band, because only there is some ground dark in every season. Without such a band, the step of
every scene is None.
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
"""What becomes of a scene in conflict: kept as it is, read with the other offset, left out, or the end of its site-year."""
OFFSET = 1000
_VEGETATION = 4
# Leaves and water absorb blue and red light, so some ground stays below 0.07 there in every season. Such ground proves that a
# scene carries nothing. Leaves reflect 0.2 to 0.5 in the near infrared, and up to 0.1 in green. Short-wave infrared is dark
# over open water only. In these bands growth and drying may brighten all fields by as much as an offset does.
_DARK_BANDS = frozenset({"B01", "B02", "B04"})
# Measured on 11 simulated archives, 5040 scenes with 5 to 60 % of flags wrong: no right one is accused with _ALIKE from 200 to
# 400, _NEAR from 200 to 300, _ENOUGH from 10 to 40 or _BLACK from -400 to -200, and hardly fewer wrong ones are found.
_ALIKE = 300  # cloud that brightens B12 by 1000 brightens B02 by 2400
_NEAR = 250  # 98 % of right steps lie from about -60 to 250; in between lies thin cloud, and with 400 some is accused
_CONTRAST = 0.87  # a veil that adds 750 or more lets through less of the ground's contrast: (1 - 0.075) ** 2
_ENOUGH = 20  # pixels that a comparison needs
_BLACK = -300  # reflectance x 10000; water and shade of correct products may be some way below 0
_LEAF, _GREEN = 1000, 0.05  # vegetation is darker in blue or red; the share of the ground that has to be vegetation
_MOST = 0.25  # share of decisions that may be wrong where nothing but they tells
_ROUNDS = 4  # of comparing and moving; enough where every offset is wrong

Float = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
UInt16 = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the pixels say of one scene's offset."""

    scene: str
    offset: int
    """As decided from source, baseline and flags."""
    step: float | None
    """By how much it is brighter than the place is, reflectance x 10000: near 0 where its offset is right; None where it
    cannot be told."""
    conflict: bool
    should_be: int | None
    """The offset that would agree; None where there is no conflict."""

    def __str__(self) -> str:
        there = f"{self.step:+.0f} against the scenes around it"
        return f"{self.scene}: offset {self.offset} contradicts its pixels, {there}; {self.should_be} would fit"


def check_offsets(scenes: Sequence[pystac.Item], look: Look) -> list[Check]:
    """Check the offset of each scene, in the order given, from a coarse look at them.

    The step of every scene is None if the look has fewer than two bands, or neither a blue nor a red band.
    """
    offsets = np.array([int(s.properties["minecube:offset"]) for s in scenes])
    carried, above = np.full((2, len(scenes)), np.nan)
    if scenes and len(look.bands) > 1 and not _DARK_BANDS.isdisjoint(look.bands):
        takes = [s.properties["minecube:datatake"] for s in scenes]
        carried, above = carried_by(look.stored, look.scl, offsets, takes)
    checks = []
    for scene, offset, carries, step in zip(scenes, offsets.tolist(), carried, above + offsets, strict=True):
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


def resolve(scenes: Sequence[pystac.Item], checks: Sequence[Check], policy: str) -> list[pystac.Item]:
    """The scenes to go on with: those in conflict kept, mended or left out as the policy has it, each with a warning.

    Raises:
        SceneError: the policy is `fail` and there is a conflict, or it leaves no scene.
    """
    conflicts = [c for c in checks if c.conflict]
    for check in conflicts:
        log.warning("%s (%s)", check, {"warn": "kept as it is", "fix": "mended", "drop": "left out"}.get(policy, policy))
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
            mended.properties["minecube:offset_reason"] += f"; but its pixels say {check.should_be} (step {check.step})"
            kept.append(mended)
    if conflicts and not kept:
        raise SceneError(
            f"the offsets of all {len(scenes)} scenes contradict their pixels, first {conflicts[0]}; see --on-offset-conflict"
        )
    return kept


def as_rows(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Checks as plain JSON, for provenance: the conflicts alone."""
    return [{"scene": c.scene, "offset": c.offset, "step": c.step, "should_be": c.should_be} for c in checks if c.conflict]


def carried_by(stored: Float, scl: UInt16, offsets: Ints, overpass: Sequence[str]) -> tuple[Floats, Floats]:
    """What scenes carry on top of reflectance, by the module's rule: 0 or 1000.

    Args:
        stored: [scene, band, pixel], two bands or more, NaN where not observed.
        scl: [scene, pixel].
        offsets: as decided, 0 or -1000.
        overpass: equal for scenes of one overpass.

    Returns:
        What each carries, and by how much it is brighter than the place is with nothing on top; NaN where not told.
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
        shift = lowest(base, green.sum() / max(use.any(axis=0).sum(), 1), level[told], offsets[told])
        base -= OFFSET * np.nan_to_num(shift)
        carried = OFFSET * (level + shift)
        above = carried + step
        carried[black & (carried > 0)] = np.nan  # its own pixels contradict each other
    impossible = np.isfinite(carried) & ~np.isin(carried, (0, OFFSET))
    carried[impossible] = np.nan
    lone = black & np.isnan(above)
    carried[lone], above[lone] = 0, dark[lone] - np.nan_to_num(base)
    _tell_by_overpass(stored, overpass, carried, above)
    return carried, np.where(np.isfinite(carried), above, np.nan)


def levels(stored: Float, clear: Bool, black: Bool, decided: Ints) -> tuple[Floats, Floats]:
    """Of which group each scene is, in thousands, NaN where not told; and its step from that group.

    Begins with what was decided, and with nothing for what would be darker than black.
    """
    level = np.where(black, 0, decided).astype(np.float64)
    for _ in range(_ROUNDS):
        step = steps(_less(stored, level), clear)
        near = np.rint(step / OFFSET)
        told = (np.abs(near) <= 1) & (np.abs(step - OFFSET * near) <= _NEAR)
        up, down = told & (near > 0), told & (near < 0)
        moved = up if up.any() else down  # with both at once, two scenes would change places for ever
        level[moved] += near[moved]
        if not moved.any():
            break
    return np.where((np.abs(step) <= _NEAR) | (black & np.isnan(step)), level, np.nan), step


def steps(ground: Float, clear: Bool) -> Floats:
    """By how much each scene [scene, band, pixel] is brighter than the others where all are clear; NaN if few pixels tell."""
    found = np.full(len(ground), np.nan)
    if len(ground) < 2:
        return found
    ranked, counts = _ranked(ground, clear), clear.sum(axis=0)
    below, above = (_quartile(ranked, counts - 1, further) for further in (0, 1))
    for n, ours in enumerate(ground):
        # The lower quartile without this scene: what stood next, where this one stands at or below it.
        theirs = np.where(ours <= below, above, below)
        moved = np.where(clear[n] & (counts > 1), ours - theirs, np.float32(np.nan))
        alike = np.ptp(moved, axis=0) <= _ALIKE
        if alike.sum() >= _ENOUGH:
            low, middle, high = np.percentile(moved[:, alike].mean(axis=0), (25, 50, 75))
            veiled = middle > _NEAR and ours[:, alike].std() < _CONTRAST * theirs[:, alike].std()
            found[n] = middle if high - low <= _ALIKE and not veiled else np.nan
    return found


def lowest(dark: float, green: float, level: Floats, offsets: Ints) -> float:
    """What the lowest group carries, in thousands; NaN where nothing tells.

    Args:
        dark: the darkest ground, should the lowest group carry nothing.
        green: share of the ground that is vegetation.
        level: the group of each scene, the lowest 0.
        offsets: as decided.
    """
    if dark < OFFSET + _BLACK:
        return float((dark - _BLACK) // OFFSET)
    if dark >= _LEAF and green >= _GREEN and not level.any():
        return 1.0
    wrong = {shift: float(np.mean(offsets != -OFFSET * (level + shift))) for shift in (0.0, 1.0, -1.0)}
    best = min(wrong, key=lambda shift: wrong[shift])
    return best if wrong[best] <= _MOST else np.nan


def _tell_by_overpass(stored: Float, overpass: Sequence[str], carried: Floats, above: Floats) -> None:
    """Fill in what is not told and another scene of the overpass tells; twice, for what one tells another by a third."""
    pairs = [(a, b) for a, b in itertools.permutations(range(len(stored)), 2) if overpass[a] == overpass[b]]
    apart = {(a, b): _apart(stored[a], stored[b]) for a, b in pairs if np.isnan(carried[a])}
    for _, ((a, b), by) in itertools.product(range(2), apart.items()):
        if np.isnan(by) or np.isfinite(carried[a]):
            continue
        if round(by / OFFSET):
            carried[a], above[a] = (OFFSET, by) if by > 0 else (0, 0)
        elif np.isfinite(carried[b]):
            carried[a], above[a] = carried[b], above[b] + by


def _apart(ours: Float, theirs: Float) -> float:
    """By how much one scene is brighter than another of its overpass, about -1000, 0 or 1000; else NaN."""
    both = np.isfinite(ours[0]) & np.isfinite(theirs[0])
    if both.sum() < _ENOUGH:
        return np.nan
    moved = np.median(ours[:, both] - theirs[:, both], axis=1)
    near = np.clip(np.rint(moved.mean() / OFFSET), -1, 1)
    return float(moved.mean()) if (np.abs(moved - OFFSET * near) <= _NEAR).all() else np.nan


def _less(stored: Float, level: Floats) -> Float:
    """What is left of [scene, band, pixel] without the thousands of each scene; NaN where those are."""
    return stored - OFFSET * level.astype(np.float32)[:, None, None]


def _ranked(ground: Float, clear: Bool) -> Float:
    """[scene, band, pixel] where clear, sorted along the scenes, NaN last."""
    return np.sort(np.where(clear[:, None], ground, np.float32(np.nan)), axis=0)


def _quartile(ranked: Float, counts: Ints, further: int = 0) -> Float:
    """The lower quartile of the first `counts` [pixel] of what is ranked, or what stands `further` on; [band, pixel]."""
    at = np.minimum(np.maximum(counts - 1, 0) // 4 + further, len(ranked) - 1)
    there: Float = np.take_along_axis(ranked, at[None, None], axis=0)[0]
    return there


def _darkest(seen: Float) -> float:
    """The 2nd percentile of [band, pixel] in the band where it is lowest; NaN where too few pixels are observed."""
    finite = np.isfinite(seen[0])
    return float(np.percentile(seen[:, finite], 2, axis=1).min()) if finite.sum() >= _ENOUGH else np.nan
