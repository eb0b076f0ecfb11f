"""The loss is its formula over known pixels, and a training stops where it is no number."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from known_trainings import PLAIN, SMALL, Flat, cube, same, weights
from minecube import models
from minecube.catalog import ModelCard, TrainingSettings
from minecube.errors import ModelError
from minecube.train import Cubes, TrainingOptions, fit
from minecube.train.loss import compute_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Flat)


def by_hand(logits: np.ndarray, wanted: np.ndarray, settings: TrainingSettings) -> float:
    terms, weights_, dice = [], settings.positive_weight, []
    for c in range(logits.shape[2]):
        both = either = 0.0
        for index in np.ndindex(logits[:, :, c].shape):
            z, t = float(logits[:, :, c][index]), int(wanted[:, :, c][index])
            if t > 1:
                continue
            p = 1 / (1 + math.exp(-z))
            right = p if t else 1 - p
            terms.append(-math.log(right) * (1 - right) ** settings.focal * (weights_ if t else 1))
            both, either = both + p * t, either + p + t
        dice.append(1 - (2 * both + 1) / (either + 1))
    return sum(terms) / len(terms) + settings.dice * sum(dice) / len(dice)


@pytest.mark.parametrize(
    "how",
    [{}, {"positive_weight": 3.0}, {"focal": 2.0}, {"dice": 0.7}, {"focal": 1.0, "dice": 1.0}],
)
def test_the_loss_is_its_formula_over_known_pixels(how: dict[str, float]) -> None:
    r, settings = np.random.default_rng(0), dataclasses.replace(PLAIN, **how)
    logits, wanted = (
        r.normal(0, 2, (2, 1, 2, 5, 4)),
        r.choice([0, 1, 255], (2, 1, 2, 5, 4)).astype(np.uint8),
    )
    expected = by_hand(logits, wanted, settings)
    logits[wanted == 255] = r.choice(
        [1e30, math.nan, -math.inf], (wanted == 255).sum()
    )  # not even looked at
    given_ = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    loss = compute_loss(given_, torch.from_numpy(wanted), settings)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert (given_.grad[torch.from_numpy(wanted == 255)] == 0).all()
    assert (given_.grad[torch.from_numpy(wanted < 2)] != 0).all()
    nothing = compute_loss(
        given_.detach(), torch.full((2, 1, 2, 5, 4), 255), dataclasses.replace(settings, dice=0.0)
    )
    assert nothing.item() == 0


class Faulty(Flat):
    """Gives this logit everywhere in one step."""

    def __init__(self, card: ModelCard, logit: float, step: int) -> None:
        super().__init__(card)
        self.logit, self.steps_left = logit, step

    def forward(self, x: torch.Tensor, _years: torch.Tensor | None = None) -> torch.Tensor:
        logits = super().forward(x)
        if self.training:
            self.steps_left -= 1
            if self.steps_left == 0:
                return torch.full_like(logits, self.logit)
        return logits


def test_a_loss_that_is_no_number_stops_says_where_and_keeps_the_last_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    settings = dataclasses.replace(PLAIN, windows=16, epochs=3)
    monkeypatch.setitem(models.ARCHITECTURES, "unet", lambda card: Faulty(card, math.nan, 4))
    source = Cubes({"a": cube(1)})
    with pytest.raises(
        ModelError,
        match=r"became nan in epoch 2, step 2 \(windows of a 2019, a 2020\); .*x.ckpt holds epoch 1",
    ):
        fit(SMALL, source, None, settings, TrainingOptions(checkpoint=path))
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Flat)
    resumed = fit(SMALL, source, None, settings, TrainingOptions(checkpoint=path, resume=True))
    assert all(torch.isfinite(value).all() for value in weights(resumed.trained.network).values())
    assert same(resumed.trained.network, fit(SMALL, source, None, settings).trained.network)
    monkeypatch.setitem(models.ARCHITECTURES, "unet", lambda card: Faulty(card, 1e38, 1))
    with pytest.raises(ModelError, match=r"became inf in epoch 1, step 1 .*; nothing was kept"):
        fit(SMALL, source, None, settings)


def test_bfloat16_on_request(flat: None) -> None:
    half = dataclasses.replace(PLAIN, bf16=("cpu",))
    source = Cubes({"a": cube(1)})
    found, exact = (
        fit(SMALL, source, None, half).history[-1].loss,
        fit(SMALL, source, None, PLAIN).history[-1].loss,
    )
    assert found != exact
    assert found == pytest.approx(exact, rel=0.02)
