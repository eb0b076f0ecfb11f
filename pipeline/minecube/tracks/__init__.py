"""Smooth yearly probabilities over all years, and derive events and areas from them.

    learn_rates([probability, ...])     -> Rates                  or rates_from_labels(footprints)
    smooth(probability, rates)          -> DataArray[year, y, x]  posterior x 250, given all years
    threshold(probability)              -> DataArray[year, y, x]  footprint at one half
    events(footprint, posterior)        -> Dataset[y, x]          onset, end, reclaimed, kind, flips
    areas(footprint, grid)              -> DataFrame              m2 by year, gain and loss
    expected_areas(smoothed, raw, grid) -> DataFrame              m2 by year with intervals
    expansion(areas)                    -> Expansion              opening and growth of a site

    areas.py        footprints and their areas on an equal-area map
    learning.py     rates of the hidden Markov model
    smoothing.py    the hidden Markov model
    events.py       history of pixels and sites
    uncertainty.py  intervals of areas

Rates may also be given by hand. A raw yearly map has new errors each year, and each error looks
like an event. Smooth it first.
"""

from minecube.codes import HALF, UNKNOWN
from minecube.tracks.areas import areas, threshold
from minecube.tracks.events import KINDS, Expansion, events, expansion, flip_rate
from minecube.tracks.learning import learn_rates, rates_from_labels, rates_given
from minecube.tracks.smoothing import Rates, posterior, smooth
from minecube.tracks.uncertainty import ALONE, Correlation, error_correlation, expected_areas

__all__ = [
    "ALONE",
    "HALF",
    "KINDS",
    "UNKNOWN",
    "Correlation",
    "Expansion",
    "Rates",
    "areas",
    "error_correlation",
    "events",
    "expansion",
    "expected_areas",
    "flip_rate",
    "learn_rates",
    "posterior",
    "rates_from_labels",
    "rates_given",
    "smooth",
    "threshold",
]
