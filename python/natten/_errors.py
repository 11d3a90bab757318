# SPDX-License-Identifier: MIT
"""The exceptions of this package, and its warnings."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class NattenError(ValueError, RuntimeError):
    """A value is wrong: a size, a window, a combination of tensors.

    Both a ``ValueError`` and a ``RuntimeError``, because callers of the two generations of this
    interface catch one or the other.
    """


class NattenTypeError(NattenError, TypeError):
    """An argument is of the wrong type."""


class NattenMemoryError(NattenError, MemoryError):
    """Memory could not be had."""


def from_status(status: int, text: str) -> Exception:
    """The exception for a status of the library (natten_status) and its sentence."""
    if status == 2:
        return NotImplementedError(text)
    if status == 3:
        return NattenMemoryError(text)
    return NattenError(text)


def _module(frame: FrameType) -> str:
    """Its name; code that exec runs may have none, and Python drops warnings of no module."""
    return str(frame.f_globals.get("__name__") or frame.f_code.co_filename)


def warn_of_old(text: str) -> None:
    """A DeprecationWarning in the name of whoever called this package: nobody in between counts,
    neither natten, which loads its modules when they are first asked for, nor importlib."""
    frame = sys._getframe(1)
    between = ("natten", "importlib", "_frozen_importlib")
    while frame.f_back and _module(frame).split(".")[0] in between:
        frame = frame.f_back
    warnings.warn_explicit(
        text,
        DeprecationWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        _module(frame),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
