# SPDX-License-Identifier: MIT
"""Neighborhood attention of NumPy arrays, without torch.

The functions of natten.functional under the same names, and each one's gradients as a function of
its own: ``na2d`` and ``na2d_backward``, ``na2d_qk`` and ``na2d_qk_backward``, ``na2d_av`` and
``na2d_av_backward``, likewise for 1 and 3 axes.

Arrays are float32, float64, float16, or ml_dtypes' bfloat16. ``order`` says how they lie:
``"heads_last"`` is ``[batch, *map, heads, channels]`` (additional tokens
``[batch, tokens, heads, channels]``), ``"heads_first"`` is ``[batch, heads, *map, channels]`` (and
``[batch, heads, tokens, channels]``). Weights ``[batch, heads, *map, slots]`` and biases
``[heads, *(2 * kernel_size - 1)]`` are the same in either. Strides are free, negative ones too;
only an array whose channels are not consecutive is copied.

Errors are NattenError (a ValueError and a RuntimeError), NattenTypeError and NotImplementedError.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from . import _call, _lib
from ._call import Call, Op, View, Window, must_copy
from ._errors import NattenError, NattenTypeError
from ._window import Bools, Ints, window

Array = npt.NDArray[Any]
Order = Literal["heads_last", "heads_first"]

_ORDERS = {"heads_last": _lib.HEADS_LAST, "heads_first": _lib.HEADS_FIRST}
# NumPy knows bfloat16 by name once ml_dtypes is imported, as it is where there are such arrays.
_DTYPES = {"float32": _lib.F32, "float64": _lib.F64, "float16": _lib.F16, "bfloat16": _lib.BF16}
_NAMES = {code: name for name, code in _DTYPES.items()}


def _checked(name: str, array: Any) -> Array:
    """An array, if it is one whose elements are all that there is to it."""
    if not isinstance(array, np.ndarray):
        raise NattenTypeError(f"{name} must be a NumPy array, got {type(array).__name__}.")
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise NattenTypeError(
            f"{name} is a masked array, whose mask nothing here looks at: pass its filled(), and "
            "for keys to be ignored a key_bias that is -inf there."
        )
    checked: Array = array
    return checked


def _usable(array: Array | None, role: int) -> Array | None:
    """The array, or a copy if the library could not address its elements."""
    name = _call.ARGUMENTS[role]
    if array is None and role in _call.OPTIONAL:
        return None
    array = _checked(name, array)
    size = array.itemsize
    addressable = array.flags.aligned and array.dtype.isnative
    addressable = addressable and not any(stride % size for stride in array.strides)
    strides = [stride // size for stride in array.strides]
    if addressable and not must_copy(role, array.shape, strides):
        return array
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _view(array: Array | None) -> View | None:
    if array is None:
        return None
    strides = [stride // array.itemsize for stride in array.strides]
    dtype = _DTYPES.get(array.dtype.name, -1)
    return View(array.shape, strides, dtype, _lib.CPU, 0)


def _empty(call: Call, role: int) -> Array | None:
    """An output, if it is wanted."""
    if not call.wants(role):
        return None
    return np.empty(call.shape(role), np.dtype(_NAMES[call.dtype(role)]))


def _compute(
    op: Op,
    order: Order,
    arrays: tuple[Array | None, ...],
    shape: Window,
    scale: float,
    wanted: tuple[bool, ...] = (),
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Array | None, ...]:
    """Runs an op; what is not wanted of its results is None."""
    _check_numbers(dropout_p, seed)
    usable = [_usable(array, role) for array, role in zip(arrays, op.inputs, strict=True)]
    bits = sum(1 << i for i, want in enumerate(wanted) if want)
    ordered = replace(op, order=_ORDERS[order])
    call = Call(ordered, [_view(a) for a in usable], shape, scale, bits, dropout=dropout_p)
    call.plan()
    results = call.make([functools.partial(_empty, call, role) for role in op.outputs], op.outputs)
    everything: list[Any] = [*usable, *results]
    call.run([everything[i].ctypes.data for i in call.order], seed=seed)
    return results


def _rank_error(name: str, array: Any, rank: int) -> None:
    if _checked(name, array).ndim != rank + 3:
        raise NattenError(
            f"{name} must have {rank + 3} dimensions for a map of rank {rank}, got {array.ndim}."
        )


def _check_numbers(dropout_p: Any, seed: Any) -> None:
    """What ctypes would say less well, or not at all."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise NattenTypeError(f"dropout_p must be a number, got {dropout_p!r}.")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise NattenTypeError(f"seed must be an integer, got {seed!r}.")
    if not 0 <= int(seed) < 1 << 64:
        raise NattenError(f"seed must be at least 0 and less than 2^64, got {seed}.")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise NattenTypeError(f"{name} must be a bool, got {value!r}.")
    return bool(value)


def _first(order: Order) -> int:
    """Where the axes of the map begin."""
    if not isinstance(order, str) or order not in _ORDERS:
        raise NattenError(f"order must be 'heads_last' or 'heads_first', got {order!r}.")
    return 1 if order == "heads_last" else 2


def _scale(scale: float | None, query: Array) -> float:
    if scale is None:
        return math.pow(max(query.shape[-1], 1), -0.5)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise NattenTypeError(f"scale must be a number, got {scale!r}.")
    try:
        return float(scale)
    except OverflowError:
        return math.inf  # which the library refuses


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _ranked(function: Callable[Concatenate[int, _P], _R], rank: int, name: str) -> Callable[_P, _R]:
    """The function for maps of one rank, under the name users know."""

    @functools.wraps(function)
    def ranked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return function(rank, *args, **kwargs)

    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    ranked.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    ranked.__name__ = ranked.__qualname__ = name
    ranked.__doc__ = (function.__doc__ or "").replace("RANK", str(rank))
    return ranked


def _na(
    rank: int,
    query: Array,
    key: Array,
    value: Array,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools = False,
    rpb: Array | None = None,
    scale: float | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    *,
    stride: Ints = 1,
    return_lse: bool = False,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    key_bias: Array | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    order: Order = "heads_last",
) -> Any:
    """Fused RANK-D neighborhood attention: natten.functional.naRANKd, for NumPy arrays.

    out = softmax(scale * query . key + rpb) . value over the window of each query; scale is
    ``head_dim ** -0.5`` unless given. Returns out, or with return_lse the pair (out, lse), lse the
    natural logarithm of the sum of exponentials, float32 (float64 for float64).

    key_bias ``[batch, *map, kv_heads]`` (heads_first: ``[batch, kv_heads, *map]``), of the type of
    lse, is added to all scores of a key; -inf masks it. dropout_p is the probability that a weight
    is dropped, which depends on seed (0 to 2^64 - 1), batch, head, query and slot only.
    """
    _rank_error("query", query, rank)
    _rank_error("key", key, rank)
    origins = (query_origin, key_origin, global_extent)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, key, _first(order))
    arrays = (query, key, value, rpb, additional_keys, additional_values, key_bias)
    return_lse = _flag("return_lse", return_lse)
    more = (_scale(scale, query), (), dropout_p, seed)
    out, lse = _compute(_call.NA_MASKED, order, arrays, shape, *more)
    return (out, lse) if return_lse else out


def _na_backward(
    rank: int,
    d_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools = False,
    rpb: Array | None = None,
    scale: float | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    *,
    d_lse: Array | None = None,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    key_bias: Array | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    order: Order = "heads_last",
) -> tuple[Array | None, ...]:
    """Gradients of naRANKd, from those of its results.

    out and lse are what naRANKd returned for the same inputs and seed. Returns (d_query, d_key,
    d_value, d_rpb, d_additional_keys, d_additional_values, d_key_bias); None for inputs that were
    not given.
    """
    _rank_error("query", query, rank)
    _rank_error("key", key, rank)
    origins = (query_origin, key_origin, global_extent)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, key, _first(order))
    inputs = (query, key, value, rpb, additional_keys, additional_values, key_bias)
    arrays = (d_out, d_lse, *inputs, out, lse)
    wanted = tuple(array is not None for array in inputs)
    more = (_scale(scale, query), wanted, dropout_p, seed)
    return _compute(_call.NA_MASKED_BACKWARD, order, arrays, shape, *more)


def _na_qk(
    rank: int,
    query: Array,
    key: Array,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_keys: Array | None = None,
    is_causal: Bools = False,
    rpb: Array | None = None,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    order: Order = "heads_first",
) -> Any:
    """Scores query . key + rpb over each query's window: natten.functional.naRANKd_qk.

    Returns ``[batch, heads, *map, slots]``, the window's tokens row-major, then the additional
    ones; what a causal mask forbids is -infinity. Nothing is scaled.
    """
    _rank_error("query", query, rank)
    _rank_error("key", key, rank)
    origins = (query_origin, key_origin, global_extent)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, key, _first(order))
    return _compute(_call.QK, order, (query, key, rpb, additional_keys), shape, 1.0)[0]


def _na_qk_backward(
    rank: int,
    d_attn: Array,
    query: Array,
    key: Array,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_keys: Array | None = None,
    is_causal: Bools = False,
    *,
    with_rpb: bool = False,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    order: Order = "heads_first",
) -> tuple[Array | None, ...]:
    """Gradients of naRANKd_qk, from that of its result.

    Returns (d_query, d_key, d_rpb, d_additional_keys); d_rpb is None unless with_rpb, and
    d_additional_keys unless additional_keys were given.
    """
    _rank_error("query", query, rank)
    _rank_error("key", key, rank)
    origins = (query_origin, key_origin, global_extent)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, key, _first(order))
    arrays = (d_attn, query, key, additional_keys)
    wanted = (True, True, _flag("with_rpb", with_rpb), additional_keys is not None)
    return _compute(_call.QK_BACKWARD, order, arrays, shape, 1.0, wanted)


def _na_av(
    rank: int,
    attn: Array,
    value: Array,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_values: Array | None = None,
    is_causal: Bools = False,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    order: Order = "heads_first",
) -> Any:
    """Values weighted by attn over each query's window: natten.functional.naRANKd_av.

    attn is ``[batch, heads, *map, slots]`` in the order of naRANKd_qk; slots that a causal mask
    forbids are not read.
    """
    _rank_error("value", value, rank)
    origins = (query_origin, key_origin, global_extent)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, value, _first(order))
    return _compute(_call.AV, order, (attn, value, additional_values), shape, 1.0)[0]


def _na_av_backward(
    rank: int,
    d_out: Array,
    attn: Array,
    value: Array,
    kernel_size: Ints,
    dilation: Ints = 1,
    additional_values: Array | None = None,
    is_causal: Bools = False,
    *,
    stride: Ints = 1,
    query_origin: Ints | None = None,
    key_origin: Ints | None = None,
    global_extent: Ints | None = None,
    order: Order = "heads_first",
) -> tuple[Array | None, ...]:
    """Gradients of naRANKd_av, from that of its result.

    Returns (d_attn, d_value, d_additional_values); the last is None unless additional_values were
    given, and d_attn is 0 in slots that a causal mask forbids.
    """
    _rank_error("value", value, rank)
    origins = (query_origin, key_origin, global_extent)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, value, _first(order))
    arrays = (d_out, attn, value, additional_values)
    wanted = (True, True, additional_values is not None)
    return _compute(_call.AV_BACKWARD, order, arrays, shape, 1.0, wanted)


na1d, na2d, na3d = (_ranked(_na, rank, f"na{rank}d") for rank in (1, 2, 3))
na1d_backward, na2d_backward, na3d_backward = (
    _ranked(_na_backward, rank, f"na{rank}d_backward") for rank in (1, 2, 3)
)
na1d_qk, na2d_qk, na3d_qk = (_ranked(_na_qk, rank, f"na{rank}d_qk") for rank in (1, 2, 3))
na1d_qk_backward, na2d_qk_backward, na3d_qk_backward = (
    _ranked(_na_qk_backward, rank, f"na{rank}d_qk_backward") for rank in (1, 2, 3)
)
na1d_av, na2d_av, na3d_av = (_ranked(_na_av, rank, f"na{rank}d_av") for rank in (1, 2, 3))
na1d_av_backward, na2d_av_backward, na3d_av_backward = (
    _ranked(_na_av_backward, rank, f"na{rank}d_av_backward") for rank in (1, 2, 3)
)
