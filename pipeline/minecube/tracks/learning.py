"""How far changes back are believed, learned from how often maps show them and how often they are true.

Ground that opens and is reclaimed, or is dug up again, goes back on an earlier change. That is rare, and an error of one year
looks the same. Of the changes back that the yearly maps show, the share that is true is how many there are in labels over how
many there are in the maps, each per step from one year to the next. This share is taken for the odds `Rates.again`: maps that
flicker much are smoothed much, and maps that do not are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from minecube.errors import LabelError
from minecube.tracks.areas import MINE, NOT_MINE, UNKNOWN, threshold
from minecube.tracks.events import changes_back
from minecube.tracks.smoothing import LEAST, Rates, checked_years, need_stored

TRUE_RATE = 0.0005
"""True changes back per step where there are no labels: about those of the simulated benchmark's training sites (0.00048)."""


def learn_rates(probabilities: Iterable[xr.DataArray], footprints: Iterable[xr.DataArray] = ()) -> Rates:
    """Rates for these maps: all their changes back are counted, and held against those of labels.

    Args:
        probabilities: Of each site, (year, y, x) uint8 x 250, 255 = none; years ascending, gaps allowed.
        footprints: Labels, of these or other sites, best those that the model was trained on: (year, y, x) uint8, 1 mine, 0
            not, 255 unknown. Without any, `TRUE_RATE` stands for their changes back.

    Raises:
        LabelError: no map, none with a known pixel, or one that is no stored probability; labels of which no pixel is known in
            two years, or that are no footprints.
    """
    shown = steps = maps = known = 0
    for probability in probabilities:
        checked_years(probability)
        values = probability.to_numpy()
        need_stored(values)
        back, of = changes_back(threshold(probability.copy(data=values)))
        shown, steps, maps, known = shown + back, steps + of, maps + 1, known + int((values != UNKNOWN).sum())
    if not known:
        raise LabelError(
            "the maps hold no known pixel (all are 255), so they tell no rates; map the sites first, or give rates"
            if maps
            else "there is no map to learn rates from; name sites that a model has mapped, or give rates"
        )
    true = _true_rate(list(footprints))
    return Rates(again=min(max(true * steps / shown, LEAST), 1.0) if shown else 1.0)


def _true_rate(footprints: list[xr.DataArray]) -> float:
    if not footprints:
        return TRUE_RATE
    true = steps = 0
    for footprint in footprints:
        checked_years(footprint)
        if not np.isin(footprint.to_numpy(), [NOT_MINE, MINE, UNKNOWN]).all():
            raise LabelError(
                f"the labels hold values other than 0, 1 and {UNKNOWN} (unknown); give footprints, not probabilities"
            )
        back, of = changes_back(footprint)
        true, steps = true + back, steps + of
    if not steps:
        raise LabelError("no pixel of these labels is known in two years, so they tell no rates; label more, or give rates")
    return true / steps
