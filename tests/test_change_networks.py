"""Networks of change have their papers' sizes, tell dates apart and learn toy pairs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from known_networks import CARDS, CHANGE, TINY, fitted, images, series, settled, tiny
from minecube import models
from minecube.errors import ModelError
from minecube.models import tinycd
from minecube.models.a2net import A2Net
from minecube.models.bit import BIT
from minecube.models.blocks import ResNet, SqueezeExcite
from minecube.models.changefft import ChangeFFT, FrequencyMix, UPerNetHead
from minecube.models.changeformer import ChangeFormer
from minecube.models.dtcdscn import DTCDSCN
from minecube.models.fully_convolutional import FullyConvolutional
from minecube.models.snunet import SNUNet
from minecube.models.tinycd import TinyCD

pytestmark = pytest.mark.usefixtures("one_thread")


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# Sizes, at the papers' three bands


@pytest.mark.parametrize(
    ("network", "millions"),
    [
        # Two classes, as the tables of later papers have the authors' code; Daudt et al. give no count.
        (lambda: FullyConvolutional(3, 2, skip="early"), 1.35),
        (lambda: FullyConvolutional(3, 2, skip="both"), 1.55),
        (lambda: FullyConvolutional(3, 2, skip="difference"), 1.35),
        (lambda: SNUNet(3, 2, 32), 12.03),  # Fang et al. 2021, SNUNet-CD/32
        # Later tables count 3.50 on the authors' code, with heads of 64, and 3.04 with heads of 8; Chen, Qi and Shi 2021 say
        # 3.55, which neither is.
        (lambda: BIT(3, 2, head=8), 3.04),
        (lambda: BIT(3, 2, head=64), 3.50),
    ],
)
def test_parameters_are_as_others_count_them(
    network: Callable[[], nn.Module], millions: float
) -> None:
    # To the last digit that is given.
    assert round(count(network()) / 1e6, 2) == millions


def test_tinycd_has_the_published_size() -> None:
    assert round(count(TinyCD(3, 1)) / 1e6, 3) == 0.285  # Codegoni et al. 2022, table 1


def test_changeformer_has_the_size_that_others_count() -> None:
    # 41.03 million in tables of later papers (some have 41.02), with the four supervised maps that are left out here: to each
    # scale's 256 channels two convolutions of 3 x 3, to two classes and among them, around a normalisation of two channels.
    maps = 4 * ((9 * 256 * 2 + 2) + 2 * 2 + (9 * 2 * 2 + 2))
    assert round((count(ChangeFormer(3, 2)) + maps) / 1e6, 2) == 41.03


def test_a2net_has_the_published_size() -> None:
    # 3.78 million, Li et al. 2023, with MobileNetV2's last convolution (320 to 1280 channels), which plays no part.
    assert round((count(A2Net(3, 1)) + 320 * 1280 + 2 * 1280) / 1e6, 2) == 3.78


def test_dtcdscn_has_the_size_that_others_count() -> None:
    # 41.07 million in tables of later papers, with the half that maps buildings: all but the encoder once more.
    network = DTCDSCN(3, 1)
    assert round((2 * count(network) - count(network.encoder)) / 1e6, 2) == 41.07


def test_changefft_mixes_as_many_frequencies_as_its_authors() -> None:
    # No count is published. By their formula: two layers of four complex blocks, each a quarter of the channels square.
    for channels in (16, 64):
        assert count(FrequencyMix(channels)) == 2 * 2 * (4 * (channels // 4) ** 2 + channels)
    # UPerNet with a ResNet-18, by hand: pyramid pooling, its bottleneck, three lateral and smoothing convolutions, fusion.
    c, w = [64, 128, 256, 512], 512
    head = 4 * (512 * w + 2 * w) + 9 * (512 + 4 * w) * w + 2 * w
    head += sum(a * w + 2 * w + 9 * w * w + 2 * w for a in c[:3]) + 9 * 4 * w * w + 2 * w
    assert count(UPerNetHead(c, w)) == head


def test_resnets_are_those_of_their_paper() -> None:
    # torchvision's counts, 11 689 512 and 21 797 672, without the classifier's 512 x 1000 + 1000.
    assert count(ResNet(3, 64, (2, 2, 2, 2))) == 11_689_512 - 513_000
    assert count(ResNet(3, 64, (3, 4, 6, 3))) == 21_797_672 - 513_000


def test_cards_are_in_their_papers_sizes() -> None:
    paper: dict[str, Callable[[int, int], nn.Module]] = {
        "fc-ef": lambda *n: FullyConvolutional(*n, skip="early"),
        "fc-siam-conc": lambda *n: FullyConvolutional(*n, skip="both"),
        "fc-siam-diff": lambda *n: FullyConvolutional(*n, skip="difference"),
        "snunet": SNUNet,
        "bit": BIT,
        "changeformer": ChangeFormer,
        "tinycd": TinyCD,
        "a2net": A2Net,
        "dtcdscn": DTCDSCN,
        "changefft": ChangeFFT,
    }
    assert sorted(paper) == sorted(CHANGE)
    with torch.device("meta"):  # shapes alone
        for name, network in paper.items():
            assert count(models.build(CARDS[name])) == count(network(10, 1)), name


def test_options_are_the_papers_unless_the_card_says_others() -> None:
    with torch.device("meta"):
        for name in [*CHANGE, "unet-small", "series-attention-small"]:
            plain = models.build(dataclasses.replace(CARDS[name], options={}))
            assert count(plain) == count(models.build(CARDS[name])), name


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fc-ef", {"droput": 0.5}, "fc-ef has no option 'droput'; there is: width, dropout"),
        ("fc-ef", {"dropout": -1}, "option 'dropout': expected a number of 0 or more, found -1"),
        (
            "fc-ef",
            {"dropout": 1.5},
            r"fc-ef cannot be built with \{'dropout': 1.5\} \(dropout probability",
        ),
        ("snunet", {"width": 0}, "option 'width': expected a whole number above 0, found 0"),
        (
            "unet-small",
            {"width": "wide"},
            "option 'width': expected a whole number above 0, found 'wide'",
        ),
        (
            "dtcdscn",
            {"depths": [3, 4]},
            r"option 'depths': expected 4 whole numbers above 0, found \[3, 4\]",
        ),
        ("tinycd", {"widths": 48}, "option 'widths': expected 4 whole numbers above 0, found 48"),
        ("changefft", {"depths": [1, 1, 1, True]}, "expected 4 whole numbers above 0"),
        (
            "a2net",
            {"encoder": "mobilenet"},
            "option 'encoder': expected a number of 0 or more, found 'mobilenet'",
        ),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=f"model {name}: .*{words}"):
        models.build(dataclasses.replace(CARDS[name], options=options))


# What a network takes and gives


@pytest.mark.parametrize("name", CHANGE)
def test_any_bands_classes_and_sizes(name: str) -> None:
    multiple = CARDS[name].multiple_px
    for bands, classes in (
        (("B02", "B03", "B04"), ("changed",)),
        (CARDS[name].bands, ("changed",)),
    ):
        network = tiny(name, bands=bands, classes=classes).eval()
        for height, width in ((multiple, 2 * multiple), (96, 64)):
            shape = network(torch.randn(2, 2, len(bands), height, width)).shape
            assert shape == (2, len(classes), height, width)


@pytest.mark.parametrize("name", [n for n in CHANGE if n != "a2net"])
def test_classes_have_a_logit_each(name: str) -> None:
    network = tiny(name, classes=("removed", "new")).eval()
    found = network(torch.randn(1, 2, 10, 64, 64))
    assert found.shape == (1, 2, 64, 64)
    assert found.min() < 0 or found.max() > 1  # not probabilities


def test_a_network_that_cannot_tell_the_order_refuses_classes_that_need_it() -> None:
    for classes in (("new",), ("removed", "new"), ("changed", "new")):
        with pytest.raises(ModelError, match="cannot tell new from removed"):
            tiny("a2net", classes=classes)


@pytest.mark.parametrize(
    "name", [n for n, card in CARDS.items() if card.task != "mapping" and n.endswith("-small")]
)
def test_small_cards_learn_are_saved_loaded_and_map_a_site(name: str, tmp_path: Path) -> None:
    """A few steps of training; then the same map, to the last bit, from the network and from its file."""
    card, years = dataclasses.replace(CARDS[name], window_px=32), [2015, 2020, 2022]
    torch.manual_seed(0)
    network = models.build(card).train()
    views = 2 if card.task == "change" else len(years)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        found = models.compute_logits(network, card.task, images(4, views, 32), years[:views])
        wanted = (images(4, 1, 32)[:, :, :1] > 0).float().expand_as(found)
        losses.append(nn.functional.binary_cross_entropy_with_logits(found, wanted))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    trained = models.TrainedModel(
        card=card, network=network.eval(), mean=(1000.0,) * 10, std=(300.0,) * 10, sites=("a",)
    )
    models.save(trained, tmp_path / "model.pt")
    pixels = np.random.default_rng(0).integers(1, 3000, (3, 10, 40, 36)).astype(np.uint16)
    pixels[1, :, 5, 7] = 0
    site = xr.DataArray(
        pixels, dims=("year", "band", "y", "x"), coords={"year": years, "band": list(card.bands)}
    )
    maps = [models.predict(of, site) for of in (trained, models.load(tmp_path / "model.pt"))]
    np.testing.assert_array_equal(*maps)
    if card.task == "change":
        assert maps[0].dims == ("pair", "class", "y", "x")
        pairs = [
            tuple(map(int, pair)) for pair in zip(maps[0]["first"], maps[0]["second"], strict=True)
        ]
        assert pairs == [(2015, 2020), (2015, 2022), (2020, 2022)]
        assert (maps[0].values[:, 0, 5, 7] == 255).tolist() == [True, False, True]
    else:
        assert maps[0].shape == (3, 40, 36)
        assert (maps[0].values[:, 5, 7] == 255).tolist() == [False, True, False]
    assert maps[0].values[0].std() > 0


@pytest.mark.parametrize("name", [n for n, card in CARDS.items() if card.task != "mapping"])
def test_every_shipped_card_of_change_and_series_builds(name: str) -> None:
    card = CARDS[name]
    steps = 2 if card.task == "change" else 3
    with torch.device("meta"):
        network = models.build(card).eval()
        windows = torch.zeros(1, steps, len(card.bands), card.window_px, card.window_px)
        found = models.compute_logits(network, card.task, windows, range(steps))
    years = 1 if card.task == "change" else steps
    assert found.shape == (1, years, len(card.classes), card.window_px, card.window_px)


@pytest.mark.parametrize("name", CHANGE)
def test_gradients_reach_every_parameter(name: str) -> None:
    network = tiny(name).train()
    for module in network.modules():
        if isinstance(
            module, SqueezeExcite
        ):  # of one or two units here, which chance may have switched off
            module.weigh[1] = nn.ELU()
    pair = torch.randn(2, 2, 10, 96, 96)
    (network(pair) * torch.randn(2, 1, 96, 96)).sum().backward()
    dead = {
        key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    }
    # What BIT's last layer adds to both dates alike is gone from their difference.
    assert dead == ({"decoder.0.perceptron.2.bias"} if name == "bit" else set())


@pytest.mark.parametrize("name", CHANGE)
def test_every_band_of_both_dates_is_seen(name: str) -> None:
    network = settled(tiny(name))
    pair = torch.randn(1, 2, 10, 64, 64, requires_grad=True)
    network(pair).square().sum().backward()
    assert (pair.grad.abs().sum(dim=(0, 3, 4)) > 0).all()


@pytest.mark.parametrize("name", CHANGE)
def test_the_order_of_the_dates_matters_where_it_should(name: str) -> None:
    network = tiny(
        name
    ).train()  # normalised by what it sees, so that every level has its say in an untrained network
    pair = torch.randn(2, 2, 10, 64, 64)
    there, back = network(pair), network(pair.flip(1))
    if name == "a2net":  # |difference| at all levels
        assert torch.allclose(there, back, atol=1e-4)
    else:
        assert not torch.allclose(there, back, atol=1e-2)


def test_bit_knows_the_order_by_the_position_of_tokens_alone() -> None:
    network = settled(tiny("bit"))
    with torch.no_grad():
        network.position.zero_()
    pair = torch.randn(1, 2, 10, 32, 32)
    assert torch.allclose(network(pair), network(pair.flip(1)), atol=1e-5)


@pytest.mark.parametrize("name", ["bit", "a2net", "dtcdscn", "changefft"])
def test_of_two_equal_dates_nothing_is_left(name: str) -> None:
    # Differences are all that is decoded, so the map of a pair of equal images does not depend on the image.
    network = settled(tiny(name))
    if name == "bit":
        with torch.no_grad():
            network.position.zero_()  # it tells the two dates' tokens apart even where they are equal
    maps = [network(torch.randn(1, 1, 10, 64, 64).expand(-1, 2, -1, -1, -1)) for _ in range(2)]
    assert torch.allclose(*maps, atol=1e-5)
    moved = torch.randn(1, 2, 10, 64, 64)
    assert not torch.allclose(network(moved), maps[0], atol=1e-3)


def test_fc_siam_diff_skips_zeros_where_dates_are_equal() -> None:
    network = settled(tiny("fc-siam-diff"))
    seen: list[torch.Tensor] = []
    for decode in network.decoder:
        decode.register_forward_pre_hook(
            lambda _, given: seen.append(given[0][:, given[0].shape[1] // 2 :])
        )
    network(torch.randn(1, 1, 10, 32, 32).expand(-1, 2, -1, -1, -1))
    assert len(seen) == 4
    assert all((skipped == 0).all() for skipped in seen)
    seen.clear()
    network(torch.randn(1, 2, 10, 32, 32))
    assert all((skipped > 0).any() for skipped in seen)


def test_frequencies_are_mixed_as_by_a_circular_convolution() -> None:
    # By hand in numpy, at each frequency and block: two complex products, ReLU of both parts between, shrinkage after.
    torch.manual_seed(0)
    mix = FrequencyMix(8, blocks=2)
    with torch.no_grad():
        for p in mix.parameters():
            p.mul_(20)
    x = torch.randn(1, 5, 6, 8)
    spectrum = np.fft.fft2(x[0].double().numpy(), axes=(0, 1), norm="ortho")
    for layer, (weight, bias) in enumerate(zip(mix.weight, mix.bias, strict=True)):
        w, b = (a.detach().double().numpy() for a in (weight, bias))
        w, b = w[..., 0] + 1j * w[..., 1], b[..., 0] + 1j * b[..., 1]
        spectrum = np.concatenate(
            [spectrum[..., 4 * k : 4 * k + 4] @ w[k] + b[k] for k in range(2)], axis=-1
        )
        parts = np.stack([spectrum.real, spectrum.imag])
        parts = (
            np.maximum(parts, 0)
            if layer == 0
            else np.sign(parts) * np.maximum(np.abs(parts) - 0.01, 0)
        )
        spectrum = parts[0] + 1j * parts[1]
    expected = np.fft.ifft2(spectrum, axes=(0, 1), norm="ortho").real
    np.testing.assert_allclose(mix(x)[0].detach().numpy(), expected, atol=1e-4)


def test_channels_are_weighed_by_their_means_and_maxima() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    for maximum in (False, True):
        module = SqueezeExcite(3, 2, maximum=maximum)
        first, second = (module.weigh[i].weight[:, :, 0, 0].detach().numpy() for i in (0, 2))
        pooled = [x.numpy().mean((2, 3))] + [x.numpy().max((2, 3))] * maximum
        score = sum(np.maximum(p @ first.T, 0) @ second.T for p in pooled)
        expected = x.numpy() / (1 + np.exp(-score))[:, :, None, None]
        np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-5)


def test_tinycd_mixes_each_channel_with_its_counterpart() -> None:
    mix = tinycd._mix(3)[:2]  # without the normalisation
    dates = torch.randn(2, 1, 3, 6, 6)
    before = mix(tinycd._interleave(*dates))
    for date, channel in itertools.product(range(2), range(3)):
        moved = dates.clone()
        moved[date, :, channel] += 1
        touched = (mix(tinycd._interleave(*moved)) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
        assert touched.tolist() == [c == channel for c in range(3)]


@pytest.mark.parametrize(
    "name", ["dtcdscn", "changeformer", "changefft", "a2net", "snunet", "fc-siam-diff"]
)
def test_each_scale_has_its_say(name: str) -> None:
    # Of the encoder's levels one at a time is blotted out in both dates.
    network = tiny(name).eval()
    pair = torch.randn(2, 2, 10, 64, 64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()(pair)  # statistics of these images
    network.eval()
    encoder, whole = network.encoder, network(pair)
    for level in range(len(encoder(pair[:, 0]))):

        def blotted(*call: Any, level: int = level) -> list[torch.Tensor]:
            return [torch.zeros_like(a) if i == level else a for i, a in enumerate(call[-1])]

        hook = encoder.register_forward_hook(blotted)
        assert not torch.allclose(network(pair), whole, atol=1e-3), level
        hook.remove()


@pytest.mark.parametrize("name", [*CHANGE, "series-attention"])
def test_half_precision_gives_nearly_the_same(name: str) -> None:
    network = settled(tiny(name) if name in TINY else series())
    windows = torch.randn(1, 2, 10, 32, 32) if name != "tinycd" else torch.randn(1, 2, 10, 64, 64)
    with torch.inference_mode():
        exact = network(windows)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(windows)
    assert torch.isfinite(rough).all()
    assert (rough.float() - exact).abs().max() < 0.1 + 0.1 * exact.abs().max()


# Learning


def changes(seed: int, n: int = 8, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of noise, and where a square appears or goes."""
    r = np.random.default_rng(seed)
    pairs = r.normal(0, 0.3, (n, 2, 10, side, side)) + r.normal(0, 0.5, (n, 1, 10, 1, 1))
    changed = np.zeros((n, 1, side, side), np.float32)
    for i in range(n):
        y, x = r.integers(2, side // 2, 2)
        changed[i, 0, y : y + side // 3, x : x + side // 3] = 1
        pairs[i, r.integers(2)] += 2 * changed[i]
    return torch.from_numpy(pairs.astype(np.float32)), torch.from_numpy(changed)


@pytest.mark.parametrize("name", CHANGE)
def test_a_few_pairs_are_learnt(name: str) -> None:
    network = tiny(name).train()
    losses = fitted(network, *changes(0, n=6), steps=30)
    assert np.mean(losses[-3:]) < 0.5 * losses[0], losses[::5]
