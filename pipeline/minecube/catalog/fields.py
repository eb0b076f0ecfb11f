"""Checks of catalogue fields, and names of sites."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from anyascii import anyascii

from minecube.catalog.mission import BANDS

LONGEST_NAME = 100
"""Most characters of a name. Files and locks add words to it, and file systems allow 255 bytes."""
_SAFE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


class FieldError(ValueError):
    """A field with a wrong value. The loader adds file and entry."""


def need(condition: object, field: str, expected: str) -> None:
    """Raise FieldError if the condition is false."""
    if not condition:
        raise FieldError(f"field {field!r}: expected {expected}")


def check_field(condition: object, entry: object, field: str, expected: str) -> None:
    """Raise FieldError with the field's value if the condition is false."""
    need(condition, field, f"{expected}, found {getattr(entry, field)!r}")


def need_bands(bands: tuple[str, ...]) -> None:
    """Raise FieldError unless these are bands of the cube, at least one."""
    unknown = [band for band in bands if band not in BANDS]
    found = ", ".join(unknown) or "none"
    need(bands and not unknown, "bands", f"bands of {', '.join(BANDS)}, found {found}")


def need_name(name: str, field: str = "id") -> None:
    """Raise FieldError if a name cannot name both a Zarr group and a file."""
    is_safe = re.fullmatch(_SAFE_NAME, name)
    beginning = name if len(name) <= LONGEST_NAME else f"{name[:20]}..."
    need(is_safe, field, f"letters, digits, _ . -, found {beginning!r}")
    need(len(name) <= LONGEST_NAME, field, f"up to {LONGEST_NAME} characters, found {len(name):,}")
    need(name != "zarr.json", field, "another name than zarr.json, which Zarr reserves")


def make_id(name: str) -> str:
    """Make an id for use as the name of a Zarr group and a file.

    Blanks become _, letters of other scripts become Latin, and all else becomes _.

    >>> make_id("Kopalnia Bełża (Nord)")
    'Kopalnia_Belza_Nord'
    >>> make_id("way/10001")
    'way_10001'

    Returns:
        The id; "" for a name without letter and digit.
    """
    plain = name.strip().replace(" ", "_")
    if re.fullmatch(_SAFE_NAME, plain):
        return plain
    return re.sub(r"[^A-Za-z0-9.-]+", "_", anyascii(name)).strip("_.-")


def match_ids(name: str, ids: Iterable[str]) -> list[str]:
    """Return the ids for a name.

    The same id, or all ids differing only in case, accents, blanks and _ . -.
    """
    ids = list(ids)
    if name in ids:
        return [name]
    return [candidate for candidate in ids if _key(candidate) == _key(name)]


@functools.lru_cache(maxsize=2**16)
def _key(name: str) -> str:
    return re.sub(r"[_.-]+", "_", make_id(name)).casefold()


def need_months(field: str, months: tuple[int, ...], at_least: int = 1) -> None:
    """Raise FieldError unless these are calendar months, ascending, each once."""
    in_order = list(months) == sorted(set(months))
    fits = in_order and len(months) >= at_least and all(1 <= month <= 12 for month in months)
    need(fits, field, f"1..12, ascending, each once, found {list(months)}")
