"""Check a card's options against those of its architecture, and build the network."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

from torch import nn

from minecube.catalog import ModelCard
from minecube.errors import ModelError


def build_with_options(card: ModelCard, network: type[nn.Module], **settings: str) -> nn.Module:
    """Build a network for the card's bands, classes and options.

    The options are the parameters of the network that have a default. `settings` are for its
    other parameters, besides `bands` and `classes`.

    Raises:
        ModelError: As for `options_of`.
    """
    parameters = signature(network).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty}
    return network(len(card.bands), len(card.classes), **settings, **options_of(card, **defaults))


def options_of(card: ModelCard, **defaults: Any) -> dict[str, Any]:
    """Merge the card's options into these defaults and check their kinds.

    Each option must be of its default's kind. Kinds are a name, a whole number above 0, a number of
    0 or more (default with a point), or as many whole numbers above 0 as in the default.

    Raises:
        ModelError: An option is unknown or of another kind.
    """
    unknown = sorted(set(card.options) - set(defaults))
    if unknown:
        raise ModelError(
            f"model {card.id}: {card.architecture} has no option {unknown[0]!r}; there is: "
            f"{', '.join(defaults)}"
        )
    options = {**defaults, **card.options}
    for name, default in defaults.items():
        valid, expected = _check(options[name], default)
        if not valid:
            raise ModelError(
                f"model {card.id}: option {name!r}: expected {expected}, found {options[name]!r}"
            )
    return options


def _check(value: Any, default: Any) -> tuple[bool, str]:
    """Check if a value is of the default's kind, and describe this kind."""
    if isinstance(default, str):
        return isinstance(value, str), "a name"
    if isinstance(default, int):
        return _is_whole(value), "a whole number above 0"
    if isinstance(default, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and value >= 0, "a number of 0 or more"
    is_list = isinstance(value, list | tuple) and len(value) == len(default)
    return is_list and all(map(_is_whole, value)), f"{len(default)} whole numbers above 0"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
