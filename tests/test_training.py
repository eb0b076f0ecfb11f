"""Networks of every task learn from known pixels, and cards that do not fit are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from known_trainings import CHANGE, PLAIN, SERIES, SMALL, Flat, cube, same
from minecube import models
from minecube.catalog import ModelCard
from minecube.errors import ModelError
from minecube.models import predict
from minecube.train import Cubes, TrainingOptions, fit

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Flat)


def iou(model: Any, of: xr.Dataset) -> float:
    of = of.assign_coords(y=np.arange(of.sizes["y"]), x=np.arange(of.sizes["x"]))
    mine, found = of.footprint.values == 1, predict(model, of.reflectance).values >= 125
    return float((mine & found).sum() / (mine | found).sum())


def test_training_maps_an_unseen_site() -> None:
    settings = dataclasses.replace(PLAIN, epochs=12, batch=16)
    model = fit(SMALL, Cubes({"b": cube(2), "a": cube(1)}), None, settings).trained
    assert iou(model, cube(16)) > 0.85
    assert model.sites == ("a", "b")
    assert not model.network.training


def test_unknown_labels_and_missing_pixels_teach_nothing() -> None:
    # Half of the site is wrongly labelled; marked unknown, or not observed, it does no harm.
    wrong = cube(1)
    wrong.footprint.values[:, :, 20:] ^= 1
    right = {}
    for how in ("unknown", "unobserved"):
        right[how] = wrong.copy(deep=True)
    right["unknown"].footprint.values[:, :, 20:] = 255
    right["unobserved"].reflectance.values[..., 20:] = 0
    unseen, long = cube(17), dataclasses.replace(PLAIN, epochs=16)
    for how, of in right.items():
        assert iou(fit(SMALL, Cubes({"a": of}), None, long).trained, unseen) > 0.6, how
    assert iou(fit(SMALL, Cubes({"a": wrong}), None, long).trained, unseen) < 0.3


@pytest.mark.parametrize("card", [SMALL, CHANGE, SERIES])
def test_every_task_is_learnt(card: ModelCard, flat: None) -> None:
    settings = dataclasses.replace(
        PLAIN, epochs=8, dice=0.5, learning_rate=0.02, rare=0.5, year_dropout=0.1, windows=64
    )
    fitted = fit(card, Cubes({"a": cube(1), "b": cube(2)}), Cubes({"c": cube(3)}), settings)
    assert fitted.history[-1].loss < fitted.history[0].loss / 2
    assert fitted.best.f1 > 0.8


def test_small_sites_and_flat_bands_can_be_trained_on() -> None:
    of = cube(19, 11, 13)
    of.footprint.values[:, 5, 5] = 1
    of.reflectance.values[:, 5] = 700
    model = fit(
        SMALL,
        Cubes({"a": of}),
        Cubes({"b": cube(20, 7, 30)}),
        dataclasses.replace(PLAIN, epochs=1, batch=64),
    ).trained
    assert model.std[5] == 1
    assert model.mean[5] == 700


def test_a_model_says_how_it_came_to_be_in_its_file_too(tmp_path: Path) -> None:
    settings = dataclasses.replace(PLAIN, epochs=3)
    fitted = fit(
        SMALL, Cubes({"a": cube(1)}), Cubes({"b": cube(2)}), settings, TrainingOptions(seed=4)
    )
    models.save(fitted.trained, tmp_path / "model.pt")
    for training in (fitted.trained.training, models.load(tmp_path / "model.pt").training):
        assert (training["seed"], training["validation sites"]) == (4, ["b"])
        assert training["settings"]["epochs"] == 3
        assert training["epoch"] == fitted.best.epoch
        assert training["validation F1"] == max(epoch.f1 for epoch in fitted.history)
    alone = fit(SMALL, Cubes({"a": cube(1)}), None, settings).trained.training
    assert alone["epoch"] == 3
    assert not [name for name in alone if name.startswith("validation ") and alone[name]]


def test_same_cubes_and_seed_give_the_same_network() -> None:
    settings, valid = dataclasses.replace(PLAIN, epochs=2, rare=0.3), Cubes({"b": cube(2)})
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = fit(
        SMALL, Cubes({"a": cube(1)}), valid, settings, TrainingOptions(seed=3)
    ).trained.network
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    torch.rand(5)
    assert same(
        first,
        fit(SMALL, Cubes({"a": cube(1)}), valid, settings, TrainingOptions(seed=3)).trained.network,
    )
    assert not same(
        first,
        fit(SMALL, Cubes({"a": cube(1)}), valid, settings, TrainingOptions(seed=4)).trained.network,
    )


def test_windows_fit_the_network_and_devices_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="multiples of 4 px, found 18 in settings plain"):
        fit(SMALL, Cubes({"a": cube(1)}), None, dataclasses.replace(PLAIN, window_px=18))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match=r"'cuda' was asked for, but torch .* sees 0 GPUs"):
        fit(SMALL, Cubes({"a": cube(1)}), None, PLAIN, TrainingOptions(device="cuda"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"task": "change", "classes": ("changed",)},
            "unet cannot be applied to windows of the task change",
        ),
        ({"task": "series"}, "unet cannot be applied to windows of the task series"),
        (
            {"architecture": "snunet", "options": {"width": 4}},
            "snunet cannot be applied to windows of the task mapping",
        ),
        (
            {"options": {"width": 4, "depth": 3}, "window_px": 20},
            r"\(1, 1, 10, 20, 20\).*correct the card's task, options or mul",
        ),
    ],
)
def test_a_card_whose_network_is_for_another_task_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = TrainingOptions(checkpoint=tmp_path / "x.ckpt")
    with pytest.raises(ModelError, match=f"model small: .*{words}"):
        fit(dataclasses.replace(SMALL, **changes), Cubes({"a": cube(1)}), None, PLAIN, run)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_gives_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", lambda _: nn.Conv2d(10, 1, 3))
    with pytest.raises(
        ModelError,
        match=r"expected logits of shape \(1, 1, 1, 16, 16\) .*found \(1, 1, 1, 14, 14\)",
    ):
        fit(SMALL, Cubes({"a": cube(1)}), None, PLAIN)
