# SPDX-License-Identifier: MIT
"""The tokens of a map in the order of its tiles, and back.

Kernels that know no maps can then work on consecutive tokens of a tile (Hassani et al.,
"Generalized Neighborhood Attention", 2025). The kernels here need no such thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.nn.functional import pad

from ._errors import NattenError, NattenTypeError
from ._window import Ints, check_rank, ints
from .utils.checks import check_tensor

__all__ = ["token_permute_operation", "token_unpermute_operation"]

_Shape = tuple[int, ...]


def _positive(name: str, value: Ints, rank: int) -> _Shape:
    sizes = ints(name, value, rank)
    for axis, size in enumerate(sizes):
        if size < 1:
            raise NattenError(f"{name} must be at least 1, got {size} on axis {axis}.")
    return sizes


def _rests(layout: Iterable[int], tile: _Shape, dilation: _Shape) -> _Shape:
    """Tiles along each axis of a dilation group, the last one padded."""
    return tuple(-(-n // (t * d)) for n, t, d in zip(layout, tile, dilation, strict=True))


def _order(rank: int, flip: bool) -> list[int]:
    """From [batch, then rest, tile, dilation of each axis, heads, channels] to [batch, dilations,
    rests, tiles, heads, channels]."""
    axes = range(rank - 1, -1, -1) if flip else range(rank)
    groups = [1 + 3 * axis + part for part in (2, 0, 1) for axis in axes]
    return [0, *groups, 1 + 3 * rank, 2 + 3 * rank]


def token_permute_operation(
    tensor: Tensor,
    tile_shape: Ints,
    dilation: Ints | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> tuple[Tensor, _Shape, _Shape]:
    """Tokens tile by tile, each dilation group a batch item of its own.

    Args:
        tensor: ``[batch, *map, heads, channels]``, a map of 1, 2 or 3 axes. Padded with zeros to
            whole tiles.
        tile_shape: tokens of a tile along each axis.
        dilation: tokens that are congruent modulo it form a group.
        flip_tiled_dims: the first axis runs fastest (among groups, tiles, and tokens of a tile),
            not the last.
        use_torch: without effect.

    Returns:
        ``[batch * groups, tokens, heads, channels]``; the map's extents; those of a group, padded.

    Raises:
        NattenError: a wrong size. NattenTypeError: a wrong type.
    """
    if check_tensor("tensor", tensor).dim() not in (4, 5, 6):
        raise NattenError(
            "tensor must be [batch, *map, heads, channels] with 1, 2 or 3 axes in the map, got "
            f"{tensor.dim()} dimensions."
        )
    batch, *extents, heads, channels = tensor.shape
    layout, rank = tuple(extents), len(extents)
    tile = _positive("tile_shape", tile_shape, rank)
    steps = _positive("dilation", 1 if dilation is None else dilation, rank)
    rests = _rests(layout, tile, steps)
    parts = list(zip(rests, tile, steps, strict=True))
    padding = [0, 0, 0, 0]
    for extent, part in zip(reversed(layout), reversed(parts), strict=True):
        padding += [0, math.prod(part) - extent]
    split = pad(tensor, padding).reshape(batch, *(n for p in parts for n in p), heads, channels)
    group = tuple(r * t for r, t, _ in parts)
    permuted = split.permute(_order(rank, flip_tiled_dims))
    shape = (batch * math.prod(steps), math.prod(group), heads, channels)
    return permuted.reshape(shape).contiguous(), layout, group


def token_unpermute_operation(
    tensor: Tensor,
    token_layout_shape: Sequence[int],
    tile_shape: Ints,
    dilation: Ints | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> Tensor:
    """The inverse of :func:`token_permute_operation`, without the padding.

    Args:
        tensor: ``[batch * groups, tokens, heads, channels]``.
        token_layout_shape: the map's extents.
        tile_shape, dilation, flip_tiled_dims, use_torch: as they were.

    Returns:
        ``[batch, *map, heads, channels]``.

    Raises:
        NattenError: a wrong size. NattenTypeError: a wrong type.
    """
    if check_tensor("tensor", tensor).dim() != 4:
        raise NattenError(
            f"tensor must be [batch, tokens, heads, channels], got {tensor.dim()} dimensions."
        )
    if not isinstance(token_layout_shape, (tuple, list)):
        raise NattenTypeError(f"token_layout_shape must be a tuple, got {token_layout_shape!r}.")
    rank = check_rank(len(token_layout_shape))
    layout = _positive("token_layout_shape", tuple(token_layout_shape), rank)
    tile = _positive("tile_shape", tile_shape, rank)
    steps = _positive("dilation", 1 if dilation is None else dilation, rank)
    rests = _rests(layout, tile, steps)
    groups, tokens = math.prod(steps), math.prod(rests) * math.prod(tile)
    batch, found, heads, channels = tensor.shape
    if batch % groups or found != tokens:
        raise NattenError(
            f"tensor must have a batch that is a multiple of the {groups} groups and {tokens} "
            f"tokens, got {batch} and {found}."
        )
    order = _order(rank, flip_tiled_dims)
    sizes = [batch // groups, *(n for p in zip(rests, tile, steps, strict=True) for n in p)]
    sizes += [heads, channels]
    split = tensor.reshape([sizes[i] for i in order])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    whole = [r * t * d for r, t, d in zip(rests, tile, steps, strict=True)]
    result = split.permute(inverse).reshape(batch // groups, *whole, heads, channels)
    for axis, extent in enumerate(layout):
        result = result.narrow(1 + axis, 0, extent)
    return result.contiguous()
