"""Bands by name, and how a wrong entry says which of its fields is wrong."""

from __future__ import annotations

BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""The cube's bands, in the cube's order; B01, B09 and B10 are left out, as in EuroMineNet."""
SCL = "SCL"
"""Asset name of the Level-2A scene classification."""
NATIVE_M = {band: 10 if band in ("B02", "B03", "B04", "B08") else 20 for band in (*BANDS, SCL)}
"""The mission's pixel sizes in metres."""


class FieldError(ValueError):
    """A field that does not hold what it must; the loader adds file and entry."""


def need(condition: object, field: str, expected: str) -> None:
    """Raises FieldError where the condition does not hold."""
    if not condition:
        raise FieldError(f"field {field!r}: expected {expected}")


def need_months(field: str, months: tuple[int, ...], at_least: int = 1) -> None:
    """Raises FieldError where these are no calendar months, ascending, each once."""
    in_order = all(1 <= m <= 12 for m in months) and list(months) == sorted(set(months))
    need(len(months) >= at_least and in_order, field, f"1..12, ascending, each once, found {list(months)}")
