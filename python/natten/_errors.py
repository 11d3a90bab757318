# SPDX-License-Identifier: MIT
"""The exceptions of this package."""

from __future__ import annotations


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
