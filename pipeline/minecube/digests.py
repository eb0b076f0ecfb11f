"""Checksums of plain values."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of plain JSON, in hexadecimal, independent of the order of keys.

    Raises TypeError for a value that JSON cannot hold.
    """
    as_stored = json.loads(json.dumps(value))  # with keys as text and tuples as lists
    return hashlib.sha256(json.dumps(as_stored, sort_keys=True).encode()).hexdigest()
