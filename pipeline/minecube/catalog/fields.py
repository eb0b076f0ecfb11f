"""Names of bands and sites, and checks of catalogue fields."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from anyascii import anyascii

LONGEST_NAME = 100
"""Most characters of a name. Files and locks add words to it, and file systems allow 255 bytes."""
BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""Bands of the cube, in its order, without B01, B09 and B10, as in EuroMineNet."""
SCL = "SCL"
"""Asset name of the Level-2A scene classification."""
NATIVE_M = {band: 10 if band in ("B02", "B03", "B04", "B08") else 20 for band in (*BANDS, SCL)}
"""The mission's pixel sizes in metres."""


class FieldError(ValueError):
    """A field with a wrong value. The loader adds file and entry."""


def need(condition: object, field: str, expected: str) -> None:
    """Raise FieldError if the condition is false."""
    if not condition:
        raise FieldError(f"field {field!r}: expected {expected}")


def need_name(name: str, field: str = "id") -> None:
    """Raise FieldError if a name cannot name both a Zarr group and a file."""
    shown = repr(name if len(name) <= LONGEST_NAME else f"{name[:20]}...")
    need(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name),
        field,
        f"letters, digits, _ . -, found {shown}",
    )
    need(len(name) <= LONGEST_NAME, field, f"up to {LONGEST_NAME} characters, found {len(name):,}")
    need(name != "zarr.json", field, "another name than zarr.json, which Zarr needs for itself")


def safe_name(name: str) -> str:
    """Make an id for use as the name of a Zarr group and a file.

    Blanks become _, letters of other scripts become Latin, and all else becomes _.

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
    """Return the known ids for a name.

    The same id, or all ids differing only in case, accents, blanks and _ . -.
    """
    ids = list(known)
    return [name] if name in ids else [i for i in ids if _key(i) == _key(name)]


@functools.lru_cache(maxsize=2**16)
def _key(name: str) -> str:
    return re.sub(r"[_.-]+", "_", safe_name(name)).casefold()


def need_months(field: str, months: tuple[int, ...], at_least: int = 1) -> None:
    """Raise FieldError unless these are calendar months, ascending, each once."""
    in_order = all(1 <= m <= 12 for m in months) and list(months) == sorted(set(months))
    need(
        len(months) >= at_least and in_order,
        field,
        f"1..12, ascending, each once, found {list(months)}",
    )
