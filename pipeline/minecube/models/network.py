"""Build networks from cards, save them to files and load them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from minecube.arrays import Float32, UInt16
from minecube.catalog import ModelCard, as_dict, rebuild_model_card
from minecube.errors import CatalogError, ModelError
from minecube.models.files import pickle, unpickle, write_whole
from minecube.models.options import build_with_options
from minecube.places import Place

FORMAT = "minecube-model-2"
ARCHITECTURES: dict[str, str | Callable[[ModelCard], nn.Module] | type[nn.Module]] = {
    "unet": "unet:UNet",
    "encoder-unet": "libraries:unet",
    "pspnet": "libraries:pspnet",
    "linknet": "libraries:linknet",
    "deeplabv3plus": "libraries:deeplabv3plus",
    "deeplabv3": "libraries:deeplabv3",
    "segformer": "libraries:segformer",
    "upernet": "libraries:upernet",
    "mask2former": "libraries:mask2former",
    # Change
    "a2net": "a2net:a2net",
    "bit": "bit:BIT",
    "changefft": "changefft:ChangeFFT",
    "changeformer": "changeformer:ChangeFormer",
    "dtcdscn": "dtcdscn:DTCDSCN",
    "fc-ef": "fully_convolutional:fc_ef",
    "fc-siam-conc": "fully_convolutional:fc_siam_conc",
    "fc-siam-diff": "fully_convolutional:fc_siam_diff",
    "snunet": "snunet:SNUNet",
    "tinycd": "tinycd:TinyCD",
    # Series
    "series-attention": "series:SeriesAttention",
}
"""Architecture -> function building its network from a card, or its place in this package.

A place is module:function, or module:class of a network with parameters `bands` and `classes`.
Its parameters with a default are its options. Modules are loaded on demand.

Further networks may be added: `ARCHITECTURES["mine"] = build_mine`.
"""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained network and the data to apply it."""

    card: ModelCard
    network: nn.Module
    """In evaluation mode, on the CPU."""
    mean: tuple[float, ...]
    """Mean reflectance x 10000 per band of the card, over the training sites."""
    std: tuple[float, ...]
    """Standard deviation, like `mean`; never zero."""
    sites: tuple[str, ...]
    """Training sites. Scores on them are not scores on unseen ground."""
    training: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Settings, seed, validation sites, chosen epoch and its scores, as plain JSON; empty if
    unknown."""


def build(card: ModelCard) -> nn.Module:
    """Build the card's network with fresh weights from torch's global random state.

    Raises:
        ModelError: The architecture is unknown, or its options are unknown or invalid.
    """
    if card.architecture not in ARCHITECTURES:
        raise ModelError(
            f"model {card.id}: unknown architecture {card.architecture!r}; there is: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    function: Any = ARCHITECTURES[card.architecture]
    if isinstance(function, str):
        module, _, name = function.partition(":")
        function = getattr(importlib.import_module(f"minecube.models.{module}"), name)
    if "bands" in signature(function).parameters:
        function = partial(build_with_options, network=function)
    try:
        network: nn.Module = function(card)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ModelError(
            f"model {card.id}: {card.architecture} cannot be built with {dict(card.options)} "
            f"({error}); try other options"
        ) from error
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network  # in this layout a third faster on CPUs


def count_parameters(card: ModelCard) -> int:
    """Count the network's trainable numbers without drawing them. Raises ModelError as `build`."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(card).parameters() if p.requires_grad)


def save(trained: TrainedModel, path: Place) -> None:
    """Write the model to one file, whole or not at all.

    Raises:
        ModelError: The file cannot be written (folder missing or read-only, disk full).
    """
    content = {
        "format": FORMAT,
        "card": as_dict(trained.card),
        "mean": [float(value) for value in trained.mean],
        "std": [float(value) for value in trained.std],
        "sites": list(trained.sites),
        "training": dict(trained.training),
        "weights": trained.network.state_dict(),
    }
    write_whole(path, pickle(content))


def load(path: Place) -> TrainedModel:
    """Load a model from a file written by `save`.

    Raises:
        ModelError: The file cannot be read, is not one of ours, or its weights are another
            architecture's.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the model cannot be read ({error})") from error
    return read_model(unpickle(content, not_a_model(str(path))), str(path))


def not_a_model(file: str) -> str:
    """Return the error message for a file without a model."""
    return (
        f"{file}: is not a model that minecube wrote, or is damaged; train one with "
        "`minecube train`"
    )


def read_model(content: Any, file: str) -> TrainedModel:
    """Build the model from the content of a file written by `save`.

    Raises:
        ModelError: A part is missing, or of another version or architecture.
    """
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ModelError(
            f"{file}: is not a model of this version of minecube (expected {FORMAT}, found "
            f"{version or 'no format'}); train one with `minecube train`, or name another "
            "program's weights in a card (models.yaml)"
        )
    content = {"training": {}, **content}  # missing in older files
    kinds = {
        "card": dict,
        "mean": list,
        "std": list,
        "sites": list,
        "training": dict,
        "weights": dict,
    }
    missing = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if missing:
        raise ModelError(
            f"{file}: says it is a {FORMAT}, but lacks {', '.join(missing)}; train it again"
        )
    card = _read_card(content["card"], file)
    mean = tuple(content["mean"])
    std = tuple(content["std"])
    numbers = all(isinstance(value, int | float) for value in (*mean, *std))
    if not numbers or {len(mean), len(std)} != {len(card.bands)} or not all(s > 0 for s in std):
        raise ModelError(
            f"{file}: expected mean and deviation of {len(card.bands)} bands, found {mean} and "
            f"{std}; train it again"
        )
    return TrainedModel(
        card=card,
        network=build_with_weights(card, content["weights"], file),
        mean=mean,
        std=std,
        sites=tuple(content["sites"]),
        training=content["training"],
    )


def build_with_weights(card: ModelCard, weights: Mapping[str, Any], file: str) -> nn.Module:
    """Build the card's network with these weights, in evaluation mode.

    Raises:
        ModelError: The weights are another network's, are no dense tensors of floats, or are not
            finite.
    """
    network = build(card)
    _need_numbers(network.state_dict(), weights, file)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file}: the weights are not those of its card ({card.architecture}, "
            f"{len(card.bands)} bands, {dict(card.options)}), so it cannot be applied "
            f"({_describe_difference(network.state_dict(), weights)}); correct the card, or train "
            "it again"
        ) from error
    return network.eval()


def _need_numbers(expected: Mapping[str, Tensor], weights: Mapping[str, Any], file: str) -> None:
    """Raise ModelError for tensors without values, of a wrong type, or with NaN or infinity."""
    problems: dict[str, list[str]] = {}
    for name, value in weights.items():
        if name not in expected or not isinstance(value, Tensor):
            continue
        problem = _describe_problem(expected[name], value)
        if problem:
            problems.setdefault(problem, []).append(name)
    if problems:
        listed = "; ".join(f"{problem} in {_count(names)}" for problem, names in problems.items())
        raise ModelError(
            f"{file}: expected dense tensors of finite floats, found {listed}; save such weights, "
            "or name others"
        )


def _describe_problem(expected: Tensor, weight: Tensor) -> str:
    """Describe the problem of a tensor as a weight; "" if it can be one."""
    if weight.is_meta:
        return "no values (device meta)"
    if weight.layout != torch.strided:
        return str(weight.layout).removeprefix("torch.")
    is_float = weight.is_floating_point()
    if (
        weight.is_quantized
        or weight.is_complex()
        or (expected.is_floating_point() and not is_float)
    ):
        return str(weight.dtype).removeprefix("torch.")
    if is_float and not torch.isfinite(weight.to(torch.float32)).all():
        return "NaN or infinity"
    return ""


def _count(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} more"


def _describe_difference(expected: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """Count missing, unexpected and misshapen weights, with one name of each."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    common = [name for name in expected if name in shapes]
    differences = {
        "missing": [name for name in expected if name not in weights],
        "not expected": [name for name in weights if name not in expected],
        "of another shape": [name for name in common if shapes[name] != expected[name].shape],
    }
    return "; ".join(
        f"{len(names)} {kind}, such as {names[0]}" for kind, names in differences.items() if names
    )


def _read_card(fields: dict[str, Any], file: str) -> ModelCard:
    try:
        return rebuild_model_card(fields)
    except CatalogError as error:
        raise ModelError(
            f"{file}: is a model that this version of minecube does not know ({error}); update "
            "minecube"
        ) from error


def compute_logits(
    network: Callable[..., Tensor], task: str, windows: Tensor, years: Sequence[int] | None = None
) -> Tensor:
    """Compute logits [n, time, class, y, x] of windows [n, time, band, y, x].

    Windows have one year, two (giving one), or all. `years` are the windows' years. Only a network
    for series receives them, since a gap of three years differs from one year.
    """
    if task == "mapping":
        return network(windows[:, 0])[:, None]
    if task == "change":
        return network(windows)[:, None]
    if years is None:
        return network(windows, None)
    return network(windows, torch.tensor(years, device=windows.device))


def normalise(windows: UInt16 | Float32, mean: Sequence[float], std: Sequence[float]) -> Float32:
    """Normalise reflectance (n, band, y, x) to zero mean and unit deviation.

    Unobserved pixels become zero.
    """
    shape = (-1, 1, 1)
    values = windows.astype(np.float32)
    values -= np.asarray(mean, np.float32).reshape(shape)
    values /= np.asarray(std, np.float32).reshape(shape)
    np.copyto(values, 0, where=~(windows > 0))
    return values


def select_bands(reflectance: xr.DataArray, card: ModelCard) -> xr.DataArray:
    """Select the card's bands of a cube's reflectance, ([year,] band, y, x), still lazy.

    Raises:
        ModelError: Bands are missing or in another order than the card's, or pixels are not uint16.
    """
    order = ["band", "y", "x"]
    if "year" in reflectance.dims:
        order.insert(0, "year")
    if set(reflectance.dims) != set(order) or reflectance.dtype != np.uint16:
        raise ModelError(
            f"model {card.id}: expected reflectance (year, band, y, x) as uint16, found "
            f"{reflectance.dims} as {reflectance.dtype}; hand in the cube's `reflectance` as it "
            "was opened, integers undecoded"
        )
    bands: list[str] = []
    if "band" in reflectance.coords:
        bands = [str(band) for band in reflectance["band"].to_numpy()]
    positions = band_positions(bands, card, "the cube")
    return reflectance.transpose(*order).isel(band=positions)


def band_positions(bands: Sequence[str], card: ModelCard, cubes: str) -> list[int]:
    """Return the positions of the card's bands among `bands`.

    `cubes` names the owner of the bands in the error.

    Raises:
        ModelError: A band is missing, or the order is another.
    """
    if [band for band in bands if band in card.bands] != list(card.bands):
        raise ModelError(
            f"model {card.id}: expected the bands {', '.join(card.bands)} in this order, found "
            f"{', '.join(bands) or 'no names'}; it would take one band for another: build {cubes} "
            "with these bands"
        )
    return [bands.index(band) for band in card.bands]
