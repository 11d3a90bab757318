# SPDX-License-Identifier: MIT
"""Neighborhood attention as functions of torch tensors.

``na1d``, ``na2d`` and ``na3d`` compute attention in one go, on heads-last tensors
``[batch, *map, heads, head_dim]``. ``na*d_qk`` and ``na*d_av`` are its two halves on heads-first
tensors ``[batch, heads, *map, head_dim]``, with the scores in between for whoever wants them.

The positional order of arguments is that of NATTEN 0.17; everything newer is keyword-only.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Generator, Tensor

from . import flops as flops  # with it torch counts the operations
from ._errors import NattenError, NattenTypeError
from ._front import Optional, av, fused, public, qk
from ._merge import merge_attentions
from ._rpb import add_rpb
from ._sequence import attention
from ._window import Bools, Ints

# The guide of 0.17 imports these from here.
from .context import disable_gemm_na as disable_gemm_na
from .context import disable_tf32 as disable_tf32
from .context import disable_tiled_na as disable_tiled_na
from .context import enable_gemm_na as enable_gemm_na
from .context import enable_tf32 as enable_tf32
from .context import enable_tiled_na as enable_tiled_na
from .context import has_bfloat as has_bfloat
from .context import has_cuda as has_cuda
from .context import has_fna as has_fna
from .context import has_fp32_gemm as has_fp32_gemm
from .context import has_fp64_gemm as has_fp64_gemm
from .context import has_fused_na as has_fused_na
from .context import has_gemm as has_gemm
from .context import has_half as has_half
from .context import has_tf32_gemm as has_tf32_gemm
from .varlen import neighborhood_attention_varlen

__all__ = [
    "add_rpb",
    "attention",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "neighborhood_attention_generic",
    "neighborhood_attention_varlen",
]


@functools.partial(public, rank=1)
def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    rpb: Optional = None,
    scale: float | None = None,
    additional_keys: Optional = None,
    additional_values: Optional = None,
    *,
    stride: Ints = 1,
    return_lse: bool = False,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Optional = None,
    generator: Generator | None = None,
    **knobs: Any,
) -> Any:
    """Fused 1-D neighborhood attention of ``[batch, length, heads, head_dim]``.

    Arguments, result and errors are those of :func:`na2d`, for this map.
    """
    return fused(
        1,
        query,
        key,
        value,
        kernel_size,
        dilation,
        is_causal,
        rpb,
        scale,
        additional_keys,
        additional_values,
        stride,
        return_lse,
        (query_origin, key_origin, global_extent),
        knobs,
        dropout_p,
        key_padding_mask,
        generator,
    )


@functools.partial(public, rank=2)
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    rpb: Optional = None,
    scale: float | None = None,
    additional_keys: Optional = None,
    additional_values: Optional = None,
    *,
    stride: Ints = 1,
    return_lse: bool = False,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Optional = None,
    generator: Generator | None = None,
    **knobs: Any,
) -> Any:
    """Fused 2-D neighborhood attention.

    Every token of the map attends to the ``kernel_size`` window of tokens around it, ``dilation``
    apart; at the borders the window is shifted inside (Hassani et al., CVPR 2023; dilation: Hassani
    and Shi, 2022; stride: Hassani et al., 2025). Weights are never stored.

    Args:
        query: ``[batch, height, width, heads, head_dim]``. Strides are free; tensors are not copied
            unless their channels are not consecutive.
        key: ``[batch, height, width, kv_heads, head_dim]``; heads is a multiple of kv_heads.
        value: ``[batch, height, width, kv_heads, value_dim]``.
        kernel_size: keys per axis that a query attends to, an integer or one for each axis. At
            least 1, and kernel_size * dilation at most the extent of the axis.
        dilation: step between the keys of a window.
        is_causal: whether only keys at or before the query are seen, a bool or one for each axis.
        rpb: relative position bias ``[heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1]``,
            added to the scaled scores; every kernel_size must then be odd.
        scale: multiplies query . key; ``head_dim ** -0.5`` unless given.
        additional_keys: ``[batch, tokens, kv_heads, head_dim]``, tokens that every query attends
            to, with additional_values.
        additional_values: ``[batch, tokens, kv_heads, value_dim]``.
        stride: queries that share the window of the one in their middle, 1 to kernel_size.
        return_lse: also return the logarithm of the sum of exponentials of the scores.
        query_origin: where query, as a block of a larger map, begins in it.
        key_origin: where key and value begin in it. They must hold all keys that are attended to.
        global_extent: the extents of the larger map.
        dropout_p: probability that a weight is dropped; the others grow by 1 / (1 - dropout_p).
            Which are dropped depends on the seed, the batch entry, the head, the query's place and
            the slot, not on threads, blocks or the kernel.
        key_padding_mask: ``[batch, height, width]`` of key, or with ``kv_heads`` as last dimension.
            Bool: keys that are True are ignored. Floating: added to all scores of the key, with a
            gradient. Queries without any key left give 0. Values of masked keys must be finite.
        generator: where the seed of dropout is drawn; torch's own for CPUs unless given.
        knobs: kernel settings of NATTEN 0.20 and later (backend, q_tile_shape and the like) are
            checked and have no effect.

    Returns:
        ``[batch, height, width, heads, value_dim]`` of the dtype of query; with return_lse a pair
        of it and ``[batch, height, width, heads]``, float32 (float64 for float64), natural
        logarithm. Both can be differentiated.

    Raises:
        NattenError: a size or number is wrong (a ValueError and a RuntimeError).
        NattenTypeError: an argument is of the wrong type (also a TypeError).
        NotImplementedError: no kernel does this; the text has each kernel's reason.
    """
    return fused(
        2,
        query,
        key,
        value,
        kernel_size,
        dilation,
        is_causal,
        rpb,
        scale,
        additional_keys,
        additional_values,
        stride,
        return_lse,
        (query_origin, key_origin, global_extent),
        knobs,
        dropout_p,
        key_padding_mask,
        generator,
    )


@functools.partial(public, rank=3)
def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    rpb: Optional = None,
    scale: float | None = None,
    additional_keys: Optional = None,
    additional_values: Optional = None,
    *,
    stride: Ints = 1,
    return_lse: bool = False,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Optional = None,
    generator: Generator | None = None,
    **knobs: Any,
) -> Any:
    """Fused 3-D neighborhood attention of ``[batch, depth, height, width, heads, head_dim]``.

    Arguments, result and errors are those of :func:`na2d`, for this map.
    """
    return fused(
        3,
        query,
        key,
        value,
        kernel_size,
        dilation,
        is_causal,
        rpb,
        scale,
        additional_keys,
        additional_values,
        stride,
        return_lse,
        (query_origin, key_origin, global_extent),
        knobs,
        dropout_p,
        key_padding_mask,
        generator,
    )


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    scale: float | None = None,
    additional_keys: Optional = None,
    additional_values: Optional = None,
    **more: Any,
) -> Any:
    """:func:`na1d`, :func:`na2d` or :func:`na3d`, by the number of dimensions of query.

    The positional order is that of NATTEN 0.20, where this function comes from: stride before
    dilation. `more` are the other keyword arguments of :func:`na2d`; result and errors are its.
    """
    if not isinstance(query, Tensor):
        raise NattenTypeError(f"query must be a tensor, got {type(query).__name__}.")
    if query.dim() not in (4, 5, 6):
        raise NattenError(
            "query must be [batch, *map, heads, head_dim] with 1, 2 or 3 axes in the map, got "
            f"{query.dim()} dimensions."
        )
    return (na1d, na2d, na3d)[query.dim() - 4](
        query,
        key,
        value,
        kernel_size,
        dilation,
        is_causal,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        stride=stride,
        **more,
    )


@functools.partial(public, rank=1)
def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_keys: Optional = None,
    is_causal: Bools | None = False,
    rpb: Optional = None,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    key_padding_mask: Optional = None,
    **knobs: Any,
) -> Tensor:
    """The scores of 1-D neighborhood attention of ``[batch, heads, length, head_dim]``.

    Arguments, result and errors are those of :func:`na2d_qk`, for this map.
    """
    origins = (query_origin, key_origin, global_extent)
    rest = (stride, origins, key_padding_mask, knobs)
    return qk(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, *rest)


@functools.partial(public, rank=2)
def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_keys: Optional = None,
    is_causal: Bools | None = False,
    rpb: Optional = None,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    key_padding_mask: Optional = None,
    **knobs: Any,
) -> Tensor:
    """The scores of 2-D neighborhood attention, neither scaled nor normalised.

    Args:
        query: ``[batch, heads, height, width, head_dim]``.
        key: ``[batch, kv_heads, height, width, head_dim]``.
        additional_keys: ``[batch, kv_heads, tokens, head_dim]``.
        key_padding_mask: ``[batch, height, width]`` of key, or with ``kv_heads`` as last dimension:
            True for keys whose scores are to be -inf, or a bias that is added to them. (The softmax
            of a query without any key left is NaN.)

    The other arguments and the errors are those of :func:`na2d`.

    Returns:
        ``[batch, heads, height, width, slots]``: first a slot for each key of the window, in
        row-major order, first key first; then one for each additional token. Slots that a causal
        mask forbids hold -inf.
    """
    origins = (query_origin, key_origin, global_extent)
    rest = (stride, origins, key_padding_mask, knobs)
    return qk(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, *rest)


@functools.partial(public, rank=3)
def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_keys: Optional = None,
    is_causal: Bools | None = False,
    rpb: Optional = None,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    key_padding_mask: Optional = None,
    **knobs: Any,
) -> Tensor:
    """The scores of 3-D neighborhood attention, ``[batch, heads, depth, height, width, dim]``.

    Arguments, result and errors are those of :func:`na2d_qk`, for this map.
    """
    origins = (query_origin, key_origin, global_extent)
    rest = (stride, origins, key_padding_mask, knobs)
    return qk(3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, *rest)


@functools.partial(public, rank=1)
def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_values: Optional = None,
    is_causal: Bools | None = False,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    **knobs: Any,
) -> Tensor:
    """Weighted sums of 1-D values ``[batch, heads, length, value_dim]``.

    Arguments, result and errors are those of :func:`na2d_av`, for this map.
    """
    origins = (query_origin, key_origin, global_extent)
    return av(
        1, attn, value, kernel_size, dilation, additional_values, is_causal, stride, origins, knobs
    )


@functools.partial(public, rank=2)
def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_values: Optional = None,
    is_causal: Bools | None = False,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    **knobs: Any,
) -> Tensor:
    """Sums of the values in each query's window, weighted by attn as it is.

    Args:
        attn: ``[batch, heads, height, width, slots]``, slots as :func:`na2d_qk` returns them; those
            that a causal mask forbids are not read. Any weights go, from any source.
        value: ``[batch, kv_heads, height, width, value_dim]``.
        additional_values: ``[batch, kv_heads, tokens, value_dim]``.

    The other arguments and the errors are those of :func:`na2d`.

    Returns:
        ``[batch, heads, height, width, value_dim]`` of the dtype of value.
    """
    origins = (query_origin, key_origin, global_extent)
    return av(
        2, attn, value, kernel_size, dilation, additional_values, is_causal, stride, origins, knobs
    )


@functools.partial(public, rank=3)
def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_values: Optional = None,
    is_causal: Bools | None = False,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    **knobs: Any,
) -> Tensor:
    """Weighted sums of 3-D values ``[batch, heads, depth, height, width, value_dim]``.

    Arguments, result and errors are those of :func:`na2d_av`, for this map.
    """
    origins = (query_origin, key_origin, global_extent)
    return av(
        3, attn, value, kernel_size, dilation, additional_values, is_causal, stride, origins, knobs
    )


def __getattr__(name: str) -> Any:
    # Names of older versions, which nobody else has to load.
    from . import _legacy

    for names in (_legacy.FUNCTIONS, _legacy.CLASSES):
        if name in names:
            return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
