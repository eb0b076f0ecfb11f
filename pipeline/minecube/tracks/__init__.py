"""Smooth yearly probabilities over all years, and derive events and areas from them.

    learn_rates([probability, ...])     -> Rates      or learn_rates_from_labels(footprints)
    smooth(probability, rates)          -> DataArray  posterior x 250, given all years
    threshold(probability)              -> DataArray  footprint at one half
    derive_events(footprint, posterior) -> Dataset    onset, end, reclaimed, kind, flips
    compute_areas(footprint, grid)      -> DataFrame  m2 by year, gain and loss
    estimate_areas(smoothed, raw, grid) -> DataFrame  m2 by year with intervals
    summarize_expansion(areas)          -> Expansion  opening and growth of a site

    areas.py        footprints and their areas on an equal-area map
    learning.py     rates of the hidden Markov model
    smoothing.py    the hidden Markov model
    events.py       history of pixels and sites
    uncertainty.py  intervals of areas

Rates may also be given by hand. A raw yearly map has new errors each year, and each error looks
like an event. Smooth it first.
"""

from minecube.tracks.areas import compute_areas, threshold
from minecube.tracks.events import (
    KINDS,
    Expansion,
    compute_flip_rate,
    derive_events,
    summarize_expansion,
)
from minecube.tracks.learning import learn_rates, learn_rates_from_labels, make_rates
from minecube.tracks.smoothing import Rates, compute_posterior, smooth
from minecube.tracks.uncertainty import (
    UNCORRELATED,
    ErrorCorrelation,
    estimate_areas,
    measure_error_correlation,
)

__all__ = [
    "KINDS",
    "UNCORRELATED",
    "ErrorCorrelation",
    "Expansion",
    "Rates",
    "compute_areas",
    "compute_flip_rate",
    "compute_posterior",
    "derive_events",
    "estimate_areas",
    "learn_rates",
    "learn_rates_from_labels",
    "make_rates",
    "measure_error_correlation",
    "smooth",
    "summarize_expansion",
    "threshold",
]
