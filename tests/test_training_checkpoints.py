"""A training keeps its state on disk, and goes on from its own state only."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from known_trainings import PLAIN, SMALL, Flat, Recorded, cube, same, with_dropout, with_holes
from minecube import models
from minecube.errors import ModelError
from minecube.train import Cubes, TrainingOptions, Windows, checkpoint, fit, survey_source

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", Flat)


class Stopped(Exception):  # noqa: N818
    """As if the machine had gone down."""


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, _total: int, _note: str) -> None:
        if done == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
@pytest.mark.parametrize("at", [1, 3, 5, 6, 8, 12])
def test_a_resumed_training_ends_as_an_uninterrupted_one(
    at: int, schedule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "unet", with_dropout)
    settings = dataclasses.replace(
        PLAIN, epochs=4, windows=24, schedule=schedule, optimiser="adamw", weight_decay=0.1
    )
    sources = Cubes({"a": with_holes(1)}), Cubes({"b": with_holes(2)})
    whole = fit(SMALL, *sources, settings, TrainingOptions(checkpoint=tmp_path / "whole.ckpt"))
    path = tmp_path / "other.ckpt"
    with pytest.raises(Stopped):  # three steps an epoch; in the middle of one, and when one is done
        fit(SMALL, *sources, settings, TrainingOptions(checkpoint=path, progress=stop_at(at)))
    assert path.exists() == (at > 3)
    recorded = Recorded(sources[0].cubes)
    seen: list[int] = []
    resumed = fit(
        SMALL,
        recorded,
        sources[1],
        settings,
        TrainingOptions(
            checkpoint=path, resume=True, progress=lambda done, total, _: seen.append(done)
        ),
    )
    begun = (at - 1) // 3
    windows = Windows(sources[0], SMALL, settings, survey_source(sources[0], SMALL, settings))
    places = [windows.position(e, i) for e in range(begun, 4) for i in range(24)]
    taken = [cut[:-1] for cut in recorded.cuts if cut[-1] == SMALL.window_px]
    assert sorted(taken) == sorted((*place.view, place.y, place.x) for place in places)
    assert seen == list(range(3 * begun + 1, 13))
    assert same(resumed.trained.network, whole.trained.network)
    shown = [dataclasses.replace(epoch, seconds=0, windows_per_s=0) for epoch in resumed.history]
    assert shown == [
        dataclasses.replace(epoch, seconds=0, windows_per_s=0) for epoch in whole.history
    ]
    states = [torch.load(p, weights_only=True) for p in (path, tmp_path / "whole.ckpt")]
    assert all(
        torch.equal(v, states[1]["network"][name]) for name, v in states[0]["network"].items()
    )
    moments = [state["optimiser"]["state"] for state in states]
    assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in moments[0])
    with (tmp_path / "other.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_a_finished_training_is_not_done_again(flat: None, tmp_path: Path) -> None:
    source, run = (
        Cubes({"a": cube(1)}),
        TrainingOptions(checkpoint=tmp_path / "x.ckpt", resume=True),
    )
    done = fit(SMALL, source, Cubes({"b": cube(2)}), PLAIN, run)
    again = fit(
        SMALL, source, Cubes({"b": cube(2)}), PLAIN, dataclasses.replace(run, progress=stop_at(1))
    )
    assert same(again.trained.network, done.trained.network)
    assert again.history == done.history
    afresh = fit(
        SMALL, source, Cubes({"b": cube(2)}), PLAIN, dataclasses.replace(run, resume=False)
    )
    assert same(afresh.trained.network, done.trained.network)


def test_the_state_of_another_training_is_refused(flat: None, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    of = {"a": cube(1), "b": cube(2)}
    valid = Cubes({"c": cube(3)})
    with pytest.raises(Stopped):
        fit(SMALL, Cubes(of), valid, PLAIN, TrainingOptions(checkpoint=path, progress=stop_at(7)))
    before = path.read_bytes()
    resume = TrainingOptions(checkpoint=path, resume=True)
    wider = dataclasses.replace(SMALL, options={"width": 8, "depth": 2})
    with pytest.raises(
        ModelError, match=r"another training, it differs in card's options \(\{'width': 4"
    ):
        fit(wider, Cubes(of), valid, PLAIN, resume)
    with pytest.raises(
        ModelError,
        match=r"differs in settings's batch \(8, now 4\); settings's dice \(0.0, now 1.0\); seed",
    ):
        fit(
            SMALL,
            Cubes(of),
            valid,
            dataclasses.replace(PLAIN, batch=4, dice=1.0),
            dataclasses.replace(resume, seed=1),
        )
    with pytest.raises(
        ModelError, match=r"training sites \(\['a', 'b'\], now \['a'\]\); normalisation's B02"
    ):
        fit(SMALL, Cubes({"a": of["a"]}), valid, PLAIN, resume)
    with pytest.raises(ModelError, match=r"validation sites \(\['c'\], now \[\]\)"):
        fit(SMALL, Cubes(of), None, PLAIN, resume)
    built_anew = {"a": cube(4), "b": cube(2)}
    with pytest.raises(ModelError, match=r"differs in normalisation's B02"):
        fit(SMALL, Cubes(built_anew), valid, PLAIN, resume)
    relabelled = {"a": of["a"].copy(deep=True), "b": of["b"]}
    relabelled["a"].footprint.values[0, :3] = 255
    with pytest.raises(ModelError, match=r"differs in pixels's training labels \(\[7680"):
        fit(SMALL, Cubes(relabelled), valid, PLAIN, resume)
    with pytest.raises(ModelError, match="interrupted after epoch 1; it would be lost"):
        fit(SMALL, Cubes(of), valid, PLAIN, TrainingOptions(checkpoint=path))
    assert path.read_bytes() == before
    for content in (b"", before[: len(before) // 2], b"PK\x03\x04" + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="not the state of a training"):
            fit(SMALL, Cubes(of), valid, PLAIN, resume)
    torch.save({"format": "minecube-model-2"}, path)
    with pytest.raises(ModelError, match="not the state of a training"):
        fit(SMALL, Cubes(of), valid, PLAIN, resume)


def test_a_state_with_a_flipped_bit_is_not_gone_on_from(flat: None, tmp_path: Path) -> None:
    """Torch, which opens it, does not look at the checksums that it wrote."""
    path, source = tmp_path / "x.ckpt", Cubes({"a": cube(1)})
    with pytest.raises(Stopped):
        fit(SMALL, source, None, PLAIN, TrainingOptions(checkpoint=path, progress=stop_at(7)))
    content, weight = (
        bytearray(path.read_bytes()),
        checkpoint.read_state(path)["network"]["layers.0.bias"],
    )
    at = bytes(content).index(weight.numpy().tobytes())
    content[at + 3] ^= 0x40  # in the exponent
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged; remove it to train afresh"):
        fit(SMALL, source, None, PLAIN, TrainingOptions(checkpoint=path, resume=True))


def test_a_state_is_written_whole_or_not_at_all(
    flat: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.ckpt"
    calls = itertools.count()
    real = Path.write_bytes

    def full(self: Path, data: Any) -> int:
        if next(calls) < 2:  # the first epoch's state and log
            return real(self, data)
        with self.open("wb") as out:
            out.write(bytes(data)[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        ModelError, match=r"x\.ckpt: could not be written .*No space left.*as it was"
    ):
        fit(SMALL, Cubes({"a": cube(1)}), None, PLAIN, TrainingOptions(checkpoint=path))
    assert len(checkpoint.read_state(path)["history"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.ckpt", "x.csv"]
