# SPDX-License-Identifier: MIT
"""What is behind natten.functional: from arguments as users write them to the operations."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _attention, _errors, _masked, _ops
from ._knobs import check_knobs
from ._nested import over_items
from ._sharding import refuse_dropout, shard_ops
from ._window import Bools, Ints, Origins, bools, ints, window

Optional = Tensor | None

_autocast_active = torch._C._is_any_autocast_enabled

# Arguments that are tensors, and whether they may be None.
_TENSORS = {
    "query": False,
    "key": False,
    "value": False,
    "attn": False,
    "rpb": True,
    "additional_keys": True,
    "additional_values": True,
    "key_padding_mask": True,
}


def _check_knobs(function: str, rank: int, knobs: dict[str, Any], is_causal: Any) -> Any:
    """Checks the hints, and reads the guide's spelling of is_causal."""
    if "is_casual" in knobs:
        if not torch.compiler.is_compiling():
            _errors.warn_of_old("is_casual is spelled is_causal.")
        is_causal = knobs.pop("is_casual")
    check_knobs(function, rank, knobs)
    return is_causal


_INTS = ("kernel_size", "stride", "dilation", "query_origin", "key_origin", "global_extent")


_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)


def kind_of(tensor: Tensor) -> str:
    """What a tensor is that no function takes; empty if it is a usual one."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    # By its dtype: under torch.func.grad is_quantized is always False.
    return "quantized" if tensor.dtype in _QUANTIZED else ""


def result(out: Tensor, lse: Tensor, return_lse: bool) -> Any:
    """What the caller wants of the two."""
    if not isinstance(return_lse, bool):
        raise _errors.NattenTypeError(f"return_lse must be a bool, got {return_lse!r}.")
    return (out, lse) if return_lse else out


def _check_arguments(arguments: dict[str, Any], order: str, rank: int) -> None:
    """What is wrong with these arguments, as far as torch itself could not say it well."""
    if rank:
        # First, because an integer there is a sign that others are out of place, too.
        bools("is_causal", arguments.get("is_causal"), rank)
        for name in _INTS:
            if arguments.get(name) is not None:
                ints(name, arguments[name], rank)
    for name, optional in _TENSORS.items():
        if name not in arguments:
            continue
        tensor = arguments[name]
        if not isinstance(tensor, Tensor):
            if tensor is None and optional:
                continue
            raise _errors.NattenTypeError(
                f"{name} must be a tensor, got {type(tensor).__name__}. (The positional order is "
                f"{order}; pass the rest by keyword.)"
            )
        kind = kind_of(tensor)
        if kind:
            raise NotImplementedError(
                f"{name} is a {kind} tensor, which this function does not take."
            )


def autocast(*tensors: Optional) -> tuple[Any, ...]:
    """Under autocast, every floating tensor except float64 in the autocast dtype."""
    device = next(t for t in tensors if t is not None).device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in tensors
    )


def bias_in(dtype: torch.dtype, rpb: Tensor) -> Tensor:
    """A position bias in the type of what it is added to."""
    if rpb.is_complex():
        raise _errors.NattenTypeError(f"rpb must be real, got {rpb.dtype}.")
    return rpb.to(dtype)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def public(function: Callable[_P, _R], rank: int) -> Callable[_P, _R]:
    """What is around every function here: tensor subclasses go first, and what goes wrong is
    explained. Checks that would only lead to other words are made when something went wrong. `rank`
    is that of the map; 0: the function takes no nested tensors."""
    parameters = inspect.signature(function)
    names = tuple(name for name in parameters.parameters if name in _TENSORS)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    order = ", ".join(n for n, p in parameters.parameters.items() if p.kind == positional)

    def explained(error: Exception, args: Any, kwargs: Any) -> Exception:
        classed = _ops.classed(error)
        if isinstance(error, _errors.NattenTypeError):
            return error
        try:
            given = parameters.bind(*args, **kwargs).arguments
        except TypeError:  # too few or too many: Python has said so
            return error
        try:
            _check_arguments(given, order, rank)
        except (_errors.NattenError, NotImplementedError) as better:
            return better
        return classed

    @functools.wraps(function)
    def outer(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            relevant = (*args, *kwargs.values())
            result: _R = handle_torch_function(outer, relevant, *args, **kwargs)
            return result
        first = args[0] if args else kwargs.get(names[0])
        if type(first) is not Tensor:
            shard_ops()
        if rank and getattr(first, "is_nested", False):
            bound = parameters.bind(*args, **kwargs)
            knobs = bound.arguments.pop("knobs", {})
            nested: _R = over_items(outer, {**bound.arguments, **knobs}, names, rank)
            return nested
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise explained(error, args, kwargs) from None

    return outer


def scale_of(scale: float | None, query: Tensor) -> float:
    """The factor of query . key."""
    given = check_scale(scale)
    if given is not None:
        return given
    channels = query.shape[-1]
    return channels**-0.5 if channels else 1.0


def check_scale(scale: float | None) -> float | None:
    """A number, or None."""
    if scale is None:
        return None
    if isinstance(scale, float) or type(scale) is int and abs(scale) < 1 << 64:
        return float(scale)
    if isinstance(scale, (torch.SymFloat, torch.SymInt)):
        return scale
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):  # NumPy's
        try:
            return float(scale)
        except OverflowError:
            raise _errors.NattenError(f"scale must be finite, got {scale}.") from None
    raise _errors.NattenTypeError(f"scale must be a number, got {scale!r}.")


def fused(
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
    origins: Origins,
    knobs: dict[str, Any],
    dropout_p: float = 0.0,
    key_padding_mask: Optional = None,
    generator: torch.Generator | None = None,
) -> Any:
    if knobs:
        is_causal = _check_knobs(f"na{rank}d", rank, knobs, is_causal)
    if torch.compiler.is_compiling() or _autocast_active():
        query, key, value, rpb, additional_keys, additional_values = autocast(
            query, key, value, rpb, additional_keys, additional_values
        )
    if rpb is not None and rpb.dtype != query.dtype:
        rpb = bias_in(query.dtype, rpb)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, key, 1)
    if _masked.is_masked(dropout_p, key_padding_mask):
        dropout, seed = _masked.dropout_of(dropout_p, generator)
        if seed is not None:
            refuse_dropout(query)
        key_bias = _masked.key_bias_of(key_padding_mask, key, 1, rank)
        tensors = (query, key, value, rpb, additional_keys, additional_values, key_bias)
        out, lse = _masked.fused(tensors, shape, check_scale(scale), dropout, seed)
    else:
        if generator is not None:
            _masked.check_generator(generator)
        scale = check_scale(scale)
        out, lse = _attention.fused(
            query, key, value, rpb, additional_keys, additional_values, shape, scale
        )
    return result(out, lse, return_lse)


def qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: Ints,
    dilation: Ints,
    additional_keys: Optional,
    is_causal: Bools | None,
    rpb: Optional,
    stride: Ints,
    origins: Origins,
    key_padding_mask: Optional,
    knobs: dict[str, Any],
) -> Tensor:
    if knobs:
        is_causal = _check_knobs(f"na{rank}d_qk", rank, knobs, is_causal)
    if torch.compiler.is_compiling() or _autocast_active():
        query, key, rpb, additional_keys = autocast(query, key, rpb, additional_keys)
    if rpb is not None and rpb.dtype != query.dtype:
        rpb = bias_in(query.dtype, rpb)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, key, 2)
    attn = _attention.qk(query, key, rpb, additional_keys, shape)
    bias = _masked.key_bias_of(key_padding_mask, key, 2, rank)
    if bias is not None:
        attn = attn + _masked.score_bias(bias, query, key, additional_keys, shape, rank)
    return attn


def av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints,
    additional_values: Optional,
    is_causal: Bools | None,
    stride: Ints,
    origins: Origins,
    knobs: dict[str, Any],
) -> Tensor:
    if knobs:
        is_causal = _check_knobs(f"na{rank}d_av", rank, knobs, is_causal)
    if torch.compiler.is_compiling() or _autocast_active():
        attn, value, additional_values = autocast(attn, value, additional_values)
    if attn.dtype != value.dtype and attn.is_floating_point() and value.is_floating_point():
        attn = attn.to(value.dtype)
    shape = window(rank, kernel_size, stride, dilation, is_causal, origins, value, 2)
    return _attention.av(attn, value, additional_values, shape)
