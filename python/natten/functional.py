# SPDX-License-Identifier: MIT
"""Neighborhood attention as functions of torch tensors.

``na1d``, ``na2d`` and ``na3d`` compute attention in one go, on heads-last tensors
``[batch, *map, heads, head_dim]``. ``na*d_qk`` and ``na*d_av`` are its two halves on heads-first
tensors ``[batch, heads, *map, head_dim]``, with the scores in between for whoever wants them.

The positional order of arguments is that of NATTEN 0.17; everything newer is keyword-only.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _attention, _errors, _lib
from ._window import Bools, Ints, window

__all__ = [
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
]

Optional = Tensor | None

_autocast_active = torch._C._is_any_autocast_enabled

# Settings of other implementations' kernels, which callers of NATTEN 0.20 and later pass. They do
# not change results; this library chooses for itself.
_KNOBS = frozenset(
    (
        "xformers_kwargs",
        "attention_kwargs",
        "backend",
        "q_tile_shape",
        "kv_tile_shape",
        "backward_q_tile_shape",
        "backward_kv_tile_shape",
        "backward_kv_splits",
        "backward_use_pt_reduction",
        "run_persistent_kernel",
        "kernel_schedule",
        "torch_compile",
    )
)


# Arguments that are tensors, and whether they may be None.
_TENSORS = {
    "query": False,
    "key": False,
    "value": False,
    "attn": False,
    "rpb": True,
    "additional_keys": True,
    "additional_values": True,
}


def _check_knobs(function: str, knobs: dict[str, Any], is_causal: Any) -> Any:
    """Drops the settings above, and reads the guide's spelling of is_causal."""
    if "is_casual" in knobs:
        warnings.warn("is_casual is spelled is_causal.", DeprecationWarning, stacklevel=4)
        is_causal = knobs.pop("is_casual")
    for name in knobs:
        if name not in _KNOBS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return is_causal


def _check_tensors(arguments: dict[str, Any]) -> None:
    """What is wrong with these arguments, as far as torch itself could not say it well."""
    for name, optional in _TENSORS.items():
        if name not in arguments:
            continue
        tensor = arguments[name]
        if not isinstance(tensor, Tensor):
            if tensor is None and optional:
                continue
            raise _errors.NattenTypeError(
                f"{name} must be a tensor, got {type(tensor).__name__}. (The positional order is "
                "that of NATTEN 0.17.)"
            )
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise NotImplementedError(
                f"{name} is a {kind} tensor, which this function does not take."
            )


def _autocast(*tensors: Optional) -> tuple[Any, ...]:
    """Under autocast, every floating tensor except float64 in the autocast dtype."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """What is around every function here: tensor subclasses go first, and what goes wrong is
    explained. Checks that would only lead to other words are made when something went wrong."""
    parameters = inspect.signature(function)

    def explained(error: Exception, args: Any, kwargs: Any) -> Exception:
        status = _lib.library.natten_torch_failure()
        if status:
            return _errors.from_status(status, str(error))
        if not isinstance(error, _errors.NattenError):
            _check_tensors(parameters.bind(*args, **kwargs).arguments)
        return error

    @functools.wraps(function)
    def public(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            relevant = (*args, *kwargs.values())
            result: _R = handle_torch_function(public, relevant, *args, **kwargs)
            return result
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise explained(error, args, kwargs) from None

    return public


def _scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    if isinstance(scale, (float, int)) and not isinstance(scale, bool):
        return float(scale)
    if isinstance(scale, (torch.SymFloat, torch.SymInt)):
        return scale
    raise _errors.NattenTypeError(f"scale must be a number, got {scale!r}.")


def _fused(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints,
    is_causal: Bools | None,
    rpb: Optional,
    scale: float | None,
    additional_keys: Optional,
    additional_values: Optional,
    stride: Ints,
    return_lse: bool,
    origins: tuple[Ints | None, Ints | None, Ints | None],
    knobs: dict[str, Any],
) -> Any:
    if knobs:
        is_causal = _check_knobs(f"na{rank}d", knobs, is_causal)
    if torch.compiler.is_compiling() or _autocast_active():
        query, key, value, rpb, additional_keys, additional_values = _autocast(
            query, key, value, rpb, additional_keys, additional_values
        )
    if rpb is not None and rpb.dtype != query.dtype:
        rpb = rpb.to(query.dtype)
    shape = window(
        rank, kernel_size, stride, dilation, is_causal, *origins, key.shape[1 : 1 + rank]
    )
    tensors = (query, key, value, rpb, additional_keys, additional_values)
    out, lse = _attention.fused(*tensors, shape, _scale(scale, query))
    return (out, lse) if return_lse else out


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints,
    additional_keys: Optional,
    is_causal: Bools | None,
    rpb: Optional,
    stride: Ints,
    origins: tuple[Ints | None, Ints | None, Ints | None],
    knobs: dict[str, Any],
) -> Tensor:
    if knobs:
        is_causal = _check_knobs(f"na{rank}d_qk", knobs, is_causal)
    if torch.compiler.is_compiling() or _autocast_active():
        query, key, rpb, additional_keys = _autocast(query, key, rpb, additional_keys)
    if rpb is not None and rpb.dtype != query.dtype:
        rpb = rpb.to(query.dtype)
    shape = window(
        rank, kernel_size, stride, dilation, is_causal, *origins, key.shape[2 : 2 + rank]
    )
    return _attention.qk(query, key, rpb, additional_keys, shape)


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints,
    additional_values: Optional,
    is_causal: Bools | None,
    stride: Ints,
    origins: tuple[Ints | None, Ints | None, Ints | None],
    knobs: dict[str, Any],
) -> Tensor:
    if knobs:
        is_causal = _check_knobs(f"na{rank}d_av", knobs, is_causal)
    if torch.compiler.is_compiling() or _autocast_active():
        attn, value, additional_values = _autocast(attn, value, additional_values)
    if attn.dtype != value.dtype and attn.is_floating_point() and value.is_floating_point():
        attn = attn.to(value.dtype)
    shape = window(
        rank, kernel_size, stride, dilation, is_causal, *origins, value.shape[2 : 2 + rank]
    )
    return _attention.av(attn, value, additional_values, shape)


@_public
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
    **knobs: Any,
) -> Any:
    """Fused 1-D neighborhood attention of ``[batch, length, heads, head_dim]``.

    Arguments, result and errors are those of :func:`na2d`, for this map.
    """
    return _fused(
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
    )


@_public
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
        knobs: kernel settings of NATTEN 0.20 and later are accepted and have no effect.

    Returns:
        ``[batch, height, width, heads, value_dim]`` of the dtype of query; with return_lse a pair
        of it and ``[batch, height, width, heads]``, float32 (float64 for float64), natural
        logarithm. Both can be differentiated.

    Raises:
        NattenError: a size or number is wrong (a ValueError and a RuntimeError).
        NattenTypeError: an argument is of the wrong type (also a TypeError).
        NotImplementedError: no kernel does this; the text has each kernel's reason.
    """
    return _fused(
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
    )


@_public
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
    **knobs: Any,
) -> Any:
    """Fused 3-D neighborhood attention of ``[batch, depth, height, width, heads, head_dim]``.

    Arguments, result and errors are those of :func:`na2d`, for this map.
    """
    return _fused(
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
    )


@_public
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
    **knobs: Any,
) -> Tensor:
    """The scores of 1-D neighborhood attention of ``[batch, heads, length, head_dim]``.

    Arguments, result and errors are those of :func:`na2d_qk`, for this map.
    """
    origins = (query_origin, key_origin, global_extent)
    return _qk(
        1,
        query,
        key,
        kernel_size,
        dilation,
        additional_keys,
        is_causal,
        rpb,
        stride,
        origins,
        knobs,
    )


@_public
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
    **knobs: Any,
) -> Tensor:
    """The scores of 2-D neighborhood attention, neither scaled nor normalised.

    Args:
        query: ``[batch, heads, height, width, head_dim]``.
        key: ``[batch, kv_heads, height, width, head_dim]``.
        additional_keys: ``[batch, kv_heads, tokens, head_dim]``.

    The other arguments and the errors are those of :func:`na2d`.

    Returns:
        ``[batch, heads, height, width, slots]``: first a slot for each key of the window, in
        row-major order, first key first; then one for each additional token. Slots that a causal
        mask forbids hold -inf.
    """
    origins = (query_origin, key_origin, global_extent)
    return _qk(
        2,
        query,
        key,
        kernel_size,
        dilation,
        additional_keys,
        is_causal,
        rpb,
        stride,
        origins,
        knobs,
    )


@_public
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
    **knobs: Any,
) -> Tensor:
    """The scores of 3-D neighborhood attention, ``[batch, heads, depth, height, width, dim]``.

    Arguments, result and errors are those of :func:`na2d_qk`, for this map.
    """
    origins = (query_origin, key_origin, global_extent)
    return _qk(
        3,
        query,
        key,
        kernel_size,
        dilation,
        additional_keys,
        is_causal,
        rpb,
        stride,
        origins,
        knobs,
    )


@_public
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
    return _av(
        1, attn, value, kernel_size, dilation, additional_values, is_causal, stride, origins, knobs
    )


@_public
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
    return _av(
        2, attn, value, kernel_size, dilation, additional_values, is_causal, stride, origins, knobs
    )


@_public
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
    return _av(
        3, attn, value, kernel_size, dilation, additional_values, is_causal, stride, origins, knobs
    )
