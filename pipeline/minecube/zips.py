"""Parse the local headers of members of zip files (APPNOTE.TXT, 4.3.7)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_FIELDS = struct.Struct("<4s5H3I2H")
LOCAL_HEADER = _FIELDS.size
"""Bytes of a local header before the member's name."""
MISPLACED = "the zip's directory points outside the file's data"
"""Message for bytes that are not the header of a member."""
_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class LocalHeader:
    """Header before a member's bytes."""

    method: int
    """Compression, as `zipfile.ZIP_STORED`."""
    name: bytes
    """The member's name, as far as it was given."""
    size: int
    """Bytes from the header's start to the member's bytes: fields, name and extra field."""


def parse_local_header(content: bytes) -> LocalHeader:
    """Parse a local header from its bytes. Bytes after the name are ignored.

    Raises:
        ValueError: the bytes are too few, or are no local header.
    """
    if len(content) < LOCAL_HEADER:
        raise ValueError("the zip ends within a member's header")
    magic, _, _, method, *_, name, extra = _FIELDS.unpack(content[:LOCAL_HEADER])
    if magic != _MAGIC:
        raise ValueError(MISPLACED)
    return LocalHeader(
        method, content[LOCAL_HEADER : LOCAL_HEADER + name], LOCAL_HEADER + name + extra
    )
