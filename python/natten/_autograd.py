# SPDX-License-Identifier: MIT
"""Derivatives.

Unfused attention is made of three bilinear maps between tokens and window slots, which are closed
under differentiation, and of two linear ones between a bias and window slots, likewise:

- ``correlate(x, y)``: attn_w = x . y_w; its derivatives are gather and scatter;
- ``gather(attn, y)``: out = sum_w attn_w y_w;
- ``scatter(attn, x)``: the transpose of gather: each key collects attn_w x of the queries it is in
  the window of;
- ``spread(bias)``: attn_w = bias_w;
- ``reduce(attn)``: the transpose of spread.

Slots that a causal mask forbids hold 0 and are never read. Everything else is composed of these:
second derivatives and forward-mode derivatives of QK and AV, and, through the weights, of fused
attention. First derivatives go straight to the library's backward ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _ops, _state
from ._call import Window, is_block, parts, rank_of

_functorch_active = torch._C._are_functorch_transforms_active
# A tensor that outlived the transform it was made in still is a wrapper.
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead

Optional = Tensor | None


def differentiable_again() -> bool:
    """Whether what is computed now (in a backward) may itself be differentiated."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or _functorch_active()


def _fold(tensor: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    """Puts a mapped dimension in front of dimension `at`, and makes one of the two."""
    if dim is None:
        shape = list(tensor.shape)
        shape.insert(at if at >= 0 else len(shape) + at, size)
        tensor = tensor.unsqueeze(at if at >= 0 else at - 1).expand(shape)
    else:
        tensor = tensor.movedim(dim, at if at >= 0 else at - 1)
    return tensor.flatten(at, at + 1) if at >= 0 else tensor.flatten(at - 1, at)


def _unfold(tensor: Tensor, size: int, at: int) -> tuple[Tensor, int]:
    position = at if at >= 0 else tensor.dim() + at
    return tensor.unflatten(position, (size, tensor.shape[position] // size)), position


def _item(argument: Any, dim: Any, index: int = 0) -> Any:
    """One of those that are mapped, if they are."""
    return argument.select(dim, index) if isinstance(dim, int) else argument


def one_by_one(cls: Any, info: Any, in_dims: Any, *arguments: Any) -> Any:
    """Mapped calls one after another, each as if it were alone."""
    if not info.batch_size:
        return _none(cls, in_dims, *arguments)
    pairs = list(zip(arguments, in_dims, strict=True))
    outputs = [cls.apply(*[_item(*pair, i) for pair in pairs]) for i in range(info.batch_size)]
    return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


def _none(cls: Any, in_dims: Any, *arguments: Any) -> Any:
    """No mapped calls: what one of zeros returns, none times. (Sums of nothing are zeros that have
    a derivative.)"""
    pairs = zip(arguments, in_dims, strict=True)
    outputs = cls.apply(*[a.sum(dim) if isinstance(dim, int) else a for a, dim in pairs])
    if isinstance(outputs, Tensor):
        return outputs.unsqueeze(0)[:0], 0
    return tuple(output.unsqueeze(0)[:0] for output in outputs), (0,) * len(outputs)


def _vmap(cls: Any, info: Any, in_dims: Any, *arguments: Any) -> Any:
    """Mapped calls become one call with more batches; with more heads where a bias, which has no
    batch, is involved."""
    size = info.batch_size
    if not size:
        return _none(cls, in_dims, *arguments)
    heads = cls.sums_over_batch or any(
        in_dims[i] is not None for i, at in enumerate(cls.heads) if at == "bias"
    )
    folded = list(arguments)
    for i, at in enumerate(cls.heads):
        if at is None or arguments[i] is None:
            continue
        if at == "bias":
            if heads:
                folded[i] = _fold(arguments[i], in_dims[i], size, 0)
        else:
            folded[i] = _fold(arguments[i], in_dims[i], size, at if heads else 0)
    try:
        outputs = cls.apply(*folded)
    except RuntimeError:
        # One item alone fails likewise, with the numbers that the caller knows.
        cls.apply(*[_item(a, dim) for a, dim in zip(arguments, in_dims, strict=True)])
        raise
    single = isinstance(outputs, Tensor)
    results, dims = [], []
    for output, at in zip((outputs,) if single else outputs, cls.output_heads, strict=False):
        result, dim = _unfold(output, size, (0 if at == "bias" else at) if heads else 0)
        results.append(result)
        dims.append(dim)
    return (results[0], dims[0]) if single else (tuple(results), tuple(dims))


class _Op(Function):
    """A Function with setup_context, which is what function transforms need. `heads` says for each
    argument which of its dimensions is the heads': "bias" for a bias (no batch), None for what is
    no tensor."""

    heads: tuple[Any, ...]
    output_heads: tuple[Any, ...]
    sums_over_batch = False
    fast: Any
    apply_fast: Any


def _classed(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that raises what a forward would, whose errors the public function sees to."""

    @functools.wraps(backward)
    def outer(ctx: Any, *grads: Optional) -> Any:
        try:
            return backward(ctx, *grads)
        except RuntimeError as error:
            better = _ops.classed(error)
            if better is error:
                raise
            raise better from None

    return outer


def _finish(cls: Any) -> Any:
    """Adds the mapping rule, if there is none, and `cls.fast`: the same Function with its context
    set up in forward, which costs a fifth and is what plain calls use, by `cls.apply_fast`."""

    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _vmap(cls, info, in_dims, *arguments)

    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.fast = True
        output = cls.forward(*arguments)
        cls.setup_context(ctx, arguments, output)
        return output

    def backward(ctx: Any, *grads: Optional) -> Any:
        _state.follow_autotuner()
        return cls.backward(ctx, *grads)

    cls.backward = staticmethod(_classed(cls.backward))
    if "vmap" not in vars(cls):
        cls.vmap = staticmethod(vmap)
    forward = getattr(cls, "fast_forward", forward)
    methods = {"forward": forward, "backward": backward, "jvp": cls.jvp}
    cls.fast = type(
        f"{cls.__name__}Fast", (Function,), {k: staticmethod(v) for k, v in methods.items()}
    )
    # Function.apply looks at every argument in Python; only this of what it does concerns us here.
    apply_in_c: Any = super(Function, cls.fast).apply
    count = sum(at is not None for at in cls.heads)

    def apply_fast(*arguments: Any) -> Any:
        tensors = [None if t is None else _unwrap_if_dead(t) for t in arguments[:count]]
        return apply_in_c(*tensors, *arguments[count:])

    cls.apply_fast = staticmethod(apply_fast)
    return cls


def apply(cls: Any, *arguments: Any) -> Any:
    """Applies a Function by the cheapest road that is right here."""
    return cls.apply(*arguments) if _functorch_active() else cls.apply_fast(*arguments)


def _save(ctx: Any, *tensors: Optional) -> None:
    ctx.save_for_backward(*tensors)
    # Inside a compiled graph no sign of forward mode can be seen: only the fast road may look.
    if forward_ad._current_level >= 0 or not getattr(ctx, "fast", False):
        ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def _add(*terms: Optional) -> Optional:
    total: Optional = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _with(
    tangent: Optional, tangent_additional: Optional, primal: Tensor, additional: Optional
) -> tuple[Tensor, Optional] | None:
    """A pair of tangents, zeros where one of the two is missing; None if both are."""
    if tangent is None and tangent_additional is None:
        return None
    if tangent is None:
        tangent = torch.zeros_like(primal)
    if tangent_additional is None and additional is not None:
        tangent_additional = torch.zeros_like(additional)
    return tangent, tangent_additional


def _like(shape: Any, tensor: Tensor) -> Tensor:
    """A tensor of this shape that nobody reads, without the memory."""
    return tensor.new_empty(shape[-1]).expand(shape)


def _wanted(need: Any, count: int) -> int:
    """needs_input_grad as the set of outputs a backward op is to compute."""
    return sum(1 << i for i in range(count) if need[i])


def _chosen(results: Any, need: Any) -> Any:
    return tuple(r if n else None for r, n in zip(results, need, strict=False))


# -------------------------------------------------------------------------------------------------
# the maps


def _slots(window: Window, additional: Optional) -> int:
    count = 1
    for size in window[: rank_of(window)]:
        count *= size
    return count + (0 if additional is None else additional.shape[2])


@_finish
class Correlate(_Op):
    """(x, y, additional y) -> attn"""

    heads = (1, 1, 1, None)
    output_heads = (1,)

    @staticmethod
    def forward(x: Tensor, y: Tensor, additional: Optional, window: Window) -> Tensor:
        attn = _like((*x.shape[:-1], _slots(window, additional)), x)
        result: Tensor = _ops.av_backward(x, attn, y, additional, window, 1.0, 1)[0]
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.window = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Optional) -> Any:
        x, y, additional = ctx.saved_tensors
        if grad is None:
            return (None,) * 4
        need = ctx.needs_input_grad
        d_x = gather(grad, y, additional, ctx.window) if need[0] else None
        d_y = d_additional = None
        if need[1] or need[2]:
            d_y, d_additional = scatter(grad, x, y, additional, ctx.window)
        return d_x, d_y, d_additional, None

    @staticmethod
    def jvp(ctx: Any, t_x: Optional, t_y: Optional, t_additional: Optional, _: None) -> Optional:
        x, y, additional = ctx.saved_tensors
        t = _with(t_y, t_additional, y, additional)
        return _add(
            None if t_x is None else correlate(t_x, y, additional, ctx.window),
            None if t is None else correlate(x, *t, ctx.window),
        )


@_finish
class AV(_Op):
    """(attn, y, additional y) -> out. This is gather, and the public AV."""

    heads = (1, 1, 1, None)
    output_heads = (1,)

    @staticmethod
    def forward(attn: Tensor, value: Tensor, additional: Optional, window: Window) -> Tensor:
        result: Tensor = _ops.av(attn, value, additional, window, 1.0)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.window = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Optional) -> Any:
        attn, value, additional = ctx.saved_tensors
        if grad is None:
            return (None,) * 4
        need = ctx.needs_input_grad
        if not differentiable_again():
            results = _ops.av_backward(
                grad, attn, value, additional, ctx.window, 1.0, _wanted(need, 3)
            )
            return *_chosen(results, need), None
        d_attn = correlate(grad, value, additional, ctx.window) if need[0] else None
        d_value = d_additional = None
        if need[1] or need[2]:
            d_value, d_additional = scatter(attn, grad, value, additional, ctx.window)
        return d_attn, d_value, d_additional, None

    @staticmethod
    def jvp(ctx: Any, t_attn: Optional, t_y: Optional, t_additional: Optional, _: None) -> Optional:
        attn, y, additional = ctx.saved_tensors
        t = _with(t_y, t_additional, y, additional)
        return _add(
            None if t_attn is None else gather(t_attn, y, additional, ctx.window),
            None if t is None else gather(attn, *t, ctx.window),
        )


@_finish
class Scatter(_Op):
    """(attn, x, and only for their shapes: y, additional y) -> (y, additional y)"""

    heads = (1, 1, 1, 1, None)
    output_heads = (1, 1)

    @staticmethod
    def forward(attn: Tensor, x: Tensor, y: Tensor, additional: Optional, window: Window) -> Any:
        wanted = 2 if additional is None else 6
        results = _ops.av_backward(x, attn, y, additional, window, 1.0, wanted)
        return results[1:2] if additional is None else results[1:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.window = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> Any:
        attn, x, y, additional = ctx.saved_tensors
        grad = _with(grads[0], grads[1] if len(grads) > 1 else None, y, additional)
        if grad is None:
            return (None,) * 5
        need = ctx.needs_input_grad
        d_attn = correlate(x, *grad, ctx.window) if need[0] else None
        d_x = gather(attn, *grad, ctx.window) if need[1] else None
        return d_attn, d_x, None, None, None

    @staticmethod
    def jvp(ctx: Any, t_attn: Optional, t_x: Optional, *_: Any) -> Any:
        attn, x, y, additional = ctx.saved_tensors
        parts = []
        if t_attn is not None:
            parts.append(scatter(t_attn, x, y, additional, ctx.window))
        if t_x is not None:
            parts.append(scatter(attn, t_x, y, additional, ctx.window))
        sums = tuple(_add(*terms) for terms in zip(*parts, strict=True)) if parts else (None, None)
        return sums[:1] if additional is None else sums


def _zeros(query: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Queries and keys of one channel that is zero, for what depends on the map only. A block's
    keys reach to the end of each axis: every window is among them."""
    keys: Any = query.shape[2:-1]
    if is_block(window):
        *_, origins, extents = parts(window)
        keys = [end - begin for begin, end in zip(origins, extents, strict=True)]
    zero = query.new_zeros(1)
    return zero.expand((*query.shape[:-1], 1)), zero.expand((*query.shape[:2], *keys, 1))


@_finish
class Spread(_Op):
    """(bias, and only for its shape: query) -> attn, without additional tokens"""

    heads = ("bias", 1, None)
    output_heads = (1,)
    sums_over_batch = True

    @staticmethod
    def forward(bias: Tensor, query: Tensor, window: Window) -> Tensor:
        attn: Tensor = _ops.qk(*_zeros(query, window), bias, None, window, 1.0)
        return attn.masked_fill_(attn == -torch.inf, 0) if any(parts(window)[3]) else attn

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, query, ctx.window = inputs
        _save(ctx, query)

    @staticmethod
    def backward(ctx: Any, grad: Optional) -> Any:
        (query,) = ctx.saved_tensors
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None, None
        return reduce(grad, query, ctx.window), None, None

    @staticmethod
    def jvp(ctx: Any, t_bias: Optional, *_: Any) -> Optional:
        (query,) = ctx.saved_tensors
        return None if t_bias is None else spread(t_bias, query, ctx.window)


@_finish
class Reduce(_Op):
    """(attn, and only for its shape: query) -> bias. Slots of additional tokens are passed over."""

    heads = (1, 1, None)
    output_heads = ("bias",)
    sums_over_batch = True

    @staticmethod
    def forward(attn: Tensor, query: Tensor, window: Window) -> Tensor:
        grad = attn[..., : _slots(window, None)]
        pair = _zeros(query, window)
        result: Tensor = _ops.qk_backward(grad, *pair, None, window, 1.0, 4)[2]
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        attn, query, ctx.window = inputs
        ctx.additional = attn.shape[-1] - _slots(ctx.window, None)
        _save(ctx, query)

    @staticmethod
    def backward(ctx: Any, grad: Optional) -> Any:
        (query,) = ctx.saved_tensors
        if grad is None or not ctx.needs_input_grad[0]:
            return None, None, None
        attn = spread(grad, query, ctx.window)
        return torch.nn.functional.pad(attn, (0, ctx.additional)), None, None

    @staticmethod
    def jvp(ctx: Any, t_attn: Optional, *_: Any) -> Optional:
        (query,) = ctx.saved_tensors
        return None if t_attn is None else reduce(t_attn, query, ctx.window)


def correlate(x: Tensor, y: Tensor, additional: Optional, window: Window) -> Tensor:
    result: Tensor = apply(Correlate, x, y, additional, window)
    return result


def gather(attn: Tensor, y: Tensor, additional: Optional, window: Window) -> Tensor:
    result: Tensor = apply(AV, attn, y, additional, window)
    return result


def scatter(
    attn: Tensor, x: Tensor, y: Tensor, additional: Optional, window: Window
) -> tuple[Tensor, Optional]:
    shapes = (y.detach(), None if additional is None else additional.detach())
    results = apply(Scatter, attn, x, *shapes, window)
    return results[0], results[1] if len(results) > 1 else None


def spread(bias: Tensor, query: Tensor, window: Window) -> Tensor:
    result: Tensor = apply(Spread, bias, query.detach(), window)
    return result


def reduce(attn: Tensor, query: Tensor, window: Window) -> Tensor:
    result: Tensor = apply(Reduce, attn, query.detach(), window)
    return result
