"""Build, save and load networks by card, and apply them to whole sites.

The card's task determines a network's input and output (float32). Each class has its own logit:

    mapping   (n, band, y, x)        ->  (n, class, y, x)          one year: mine
    change    (n, 2, band, y, x)     ->  (n, class, y, x)          two years: changes, earlier first
    series    (n, year, band, y, x)  ->  (n, year, class, y, x)    all years at once: mine in each

`compute_logits` gives all three one form: [n, time, band, y, x] -> [n, time, class, y, x].
"""

from __future__ import annotations

from minecube.models.compute import Compute
from minecube.models.mapping import Mapper, MapRows, View, describe, list_views, predict
from minecube.models.network import (
    ARCHITECTURES,
    TrainedModel,
    build,
    compute_logits,
    count_parameters,
    load,
    normalise,
    save,
    select_bands,
)
from minecube.models.weights import fetch, find_model

__all__ = [
    "ARCHITECTURES",
    "Compute",
    "MapRows",
    "Mapper",
    "TrainedModel",
    "View",
    "build",
    "compute_logits",
    "count_parameters",
    "describe",
    "fetch",
    "find_model",
    "list_views",
    "load",
    "normalise",
    "predict",
    "save",
    "select_bands",
]
