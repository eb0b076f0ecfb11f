"""Read texts and numbers of an item. Any of them may be missing or malformed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pystac

from minecube.errors import SceneError

_UNKNOWN_TEXTS = {"", "none", "null", "nan", "<na>", "nat"}
"""Lower-case spellings of an unknown value, as tables and their libraries write null."""
_NUMERIC = (int, float, str, Decimal, np.floating, np.integer)
"""Types of numbers in items, and of text with a possible number."""


def refusal(item: pystac.Item, reason: str) -> SceneError:
    """Return the error for an unusable item."""
    return SceneError(f"item {item.id}: {reason}; it is refused")


def read_property(item: pystac.Item, *names: str) -> str:
    """Return the first known property as text, or an empty text."""
    for name in names:
        text = str(item.properties.get(name, "")).strip()
        if text.lower() not in _UNKNOWN_TEXTS:
            return text
    return ""


def read_number(fields: Mapping[str, Any], *names: str) -> float | None:
    """Return the first of these fields with a number, or None."""
    for name in names:
        number = parse_number(fields.get(name))
        if number is not None:
            return number
    return None


def parse_number(value: object) -> float | None:
    """Parse a finite number, also from text. Return None for any other value."""
    if isinstance(value, bool) or not isinstance(value, _NUMERIC):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    return number


def parse_numbers(value: object) -> list[float]:
    """Parse a list of numbers. Return an empty list for other values or any unknown number."""
    if not isinstance(value, list | tuple):
        return []
    numbers: list[float] = []
    for element in value:
        number = parse_number(element)
        if number is None:
            return []
        numbers.append(number)
    return numbers
