"""Footprints through time: yearly probabilities smoothed over all years, and what then is told of each pixel and site.

    rates = learn_rates([probability, ...])   -> Rates                    or rates_from_labels(footprints), or your own
    smooth(probability, rates)                -> DataArray[year, y, x]    posterior x 250, each year given all years
    likeliest(probability, rates)             -> DataArray[year, y, x]    footprint of the likeliest path (Viterbi)
    threshold(probability)                    -> DataArray[year, y, x]    footprint at one half
    events(footprint, posterior)              -> Dataset[y, x]            onset, end, reclaimed, kind, flips
    areas(footprint, grid)                    -> DataFrame                m2 by year, gain and loss
    expected_areas(smoothed, raw, grid)       -> DataFrame                m2 by year with intervals
    expansion(areas)                          -> Expansion                when a site opened, how fast it grows

    areas.py      footprints counted on an equal-area map    smoothing.py        the hidden Markov model, in numpy
    learning.py   its rates                                  torch_smoothing.py  the same on a GPU
    events.py     what became of a pixel, and of a site      uncertainty.py      how far off an area may be

A raw yearly map errs anew each year, so each of its errors is an event: smooth first.
"""

from minecube.tracks.areas import HALF, MINE, NOT_MINE, UNKNOWN, areas, onset, threshold
from minecube.tracks.events import KINDS, Expansion, events, expansion, flip_rate
from minecube.tracks.learning import learn_rates, rates_from_labels, rates_given
from minecube.tracks.smoothing import Rates, likeliest, posterior, smooth, viterbi
from minecube.tracks.uncertainty import ALONE, Correlation, error_correlation, expected_areas

__all__ = [
    "ALONE",
    "HALF",
    "KINDS",
    "MINE",
    "NOT_MINE",
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
    "likeliest",
    "onset",
    "posterior",
    "rates_from_labels",
    "rates_given",
    "smooth",
    "threshold",
    "viterbi",
]
