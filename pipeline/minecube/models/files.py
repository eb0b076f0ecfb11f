"""Files of tensors and plain values: written whole or not at all, and opened only where every byte is as it was written."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from minecube.errors import ModelError
from minecube.files import replacing

_FOREIGN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What zipfile and torch raise on a file that is none of theirs, or damaged."""


def pickled(content: Mapping[str, Any]) -> memoryview:
    """The bytes of a file of these, tensors among them."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getbuffer()


def unpickled(content: bytes, otherwise: str) -> Any:
    """What is in a file that `pickled` or `torch.save` made, tensors on the CPU and plain values: nothing in it is run.

    Raises:
        ModelError: it is something else, or damaged; says `otherwise`.
    """
    file = io.BytesIO(content)
    try:
        with zipfile.ZipFile(file) as parts:  # which knows the checksums that torch writes, and does not look at
            damaged = parts.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except _FOREIGN as error:
        raise ModelError(otherwise) from error


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file, whole or not at all; raises ModelError where it cannot be (folder missing or read-only, disk full)."""
    try:
        with replacing(path) as draft:
            draft.write_bytes(content)
    except (OSError, ValueError) as error:  # the latter of a name that cannot be one
        raise ModelError(f"{path}: could not be written ({error}); what was there before is as it was") from error
