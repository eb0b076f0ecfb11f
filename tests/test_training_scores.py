"""Validation sites give the scores that choose the best epoch and stop a training."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torch import nn

from known_trainings import PLAIN, SMALL, Flat, corner, cube, labels_of, weights, with_holes
from minecube import models
from minecube.catalog import ModelCard
from minecube.errors import ModelError
from minecube.train import Cubes, TrainingOptions, fit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Flat)


class Threshold(nn.Module):
    """Says mine where the first band is bright, whatever it is taught."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] + 0 * self.kept


def test_scores_are_those_of_the_pooled_pixels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Threshold)
    train, valid = {"a": cube(1)}, {"b": with_holes(2, 21, 50), "c": with_holes(3, 40, 17)}
    run = TrainingOptions(checkpoint=tmp_path / "x.ckpt")
    fitted = fit(SMALL, Cubes(train), Cubes(valid), dataclasses.replace(PLAIN, epochs=1), run)
    truth = np.concatenate([labels_of(of).ravel() for of in valid.values()])
    said = np.concatenate(
        [(of.reflectance.values[:, 0] >= fitted.trained.mean[0]).ravel() for of in valid.values()]
    )
    truth, said = truth[truth < 2], said[truth < 2]
    best = fitted.best
    assert best.f1 == pytest.approx(f1_score(truth, said), abs=1e-12)
    assert best.iou == pytest.approx(jaccard_score(truth, said), abs=1e-12)
    assert best.precision == pytest.approx(precision_score(truth, said), abs=1e-12)
    assert best.recall == pytest.approx(recall_score(truth, said), abs=1e-12)
    with (tmp_path / "x.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["f1"]) == pytest.approx(best.f1, rel=1e-5)
    assert list(row) == [
        "epoch",
        "loss",
        "f1",
        "iou",
        "precision",
        "recall",
        "learning_rate",
        "seconds",
        "windows_per_s",
    ]


def test_windows_of_validation_that_hold_no_mine_are_no_measure(flat: None) -> None:
    one = dataclasses.replace(PLAIN, valid_windows=1)
    with pytest.raises(ModelError, match="1 windows of the validation sites hold no pixel of mine"):
        fit(SMALL, Cubes({"a": cube(1)}), Cubes({"b": corner(200, 200)}), one)


class Scripted(Flat):
    """Learns as ever, but is judged by how far above the mean it takes a first band to be a mine."""

    def __init__(self, card: ModelCard, thresholds: list[float]) -> None:
        super().__init__(card)
        self.thresholds = thresholds
        self.after: list[dict[str, torch.Tensor]] = []

    def train(self, mode: bool = True) -> Scripted:
        if not mode:
            self.after.append(weights(self))
        return super().train(mode)

    def forward(self, x: torch.Tensor, _years: torch.Tensor | None = None) -> torch.Tensor:
        if self.training:
            return super().forward(x)
        return x[:, :1] - self.thresholds[len(self.after) - 1]


def test_it_stops_when_f1_no_longer_grows_and_returns_the_best_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best, worse, worst = 0.7, 1.8, 2.2
    # It is tried once before it learns. An equal one is no better.
    thresholds = [best, worst, best, worse, best, best, worst, worst]
    networks: list[Scripted] = []

    def build(card: ModelCard) -> Scripted:
        networks.append(Scripted(card, thresholds))
        return networks[-1]

    monkeypatch.setitem(models.ARCHITECTURES, "unet", build)
    patient = dataclasses.replace(PLAIN, epochs=7, patience=3)
    fitted = fit(SMALL, Cubes({"a": cube(1)}), Cubes({"b": cube(2)}), patient)
    assert [epoch.epoch for epoch in fitted.history] == [1, 2, 3, 4, 5]
    assert fitted.best == fitted.history[1]
    scores = [epoch.f1 for epoch in fitted.history]
    assert scores[1] == scores[3] == scores[4] > scores[2] > scores[0]
    after = networks[0].after[1:]
    found = weights(fitted.trained.network)
    assert all(torch.equal(found[name], after[1][name]) for name in found)
    assert not all(torch.equal(found[name], after[4][name]) for name in found)
    alone = fit(SMALL, Cubes({"a": cube(1)}), None, patient)
    assert len(alone.history) == 7  # nothing to be judged by
    assert alone.best == alone.history[-1]


def test_training_and_validation_sites_are_apart() -> None:
    with pytest.raises(ModelError, match="apart, found b in both"):
        fit(SMALL, Cubes({"a": cube(1), "b": cube(2)}), Cubes({"b": cube(2), "c": cube(3)}), PLAIN)
