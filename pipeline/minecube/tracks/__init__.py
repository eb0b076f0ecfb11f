"""Footprints through time: yearly probabilities smoothed over all years, and what then is told of each pixel and site.

    rates = learn_rates([probability, ...])   -> Rates                    or with labels, or your own: Rates(again=0.1)
    smooth(probability, rates)                -> DataArray[year, y, x]    probability x 250, each year given all years
    threshold(probability)                    -> DataArray[year, y, x]    footprint at one half
    events(footprint, smoothed)               -> Dataset[y, x]            onset, end, reclaimed, kind, flips
    areas(footprint, grid)                    -> DataFrame                m2 by year, gain and loss
    expected_areas(smoothed, raw, grid)       -> DataFrame                m2 by year with intervals
    expansion(areas)                          -> Expansion                when a site opened, how fast it grows

    areas.py      footprints counted on an equal-area map    smoothing.py        the hidden Markov model, in numpy
    learning.py   its one rate                               torch_smoothing.py  the same on a GPU
    events.py     what became of a pixel, and of a site      uncertainty.py      how far off an area may be

Each error of a raw yearly map is an event that never was, and most of these go back a year later: smooth first.
"""

from minecube.tracks.areas import HALF, MINE, NOT_MINE, UNKNOWN, areas, onset, threshold
from minecube.tracks.events import KINDS, Expansion, changes_back, events, expansion, flip_rate
from minecube.tracks.learning import learn_rates
from minecube.tracks.smoothing import Rates, best_stories, smooth
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
    "best_stories",
    "changes_back",
    "error_correlation",
    "events",
    "expansion",
    "expected_areas",
    "flip_rate",
    "learn_rates",
    "onset",
    "smooth",
    "threshold",
]
