"""Networks: built, saved, loaded, and applied to sites of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from minecube import models, train
from minecube.catalog import BANDS, ModelCard, Settings, load_models
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
    settings = Settings(id="t", title="t", epochs=12, learning_rate=3e-3)
    return train.fit(SMALL, train.Cubes({"a": cube(1), "b": cube(2)}), None, settings).trained


# The network


def test_parameters_are_those_of_the_architecture() -> None:
    # By hand for width w, depth 1: two 3 x 3 convolutions with batch normalisation at each of three blocks, one up-convolution.
    w, bands = 5, 10

    def block(a: int, b: int) -> int:
        return 9 * a * b + 2 * b + 9 * b * b + 2 * b

    expected = block(bands, w) + block(w, 2 * w) + (4 * 2 * w * w + w) + block(2 * w, w) + (w + 1)
    network = models.build(dataclasses.replace(SMALL, options={"width": w, "depth": 1}))
    assert sum(p.numel() for p in network.parameters()) == expected


def test_the_shipped_card_builds_and_gives_logits_of_its_windows() -> None:
    card = load_models()["unet-small"]
    network = models.build(card).eval()
    assert network(torch.zeros(1, 10, card.window_px, card.window_px)).shape == (1, 1, card.window_px, card.window_px)


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
