# SPDX-License-Identifier: MIT
"""QK and fused attention as differentiable functions, and the road each call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _autograd, _ops, _preferences, _state
from ._autograd import (
    AV,
    Optional,
    _add,
    _chosen,
    _finish,
    _Op,
    _save,
    _wanted,
    _with,
    correlate,
    differentiable_again,
    gather,
    reduce,
    scatter,
    spread,
)
from ._call import Window


def _score_tangent(
    tangents: Any,
    query: Tensor,
    key: Tensor,
    additional: Optional,
    window: Window,
    scale: float,
) -> Optional:
    """The tangent of scale * q . k + bias, from those of query, key, bias and additional keys."""
    t_query, t_key, t_bias, t_additional = tangents
    t = _with(t_key, t_additional, key, additional)
    products = _add(
        None if t_query is None else correlate(t_query, key, additional, window),
        None if t is None else correlate(query, *t, window),
    )
    bias = None
    if t_bias is not None:
        extra = 0 if additional is None else additional.shape[2]
        bias = torch.nn.functional.pad(spread(t_bias, query, window), (0, extra))
    return _add(None if products is None else products * scale, bias)


def _score_grads(
    need: Any,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    additional: Optional,
    window: Window,
    scale: float,
) -> tuple[Optional, Optional, Optional, Optional]:
    """Gradients for query, key, bias and additional keys from that of scale * q . k + bias."""
    d_query = d_key = d_bias = d_additional = None
    if need[0]:
        d_query = gather(grad, key, additional, window) * scale
    if need[1] or need[3]:
        d_key, d_additional = scatter(grad, query, key, additional, window)
        d_key = d_key * scale
        d_additional = None if d_additional is None else d_additional * scale
    if need[2]:
        d_bias = reduce(grad, query, window)
    return d_query, d_key, d_bias, d_additional


@_finish
class QK(_Op):
    """(query, key, bias, additional keys) -> attn, not normalised"""

    heads = (1, 1, "bias", 1, None, None)
    output_heads = (1,)

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        bias: Optional,
        additional: Optional,
        window: Window,
        scale: float,
    ) -> Tensor:
        result: Tensor = _ops.qk(query, key, bias, additional, window, scale)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        query, key, _, additional, ctx.window, ctx.scale = inputs
        _save(ctx, query, key, additional)

    @staticmethod
    def backward(ctx: Any, grad: Optional) -> Any:
        query, key, additional = ctx.saved_tensors
        need = ctx.needs_input_grad
        if grad is None:
            return (None,) * 6
        if differentiable_again():
            grads = _score_grads(need, grad, query, key, additional, ctx.window, ctx.scale)
            return *grads, None, None
        results = _ops.qk_backward(
            grad, query, key, additional, ctx.window, ctx.scale, _wanted(need, 4)
        )
        return *_chosen(results, need), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Optional:
        query, key, additional = ctx.saved_tensors
        return _score_tangent(tangents[:4], query, key, additional, ctx.window, ctx.scale)


# -------------------------------------------------------------------------------------------------
# fused


def _first(tensor: Optional) -> Optional:
    """Heads-last to heads-first, of tokens."""
    return None if tensor is None else tensor.movedim(-2, 1)


def _last(tensor: Optional) -> Optional:
    return None if tensor is None else tensor.movedim(1, -2)


def spread_keys(key_bias: Tensor, query: Tensor, additional: Optional, window: Window) -> Tensor:
    """What biases of keys (heads-first) add to the scores: a product with queries of one channel
    that is 1."""
    ones = query.new_ones(1).expand((*query.shape[:-1], 1))
    scores = correlate(ones, key_bias.to(query.dtype).unsqueeze(-1), None, window)
    extra = 0 if additional is None else additional.shape[2]
    return torch.nn.functional.pad(scores, (0, extra)) if extra else scores


def _scale(scale: float | None, query: Tensor) -> float:
    """The factor of query . key. As long as it is None, no compiled code depends on head_dim."""
    return query.shape[-1] ** -0.5 if scale is None else scale


def _weights(
    query: Tensor,
    key: Tensor,
    bias: Optional,
    additional: Optional,
    window: Window,
    scale: float,
    key_bias: Optional = None,
) -> Tensor:
    """The softmax weights of heads-first tensors, differentiable; 0 where no key is left."""
    scores = _autograd.apply(QK, query, key, bias, additional, window, scale)
    if key_bias is not None:
        scores = scores + spread_keys(key_bias.movedim(-1, 1), query, additional, window)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    range_of = torch.finfo(scores.dtype)
    top = scores.detach().amax(-1, keepdim=True).clamp_min(range_of.min)
    powers = (scores - top).exp()
    weights: Tensor = powers / powers.sum(-1, keepdim=True).clamp_min(range_of.tiny)
    return weights


def backward_composed(
    need: Any,
    d_out: Optional,
    d_lse: Optional,
    tensors: Any,
    window: Window,
    scale: float | None,
    key_bias: Optional = None,
) -> tuple[Optional, ...]:
    """The gradients of fused attention, through its weights: differentiable any number of times.
    The last one is that of the biases of keys."""
    query, key, value, bias, additional_key, additional_value = tensors
    scale = _scale(scale, query)
    q, k, v = query.movedim(-2, 1), key.movedim(-2, 1), value.movedim(-2, 1)
    ak, av = _first(additional_key), _first(additional_value)
    weights = _weights(q, k, bias, ak, window, scale, key_bias)
    d_value = d_av = d_weights = None
    if d_out is not None:
        d_out = d_out.movedim(-2, 1)
        d_weights = correlate(d_out, v, av, window).to(weights.dtype)
        if need[2] or need[5]:
            d_value, d_av = scatter(weights.to(v.dtype), d_out, v, av, window)
    d_scores = torch.zeros_like(weights)
    if d_weights is not None:
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    if d_lse is not None:
        d_scores = d_scores + weights * d_lse.movedim(-1, 1).unsqueeze(-1)
    score_need = (need[0], need[1], need[3], need[4])
    d_key_bias = None
    if key_bias is not None and need[6]:
        ones = weights.new_ones(1).expand((*weights.shape[:-1], 1))
        grad = d_scores[..., : d_scores.shape[-1] - (0 if ak is None else ak.shape[2])]
        d_key_bias = scatter(grad, ones, key_bias.movedim(-1, 1).unsqueeze(-1), None, window)[0]
        d_key_bias = d_key_bias.squeeze(-1).movedim(1, -1).to(key_bias.dtype)
    d_scores = d_scores.to(q.dtype)
    d_query, d_key, d_bias, d_ak = _score_grads(score_need, d_scores, q, k, ak, window, scale)
    return (
        _last(d_query),
        _last(d_key),
        _last(d_value),
        d_bias,
        _last(d_ak),
        _last(d_av),
        d_key_bias,
    )


@_finish
class Fused(_Op):
    """(query, key, value, bias, additional keys, additional values) -> (out, lse)"""

    heads = (-2, -2, -2, "bias", -2, -2, None, None)
    output_heads = (-2, -1)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        *tensors, window, scale = arguments
        return _ops.na(*tensors, window, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.window, ctx.scale = inputs
        _save(ctx, *tensors, *output)

    @staticmethod
    def fast_forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Optional,
        additional_keys: Optional,
        additional_values: Optional,
        window: Window,
        scale: float | None,
    ) -> Any:
        tensors = (query, key, value, bias, additional_keys, additional_values)
        out, lse = _ops.na_eagerly(*tensors, window, scale)
        ctx.save_for_backward(*tensors, out, lse)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        ctx.window = window
        ctx.scale = scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Optional, d_lse: Optional) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        need = ctx.needs_input_grad
        if d_out is None and d_lse is None:
            return (None,) * 8
        if differentiable_again():
            grads = backward_composed(need, d_out, d_lse, tensors, ctx.window, ctx.scale)
            return *grads[:6], None, None
        return *_fused_backward(need, d_out, d_lse, tensors, out, lse, ctx), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *tensors, _, lse = ctx.saved_tensors
        return forward_mode(tangents[:6], tensors, lse, ctx.window, ctx.scale)


def forward_mode(
    tangents: Any,
    tensors: Any,
    lse: Tensor,
    window: Window,
    scale: float | None,
    key_bias: Optional = None,
    t_key_bias: Optional = None,
) -> tuple[Optional, Tensor]:
    """The tangents of out and LSE, through the weights."""
    query, key, value, bias, additional_key, additional_value = tensors
    t_q, t_k, t_v, t_bias, t_ak, t_av = tangents
    scale = _scale(scale, query)
    q, k, v = query.movedim(-2, 1), key.movedim(-2, 1), value.movedim(-2, 1)
    ak, av = _first(additional_key), _first(additional_value)
    weights = _weights(q, k, bias, ak, window, scale, key_bias)
    t_inputs = (_first(t_q), _first(t_k), t_bias, _first(t_ak))
    t_scores = _score_tangent(t_inputs, q, k, ak, window, scale)
    if t_key_bias is not None:
        t_scores = _add(t_scores, spread_keys(t_key_bias.movedim(-1, 1), q, ak, window))
    t_value = _with(_first(t_v), _first(t_av), v, av)
    t_out = None if t_value is None else gather(weights.to(v.dtype), *t_value, window)
    t_lse = torch.zeros_like(lse)
    if t_scores is not None:
        t_scores = t_scores.to(weights.dtype)
        t_lse = (weights * t_scores).sum(-1, keepdim=True)
        t_weights = weights * (t_scores - t_lse)
        t_out = _add(t_out, gather(t_weights.to(v.dtype), v, av, window))
        t_lse = t_lse.squeeze(-1).movedim(1, -1).to(lse.dtype)
    return _last(t_out), t_lse


def _fused_backward(
    need: Any, d_out: Optional, d_lse: Optional, tensors: Any, out: Tensor, lse: Tensor, ctx: Any
) -> Any:
    if d_out is None:
        d_out = torch.zeros_like(out)
    if d_out.is_cuda and not torch.compiler.is_compiling():
        _preferences.refresh()  # torch's may have changed since the forward
    results = _ops.na_backward(
        d_out, d_lse, *tensors, out, lse, ctx.window, ctx.scale, _wanted(need, 6)
    )
    return _chosen(results, need)


# -------------------------------------------------------------------------------------------------
# under a compiler: ops with registered derivatives


def _traced_setup(ctx: Any, inputs: Any, output: Any) -> None:
    """For all three ops: tensors, then window and scale."""
    *tensors, window, ctx.scale = inputs
    ctx.window = tuple(window)
    outputs = output if isinstance(output, tuple) else ()
    ctx.save_for_backward(*tensors, *outputs)
    ctx.set_materialize_grads(False)


def _traced_backward(cls: Any) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Optional) -> Any:
        need = ctx.needs_input_grad
        nothing = (None, None)
        tensors = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return *(None for _ in need[:-2]), *nothing
        numbers = (ctx.window, ctx.scale)
        if cls is Fused:
            *inputs, out, lse = tensors
            return *_fused_backward(need, grads[0], grads[1], inputs, out, lse, ctx), *nothing
        if cls is QK:
            query, key, _, additional = tensors
            results = _ops.qk_backward(grads[0], query, key, additional, *numbers, _wanted(need, 4))
        else:
            results = _ops.av_backward(grads[0], *tensors, *numbers, _wanted(need, 3))
        return *_chosen(results, need), *nothing

    return backward


for _name, _class in (("na", Fused), ("qk", QK), ("av", AV)):
    torch.library.register_autograd(
        f"natten::{_name}_traced",
        _traced_backward(_class),
        setup_context=_traced_setup,
        lib=_ops._definitions,
    )


# -------------------------------------------------------------------------------------------------
# the road


_functorch_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_fast_fused = Fused.apply_fast


def _refuse_nested_forward() -> None:
    """torch drops the tangents of the outer of two forward modes around a Function."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise NotImplementedError(
            "Forward mode over forward mode (jvp of jvp, jacfwd of jacfwd) is not supported: torch "
            "would return zeros. Take jacfwd(jacrev(...)), as torch.func.hessian does, or "
            "jacrev(jacrev(...))."
        )


def _full_fused(*arguments: Any) -> Any:
    _refuse_nested_forward()
    return Fused.apply(*arguments)


def _full_qk(*arguments: Any) -> Any:
    _refuse_nested_forward()
    return QK.apply(*arguments)


def _full_av(*arguments: Any) -> Any:
    _refuse_nested_forward()
    return AV.apply(*arguments)


def _keep_whole() -> bool:
    """Has Dynamo put the three functions above into its graphs as they are: taken apart, they would
    lose their tangents. Dynamo runs this while it traces, because of the mark below; so nobody who
    does not compile has to load it. It must have run before the functions are first mentioned."""
    for function in (_full_fused, _full_qk, _full_av):
        torch.compiler.allow_in_graph(function)
    return True


_keep_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _call(cls: Any, full: Any, op: Any, traced: Any, tensors: tuple[Any, ...], numbers: Any) -> Any:
    """Takes the cheapest road that is right. `numbers` is (window, scale), or for AV (window,)."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _state.follow_autotuner()
        if tensors[0].is_cuda:
            _preferences.refresh()
    dual = forward_ad._current_level >= 0
    if _functorch_active() or (compiling and dual):
        return full(*tensors, *numbers)
    if not compiling and not _is_tracing():
        if dual or (
            torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        ):
            return cls.apply_fast(*tensors, *numbers)
        traced = op
    return traced(*tensors, numbers[0], numbers[1] if len(numbers) > 1 else 1.0)


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Optional,
    additional_keys: Optional,
    additional_values: Optional,
    window: Window,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Fused attention of heads-last tensors: (out, lse)."""
    compiling = torch.compiler.is_compiling()
    if not (compiling or _functorch_active() or _is_tracing()):
        # The roads of _call for plain calls, which are to cost little.
        if query.is_cuda:
            _preferences.refresh()
        if _state.tunes:
            _state.follow_autotuner()
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled()
            and (
                query.requires_grad
                or key.requires_grad
                or value.requires_grad
                or (bias is not None and bias.requires_grad)
                or (additional_keys is not None and additional_keys.requires_grad)
                or (additional_values is not None and additional_values.requires_grad)
            )
        ):
            return _fast_fused(  # type: ignore[no-any-return]
                query, key, value, bias, additional_keys, additional_values, window, scale
            )
        return _ops.na_eagerly(  # type: ignore[no-any-return]
            query, key, value, bias, additional_keys, additional_values, window, scale
        )
    if compiling:
        _keep_whole()
    tensors = (query, key, value, bias, additional_keys, additional_values)
    result: tuple[Tensor, Tensor] = _call(
        Fused, _full_fused, _ops.na_eagerly, _ops.na_traced, tensors, (window, scale)
    )
    return result


def qk(
    query: Tensor,
    key: Tensor,
    bias: Optional,
    additional_keys: Optional,
    window: Window,
    scale: float = 1.0,
) -> Tensor:
    """Scores of heads-first tensors."""
    if torch.compiler.is_compiling():
        _keep_whole()
    tensors = (query, key, bias, additional_keys)
    result: Tensor = _call(QK, _full_qk, _ops.qk_eagerly, _ops.qk_traced, tensors, (window, scale))
    return result


def av(attn: Tensor, value: Tensor, additional_values: Optional, window: Window) -> Tensor:
    """Weighted sums of heads-first values."""
    if torch.compiler.is_compiling():
        _keep_whole()
    tensors = (attn, value, additional_values)
    result: Tensor = _call(AV, _full_av, _ops.av_eagerly, _ops.av_traced, tensors, (window,))
    return result
