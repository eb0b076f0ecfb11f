"""Networks fitted to cubes; windows are cut from the cubes as they are needed, and none is written.

source.py      where windows come from, what a task sees of them, what is to be learnt
survey.py      one pass before: normalisation, and where labels and the rare class are
windows.py     windows to learn from and to be judged by, drawn, cut, turned and jittered
loss.py        the loss             checkpoint.py  state and log on disk
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
