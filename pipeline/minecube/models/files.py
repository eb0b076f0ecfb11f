"""Write files of tensors and plain values whole, and open only undamaged ones.

No code of a file is ever run. torch's restricted unpickler (`weights_only`, safe since torch 2.6:
CVE-2025-32434) reads tensors and plain values. numpy scalars become numbers. Objects of other
classes become placeholders or are refused.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from minecube.errors import ModelError
from minecube.files import replacing
from minecube.places import Place, outgoing

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
"""Exceptions of zipfile and torch for foreign or damaged files."""


def pickle(content: Mapping[str, Any]) -> memoryview:
    """Serialise a dictionary of tensors and plain values by torch.save."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getbuffer()


class Placeholder:
    """Stand-in for an object of another class, with its arguments and state, without its code.

    A subclass is made per class of the file, with the same module and name.
    """

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> Any:
        """Keep the arguments, or make a number of a numpy scalar's dtype and bytes."""
        if f"{cls.__module__}.{cls.__name__}" in _NUMPY:
            dtype, content = arguments
            numpy_dtype = np.dtype(str(dtype.arguments[0])).newbyteorder(dtype.state[1])
            return np.frombuffer(content, numpy_dtype)[0].item()
        placeholder = super().__new__(cls)
        placeholder.arguments = arguments
        return placeholder

    def __setstate__(self, state: Any) -> None:
        self.state = state


_NUMPY = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""Makers of scalars in pickles of numpy 1 and 2."""
_ONE_AT_A_TIME = threading.Lock()
"""Lock for torch's list of accepted classes, shared by all threads."""


def unpickle(content: bytes, message: str, placeholders: bool = False) -> Any:
    """Read a file of `pickle` or `torch.save` without running any code in it.

    Tensors are loaded on the CPU. With `placeholders`, an object of another class becomes a
    `Placeholder`. Otherwise the file is refused.

    Raises:
        ModelError: The file is foreign or damaged. The message is `message`, plus the format if
            known.
    """
    file = io.BytesIO(content)
    try:
        with zipfile.ZipFile(file) as parts:  # checks the checksums: torch writes but ignores them
            damaged = parts.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        replaced = set(names)
        if not placeholders:
            replaced &= {*_NUMPY, "numpy.dtype"}
        file.seek(0)
        with (
            _ONE_AT_A_TIME,
            torch.serialization.safe_globals([_placeholder_class(name) for name in replaced]),
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except _FOREIGN as error:
        kind = describe_format(content)
        if kind:
            message = f"{message} (it looks like {kind})"
        raise ModelError(message) from error


def _placeholder_class(path: str) -> type[Placeholder]:
    module, _, name = path.rpartition(".")
    return type(name, (Placeholder,), {"__module__": module})


_BEGINNINGS = {
    rb"\x89HDF": "an HDF5 file, as Keras writes: save a torch network's state_dict() by torch.save",
    rb"version https://git-lfs": "a pointer of Git LFS: get the file itself by `git lfs pull`",
    rb"\s*<": "a page of HTML or XML: get the file itself",
    rb"\x80\x02\x8a\x0a": "a file of torch.save before torch 1.6: load it and save it again",
    rb"\x80": "a pickle that torch.save did not write: "
    "save the network's state_dict() by torch.save",
    rb"\x1f\x8b": "a gzip file: unpack it",
    rb"\x08.[\x12:]": "an ONNX model: save the network's state_dict() by torch.save",
    rb'.{6}\0\0\{"': "a safetensors file: load its tensors and save them by torch.save",
}
_PROGRAMS = {
    "constants.pkl": "a TorchScript archive",
    "archive_format": "a program of torch.export",
}
"""Zip archives of torch, by the name of a member."""


def describe_format(content: bytes) -> str:
    """Name a file's format and the remedy; empty if the format is unknown or the file damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            names = {name.partition("/")[2] for name in parts.namelist()}
            damaged = parts.testzip()
    except _FOREIGN:
        return next(
            (kind for start, kind in _BEGINNINGS.items() if re.match(start, content, re.DOTALL)), ""
        )
    if damaged:
        return ""
    program = next((kind for part, kind in _PROGRAMS.items() if part in names), None)
    if program:
        return f"{program}: save the network's state_dict() by torch.save"
    if "data.pkl" not in names:
        return "a zip archive of something else"
    classes = _list_classes(content)
    if not classes:
        return ""
    return f"a file with objects of {classes}: save the network's state_dict() alone"


def _list_classes(content: bytes) -> str:
    """List the first classes in a file of torch.save that are not loaded."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
    except _FOREIGN:
        return ""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def write_whole(path: Place, content: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    Raises:
        ModelError: The file cannot be written (folder missing or read-only, disk full).
    """
    try:
        with outgoing(path) as local, replacing(local) as draft:
            draft.write_bytes(content)
    except (OSError, ValueError) as error:  # ValueError: invalid file name
        raise ModelError(
            f"{path}: could not be written ({error}); what was there before is as it was"
        ) from error
