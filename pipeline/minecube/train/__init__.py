"""Fit networks to cubes, with windows cut from the cubes on demand.

No window is written to disk.

source.py      sites to cut windows from, views and targets of a task
statistics.py  one pass before: normalisation, positions of labels and of the rare class
windows.py     windows for training and validation: drawn, cut, turned and jittered
loss.py        the loss
judge.py       scores on the validation sites
checkpoint.py  state and log on disk
epochs.py      the epochs of a training, and its state
fitting.py     the training as a whole

survey_source(train, card, settings)                        -> SourceSurvey
Windows(train, card, settings, survey, seed)[epoch, number] -> image, target
fit(card, train, valid, settings)                           -> TrainingResult
"""

from __future__ import annotations

from minecube.train.checkpoint import Epoch
from minecube.train.epochs import TrainingOptions
from minecube.train.fitting import TrainingResult, fit
from minecube.train.source import Cubes, WindowSource, compute_targets, list_views
from minecube.train.statistics import SourceSurvey, survey_source
from minecube.train.windows import Position, Tiles, Windows

__all__ = [
    "Cubes",
    "Epoch",
    "Position",
    "SourceSurvey",
    "Tiles",
    "TrainingOptions",
    "TrainingResult",
    "WindowSource",
    "Windows",
    "compute_targets",
    "fit",
    "list_views",
    "survey_source",
]
