"""Scores of footprints through time: `count` makes additive integer states, `+` joins them, formulas come last.

    states.py     counts: `Scores`, to JSON and back      counting.py   footprints -> counts, fast
    curves.py     probabilities -> counts, and curves      change.py     maps of change -> counts
    formulas.py   counts -> scores                         intervals.py  how sure they are, by bootstrap over sites
    baselines.py  maps that must lose

Joined states of blocks, sites and machines give the scores of all their pixels together: a ratio of sums, never a mean of
ratios. A score whose denominator is zero is NaN, because nothing was there to be judged: never 0, never 1.

Unknown pixels (255) are left out, each where it matters: a pixel counts in a year if truth and prediction are known then, and
in a pair of years if they are known in both. Where truth is known but the prediction is not, the pixel is counted as
unmapped, so that a map cannot gain unseen by leaving out what is hard.

Let y be truth and p prediction, b = [y_t != y_(t-1)] and c = [p_t != p_(t-1)] with t-1 the year listed before t.
- Boundary F1: precision is the share of the prediction's boundary pixels within 3 px of the truth's, recall the reverse (Csurka
  et al. 2013, BMVC). Boundary pixels are mine with a known neighbour, of the four, that is not; a site's edge is no boundary.
- CA-TIoU, version 1. EuroMineNet (arXiv:2510.14661) names it, but its public code lacks the formula; this one is ours. Pixels
  whose truth takes one value in all its known years are stratum S, those with both values are stratum C. In each the tube IoU
  is sum |p and y| / sum |p or y| over pixels and years; CA-TIoU is the mean of the two, NaN unless both are defined.
- BC, SC, SCS as DynamicEarthNet's authors compute them (Toker et al. 2022, CVPR; their evaluation code): BC = sum |b and c| /
  sum |b or c|; SC is the IoU of y_t and p_t over pixels with b = 1, averaged over the classes that y_t has there; SCS is their
  mean. SC does not ask whether p changed: a map that never changes has BC = 0, but not SC = 0.
- VC_n, video consistency (Miao et al. 2021, CVPR, VSPW; their evaluation code): of the pixels whose truth is one class in all
  of n consecutive years, the share whose prediction is one class in all of them. Whether it is the right one is not asked: a
  map that never changes has VC_n = 1. Theirs is a mean of ratios, by window, that leaves out the last window of a video; ours
  is the ratio of sums over all windows. The counts are kept by window, so that theirs can be had, too.
- Change over all pairs of years, in three variants: `change` (any), `transition` (right only if removed and new are told apart;
  both together, `same` being background) and `expansion` (new alone). A map that never changes scores 0 in each.
- AUPRC is the average precision. F1@r: that of the r pixel pairs with the highest scores, r the number of those that truly
  changed; no threshold is chosen. Brier score, and expected calibration error in ten bins, of the footprints' probabilities.
"""

from minecube.metrics.baselines import baselines
from minecube.metrics.bits import MARGIN_PX
from minecube.metrics.change import count_change
from minecube.metrics.counting import count
from minecube.metrics.curves import count_probability, precision_recall, reliability
from minecube.metrics.formulas import by_gap, by_pair, by_year, finish
from minecube.metrics.intervals import difference, intervals
from minecube.metrics.states import (
    BOUNDARY_PX,
    HALF,
    LEVELS,
    UNKNOWN,
    Histogram,
    Mapped,
    Pair,
    Scores,
    Steps,
    Tubes,
    Window,
)

CA_TIOU_VERSION = 1

__all__ = [
    "BOUNDARY_PX",
    "CA_TIOU_VERSION",
    "HALF",
    "LEVELS",
    "MARGIN_PX",
    "UNKNOWN",
    "Histogram",
    "Mapped",
    "Pair",
    "Scores",
    "Steps",
    "Tubes",
    "Window",
    "baselines",
    "by_gap",
    "by_pair",
    "by_year",
    "count",
    "count_change",
    "count_probability",
    "difference",
    "finish",
    "intervals",
    "precision_recall",
    "reliability",
]
