# SPDX-License-Identifier: MIT
"""Relative position biases on their own."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._attention import qk
from ._autograd import _zeros
from ._call import is_block, parts
from ._errors import NattenError, NattenTypeError
from ._front import autocast, bias_in, public
from ._window import Bools, Ints, ints, window

MOST_TOKENS = 2**29  # of an axis: natten.h's limit, here before tensors of that size are made


@functools.partial(public, rank=0)
def add_rpb(
    attn: Tensor,
    rpb: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
) -> Tensor:
    """Adds a relative position bias to scores from any source.

    Args:
        attn: ``[batch, heads, *map, slots]``, slots as :func:`na2d_qk` returns them.
        rpb: ``[heads, 2 * kernel_size - 1...]``, for as many axes as the map has.

    The other arguments and the errors are those of :func:`na2d`.

    Returns:
        The sum; slots that a causal mask forbids hold -inf, those of additional tokens stay.
    """
    if not isinstance(rpb, Tensor):
        raise NattenTypeError(f"rpb must be a tensor, got {type(rpb).__name__}.")
    attn, rpb = autocast(attn, rpb)
    rank = rpb.dim() - 1
    if not 1 <= rank <= 3:
        raise NattenError(
            f"rpb must be [heads, ...] for a map of 1, 2 or 3 axes, got {rpb.dim()} dimensions."
        )
    if attn.dim() != rank + 3:
        raise NattenError(
            f"attn must have {rank + 3} dimensions with a bias of {rank + 1}, got {attn.dim()}."
        )
    origins = (query_origin, key_origin, global_extent)
    sizes = (ints("kernel_size", kernel_size, rank), ints("stride", stride, rank))
    steps = ints("dilation", 1 if dilation is None else dilation, rank)
    shape = window(rank, *sizes, steps, is_causal, origins, attn, 2)
    ends = zip(parts(shape)[-1], parts(shape)[-2], strict=True) if is_block(shape) else ()
    for axis, (end, begin) in enumerate(ends):
        if not begin < end <= MOST_TOKENS:
            raise NattenError(
                f"key_origin < global_extent <= {MOST_TOKENS} must hold, got {begin} and {end}"
                f" for axis {axis}."
            )
    bias = qk(*_zeros(attn, shape), bias_in(attn.dtype, rpb), None, shape)
    extra = attn.shape[-1] - bias.shape[-1]
    if extra < 0:
        raise NattenError(
            f"attn has {attn.shape[-1]} slots in its last dimension, but the window has "
            f"{bias.shape[-1]}."
        )
    return attn + (torch.nn.functional.pad(bias, (0, extra)) if extra else bias)
