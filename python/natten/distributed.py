# SPDX-License-Identifier: MIT
"""Neighborhood attention of a map that is cut into blocks along one axis, a block for each process.

Queries stay where they are. Each process fetches exactly the keys and values that the windows of
its queries reach, from whichever processes hold them, and in the backward their gradients return.
Results and gradients are those of the whole map. Blocks may differ in size, and windows may reach
over several of them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from . import _lib, functional
from ._errors import NattenError
from ._window import Bools, Ints, bools, ints

__all__ = ["na1d", "na2d", "na3d"]

Interval = tuple[int, int]


def _reach(block: Interval, axis: _lib.Axis) -> Interval:
    """The keys that the windows of a block of queries lie in. Windows move forward along each
    dilation group, so the first and the last queries of the block decide."""
    begin, end = block
    first, count = ctypes.c_int64(), ctypes.c_int64()
    low, high = axis.global_extent, 0
    edge = min(axis.dilation, end - begin)
    for query in {*range(begin, begin + edge), *range(end - edge, end)}:
        if _lib.library.natten_axis_window(axis, query, first, count):
            raise NattenError(_lib.library.natten_last_error().decode())
        low = min(low, first.value)
        high = max(high, first.value + (count.value - 1) * axis.dilation + 1)
    return low, high


def _common(one: Interval, other: Interval) -> Interval:
    begin = max(one[0], other[0])
    return begin, max(begin, min(one[1], other[1]))


def _fetch(
    tensor: Tensor, dim: int, blocks: list[Interval], wanted: list[Interval], rank: int, group: Any
) -> Tensor:
    """The part wanted[rank] of a tensor that is cut along `dim` into blocks."""
    rows = tensor.movedim(dim, 0)
    width = rows[0].numel()
    own = blocks[rank][0]
    sent = [_common(blocks[rank], interval) for interval in wanted]
    received = [_common(block, wanted[rank]) for block in blocks]
    parts = torch.cat([rows[begin - own : end - own] for begin, end in sent])
    flat = all_to_all_single_autograd(
        parts.flatten(),
        [(end - begin) * width for begin, end in received],
        [(end - begin) * width for begin, end in sent],
        group,
    )
    result: Tensor = flat.view(-1, *rows.shape[1:]).movedim(0, dim)
    return result


def _sizes(size: int, group: Any) -> list[int]:
    """Every process' size, by rank."""
    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, size, group)
    return sizes


def _sharded(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    axis: int = 0,
    sizes: list[int] | None = None,
    stride: Ints = 1,
    group: Any = None,
    **options: Any,
) -> Any:
    group = dist.group.WORLD if group is None else group
    if not 0 <= axis < rank:
        raise NattenError(f"axis must be 0 to {rank - 1}, got {axis}.")
    sizes = _sizes(query.shape[1 + axis], group) if sizes is None else sizes
    me = dist.get_rank(group)
    if len(sizes) != dist.get_world_size(group) or query.shape[1 + axis] != sizes[me]:
        raise NattenError(
            f"sizes must hold every process' extent along axis {axis}, got {sizes} where this one, "
            f"of rank {me}, has {query.shape[1 + axis]}."
        )
    if min(sizes) < 1:
        raise NattenError(f"Every process must hold a part of axis {axis}, got sizes {sizes}.")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    blocks = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    rule = _lib.Axis(
        query_extent=ends[-1],
        key_extent=ends[-1],
        global_extent=ends[-1],
        window=ints("kernel_size", kernel_size, rank)[axis],
        stride=ints("stride", stride, rank)[axis],
        dilation=ints("dilation", dilation, rank)[axis],
        causal=bools("is_causal", is_causal, rank)[axis],
    )
    wanted = [_reach(block, rule) for block in blocks]
    halo = [_fetch(t, 1 + axis, blocks, wanted, me, group) for t in (key, value)]
    extents = list(query.shape[1 : 1 + rank])
    extents[axis] = ends[-1]
    origins = [[0] * rank, [0] * rank]
    origins[0][axis], origins[1][axis] = blocks[me][0], wanted[me][0]
    function: Any = (functional.na1d, functional.na2d, functional.na3d)[rank - 1]
    return function(
        query,
        *halo,
        kernel_size,
        dilation,
        is_causal,
        stride=stride,
        query_origin=origins[0],
        key_origin=origins[1],
        global_extent=extents,
        **options,
    )


def na1d(query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, **options: Any) -> Any:
    """As :func:`na2d`, for ``[batch, length, heads, head_dim]``."""
    return _sharded(1, query, key, value, kernel_size, **options)


def na2d(query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, **options: Any) -> Any:
    """This process' block of :func:`natten.functional.na2d` of the whole map.

    To be called by all processes of the group, each with its own blocks of query, key and value,
    in rank order along the axis.

    Args:
        query: ``[batch, height, width, heads, head_dim]``, this process' block; key and value are
            blocks of the same tokens.
        axis: which axis of the map is cut, 0 by default.
        sizes: every process' extent along it, by rank. Asked for over the group unless given.
        group: the process group; all processes by default.
        options: further arguments of :func:`natten.functional.na2d`, by keyword. The gradients of a
            bias and of additional tokens hold what this process' queries contribute: sum them over
            the group, as those of any parameter that all processes hold.

    Raises:
        NattenError: as :func:`natten.functional.na2d`, and if sizes do not fit the blocks.
    """
    return _sharded(2, query, key, value, kernel_size, **options)


def na3d(query: Tensor, key: Tensor, value: Tensor, kernel_size: Ints, **options: Any) -> Any:
    """As :func:`na2d`, for ``[batch, depth, height, width, heads, head_dim]``."""
    return _sharded(3, query, key, value, kernel_size, **options)
