"""Networks: built, trained, saved, loaded, and applied to sites of any size."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from minecube import models, train
from minecube.catalog import BANDS, ModelCard, load_models
from minecube.errors import ModelError
from minecube.models import Trained, load, predict, save

SMALL = ModelCard(
    id="small", title="for tests", architecture="unet", options={"width": 4, "depth": 2}, window_px=16, multiple_px=4
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Windows this small are slower with more, far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cube(seed: int, height: int = 48, width: int = 40, years: tuple[int, ...] = (2019, 2020)) -> xr.Dataset:
    """Bright discs, the mines, in dim noise; another disc each year."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mine = np.stack(
        [np.hypot(y - r.uniform(0.3, 0.7) * height, x - r.uniform(0.3, 0.7) * width) < r.uniform(8, 14) for _ in years]
    )
    pixels = r.normal(1000, 150, (len(years), len(BANDS), height, width)) + 900 * mine[:, None]
    return xr.Dataset(
        {
            "reflectance": (("year", "band", "y", "x"), np.clip(pixels, 1, None).astype(np.uint16)),
            "footprint": (("year", "y", "x"), mine.astype(np.uint8)),
        },
        coords={
            "year": list(years),
            "band": list(BANDS),
            "y": 5_600_035.0 - 10 * np.arange(height),
            "x": 500_005.0 + 10 * np.arange(width),
        },
    )


def untrained(card: ModelCard = SMALL, seed: int = 0) -> Trained:
    torch.manual_seed(seed)
    network = models.build(card).eval()
    for module in network.modules():  # statistics as after training, so that all layers matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    n = len(card.bands)
    return Trained(card=card, network=network, mean=(1000.0,) * n, std=(500.0,) * n, sites=("a",))


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train.fit({"a": cube(1), "b": cube(2)}, SMALL, epochs=12)


def iou(model: Trained, of: xr.Dataset) -> float:
    mine, found = of.footprint.values == 1, predict(model, of.reflectance).values >= 125
    return float((mine & found).sum() / (mine | found).sum())


# The network


def test_parameters_are_those_of_the_architecture() -> None:
    # By hand for width w, depth 1: two 3 x 3 convolutions with batch normalisation at each of three blocks, one up-convolution.
    w, bands = 5, 10

    def block(a: int, b: int) -> int:
        return 9 * a * b + 2 * b + 9 * b * b + 2 * b

    expected = block(bands, w) + block(w, 2 * w) + (4 * 2 * w * w + w) + block(2 * w, w) + (w + 1)
    network = models.build(dataclasses.replace(SMALL, options={"width": w, "depth": 1}))
    assert sum(p.numel() for p in network.parameters()) == expected


def test_every_shipped_card_builds_and_maps() -> None:
    for card in load_models().values():
        side = card.window_px
        network = models.build(card).eval()
        assert network(torch.zeros(1, len(card.bands), side, side)).shape == (1, 1, side, side)


# Files


def test_a_saved_model_maps_as_before(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save(trained, path)
    found = load(path)
    assert (found.card, found.mean, found.std, found.sites) == (trained.card, trained.mean, trained.std, ("a", "b"))
    xr.testing.assert_identical(predict(found, cube(15).reflectance), predict(trained, cube(15).reflectance))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_model_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    save(untrained(seed=0), path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as out:
            out.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ModelError, match="No space left"):
        save(untrained(seed=1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    with pytest.raises(ModelError, match="could not be written"):
        save(untrained(), tmp_path / "missing" / "model.pt")


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_files_that_are_not_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(ModelError, match="cannot be read"):
        load(path)
    save(untrained(), path)
    whole = path.read_bytes()
    for content in (b"", b"no model", whole[: len(whole) // 2], b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is not a model that minecube wrote"):
            load(path)
    torch.save({"weights": {}}, path)
    with pytest.raises(ModelError, match="not a model of this version"):
        load(path)
    torch.save(Evil(tmp_path / "written"), path)
    with pytest.raises(ModelError, match="is not a model that minecube wrote"):
        load(path)
    assert not (tmp_path / "written").exists()


def altered(path: Path, **changes: object) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "card": {**content["card"], **changes}}, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"width": 8, "depth": 2}}, "weights are not those of its card"),
        ({"options": {"width": 4, "depth": 1}}, "weights are not those of its card"),
        ({"architecture": "gpt"}, "unknown architecture 'gpt'"),
        ({"attention": True}, "does not know.*attention"),
    ],
)
def test_models_of_another_architecture_are_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = tmp_path / "model.pt"
    save(untrained(), path)
    altered(path, **changes)
    with pytest.raises(ModelError, match=words):
        load(path)


# Training


def test_training_maps_an_unseen_site(trained: Trained) -> None:
    assert iou(trained, cube(16)) > 0.85
    assert trained.sites == ("a", "b")
    assert not trained.network.training


def test_same_cubes_and_seed_give_the_same_network() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = train.fit({"a": cube(1)}, SMALL, epochs=2, seed=seed)
        return torch.cat([value.flatten().float() for value in model.network.state_dict().values()])

    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    torch.rand(5)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_normalisation_is_that_of_observed_training_pixels() -> None:
    a, b = cube(1), cube(2)
    a.reflectance.values[0, 2, :20] = 0  # one band missing: the pixel is not observed
    model = train.fit({"a": a, "b": b}, SMALL, epochs=1)
    images = np.concatenate([c.reflectance.values.transpose(1, 0, 2, 3).reshape(10, -1) for c in (a, b)], axis=1)
    observed = images[:, (images > 0).all(axis=0)].astype(float)
    np.testing.assert_allclose(model.mean, observed.mean(axis=1))
    np.testing.assert_allclose(model.std, observed.std(axis=1))


def test_unknown_labels_and_missing_pixels_teach_nothing() -> None:
    # Half of the site is wrongly labelled; marked unknown, or not observed, it does no harm.
    wrong = cube(1)
    wrong.footprint.values[:, :, 20:] ^= 1
    right = {}
    for how in ("unknown", "unobserved"):
        right[how] = wrong.copy(deep=True)
    right["unknown"].footprint.values[:, :, 20:] = 255
    right["unobserved"].reflectance.values[..., 20:] = 0
    unseen = cube(17)
    for how, of in right.items():
        assert iou(train.fit({"a": of}, SMALL, epochs=40), unseen) > 0.6, how
    assert iou(train.fit({"a": wrong}, SMALL, epochs=40), unseen) < 0.3


def test_what_is_not_known_is_not_even_looked_at() -> None:
    labels = torch.tensor([[[0, 1], [255, 1]]], dtype=torch.uint8)
    logits = torch.tensor([[[[0.5, -1.0], [9.0, 2.0]]]])
    p = 1 / (1 + np.exp(-np.array([0.5, -1.0, 2.0])))
    expected = -(math.log(1 - p[0]) + math.log(p[1]) + math.log(p[2])) / 3
    assert train._loss(logits, labels).item() == pytest.approx(expected)
    assert train._loss(logits, torch.full_like(labels, 255)).item() == 0


def test_windows_turn_labels_with_their_pixels_and_keep_unobserved_ones_out() -> None:
    # Every band holds the label, so after any turn, flip and shift they must still agree.
    of = cube(18, 40, 20)
    values = of.reflectance.values
    values[...] = 1000 + 3000 * of.footprint.values[:, None].astype(int)
    values[:, 4, 5:9, 5:9] = 0
    pixels = {"a": train._pixels("a", of, SMALL)}
    places, _, _ = train._survey(pixels, 32)  # wider than the site
    images, labels = train._cut(pixels, places * 8, 32, np.random.default_rng(0))
    assert images.shape == (len(labels), 10, 32, 32)
    known = labels <= 1
    assert known.any()
    assert ((images[:, 0] > 2500) == (labels == 1))[known].all()
    assert (images[:, 0][~known] >= 0).all()
    assert not known[(images == 0).any(axis=1)].any()
    assert len({label.tobytes() for label in labels}) > 8


def test_small_sites_and_flat_bands_can_be_trained_on() -> None:
    of = cube(19, 11, 13)
    of.reflectance.values[:, 5] = 700
    model = train.fit({"a": of}, SMALL, epochs=1, batch=64)
    assert model.std[5] == 1
    assert predict(model, of.reflectance).shape == (2, 11, 13)


def test_progress_tells_epochs_and_falling_losses() -> None:
    seen: list[tuple[int, float]] = []
    train.fit({"a": cube(1), "b": cube(2)}, SMALL, epochs=8, progress=lambda epoch, loss: seen.append((epoch, loss)))
    assert [epoch for epoch, _ in seen] == list(range(1, 9))
    assert seen[-1][1] < seen[0][1] / 1.2


def test_a_cube_without_labels_is_refused() -> None:
    of = cube(1)
    of.footprint.values[...] = 255
    with pytest.raises(ModelError, match="both labelled and observed"):
        train.fit({"a": of}, SMALL)
    of.footprint.values[0], of.reflectance.values[0] = 1, 0
    with pytest.raises(ModelError, match="both labelled and observed"):
        train.fit({"a": of}, SMALL)
    with pytest.raises(ModelError, match="reflectance and footprint, found reflectance"):
        train.fit({"a": of.drop_vars("footprint")}, SMALL)
    with pytest.raises(ModelError, match="no site"):
        train.fit({}, SMALL)


def test_a_loss_that_is_no_number_stops_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    real = train._loss
    calls = itertools.count(1)
    monkeypatch.setattr(train, "_loss", lambda logits, labels: real(logits, labels) * (math.nan if next(calls) == 3 else 1))
    with pytest.raises(ModelError, match=r"loss became nan in epoch 2, step 1 \(windows of a 2019, a 2020\)"):
        train.fit({"a": cube(1)}, SMALL, epochs=4, batch=8)
