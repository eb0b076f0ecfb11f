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
from minecube.models import Trained, load, mapping, predict, save

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


# Mapping


@pytest.mark.parametrize(("height", "width"), [(48, 40), (5, 7), (1, 33), (16, 16), (17, 15), (100, 9)])
def test_any_size_of_site_is_mapped_on_its_own_grid(height: int, width: int) -> None:
    reflectance = cube(3, height, width).reflectance
    found = predict(untrained(), reflectance)
    assert found.dtype == np.uint8
    assert found.dims == ("year", "y", "x")
    assert found.shape == (2, height, width)
    for name in ("year", "y", "x"):
        xr.testing.assert_equal(found[name], reflectance[name])
    assert found.max() <= 250


def test_windows_do_not_show() -> None:
    # A network that looks at single pixels only must give the same map in windows as at once.
    model = untrained()
    model.network.forward = lambda x: x[:, :1] * 0.7 - 0.2  # type: ignore[method-assign]
    reflectance = cube(4, 45, 38).reflectance
    logits = (reflectance.isel(band=0).values.astype(np.float64) - 1000) / 500 * 0.7 - 0.2
    expected = 250 / (1 + np.exp(-logits))
    assert np.abs(predict(model, reflectance).values - expected).max() <= 0.5 + 1e-4


def test_logits_are_blended_not_probabilities_and_the_rim_of_a_window_counts_little() -> None:
    # Windows give +8 in their left half, -2 in their right: where two meet, logits by squared sine are known in closed form.
    model = untrained()
    half = torch.where(torch.arange(16) < 8, 8.0, -2.0).expand(1, 1, 16, 16)
    model.network.forward = lambda x: half.expand(len(x), -1, -1, -1)  # type: ignore[method-assign]
    found = predict(model, cube(5, 24, 64).reflectance).values[0, 12, 4:52]
    weight = np.sin(np.pi * (np.arange(8) + 0.5) / 16) ** 2  # of the window that begins here; its left half lies over
    logits = 8 * weight + -2 * (1 - weight)  # the right half of the one before
    assert np.abs(found.reshape(-1, 8).astype(int) - np.rint(250 / (1 + np.exp(-logits)))).max() <= 1


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The blended logits of every year mapped so far, before they are rounded to a probability."""
    found: list[np.ndarray] = []
    probability = mapping._Blend.probability

    def recorded(self: mapping._Blend) -> np.ndarray:
        found.append(self.total.copy())
        return probability(self)

    monkeypatch.setattr(mapping._Blend, "probability", recorded)
    return found


def test_the_map_is_the_same_whatever_the_batch(sums: list[np.ndarray]) -> None:
    # Wide enough for the libraries to choose another kernel for another batch, as they do.
    model = untrained(dataclasses.replace(SMALL, options={"width": 16, "depth": 3}, window_px=32))
    reflectance = cube(6, 70, 53).reflectance.sel(year=2019)
    for batch in (1, 2, 3, 7, 16, 1000):
        predict(model, reflectance, batch=batch)
    assert all(np.array_equal(sums[0], other) for other in sums)


def test_the_map_is_the_same_whatever_the_order_of_the_windows(sums: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    reflectance = cube(7, 70, 53).reflectance.sel(year=2019)
    corners = mapping._Blend.corners
    for seed in range(4):
        order = np.random.default_rng(seed)
        monkeypatch.setattr(mapping._Blend, "corners", lambda self, order=order: order.permutation(corners(self)).tolist())
        predict(untrained(), reflectance)
    assert all(np.array_equal(sums[0], other) for other in sums)


def test_pixels_without_observation_have_no_probability() -> None:
    of = cube(8, 60, 60)
    pixels = of.reflectance.values
    pixels[0, 3, 10, 20] = 0
    pixels[1, :, :40, :40] = 0
    found = predict(untrained(), of.reflectance).values
    assert np.array_equal(found == 255, (pixels == 0).any(axis=1))


def test_a_lazy_cube_is_read_one_year_at_a_time() -> None:
    of = cube(9, years=(2018, 2019, 2020))
    read: list[int] = []

    def block(values: np.ndarray) -> np.ndarray:
        read.append(len(values))
        return values

    lazy = of.reflectance.chunk({"year": 1})
    lazy = lazy.copy(data=lazy.data.map_blocks(block, dtype=np.uint16, meta=np.empty((0, 0, 0, 0), np.uint16)))
    seen = []
    found = predict(untrained(), lazy, progress=lambda done, total: seen.append((done, total, len(read))))
    xr.testing.assert_identical(found, predict(untrained(), of.reflectance))
    windows = len(seen) // 3
    assert [s[2] for s in seen] == [1] * windows + [2] * windows + [3] * windows
    assert [s[:2] for s in seen] == [(i + 1, 3 * windows) for i in range(3 * windows)]


def test_one_year_alone_and_in_a_series_are_the_same() -> None:
    of = cube(10)
    series = predict(untrained(), of.reflectance)
    alone = predict(untrained(), of.reflectance.sel(year=2020))
    assert alone.dims == ("y", "x")
    assert np.array_equal(alone, series.sel(year=2020))


def test_mapping_evaluates_and_leaves_the_model_as_it_was() -> None:
    model, reflectance = untrained(), cube(11).reflectance
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    expected = predict(model, reflectance)
    model.network.train()  # statistics of each window in place of those learnt, unless mapping sees to it
    xr.testing.assert_identical(predict(model, reflectance), expected)
    assert model.network.training
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_bands_are_taken_by_name() -> None:
    of = cube(12)
    three = dataclasses.replace(SMALL, bands=("B03", "B04", "B11"))
    expected = predict(untrained(three), of.reflectance.sel(band=list(three.bands)))
    xr.testing.assert_identical(predict(untrained(three), of.reflectance), expected)
    turned = of.reflectance.isel(band=[1, 0, *range(2, 10)])
    with pytest.raises(ModelError, match="in this order, found B03, B02, B04"):
        predict(untrained(), turned)
    with pytest.raises(ModelError, match="found B02, B03, B04"):
        predict(untrained(), of.reflectance.isel(band=slice(0, 9)))
    with pytest.raises(ModelError, match="no names"):
        predict(untrained(), of.reflectance.drop_vars("band"))


def test_decoded_reflectance_is_refused() -> None:
    with pytest.raises(ModelError, match=r"uint16.*float"):
        predict(untrained(), cube(13).reflectance / 10000.0)


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match=r"'cuda' was asked for, but torch .* sees 0 GPUs"):
        predict(untrained(), cube(14).reflectance, device="cuda")
    with pytest.raises(ModelError, match="'gpu' is not one that torch knows"):
        predict(untrained(), cube(14).reflectance, device="gpu")


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
