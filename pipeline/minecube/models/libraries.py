"""Mapping networks of segmentation-models-pytorch, timm and transformers.

They need `pip install 'minecube[models]'`. Each maps (n, bands, y, x) to logits (n, classes, y, x).
Weights keep the library's names, so its own state_dicts fit. No network downloads anything: weights
come from the card or from training.

DeepLabV3(+) and UPerNet pool a window to one pixel and normalise it over the batch. In training
they need at least two windows, and torch reports fewer. All others train on one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minecube.catalog import ModelCard
from minecube.errors import ModelError
from minecube.models.blocks import enlarge
from minecube.models.options import options_of
from minecube.models.torchvision_operators import declare_missing_operators

declare_missing_operators()

import segmentation_models_pytorch as smp  # noqa: E402  timm imports torchvision
import timm  # noqa: E402
import transformers  # noqa: E402

_ENCODER = "resnet50"
"""Default encoder of the networks of segmentation-models-pytorch."""
# Channels and depths of the four stages, width of the decoder: Xie et al. 2021, tables 1 and 6.
_SEGFORMER = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2), 256),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3), 768),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3), 768),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3), 768),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3), 768),
}
# Channels of the first stage, depths: Liu et al. 2022, section 3. Up to nano: Woo et al. 2023
# (arXiv:2301.00808).
_CONVNEXT = {
    "convnext-atto": (40, (2, 2, 6, 2)),
    "convnext-femto": (48, (2, 2, 6, 2)),
    "convnext-pico": (64, (2, 2, 6, 2)),
    "convnext-nano": (80, (2, 2, 8, 2)),
    "convnext-tiny": (96, (3, 3, 9, 3)),
    "convnext-small": (96, (3, 3, 27, 3)),
    "convnext-base": (128, (3, 3, 27, 3)),
}
# Channels of the first stage, depths: Liu et al. 2021, section 3.3. Heads have 32 channels. mini is
# ours, for CPUs.
_SWIN = {
    "swin-mini": (32, (2, 2, 2, 2)),
    "swin-tiny": (96, (2, 2, 6, 2)),
    "swin-small": (96, (2, 2, 18, 2)),
    "swin-base": (128, (2, 2, 18, 2)),
}
_MOBILEVIT = {f"mobilevitv2-{width}": width for width in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def unet(card: ModelCard) -> nn.Module:
    """Build U-Net (Ronneberger et al. 2015, arXiv:1505.04597) on the option `encoder`."""
    options = options_of(card, encoder=_ENCODER)
    return _build_smp(card, smp.Unet, options["encoder"])


def linknet(card: ModelCard) -> nn.Module:
    """Build LinkNet (Chaurasia and Culurciello 2017, arXiv:1707.03718) on the option `encoder`."""
    options = options_of(card, encoder=_ENCODER)
    return _build_smp(card, smp.Linknet, options["encoder"])


def pspnet(card: ModelCard) -> nn.Module:
    """Build PSPNet (Zhao et al. 2017, arXiv:1612.01105) on the option `encoder`.

    Option `width` is the pyramid's, 512 as published. As published, the last two stages are
    dilated, with features at 1/8 of the resolution. The library leaves these stages out by default.
    It fuses the pyramid by a 1 x 1 convolution, the paper by 3 x 3.
    """
    options = options_of(card, encoder=_ENCODER, width=512)
    pyramid = partial(smp.PSPNet, psp_out_channels=options["width"], encoder_depth=5, upsampling=8)
    network = _build_smp(card, pyramid, options["encoder"])
    network.encoder.make_dilated(8)  # type: ignore[operator, union-attr]
    return network


def deeplabv3plus(card: ModelCard) -> nn.Module:
    """Build DeepLabV3+ (Chen et al. 2018, arXiv:1802.02611) at output stride 16.

    Options: `encoder` and `width` (256 as published).
    """
    options = options_of(card, encoder=_ENCODER, width=256)
    pyramid = partial(smp.DeepLabV3Plus, decoder_channels=options["width"])
    return _build_smp(card, pyramid, options["encoder"])


def deeplabv3(card: ModelCard) -> nn.Module:
    """Build DeepLabV3 (Chen et al. 2017, arXiv:1706.05587) on MobileViTV2.

    The option `encoder` selects the MobileViTV2 (Mehta and Rastegari 2022, arXiv:2206.02680).
    Output stride is 16, with rates 6, 12 and 18. Option `width` is the pyramid's, 512 as published.
    """
    options = options_of(card, encoder="mobilevitv2-1.0", width=512)
    config = transformers.MobileViTV2Config(
        num_channels=len(card.bands),
        num_labels=len(card.classes),
        width_multiplier=_size_of(card, _MOBILEVIT, options["encoder"]),
        aspp_out_channels=options["width"],
        output_stride=16,
    )
    return _with_logits(transformers.MobileViTV2ForSemanticSegmentation(config), _enlarge_logits)


def segformer(card: ModelCard) -> nn.Module:
    """Build SegFormer (Xie et al. 2021, arXiv:2105.15203), b0 to b5 by the option `encoder`."""
    channels, depths, width = _size_of(card, _SEGFORMER, options_of(card, encoder="b2")["encoder"])
    config = transformers.SegformerConfig(
        num_channels=len(card.bands),
        num_labels=len(card.classes),
        hidden_sizes=channels,
        depths=depths,
        decoder_hidden_size=width,
    )
    return _with_logits(transformers.SegformerForSemanticSegmentation(config), _enlarge_logits)


def upernet(card: ModelCard) -> nn.Module:
    """Build UPerNet (Xiao et al. 2018, arXiv:1807.10221) on ConvNeXt or Swin.

    The option `encoder` selects the backbone. Option `width` is the pyramids', 512 as published.
    The auxiliary head is left out, as it only serves its own loss.
    """
    options = options_of(card, encoder="swin-tiny", width=512)
    config = transformers.UperNetConfig(
        backbone_config=_backbone_config(card, options["encoder"], {**_CONVNEXT, **_SWIN}),
        hidden_size=options["width"],
        use_auxiliary_head=False,
        num_labels=len(card.classes),
    )
    return _with_logits(transformers.UperNetForSemanticSegmentation(config), _enlarge_logits)


def mask2former(card: ModelCard) -> nn.Module:
    """Build Mask2Former (Cheng et al. 2022, arXiv:2112.01527) on Swin, with a logit per class.

    Each of the `queries` has a mask and a kind: a class, background or nothing. In the paper's
    semantic inference, a class scores s_c = sum over queries of p(c) sigmoid(mask), and a pixel
    gets the class of the highest score. Here a class's logit is
    log s_c - log s_background. It is computed at the masks' resolution (a quarter), then enlarged.
    It is above zero if the paper would choose the class over the background. Training uses the same
    loss per pixel as all other networks. The paper's loss by matched sets of masks is for
    separating objects, and these labels have no objects.

    Options, with published defaults: `encoder` (swin-tiny), `queries` (100), `width` (256),
    `encoder_layers` (6, of the pixel decoder) and `decoder_layers` (9).
    """
    options = options_of(
        card, encoder="swin-tiny", width=256, queries=100, encoder_layers=6, decoder_layers=9
    )
    width = options["width"]
    config = transformers.Mask2FormerConfig(
        backbone_config=_backbone_config(card, options["encoder"], _SWIN),
        num_labels=1 + len(card.classes),
        num_queries=options["queries"],
        encoder_layers=options["encoder_layers"],
        # The library also counts the masks of the initial queries.
        decoder_layers=options["decoder_layers"] + 1,
        feature_size=width,
        mask_feature_size=width,
        hidden_dim=width,
        encoder_feedforward_dim=4 * width,
        dim_feedforward=8 * width,
    )
    network = transformers.Mask2FormerForUniversalSegmentation(config)
    # As in the paper's own code. The library starts with nearly constant masks and the same class
    # for all queries. All classes then have the same score at every pixel, and thousands of
    # windows pass before the network learns anything.
    network.class_predictor.reset_parameters()
    features = network.model.pixel_level_module.decoder.mask_projection
    nn.init.kaiming_uniform_(features.weight, a=1)
    nn.init.zeros_(features.bias)
    return _with_logits(network, _score_classes)


def _size_of(card: ModelCard, sizes: Mapping[str, Any], encoder: str) -> Any:
    if encoder not in sizes:
        raise ModelError(
            f"model {card.id}: {card.architecture} knows no encoder {encoder!r}; there is: "
            f"{', '.join(sizes)}"
        )
    return sizes[encoder]


def _backbone_config(
    card: ModelCard, encoder: str, sizes: Mapping[str, tuple[int, tuple[int, ...]]]
) -> Any:
    width, depths = _size_of(card, sizes, encoder)
    channels = [width * 2**stage for stage in range(4)]
    if encoder in _CONVNEXT:
        return transformers.ConvNextConfig(
            num_channels=len(card.bands),
            hidden_sizes=channels,
            depths=list(depths),
            out_features=_STAGES,
        )
    return transformers.SwinConfig(
        num_channels=len(card.bands),
        embed_dim=width,
        depths=list(depths),
        num_heads=[c // 32 for c in channels],
        window_size=7,
        out_features=_STAGES,
    )


def _build_smp(card: ModelCard, architecture: Callable[..., Any], encoder: str) -> nn.Module:
    # Two families are left out. The licence of Mix Transformers forbids commerce (see segformer),
    # and timm- names are outdated.
    encoders = [
        name for name in smp.encoders.get_encoder_names() if not name.startswith(("mit_", "timm-"))
    ]
    encoders += [f"tu-{name}" for name in timm.list_models()]
    if encoder not in encoders:
        close = ", ".join(difflib.get_close_matches(encoder, encoders, 5, 0))
        raise ModelError(
            f"model {card.id}: unknown encoder {encoder!r}; there are {len(encoders)}, the nearest "
            f"by name: {close} (those of segmentation-models-pytorch, and of timm behind tu-)"
        )
    network: nn.Module = architecture(
        encoder_name=encoder,
        encoder_weights=None,
        in_channels=len(card.bands),
        classes=len(card.classes),
    )
    return network


def _with_logits(network: nn.Module, logits: Callable[..., Tensor]) -> nn.Module:
    """Make a network of transformers return these logits instead of its own output."""
    for name, module in network.named_modules():
        # Swin's classifier would use this layer; no data passes it here.
        if name.endswith("swin.layernorm"):
            module.requires_grad_(False)
        # Some networks draw its scale around zero, which blocks the signal.
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    network.register_forward_hook(logits)
    return network


def _enlarge_logits(_network: nn.Module, inputs: tuple[Tensor], output: Any) -> Tensor:
    return enlarge(output.logits, inputs[0])


def _score_classes(_network: nn.Module, inputs: tuple[Tensor], output: Any) -> Tensor:
    # In logarithms: a score may underflow, but its gradient is needed.
    # (n, query, background and classes)
    kinds = output.class_queries_logits.float().log_softmax(-1)[..., :-1]
    masks = nn.functional.logsigmoid(output.masks_queries_logits.float())  # (n, query, y, x)
    background, *classes = (
        torch.logsumexp(masks + kinds[..., c, None, None], dim=1) for c in range(kinds.shape[-1])
    )
    return enlarge(torch.stack(classes, 1) - background[:, None], inputs[0])
