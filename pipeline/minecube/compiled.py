"""Loops over pixels that numpy has no function for, compiled by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function compiled at its first call, in some seconds, and kept on disk for the next process, if there is a place.

    It leaves other threads to run meanwhile. Floating point is that of IEEE 754, in the order in which it is written: to divide
    by zero gives what numpy gives, and is no error. What is kept goes by the function's own file: who changes this one, or a
    constant that is imported there, removes `*.nbi` from the folders `__pycache__`.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
