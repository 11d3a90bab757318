# SPDX-License-Identifier: MIT
"""Fused attention with a bias for each key, and with dropout. Both have ops of their own, so that
those without cost nothing more."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _attention, _ops, _preferences, _state
from ._attention import backward_composed, forward_mode
from ._autograd import (
    Optional,
    _chosen,
    _finish,
    _Op,
    _save,
    _vmap,
    _wanted,
    differentiable_again,
    one_by_one,
)
from ._call import Window
from ._errors import NattenError, NattenTypeError

_AGAIN = (
    "Derivatives of derivatives, and forward mode, go through weights that are made anew, and "
    "dropout of those cannot be repeated: with dropout_p > 0 there are only first derivatives."
)


def _backward(
    need: Any,
    d_out: Optional,
    d_lse: Optional,
    saved: Any,
    window: Window,
    scale: float | None,
    p: float,
    again: bool = False,
) -> Any:
    """The gradients of the seven tensors; `again`: someone may ask for theirs."""
    *tensors, seed, out, lse = saved
    if d_out is None and d_lse is None:
        return (None,) * 7
    d_out = torch.zeros_like(out) if d_out is None else d_out
    arguments = (d_out, d_lse, *tensors, out, lse, window, scale, p, _wanted(need, 7), seed)
    return _chosen((Once.apply if again else _ops.na_masked_backward)(*arguments), need)


class Once(Function):
    """The gradients of Masked with dropout, for callers that might differentiate them again."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _ops.na_masked_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> Any:
        raise NotImplementedError(_AGAIN)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_AGAIN)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return one_by_one(Once, info, in_dims, *arguments)


@_finish
class Masked(_Op):
    """(query, key, value, position bias, additional keys, additional values, key bias, seed)
    -> (out, lse)"""

    heads = (-2, -2, -2, "bias", -2, -2, -1, None, None, None, None)
    output_heads = (-2, -1)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, seed, window, scale, dropout = arguments
        return _ops.na_masked(*tensors, window, scale, dropout, seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.window, ctx.scale, ctx.dropout = inputs
        _save(ctx, *tensors, *output)

    @staticmethod
    def backward(ctx: Any, d_out: Optional, d_lse: Optional) -> Any:
        need, nothing = ctx.needs_input_grad, (None,) * 4
        saved, numbers = ctx.saved_tensors, (ctx.window, ctx.scale)
        if d_out is None and d_lse is None:
            return *(None,) * 7, *nothing
        again = differentiable_again()
        if ctx.dropout or not again:
            grads = _backward(need, d_out, d_lse, saved, *numbers, ctx.dropout, again)
            return *grads, *nothing
        return *backward_composed(need, d_out, d_lse, saved[:6], *numbers, saved[6]), *nothing

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        """What is dropped follows from the place in a batch: with dropout none is put together."""
        dropout = arguments[-1]
        return (one_by_one if dropout else _vmap)(Masked, info, in_dims, *arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if ctx.dropout:
            raise NotImplementedError(_AGAIN)
        *tensors, key_bias, _, _, lse = ctx.saved_tensors
        numbers = (ctx.window, ctx.scale)
        return forward_mode(tangents[:6], tensors, lse, *numbers, key_bias, tangents[6])


def _traced_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, window, ctx.scale, ctx.dropout, seed = inputs
    ctx.window = tuple(window)
    ctx.save_for_backward(*tensors, seed, *output)
    ctx.set_materialize_grads(False)


def _traced_backward(ctx: Any, d_out: Optional, d_lse: Optional) -> Any:
    numbers = (ctx.window, ctx.scale, ctx.dropout)
    need = ctx.needs_input_grad
    return *_backward(need, d_out, d_lse, ctx.saved_tensors, *numbers), *(None,) * 4


torch.library.register_autograd(
    "natten::na_masked_traced",
    _traced_backward,
    setup_context=_traced_setup,
    lib=_ops._definitions,
)


def _full(*arguments: Any) -> Any:
    _attention._refuse_nested_forward()
    return Masked.apply(*arguments)


def _keep_whole() -> bool:
    """As that of _attention."""
    torch.compiler.allow_in_graph(_full)
    return True


_keep_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fused(
    tensors: tuple[Any, ...], window: Window, scale: float | None, dropout: float, seed: Optional
) -> tuple[Tensor, Tensor]:
    """Fused attention of heads-last tensors, the last of the seven a bias for each key: (out,
    lse)."""
    compiling = torch.compiler.is_compiling()
    if compiling:
        _keep_whole()
    else:
        _state.follow_autotuner()
        if tensors[0].is_cuda:
            _preferences.refresh()
    dual = forward_ad._current_level >= 0
    result: tuple[Tensor, Tensor]
    if _attention._functorch_active() or (compiling and dual):
        result = _full(*tensors, seed, window, scale, dropout)
    elif compiling or _attention._is_tracing():
        result = _ops.na_masked_traced(*tensors, window, scale, dropout, seed)
    elif dual or any(t is not None and t.requires_grad for t in tensors):
        result = Masked.apply_fast(*tensors, seed, window, scale, dropout)
    else:
        result = _ops.na_masked(*tensors, window, scale, dropout, seed)
    return result


def is_masked(dropout_p: Any, mask: Any) -> bool:
    """Whether a call has to go through this module, if only to be told what is wrong."""
    return mask is not None or not isinstance(dropout_p, (int, float)) or dropout_p != 0


def check_generator(generator: Any) -> None:
    """Raises for what is none, also where nothing is drawn from it."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise NattenTypeError(f"generator must be a torch.Generator, got {generator!r}.")


def dropout_of(dropout_p: float, generator: Any) -> tuple[float, Optional]:
    """The probability, and a seed if it is not 0."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise NattenTypeError(f"dropout_p must be a number, got {dropout_p!r}.")
    if not 0 <= dropout_p <= 1:
        raise NattenError(f"dropout_p must be between 0 and 1, got {dropout_p}.")
    check_generator(generator)
    return float(dropout_p), _ops.draw_seed(generator) if dropout_p else None


def key_bias_of(mask: Any, key: Tensor, first: int, rank: int) -> Optional:
    """A mask of keys, bool or float, ``[batch, *map]`` or also with heads last, as a bias of the
    keys whose axes begin at `first`: ``[batch, *map, kv_heads]``, in the type that sums are in."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NattenTypeError(f"key_padding_mask must be a tensor, got {type(mask).__name__}.")
    if mask.dim() not in (rank + 1, rank + 2):
        raise NattenError(
            f"key_padding_mask must have {rank + 1} dimensions, or {rank + 2} with heads, for a "
            f"map of rank {rank}, got {mask.dim()}."
        )
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    if mask.dtype == torch.bool:
        mask = mask.to(dtype).masked_fill(mask, -torch.inf)
    elif not mask.is_floating_point():
        raise NattenTypeError(
            "key_padding_mask must be bool (True where a key is to be ignored) or floating, got "
            f"{mask.dtype}."
        )
    heads = key.shape[1 if first == 2 else -2]
    bias: Tensor = mask.to(dtype)
    return bias if bias.dim() == rank + 2 else bias.unsqueeze(-1).expand((*bias.shape, heads))


def check_key_bias(bias: Optional, keys: tuple[int, ...]) -> None:
    """Raises unless a bias, if there is one, is for `keys`: batch, map, heads."""
    if bias is not None and tuple(bias.shape) != keys:
        raise NattenError(
            f"key_padding_mask is for keys of {tuple(bias.shape)} (batch, map, heads), but key has "
            f"{keys}."
        )


def score_bias(
    bias: Tensor, query: Tensor, key: Tensor, additional: Optional, window: Window, rank: int
) -> Tensor:
    """What a bias of keys adds to scores of heads-first tensors."""
    check_key_bias(bias, (key.shape[0], *key.shape[2 : 2 + rank], key.shape[1]))
    return _attention.spread_keys(bias.movedim(-1, 1), query, additional, window)
