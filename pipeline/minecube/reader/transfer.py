"""What a read transfers: the head of a file, and counts of requests and bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """Network use of one read."""

    requests: int = 0
    retried: int = 0
    bytes: int = 0
    wrapped: int = 0
    """Pixels read as invalid because their number is above 32767."""
    error: Exception | None = None
    """Reason for missing or false bytes given to GDAL. The caller of GDAL must check it."""


@dataclass(frozen=True)
class Head:
    """The beginning of a file, including a COG's header."""

    data: bytes
    size: int
    version: str
    """ETag of the file: bytes of two versions would make a false image."""
