"""Fit networks to cubes, with windows cut from the cubes on demand.

No window is written to disk.

source.py      sites to cut windows from, views and targets of a task
survey.py      one pass before: normalisation, positions of labels and of the rare class
windows.py     windows for training and validation: drawn, cut, turned and jittered
loss.py        the loss
judge.py       scores on the validation sites
checkpoint.py  state and log on disk
fitting.py     the training

survey(train) -> Survey;  Windows(train, survey)[epoch, number] -> image, target;  fit(...) -> Fitted
"""

from __future__ import annotations

from minecube.train.checkpoint import Epoch
from minecube.train.fitting import Fitted, Run, fit
from minecube.train.source import UNKNOWN, Cubes, Source, target, views
from minecube.train.survey import Survey, survey
from minecube.train.windows import Place, Tiles, Windows

__all__ = [
    "UNKNOWN",
    "Cubes",
    "Epoch",
    "Fitted",
    "Place",
    "Run",
    "Source",
    "Survey",
    "Tiles",
    "Windows",
    "fit",
    "survey",
    "target",
    "views",
]
