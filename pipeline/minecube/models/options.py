"""Check a card's options against those of its architecture."""

from __future__ import annotations

from typing import Any

from minecube.catalog import ModelCard
from minecube.errors import ModelError


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
            f"model {card.id}: {card.architecture} has no option {unknown[0]!r}; there is: {', '.join(defaults)}"
        )
    found = {**defaults, **card.options}
    for name, default in defaults.items():
        expected = _unlike(found[name], default)
        if expected:
            raise ModelError(
                f"model {card.id}: option {name!r}: expected {expected}, found {found[name]!r}"
            )
    return found


def _unlike(value: Any, default: Any) -> str:
    """Describe the expected kind; empty if the value is of the default's kind."""
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a name"
    if isinstance(default, int):
        return "" if _whole(value) else "a whole number above 0"
    if isinstance(default, float):
        return (
            ""
            if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            else "a number of 0 or more"
        )
    several = (
        isinstance(value, list | tuple) and len(value) == len(default) and all(map(_whole, value))
    )
    return "" if several else f"{len(default)} whole numbers above 0"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
