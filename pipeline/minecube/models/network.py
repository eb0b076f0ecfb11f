"""Build networks from cards, save them to files and load them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from minecube.catalog import ModelCard, as_dict, model_card_of
from minecube.errors import CatalogError, ModelError
from minecube.models.files import pickled, unpickled, write_whole

FORMAT = "minecube-model-2"
ARCHITECTURES = {
    "unet": "unet:unet",
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
    "bit": "bit:bit",
    "changefft": "changefft:changefft",
    "changeformer": "changeformer:changeformer",
    "dtcdscn": "dtcdscn:dtcdscn",
    "fc-ef": "fully_convolutional:fc_ef",
    "fc-siam-conc": "fully_convolutional:fc_siam_conc",
    "fc-siam-diff": "fully_convolutional:fc_siam_diff",
    "snunet": "snunet:snunet",
    "tinycd": "tinycd:tinycd",
    # Series
    "series-attention": "series:series_attention",
}
"""Architecture -> module:function building its network from a card. Modules are loaded on demand.
"""


@dataclass(frozen=True, kw_only=True)
class Trained:
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
            f"model {card.id}: unknown architecture {card.architecture!r}; there is: {', '.join(sorted(ARCHITECTURES))}"
        )
    module, _, name = ARCHITECTURES[card.architecture].partition(":")
    function = getattr(importlib.import_module(f"minecube.models.{module}"), name)
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
            f"model {card.id}: {card.architecture} cannot be built with {dict(card.options)} ({error}); try other options"
        ) from error
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # a third faster on CPUs


def parameters(card: ModelCard) -> int:
    """Count the trainable numbers of the card's network without drawing them.

    Raises:
        ModelError: As for `build`.
    """
    with torch.device("meta"):
        return sum(p.numel() for p in build(card).parameters() if p.requires_grad)


def save(trained: Trained, path: Path) -> None:
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
    write_whole(path, pickled(content))


def load(path: Path) -> Trained:
    """Load a model from a file written by `save`.

    Raises:
        ModelError: The file cannot be read, is not one of ours, or its weights are another
            architecture's.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the model cannot be read ({error})") from error
    return model_of(unpickled(content, foreign(str(path))), str(path))


def foreign(where: str) -> str:
    """Return the error message for a file without a model."""
    return f"{where}: is not a model that minecube wrote, or is damaged; train one with `minecube train`"


def model_of(content: Any, where: str) -> Trained:
    """Build the model from the content of a file written by `save`.

    Raises:
        ModelError: A part is missing, or of another version or architecture.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ModelError(
            f"{where}: is not a model of this version of minecube (expected {FORMAT}, found {found or 'no format'}); "
            "train one with `minecube train`, or name another program's weights in a card (models.yaml)"
        )
    content = {"training": {}, **content}  # missing in older files
    parts = {
        "card": dict,
        "mean": list,
        "std": list,
        "sites": list,
        "training": dict,
        "weights": dict,
    }
    wrong = [name for name, kind in parts.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise ModelError(
            f"{where}: says it is a {FORMAT}, but lacks {', '.join(wrong)}; train it again"
        )
    card = _card(content["card"], where)
    mean, std, sites = (tuple(content[key]) for key in ("mean", "std", "sites"))
    numbers = all(isinstance(value, int | float) for value in (*mean, *std))
    if not numbers or {len(mean), len(std)} != {len(card.bands)} or not all(s > 0 for s in std):
        raise ModelError(
            f"{where}: expected mean and deviation of {len(card.bands)} bands, found {mean} and {std}; train it again"
        )
    network = filled(card, content["weights"], where)
    return Trained(
        card=card, network=network, mean=mean, std=std, sites=sites, training=content["training"]
    )


def filled(card: ModelCard, weights: Mapping[str, Any], where: str) -> nn.Module:
    """Fill the card's network with these weights, in evaluation mode.

    Raises:
        ModelError: The weights are another network's, are no dense tensors of floats, or are not
            finite.
    """
    network = build(card)
    _need_numbers(network.state_dict(), weights, where)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{where}: the weights are not those of its card ({card.architecture}, {len(card.bands)} bands, "
            f"{dict(card.options)}), so it cannot be applied ({_difference(network.state_dict(), weights)}); correct the card, "
            "or train it again"
        ) from error
    return network.eval()


def _need_numbers(expected: Mapping[str, Tensor], found: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for tensors without values, of a wrong type, or with NaN or infinity."""
    problems: dict[str, list[str]] = {}
    for name, value in found.items():
        if (
            name in expected
            and isinstance(value, Tensor)
            and (problem := _problem(expected[name], value))
        ):
            problems.setdefault(problem, []).append(name)
    if problems:
        words = "; ".join(
            f"{problem} in {names[0]}{_and_more(names)}" for problem, names in problems.items()
        )
        raise ModelError(
            f"{where}: expected dense tensors of finite floats, found {words}; save such weights, or name others"
        )


def _problem(expected: Tensor, found: Tensor) -> str:
    """Describe the problem of a tensor as a weight; "" if it can be one."""
    if found.is_meta:
        return "no values (device meta)"
    if found.layout != torch.strided:
        return str(found.layout).removeprefix("torch.")
    if (
        found.is_quantized
        or found.is_complex()
        or (expected.is_floating_point() and not found.is_floating_point())
    ):
        return str(found.dtype).removeprefix("torch.")
    finite = not found.is_floating_point() or bool(torch.isfinite(found.to(torch.float32)).all())
    return "" if finite else "NaN or infinity"


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> str:
    """Count missing, unexpected and misshapen weights, with one name of each."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in found.items()}
    found_otherwise = [
        n for n, value in expected.items() if n in shapes and shapes[n] != value.shape
    ]
    differences = {
        "missing": [name for name in expected if name not in found],
        "not expected": [name for name in found if name not in expected],
        "of another shape": found_otherwise,
    }
    return "; ".join(
        f"{len(names)} {what}, such as {names[0]}" for what, names in differences.items() if names
    )


def _card(fields: dict[str, Any], where: str) -> ModelCard:
    try:
        return model_card_of(fields)
    except CatalogError as error:
        raise ModelError(
            f"{where}: is a model that this version of minecube does not know ({error}); update minecube"
        ) from error


def logits(
    network: Callable[..., Tensor], task: str, windows: Tensor, years: Sequence[int] | None = None
) -> Tensor:
    """Compute logits [n, time, class, y, x] of windows [n, time, band, y, x].

    Windows have one year, two (giving one), or all. `years` are the windows' years. Only a network
    for series receives them, since a gap of three years differs from one year.
    """
    if task == "series":
        return network(
            windows, None if years is None else torch.tensor(years, device=windows.device)
        )
    return network(windows[:, 0] if task == "mapping" else windows)[:, None]


def normalise(
    windows: NDArray[np.uint16] | NDArray[np.float32], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """Normalise reflectance (n, band, y, x) to zero mean and unit deviation.

    Unobserved pixels become zero.
    """
    shape = (-1, 1, 1)
    values: NDArray[np.float32] = windows - np.asarray(mean, np.float32).reshape(shape)
    values /= np.asarray(std, np.float32).reshape(shape)
    np.putmask(values, ~(windows > 0), 0)
    return values


def select_bands(reflectance: xr.DataArray, card: ModelCard) -> xr.DataArray:
    """Select the card's bands of a cube's reflectance, ([year,] band, y, x), still lazy.

    Raises:
        ModelError: Bands are missing or in another order than the card's, or pixels are not uint16.
    """
    order = [d for d in ("year", "band", "y", "x") if d != "year" or d in reflectance.dims]
    if set(reflectance.dims) != set(order) or reflectance.dtype != np.uint16:
        raise ModelError(
            f"model {card.id}: expected reflectance (year, band, y, x) as uint16, found {reflectance.dims} as "
            f"{reflectance.dtype}; hand in the cube's `reflectance` as it was opened, integers undecoded"
        )
    found = [str(b) for b in reflectance["band"].to_numpy()] if "band" in reflectance.coords else []
    if [b for b in found if b in card.bands] != list(card.bands):
        raise ModelError(
            f"model {card.id}: expected the bands {', '.join(card.bands)} in this order, found "
            f"{', '.join(found) or 'no names'}; it would take one band for another: build the cube with these bands"
        )
    return reflectance.transpose(*order).isel(band=[found.index(b) for b in card.bands])
