# SPDX-License-Identifier: MIT
"""Window arguments as users write them, made into tuples. What the numbers mean is checked by the
library."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from ._call import MOST, Window
from ._errors import NattenError, NattenTypeError

Ints = int | Sequence[int]
Bools = bool | Sequence[bool]
# query_origin, key_origin, global_extent
Origins = tuple[Ints | None, Ints | None, Ints | None]

_ORDER = (
    "The positional order is that of NATTEN 0.17: query, key, value, kernel_size, dilation, "
    "is_causal, ...; from 0.20 on stride came before dilation. Pass stride, dilation and is_causal "
    "by keyword."
)


def check_rank(na_dim: Any) -> int:
    """The number of axes, where callers say so themselves."""
    if type(na_dim) is not int or na_dim not in (1, 2, 3):
        raise NattenError(f"na_dim must be 1, 2 or 3, got {na_dim!r}.")
    return na_dim


def ints(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """An integer for each axis, from one for all or a sequence of `rank`."""
    if type(value) is int and abs(value) < MOST:
        return (value,) * rank
    if isinstance(value, (tuple, list)):
        if len(value) != rank:
            raise NattenError(
                f"{name} must be an integer or have {rank} of them, one for each axis, got "
                f"{len(value)}: {value!r}."
            )
        return tuple(
            [x if type(x) is int and abs(x) < MOST else _int(name, x, rank) for x in value]
        )
    return (_int(name, value, rank),) * rank


def _int(name: str, value: Any, rank: int) -> int:
    # Integers of NumPy, and torch's symbolic ones, are integers too; a bool is a mistake.
    if type(value) is not int and not isinstance(value, bool):
        try:
            value = int(value) if type(value).__name__ == "SymInt" else operator.index(value)
        except TypeError:
            pass
    if type(value) is int:
        if abs(value) >= MOST:
            raise NattenError(f"{name} must be less than 2^62, got {value}.")
        return value
    raise NattenTypeError(
        f"{name} must be an integer or a tuple of {rank} integers, got {value!r} of type "
        f"{type(value).__name__}."
    )


def bools(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """0 or 1 for each axis, from one bool for all or a sequence of `rank`."""
    if value is False or value is None:
        return (0,) * rank
    if value is True:
        return (1,) * rank
    if not isinstance(value, (tuple, list)) or not all(isinstance(x, bool) for x in value):
        raise NattenTypeError(
            f"{name} must be a bool or a tuple of {rank} bools, got {value!r}. {_ORDER}"
        )
    if len(value) != rank:
        raise NattenError(
            f"{name} must be a bool or have {rank} of them, one for each axis, got {len(value)}: "
            f"{value!r}."
        )
    return tuple([int(x) for x in value])


def window(
    rank: int,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints | None,
    is_causal: Bools | None,
    origins: Origins = (None, None, None),
    key: Any = None,
    first: int = 1,
) -> Window:
    """All of them. The map's axes are those of `key` from `first` on."""
    query_origin, key_origin, global_extent = origins
    whole = query_origin is key_origin is global_extent is None
    if (
        whole
        and type(kernel_size) is int
        and type(dilation) is int
        and type(stride) is int
        and is_causal is False
    ):
        return (kernel_size,) * rank + (stride,) * rank + (dilation,) * rank + (0,) * rank
    block: tuple[int, ...] = ()
    if not whole:
        block = (
            *ints("query_origin", 0 if query_origin is None else query_origin, rank),
            *ints("key_origin", 0 if key_origin is None else key_origin, rank),
            *ints(
                "global_extent",
                tuple(key.shape[first : first + rank]) if global_extent is None else global_extent,
                rank,
            ),
        )
    return (
        *ints("kernel_size", kernel_size, rank),
        *ints("stride", stride, rank),
        *ints("dilation", 1 if dilation is None else dilation, rank),
        *bools("is_causal", is_causal, rank),
        *block,
    )
