"""Score footprints through time. `count` gives integer counts, `+` adds them, formulas come last.

    counts.py      counts: `Counts`, to JSON and back    footprints.py  footprints -> counts
    boundaries.py  boundary pixels -> counts             change.py      maps of change -> counts
    curves.py      probabilities -> counts and curves    formulas.py    counts -> scores
    intervals.py   bootstrap over sites                  baselines.py   trivial maps

Added counts of blocks, sites and machines give the scores of all their pixels together. A score is
a ratio of sums, never a mean of ratios. A zero denominator gives NaN, never 0 or 1, since there is
nothing to judge.

Unknown pixels (255) are left out. A pixel counts in a year if truth and prediction are known in it.
It counts in a pair of years if they are known in both. A pixel with known truth and unknown
prediction counts as unmapped. So a map cannot gain unseen by leaving out hard pixels.

Let y be truth, p prediction and t-1 the year listed before t. Let b = [y_t != y_(t-1)] and
c = [p_t != p_(t-1)].
- Boundary F1: Precision is the share of the prediction's boundary pixels within 3 px of the
  truth's. Recall is the reverse (Csurka et al. 2013, BMVC). Boundary pixels are mine, and one of
  their four neighbours is known and not mine. A site's edge is no boundary.
- CA-TIoU, version 1: named by EuroMineNet (arXiv:2510.14661). Its public code lacks the formula, so
  this formula is ours. Stratum S has the pixels with one truth value in all their known years.
  Stratum C has the pixels with both values. In each stratum the tube IoU is sum |p and y| / sum |p
  or y| over pixels and years. CA-TIoU is the mean of the two, NaN unless both are defined.
- BC, SC, SCS: Computed as by DynamicEarthNet's authors (Toker et al. 2022, CVPR; their evaluation
  code). BC = sum |b and c| / sum |b or c|. SC is the IoU of y_t and p_t over pixels with b = 1,
  averaged over the classes of y_t in these pixels. SCS is the mean of BC and SC. SC ignores whether
  p changed. So a map without any change has BC = 0, but not SC = 0.
- VC_n, video consistency (Miao et al. 2021, CVPR, VSPW; their evaluation code): Take the pixels
  with one truth class in n consecutive years. VC_n is the share with one predicted class in all n
  years, right or wrong. So a map without any change has VC_n = 1. The original is a mean of ratios
  by window, and leaves out the last window of a video. Ours is the ratio of sums over all windows.
  Counts are kept by window, so the original is available too.
- Change over all pairs of years, in three variants. `change` is any change. `transition`
  pools removed and new, with `same` as background. A hit needs the right direction. `expansion` is
  new alone. A map without any change scores 0 in each.
- AUPRC is the average precision. F1@r is the F1 of the r pixel pairs with the highest scores. Here
  r is the number of true changes, so no threshold is chosen. Footprint probabilities also have the
  Brier score and the expected calibration error in ten bins.
"""

from minecube.metrics.baselines import make_baselines
from minecube.metrics.boundaries import MARGIN_PX
from minecube.metrics.change import count_change
from minecube.metrics.counts import Counts, Histogram
from minecube.metrics.curves import (
    count_probability,
    tabulate_precision_recall,
    tabulate_reliability,
)
from minecube.metrics.footprints import count
from minecube.metrics.formulas import finish, tabulate_gaps, tabulate_pairs, tabulate_years
from minecube.metrics.intervals import estimate_difference, estimate_intervals

CA_TIOU_VERSION = 1

__all__ = [
    "CA_TIOU_VERSION",
    "MARGIN_PX",
    "Counts",
    "Histogram",
    "count",
    "count_change",
    "count_probability",
    "estimate_difference",
    "estimate_intervals",
    "finish",
    "make_baselines",
    "tabulate_gaps",
    "tabulate_pairs",
    "tabulate_precision_recall",
    "tabulate_reliability",
    "tabulate_years",
]
