"""The mapping networks of the libraries: their sizes against what is published, and that each trains, is saved, and maps."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import xarray as xr

from minecube import models
from minecube.catalog import BANDS, ModelCard, load_models
from minecube.errors import ModelError
from minecube.models import TrainedModel, libraries, torchvision_operators

pytestmark = pytest.mark.usefixtures("one_thread")

CARDS = {
    name: card
    for name, card in load_models().items()
    if models.ARCHITECTURES.get(card.architecture, "").startswith("libraries:")
}
SMALL = {name: card for name, card in CARDS.items() if name.endswith("-small")}
ON_TWO = ("deeplabv3plus", "deeplabv3", "upernet")  # trained on two windows at least


def built(card: ModelCard, seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(card)


def count(architecture: str, classes: int = 1, bands: int = 10, **options: object) -> int:
    """Parameters of the network, for any number of classes, which a card could not ask for."""
    card = ModelCard(id="counted", title="", architecture=architecture, options=options)
    stand_in = types.SimpleNamespace(
        id=card.id,
        architecture=architecture,
        options=options,
        bands=range(bands),
        classes=range(classes),
    )
    with torch.device("meta"):
        return sum(
            p.numel()
            for p in getattr(libraries, models.ARCHITECTURES[architecture].partition(":")[2])(
                stand_in
            ).parameters()
        )


def test_there_are_ten_each_in_two_sizes() -> None:
    assert len(CARDS) == 20
    assert len(SMALL) == 10
    pairs = sorted(
        (c.architecture, c.paper.split(";")[-1].split(",")[0])
        for c in CARDS.values()
        if c.id not in SMALL
    )
    assert pairs == sorted(
        (c.architecture, c.paper.split(";")[-1].split(",")[0]) for c in SMALL.values()
    )
    assert all("arXiv:" in card.paper for card in CARDS.values())


# Sizes


@pytest.mark.parametrize(
    ("published", "architecture", "classes", "options"),
    [
        # SegFormer, table 1: ADE20K, 150 classes, encoder and decoder.
        (3.8, "segformer", 150, {"encoder": "b0"}),
        (13.7, "segformer", 150, {"encoder": "b1"}),
        (27.5, "segformer", 150, {"encoder": "b2"}),
        (47.3, "segformer", 150, {"encoder": "b3"}),
        (64.1, "segformer", 150, {"encoder": "b4"}),
        (84.7, "segformer", 150, {"encoder": "b5"}),
        # DeepLabV3 on MobileViTV2: the authors' model zoo (ml-cvnets), PASCAL VOC, 21 classes, and ADE20K, 150.
        (6.2, "deeplabv3", 21, {"encoder": "mobilevitv2-0.5"}),
        (13.3, "deeplabv3", 21, {"encoder": "mobilevitv2-1.0"}),
        (17.7, "deeplabv3", 21, {"encoder": "mobilevitv2-1.25"}),
        (9.6, "deeplabv3", 150, {"encoder": "mobilevitv2-0.75"}),
        (13.4, "deeplabv3", 150, {"encoder": "mobilevitv2-1.0"}),
        (28.1, "deeplabv3", 150, {"encoder": "mobilevitv2-1.75"}),
        (34.0, "deeplabv3", 150, {"encoder": "mobilevitv2-2.0"}),
    ],
)
def test_parameters_are_as_published(
    published: float, architecture: str, classes: int, options: dict[str, str]
) -> None:
    assert count(architecture, classes, bands=3, **options) / 1e6 == pytest.approx(
        published, abs=0.051
    )


@pytest.mark.parametrize(
    ("published", "encoder", "features"),
    [
        # Swin (table 3c) and ConvNeXt (table 4): ADE20K, with the auxiliary head of 256 channels on the third stage.
        (60, "swin-tiny", 384),
        (81, "swin-small", 384),
        (121, "swin-base", 512),
        (60, "convnext-tiny", 384),
        (82, "convnext-small", 384),
        (122, "convnext-base", 512),
    ],
)
def test_parameters_of_upernet_are_as_published_without_the_auxiliary_head(
    published: int, encoder: str, features: int
) -> None:
    auxiliary = 9 * features * 256 + 2 * 256 + 256 * 150 + 150
    assert round((count("upernet", 150, 3, encoder=encoder) + auxiliary) / 1e6) == published


@pytest.mark.parametrize(
    ("published", "encoder"), [(47, "swin-tiny"), (69, "swin-small"), (107, "swin-base")]
)
def test_parameters_of_mask2former_are_as_published(published: int, encoder: str) -> None:
    # Table 1: COCO, 133 classes; one of them is background here.
    assert round(count("mask2former", 132, 3, encoder=encoder) / 1e6) == published


RESNET18, RESNET50, MOBILENETV2 = 11_176_512, 23_508_032, 2_223_872
"""torchvision's 11,689,512, 25,557,032 and 3,504,872, without the classifiers of 1000 classes."""


def norm(channels: int) -> int:
    return 2 * channels


def conv(a: int, b: int, side: int = 1) -> int:
    """A convolution without bias, and batch normalisation."""
    return side * side * a * b + norm(b)


def separable(a: int, b: int) -> int:
    return 9 * a + conv(a, b)


def unet_decoder(features: list[int]) -> int:
    # Features from the coarsest on, each block's output: 256, 128, 64, 32, 16; the head 3 x 3 with a bias.
    blocks, inlet = 0, features[0]
    for skip, out in zip([*features[1:], 0], (256, 128, 64, 32, 16), strict=True):
        blocks += conv(inlet + skip, out, 3) + conv(out, out, 3)
        inlet = out
    return blocks + 9 * 16 + 1


def linknet_decoder(features: list[int]) -> int:
    # Each block: 1 x 1 to a quarter, transposed 4 x 4 with a bias, 1 x 1 to the next feature's channels; a head of 1 x 1.
    outs = [*features[1:], 32]
    blocks = [
        conv(a, a // 4) + conv(a // 4, a // 4, 4) + a // 4 + conv(a // 4, b)
        for a, b in zip(features, outs, strict=True)
    ]
    return sum(blocks) + 32 + 1


def pspnet_decoder(a: int, width: int) -> int:
    # The pool of one pixel has a bias in place of a normalisation.
    return 4 * a * a // 4 + 3 * norm(a // 4) + a // 4 + conv(2 * a, width) + 9 * width + 1


def deeplabv3plus_decoder(a: int, low: int, width: int) -> int:
    pyramid = 2 * conv(a, width) + 3 * separable(a, width) + conv(5 * width, width)
    return (
        pyramid + separable(width, width) + conv(low, 48) + separable(width + 48, width) + width + 1
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet-resnet50", RESNET50 + 7 * 49 * 64 + unet_decoder([2048, 1024, 512, 256, 64])),
        ("unet-resnet18-small", RESNET18 + 7 * 49 * 64 + unet_decoder([512, 256, 128, 64, 64])),
        ("linknet-resnet50", RESNET50 + 7 * 49 * 64 + linknet_decoder([2048, 1024, 512, 256, 64])),
        (
            "linknet-resnet18-small",
            RESNET18 + 7 * 49 * 64 + linknet_decoder([512, 256, 128, 64, 64]),
        ),
        ("pspnet-resnet50", RESNET50 + 7 * 49 * 64 + pspnet_decoder(2048, 512)),
        ("pspnet-resnet18-small", RESNET18 + 7 * 49 * 64 + pspnet_decoder(512, 128)),
        ("deeplabv3plus-resnet50", RESNET50 + 7 * 49 * 64 + deeplabv3plus_decoder(2048, 256, 256)),
        (
            "deeplabv3plus-resnet18-small",
            RESNET18 + 7 * 49 * 64 + deeplabv3plus_decoder(512, 64, 128),
        ),
        (
            "deeplabv3plus-mobilenetv2",
            MOBILENETV2 + 7 * 9 * 32 + deeplabv3plus_decoder(1280, 24, 256),
        ),
    ],
)
def test_parameters_are_those_counted_by_hand(name: str, expected: int) -> None:
    assert models.count_parameters(CARDS[name]) == expected


def test_linknet_on_a_resnet18_is_about_the_size_of_the_paper() -> None:
    # 11.5 million in its abstract, for 20 classes; the library's decoder ends otherwise.
    assert count("linknet", 20, 3, encoder="resnet18") / 1e6 == pytest.approx(11.5, rel=0.02)


# Shapes


@pytest.mark.parametrize("name", CARDS)
def test_every_card_builds_and_gives_logits_of_its_windows(name: str) -> None:
    card = CARDS[name]
    with torch.device("meta"):
        network = models.build(card).to("meta").eval()
        height, width = card.window_px, card.window_px + card.multiple_px
        assert network(torch.empty(3, 10, height, width)).shape == (3, 1, height, width)


@pytest.mark.parametrize(
    ("name", "stride"), [("pspnet-resnet50", 8), ("deeplabv3plus-resnet50", 16)]
)
def test_features_are_as_fine_as_published(name: str, stride: int) -> None:
    network = models.build(CARDS[name]).to("meta").eval()
    assert network.encoder(torch.empty(1, 10, 160, 160, device="meta"))[-1].shape == (
        1,
        2048,
        160 // stride,
        160 // stride,
    )


def test_mobilevit_keeps_a_sixteenth() -> None:
    network = models.build(CARDS["deeplabv3-mobilevitv2"]).to("meta").eval()
    found = network.mobilevitv2(torch.empty(1, 10, 160, 160, device="meta"))
    assert found.last_hidden_state.shape == (1, 512, 10, 10)


def test_weights_are_named_as_in_the_library() -> None:
    config = transformers.SegformerConfig(num_channels=10, num_labels=1)
    with torch.device("meta"):
        theirs = transformers.SegformerForSemanticSegmentation(config).state_dict()
        ours = models.build(CARDS["segformer-b0-small"]).state_dict()
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}


@pytest.mark.parametrize("name", SMALL)
def test_any_number_of_bands(name: str) -> None:
    card = dataclasses.replace(SMALL[name], bands=("B03", "B04", "B8A", "B11"))
    network = built(card).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 4, 32, 32)).shape == (1, 1, 32, 32)
        with pytest.raises((RuntimeError, ValueError)):
            network(torch.zeros(1, 10, 32, 32))


# Training, saving, mapping


def scene(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance (band, y, x) in which a mine, a bright disc, stands out; and the mine."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    mine = np.hypot(y - r.uniform(0.3, 0.7) * height, x - r.uniform(0.3, 0.7) * width) < 0.25 * min(
        height, width
    )
    return np.clip(r.normal(1000, 150, (10, height, width)) + 900 * mine, 1, None).astype(
        np.uint16
    ), mine


@pytest.mark.parametrize("name", SMALL)
def test_it_trains_is_saved_and_maps_as_before(name: str, tmp_path: Path) -> None:
    card = dataclasses.replace(SMALL[name], window_px=64)
    network = built(card).train()
    image, mine = (
        np.stack(pixels) for pixels in zip(*(scene(seed, 64, 64) for seed in range(2)), strict=True)
    )
    mean, std = (1000.0,) * 10, (300.0,) * 10
    x = torch.from_numpy(models.normalise(image, mean, std))
    y = torch.from_numpy(mine[:, None].astype(np.float32))
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    torch.manual_seed(0)  # of dropout
    reached: set[str] = set()
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        reached |= {
            n
            for n, p in network.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0
        }
    assert {n for n, p in network.named_parameters() if p.requires_grad} - reached == set()
    assert losses[-1] < losses[0]

    models.save(
        TrainedModel(card=card, network=network.eval(), mean=mean, std=std, sites=("a",)),
        tmp_path / "model.pt",
    )
    found = models.load(tmp_path / "model.pt")
    assert found.card == card
    pixels = scene(9, 70, 53)[0]
    reflectance = xr.DataArray(pixels, dims=("band", "y", "x"), coords={"band": list(BANDS)})
    mapped = models.predict(found, reflectance)
    assert mapped.shape == (70, 53)
    with torch.inference_mode():
        assert torch.equal(found.network(x), network(x))
    assert mapped.values.max() <= 250


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_of_one_trains_unless_it_is_said_not_to(name: str) -> None:
    network = built(SMALL[name]).train()
    x = torch.randn(1, 10, 64, 64, generator=torch.Generator().manual_seed(0))
    if SMALL[name].architecture in ON_TWO:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            network(x)
    else:
        network(x).sum().backward()


@pytest.mark.parametrize("name", SMALL)
def test_a_fresh_network_already_answers_to_what_it_sees(name: str) -> None:
    # Seen: scales of normalisation drawn about zero, and queries that are all of one class, let no signal through.
    network = built(SMALL[name]).train()
    x = torch.from_numpy(
        np.stack(
            [models.normalise(scene(i, 64, 64)[0], (1000.0,) * 10, (300.0,) * 10) for i in range(2)]
        )
    )
    torch.manual_seed(0)  # of dropout
    assert network(x).std(dim=(2, 3)).min() > 0.003


def test_the_same_seed_gives_the_same_weights() -> None:
    for name in ("mask2former-swin-mini-small", "deeplabv3plus-mobilenetv2-small"):
        one, same, other = (built(SMALL[name], seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert any(not torch.equal(one[key], other[key]) for key in one)


# Mask2Former's queries


def by_class(kinds: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Logits of (n, query, background and classes and nothing) and (n, query, y, x), at the masks' resolution."""
    found = types.SimpleNamespace(class_queries_logits=kinds, masks_queries_logits=masks)
    return libraries._score_classes(torch.nn.Identity(), (masks,), found)


def test_queries_become_the_odds_of_the_papers_scores() -> None:
    r = np.random.default_rng(0)
    kinds, masks = r.normal(0, 2, (2, 5, 4)), r.normal(0, 2, (2, 5, 6, 7))
    share = np.exp(kinds) / np.exp(kinds).sum(-1, keepdims=True)
    score = np.einsum(
        "nqc,nqyx->ncyx", share[..., :-1], 1 / (1 + np.exp(-masks))
    )  # equation of semantic inference
    found = by_class(torch.from_numpy(kinds), torch.from_numpy(masks)).numpy()
    odds = score[:, 1:] / score[:, :1]
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), odds / (1 + odds), rtol=1e-5)


def test_queries_far_from_any_doubt_give_numbers_and_gradients() -> None:
    kinds = torch.tensor([[[400.0, -400.0, 0.0], [-400.0, 300.0, 300.0]]], requires_grad=True)
    masks = torch.full((1, 2, 3, 3), -500.0, requires_grad=True)
    found = by_class(kinds, masks)
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(kinds.grad).all()
    assert (masks.grad != 0).any()


# Options


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("encoder-unet", {"depth": 3}, "encoder-unet has no option 'depth'; there is: encoder"),
        ("encoder-unet", {"encoder": "resnet51"}, "unknown encoder 'resnet51'.*resnet50"),
        ("encoder-unet", {"encoder": "mit_b0"}, "unknown encoder 'mit_b0'"),
        ("linknet", {"encoder": "tu-swin_tinny"}, "unknown encoder 'tu-swin_tinny'"),
        ("pspnet", {"encoder": "vgg16"}, r"pspnet cannot be built with \{'encoder': 'vgg16'\}"),
        ("deeplabv3plus", {"width": 0}, "option 'width': expected a whole number above 0, found 0"),
        (
            "deeplabv3plus",
            {"width": True},
            "option 'width': expected a whole number above 0, found True",
        ),
        (
            "deeplabv3",
            {"encoder": "mobilevit-1.0"},
            "no encoder 'mobilevit-1.0'; there is: mobilevitv2-0.5, ",
        ),
        ("segformer", {"encoder": "b6"}, "no encoder 'b6'; there is: b0, b1, b2, b3, b4, b5$"),
        ("segformer", {"encoder": 2}, "option 'encoder': expected a name, found 2"),
        (
            "upernet",
            {"encoder": "resnet50"},
            "no encoder 'resnet50'; there is: convnext-atto, .*, swin-base$",
        ),
        (
            "mask2former",
            {"queries": "many"},
            "option 'queries': expected a whole number above 0, found 'many'",
        ),
    ],
)
def test_wrong_options_are_named(architecture: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=f"model odd: .*{words}"), torch.device("meta"):
        models.build(ModelCard(id="odd", title="", architecture=architecture, options=options))


# Libraries


def test_the_libraries_are_loaded_when_one_of_their_networks_is_asked_for_and_then_without_a_warning() -> (
    None
):
    code = """
import sys
from minecube import models
from minecube.catalog import load_models
assert not {"timm", "transformers", "segmentation_models_pytorch"} & set(sys.modules)
models.build(load_models()["linknet-resnet18-small"])
assert "timm" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_torchvision_is_mended_only_where_it_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: list[str] = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: declared.append(name))

    def importing(error: Exception | None) -> None:
        def import_module(name: str) -> None:
            assert name == "torchvision"
            if error:
                raise error

        monkeypatch.setattr(importlib, "import_module", import_module)
        torchvision_operators.declare_missing_operators()

    importing(None)
    importing(ModuleNotFoundError("No module named 'torchvision'", name="torchvision"))
    assert declared == []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RuntimeError, match="nms"):
        importing(RuntimeError("operator torchvision::nms does not exist"))
    assert declared == []
    monkeypatch.setattr(torch.version, "cuda", None)
    importing(RuntimeError("operator torchvision::nms does not exist"))
    assert declared == ["torchvision::nms", "torchvision::qnms"]
