"""Numba-compiled loops, for work that NumPy would need one pass over memory per step for.

A module that uses this takes half a second to import: import it where the work is done, not where commands are parsed.
Numba keeps compiled code beside the source, or in the user's cache folder where that is read-only, and looks at the
age of a loop's own file only: loops that call each other belong into one file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """Compile ``loop`` on its first call with arguments of these types; it runs without the interpreter's lock.

    Arithmetic follows NumPy (no error on division by zero) and the order in which it is written.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(loop)
    except RuntimeError:  # no folder to cache it in: compiled again in every process
        return numba.njit(**options)(loop)
