"""Compile loops over pixels with numba, for operations missing in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function at its first call, and cache the result on disk if possible.

    Compilation takes some seconds. The function lets other threads run. Floating point follows IEEE
    754 in the written order. Division by zero gives numpy's result, not an error. The cache depends
    only on the function's own file. After a change here, or to an imported constant, remove `*.nbi`
    from the `__pycache__` folders.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package's folder nor the user's is writable
        return numba.njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
