# SPDX-License-Identifier: MIT
"""Neighborhood attention of maps of different sizes in one tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._errors import NattenError, NattenTypeError
from ._front import public, result
from ._items import attention_of_items, transformed
from ._knobs import WINDOW_KNOBS, check_knobs
from ._sequence import check_packed, check_tensors
from ._window import Bools, Ints, bools, ints

__all__ = ["neighborhood_attention_varlen"]

_Row = tuple[int, ...]


def _layouts(token_layouts: Any) -> tuple[Any, ...]:
    """Extents of each item, hashable."""
    if isinstance(token_layouts, (str, Tensor)) or not isinstance(token_layouts, Sequence):
        raise NattenTypeError(
            "token_layouts must be a list with the extents of each item, got "
            f"{type(token_layouts).__name__}."
        )
    return tuple([tuple(x) if isinstance(x, (list, tuple)) else x for x in token_layouts])


def _axes(layout: Any) -> int:
    return len(layout) if isinstance(layout, tuple) else 1


def _freeze(value: Any) -> Any:
    return tuple([_freeze(x) for x in value]) if isinstance(value, (list, tuple)) else value


def _each(
    name: str, one: Any, per_item: Any, count: int, read: Callable[[str, Any, int], _Row], rank: int
) -> list[_Row]:
    """The parameter of each item, from one for all or a list with one for each."""
    if per_item is None:
        return [read(name, one, rank)] * count
    if not isinstance(per_item, (list, tuple)):
        raise NattenTypeError(f"{name}_list must be a list, got {type(per_item).__name__}.")
    if len(per_item) != count:
        raise NattenError(
            f"{name}_list must have an entry for each of the {count} items, got {len(per_item)}."
        )
    return [read(f"{name}_list[{i}]", value, rank) for i, value in enumerate(per_item)]


def _make_table(
    layouts: tuple[Any, ...], values: tuple[Any, ...], lists: tuple[Any, ...]
) -> tuple[Tensor, list[list[int]], int]:
    """The table of the items (see _items.py), the same as integers, and the number of tokens."""
    count = len(layouts)
    rank = _axes(layouts[0]) if count else 1
    if not 1 <= rank <= 3:
        raise NattenError(f"Items must have 1, 2 or 3 axes, but item 0 has extents {layouts[0]}.")
    names = ("kernel_size", "stride", "dilation")
    kernel_size, stride, dilation = (
        _each(name, value, per_item, count, ints, rank)
        for name, value, per_item in zip(names, values[:3], lists[:3], strict=True)
    )
    causal = _each("is_causal", values[3], lists[3], count, bools, rank)
    for i, sizes in enumerate(kernel_size):
        if min(sizes) < 1:  # 0 is what the table says of items in which all see all
            raise NattenError(f"Item {i}: kernel_size must be at least 1, got {sizes}.")
    rows, total = [], 0
    for i, layout in enumerate(layouts):
        if _axes(layout) != rank:
            raise NattenError(
                f"Items must have as many axes each, but item 0 has {rank} and item "
                f"{i} has extents {layout}."
            )
        extents = ints(f"token_layouts[{i}]", layout, rank)
        tokens = 1
        for extent in extents:
            tokens *= extent
        if tokens < 0 or total + tokens >> 62:
            raise NattenError(f"Extents must be at least 0 and not that large, got {layout}.")
        total += tokens
        columns = (extents, extents, kernel_size[i], stride[i], dilation[i], causal[i])
        rows.append([column[axis] for axis in range(rank) for column in columns])
    table = torch.tensor(rows, dtype=torch.int64).reshape(count, -1 if count else 6)
    return table, rows, total


@functools.lru_cache(maxsize=64)
def _kept_table(*arguments: Any) -> tuple[Tensor, list[list[int]], int]:
    with torch.inference_mode(False):  # autograd may save it later
        return _make_table(*arguments)


def _is_plain(value: Any, kind: type) -> bool:
    """Whether a value is found again by what it is: 1 and True are equal, and others may change."""
    if type(value) is tuple:
        return all([_is_plain(x, kind) for x in value])
    return value is None or type(value) is kind


def _table(layouts: Any, values: Any, lists: Any) -> tuple[Tensor, list[list[int]], int]:
    """A table that is kept, or one of its own where tensors are not what they seem."""
    special = torch.compiler.is_compiling() or transformed()
    if not special and not torch._C._len_torch_dispatch_stack():
        numbers, flags = (layouts, values[:3], lists[:3]), (values[3], lists[3])
        if _is_plain(numbers, int) and _is_plain(flags, bool):
            return _kept_table(layouts, values, lists)
    return _make_table(layouts, values, lists)


@functools.partial(public, rank=0)
def neighborhood_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    token_layouts: Sequence[Ints],
    kernel_size: Ints | None = None,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    *,
    kernel_size_list: Sequence[Ints] | None = None,
    stride_list: Sequence[Ints] | None = None,
    dilation_list: Sequence[Ints] | None = None,
    is_causal_list: Sequence[Bools] | None = None,
    return_lse: bool = False,
    **knobs: Any,
) -> Any:
    """Neighborhood attention within each of several maps of different sizes, packed one after
    another along the token axis.

    Nothing is copied or padded: every item is computed in place, small ones side by side on a CPU.
    Equal neighbours are computed as a batch. On CUDA items are launched one after another.

    Args:
        query: ``[1, tokens, heads, head_dim]``. The tokens of an item are its map in row-major
            order.
        key: ``[1, tokens, kv_heads, head_dim]``; heads is a multiple of kv_heads.
        value: ``[1, tokens, kv_heads, value_dim]``.
        token_layouts: the extents of each item, ``[(4, 6), (9, 3), ...]``; integers for 1-D items.
            All have one, two or three axes; their tokens add up to those of query.
        kernel_size: as for natten.functional.na2d, for all items; kernel_size * dilation is at most
            the extent of every axis of every item.
        stride, dilation, is_causal, scale: likewise.
        kernel_size_list: a kernel_size for each item instead.
        stride_list, dilation_list, is_causal_list: likewise.
        return_lse: also return the logarithm of the sum of exponentials of the scores.
        knobs: kernel settings of NATTEN 0.20 and later are checked and have no effect.

    Returns:
        ``[1, tokens, heads, value_dim]`` of the dtype of query; with return_lse a pair of it and
        ``[1, tokens, heads]``, float32 (float64 for float64), natural logarithm. Both can be
        differentiated.

    Raises:
        NattenError: a size or number is wrong; the text says of which item.
        NattenTypeError: an argument is of the wrong type.
        NotImplementedError: no kernel does this.
    """
    check_tensors(query, key, value)
    check_packed(query, key, value)
    if kernel_size is None and kernel_size_list is None:
        raise NattenTypeError("kernel_size or kernel_size_list must be given.")
    table, rows, total = _table(
        _layouts(token_layouts),
        (_freeze(kernel_size), _freeze(stride), _freeze(dilation), _freeze(is_causal)),
        tuple(map(_freeze, (kernel_size_list, stride_list, dilation_list, is_causal_list))),
    )
    check_knobs("neighborhood_attention_varlen", table.shape[1] // 6, knobs, WINDOW_KNOBS)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[1] != total:
            raise NattenError(
                f"{name} has {tensor.shape[1]} tokens, but the items have {total} together."
            )
    out, lse = attention_of_items(query, key, value, table, scale, rows)
    return result(out, lse, return_lse)
