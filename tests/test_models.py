"""Networks: built, saved, loaded, and applied to sites of any size."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from minecube import models
from minecube.catalog import BANDS, ModelCard, load_models
from minecube.errors import ModelError
from minecube.models import TrainedModel, load, predict, save

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelCard(
    id="small",
    title="for tests",
    architecture="unet",
    options={"width": 4, "depth": 2},
    window_px=16,
    multiple_px=4,
)


def untrained(card: ModelCard = SMALL, seed: int = 0) -> TrainedModel:
    torch.manual_seed(seed)
    network = models.build(card).eval()
    for module in network.modules():  # statistics as after training, so that all layers matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    n = len(card.bands)
    return TrainedModel(
        card=card, network=network, mean=(1000.0,) * n, std=(500.0,) * n, sites=("a",)
    )


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
    assert network(torch.zeros(1, 10, card.window_px, card.window_px)).shape == (
        1,
        1,
        card.window_px,
        card.window_px,
    )


# Files


class Pointwise(torch.nn.Conv2d):
    """A network of one's own: a linear function of each pixel's bands."""

    def __init__(self, bands: int, classes: int, kernel: int = 1) -> None:
        super().__init__(bands, classes, kernel, padding=kernel // 2)


def test_a_class_of_ones_own_gets_bands_classes_and_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(models.ARCHITECTURES, "pointwise", Pointwise)
    card = dataclasses.replace(SMALL, architecture="pointwise", options={"kernel": 3})
    assert models.count_parameters(card) == 10 * 3 * 3 + 1
    with pytest.raises(ModelError, match="pointwise has no option 'width'; there is: kernel"):
        models.build(dataclasses.replace(card, options={"width": 4}))


def test_a_saved_model_maps_as_before(tmp_path: Path) -> None:
    path, trained = tmp_path / "model.pt", untrained()
    save(trained, path)
    found = load(path)
    assert (found.card, found.mean, found.std, found.sites) == (
        trained.card,
        trained.mean,
        trained.std,
        ("a",),
    )
    pixels = np.random.default_rng(15).integers(1, 3000, (len(BANDS), 48, 40), dtype=np.uint16)
    of = xr.DataArray(pixels, dims=("band", "y", "x"), coords={"band": list(BANDS)})
    xr.testing.assert_identical(predict(found, of), predict(trained, of))
    assert not predict(untrained(seed=1), of).equals(predict(trained, of))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_model_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    for name in ("missing/model.pt", "model.pt/model.pt", "long" * 100, "a\0b"):
        with pytest.raises(ModelError, match="could not be written"):
            save(untrained(), tmp_path / name)


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
    for pickle in (
        b"\x80\x02K\x01Q.",
        b"\x80\x02X\x03",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n)Q.",
    ):
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, pickle if name.endswith("data.pkl") else old.read(name))
        with pytest.raises(ModelError, match="is not a model that minecube wrote"):
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
def test_models_of_another_architecture_are_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path = tmp_path / "model.pt"
    save(untrained(), path)
    altered(path, **changes)
    with pytest.raises(ModelError, match=words):
        load(path)
