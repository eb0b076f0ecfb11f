"""Bands by name, and how a wrong entry says which of its fields is wrong."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from anyascii import anyascii

LONGEST_NAME = 100
"""Characters of a name. Files and locks add words of their own to it, and file systems take 255 bytes."""
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


def need_name(name: str, field: str = "id") -> None:
    """Raise FieldError if a name cannot name both a Zarr group and a file."""
    shown = repr(name if len(name) <= LONGEST_NAME else f"{name[:20]}...")
    need(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name), field, f"letters, digits, _ . -, found {shown}")
    need(len(name) <= LONGEST_NAME, field, f"up to {LONGEST_NAME} characters, found {len(name):,}")
    need(name != "zarr.json", field, "another name than zarr.json, which Zarr needs for itself")


def safe_name(name: str) -> str:
    """Make an id that can name a Zarr group and a file: blanks become _, other scripts Latin letters, the rest _.

    >>> safe_name("Kopalnia Bełża (Nord)")
    'Kopalnia_Belza_Nord'
    >>> safe_name("way/10001")
    'way_10001'

    Returns:
        The id; "" for a name without letter and digit.
    """
    plain = name.strip().replace(" ", "_")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", plain):
        return plain
    return re.sub(r"[^A-Za-z0-9.-]+", "_", anyascii(name)).strip("_.-")


def same_names(name: str, known: Iterable[str]) -> list[str]:
    """The known ids that a name may mean: itself, or all that differ in case, accents, blanks and _ . - only."""
    ids = list(known)
    return [name] if name in ids else [i for i in ids if _key(i) == _key(name)]


@functools.lru_cache(maxsize=2**16)
def _key(name: str) -> str:
    return re.sub(r"[_.-]+", "_", safe_name(name)).casefold()


def need_months(field: str, months: tuple[int, ...], at_least: int = 1) -> None:
    """Raises FieldError where these are no calendar months, ascending, each once."""
    in_order = all(1 <= m <= 12 for m in months) and list(months) == sorted(set(months))
    need(len(months) >= at_least and in_order, field, f"1..12, ascending, each once, found {list(months)}")
