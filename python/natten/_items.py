# SPDX-License-Identifier: MIT
"""Attention within each of several items of different sizes, packed one after another along the
token axis of heads-last tensors ``[batch, tokens, heads, channels]``, in each batch item alike.

A table says what the items are: int64, a row for each, and in it for each axis query_extent,
key_extent, kernel_size (0: every key), stride, dilation and is_causal, as natten_item_axis has it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _attention, _call, _lib, _ops, _preferences
from ._autograd import Optional, _chosen, _wanted, differentiable_again
from ._errors import NattenError, from_status
from ._front import autocast, scale_of

COLUMNS = 6

_INPUTS = (_lib.QUERY, _lib.KEY, _lib.VALUE)
_SAVED = (_lib.D_OUT, _lib.D_LSE, *_INPUTS, _lib.OUT, _lib.LSE)
_GRADS = (_lib.D_QUERY, _lib.D_KEY, _lib.D_VALUE)

_functorch_active = torch._C._are_functorch_transforms_active


# -------------------------------------------------------------------------------------------------
# ops


def _describe(tensor: _lib.Tensor, role: int, given: Tensor) -> Tensor:
    """Fills in a tensor of a call; returns what its address belongs to."""
    if _call.must_copy(role, given.shape, given.stride()):
        given = given.contiguous()
    place = _ops._DEVICES.get(given.device.type, -1), given.device.index or 0
    dtype = _ops._DTYPES.get(given.dtype, -1)
    _call._fill(tensor, _call.View(given.shape, given.stride(), dtype, *place))
    tensor.data = given.data_ptr() or None
    return given


def _compute(
    op: int, inputs: dict[int, Tensor], outputs: dict[int, Tensor], table: Tensor, scale: float
) -> None:
    table = table.to("cpu", torch.int64).contiguous()
    count, rank = table.shape[0], table.shape[1] // COLUMNS
    call = _lib.Call(op=op, order=_lib.HEADS_LAST, scale=scale)
    call.preferences = _preferences.current
    for role in range(_lib.ROLES):
        call.tensor[role].dims = -1
    kept = [_describe(call.tensor[role], role, tensor) for role, tensor in inputs.items()]
    for role, tensor in outputs.items():
        kept.append(_describe(call.tensor[role], role, tensor))
        call.outputs |= 1 << role
    # Items without queries or without keys are passed over: what belongs to them is zero.
    if not table.view(count, rank, COLUMNS)[..., :2].all():
        for role, tensor in outputs.items():
            tensor.fill_(-torch.inf if role == _lib.LSE else 0)
    like = kept[0]
    run = _lib.Run(threads=torch.get_num_threads())
    arguments = (ctypes.byref(call), table.data_ptr(), count, rank)
    size = ctypes.c_size_t()
    if like.is_cuda:
        call.preferences = _preferences.refresh()
        _check(call, _lib.library.natten_call_items(*arguments, None, ctypes.byref(size)))
        workspace = like.new_empty(size.value, dtype=torch.uint8)
        run.workspace = workspace.data_ptr() or None
        run.stream = torch.cuda.current_stream(like.device).cuda_stream or None
    _check(call, _lib.library.natten_call_items(*arguments, ctypes.byref(run), ctypes.byref(size)))


def _check(call: _lib.Call, status: int) -> None:
    if status:
        raise from_status(status, call.text.decode())


def _outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=sums)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(query, value)
    inputs = dict(zip(_INPUTS, (query, key, value), strict=True))
    _compute(_lib.FORWARD, inputs, {_lib.OUT: out, _lib.LSE: lse}, table, scale)
    return out, lse


def _empty_grads(tensors: Any, wanted: int) -> tuple[Tensor, ...]:
    """Contiguous gradients, empty ones of those nobody wants."""
    return tuple(t.new_empty(t.shape if wanted >> i & 1 else (0,)) for i, t in enumerate(tensors))


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, table, scale, wanted = arguments
    grads = _empty_grads(tensors[2:5], wanted)
    inputs = {r: t for r, t in zip(_SAVED, tensors, strict=True) if t is not None}
    outputs = {r: g for i, (r, g) in enumerate(zip(_GRADS, grads, strict=True)) if wanted >> i & 1}
    if outputs:
        _compute(_lib.BACKWARD, inputs, outputs, table, scale)
    return grads


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(query, value)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return _empty_grads(arguments[2:5], arguments[-1])


_FORWARD = "(Tensor query, Tensor key, Tensor value, Tensor table, float scale)"
_BACKWARD = (
    "(Tensor d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor table, float scale, int wanted)"
)

# Alive as long as the ops are to be.
_definitions = torch.library.Library("natten", "FRAGMENT")

for _name, _schema, _kernel, _fake in (
    ("items", f"{_FORWARD} -> (Tensor, Tensor)", _forward, _fake_forward),
    ("items_traced", f"{_FORWARD} -> (Tensor, Tensor)", _forward, _fake_forward),
    ("items_backward", f"{_BACKWARD} -> (Tensor, Tensor, Tensor)", _backward, _fake_backward),
):
    _definitions.define(f"{_name}{_schema}", tags=_ops._tags())
    for _key in ("CPU", "CUDA"):
        _definitions.impl(_name, _kernel, _key)
    torch.library.register_fake(f"natten::{_name}", _fake, lib=_definitions)

_items = torch.ops.natten.items.default
_items_traced = torch.ops.natten.items_traced.default
_items_backward = torch.ops.natten.items_backward.default


# -------------------------------------------------------------------------------------------------
# derivatives


def _rows_of(table: Tensor) -> list[list[int]]:
    if table.is_meta:
        raise NattenError(
            "Transforms and second derivatives go item by item, but the lengths are on meta, where "
            "there are no numbers."
        )
    rows: list[list[int]] = table.tolist()
    return rows


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Optional, d_lse: Optional) -> tuple[Optional, ...]:
    query, key, value, table, out, lse = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    if d_out is None and d_lse is None:
        return (None,) * 5
    d_out = torch.zeros_like(out) if d_out is None else d_out
    results = _items_backward(
        d_out, d_lse, query, key, value, out, lse, table, ctx.scale, _wanted(need, 3)
    )
    return *_chosen(results, need), None, None


class _Items(Function):
    """(query, key, value, table, scale) -> (out, lse)"""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = _items(*arguments)
        _setup(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, d_out: Optional, d_lse: Optional) -> Any:
        if not differentiable_again() or (d_out is None and d_lse is None):
            return _gradients(ctx, d_out, d_lse)
        query, key, value, table, _, _ = ctx.saved_tensors
        tensors = (query, key, value)
        outputs = _by_items(query, key, value, _rows_of(table), ctx.scale)
        pairs = [(o, d) for o, d in zip(outputs, (d_out, d_lse), strict=True) if d is not None]
        inputs = [t for t, n in zip(tensors, ctx.needs_input_grad, strict=False) if n]
        grads = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                inputs,
                [d_output for _, d_output in pairs],
                create_graph=True,
            )
        )
        return *(next(grads) if n else None for n in ctx.needs_input_grad[:3]), None, None


torch.library.register_autograd(
    "natten::items_traced", _gradients, setup_context=_setup, lib=_definitions
)


# -------------------------------------------------------------------------------------------------
# explanations


def _view(packed: Tensor, batch: int, extents: Sequence[int]) -> _call.View:
    """The part of a packed tensor that holds `batch` maps of these extents, or one of each batch
    entry."""
    steps = [packed.stride(1)]
    for extent in reversed(extents):
        steps.insert(0, steps[0] * extent)
    first = (batch, steps[0]) if packed.shape[0] == 1 else (packed.shape[0], packed.stride(0))
    shape = (first[0], *extents, *packed.shape[2:])
    strides = (first[1], *steps[1:], *packed.stride()[2:])
    place = _ops._DEVICES.get(packed.device.type, -1), packed.device.index or 0
    return _call.View(shape, strides, _ops._DTYPES.get(packed.dtype, -1), *place)


def explain(arguments: Any) -> list[str]:
    """Which kernel takes each item, or batch of equal neighbours, of a call of an op."""
    backward = len(arguments) > len(_INPUTS) + 2
    op, roles = (_call.NA_BACKWARD, _SAVED) if backward else (_call.NA, _INPUTS)
    given = dict(zip(roles, arguments, strict=False))
    table, scale = arguments[len(roles) : len(roles) + 2]
    texts = []
    for row, equal in itertools.groupby(table.tolist()):
        queries, keys, sizes, *others = (row[i::COLUMNS] for i in range(COLUMNS))
        if not (all(queries) and all(keys)):
            continue
        views, count = [], len(list(equal))
        for role in op.inputs:
            tensor = given.get(role)
            extents = keys if role in (_lib.KEY, _lib.VALUE) else queries
            views.append(None if tensor is None else _view(tensor, count, extents))
        window = [size or extent for size, extent in zip(sizes, keys, strict=True)]
        window += [*itertools.chain(*others), *(0,) * 2 * len(keys), *keys]
        wanted = arguments[-1] if backward else 0
        call = _call.Call(op, views, tuple(window), scale, wanted, _preferences.current)
        texts.append(call.explain())
    return texts


# -------------------------------------------------------------------------------------------------
# the road


def without_tokens(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """No queries or no keys: nothing, or zeros, that gradients pass through."""
    groups = query.unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bqhgk", groups, key) * scale
    out = torch.einsum("bqhgk,bkhe->bqhge", scores.softmax(-1), value).flatten(2, 3)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, scores.to(dtype).logsumexp(-1).flatten(2, 3)


def _by_items(
    query: Tensor, key: Tensor, value: Tensor, rows: Any, scale: float
) -> tuple[Tensor, Tensor]:
    """Item by item, as functions that can be differentiated and mapped in every way."""
    outs, logs = [query.new_empty((query.shape[0], 0, query.shape[2], value.shape[3]))], []
    logs.append(_outputs(outs[0], value)[1])
    at = [0, 0]
    for row in rows:
        parts = [row[i::COLUMNS] for i in range(COLUMNS)]
        rank, sizes = len(parts[0]), [1, 1]
        for i in range(2):
            for extent in parts[i]:
                sizes[i] *= extent
        q = query.narrow(1, at[0], sizes[0])
        k, v = (t.narrow(1, at[1], sizes[1]) for t in (key, value))
        at = [at[0] + sizes[0], at[1] + sizes[1]]
        if not all(sizes):
            out, lse = without_tokens(q, k, v, scale)
        else:
            window = [w or n for w, n in zip(parts[2], parts[1], strict=True)]
            numbers = (*window, *parts[3], *parts[4], *parts[5], *(0,) * 2 * rank, *parts[1])
            q = q.unflatten(1, parts[0])
            k, v = (t.unflatten(1, parts[1]) for t in (k, v))
            out, lse = _attention.fused(q, k, v, None, None, None, numbers, scale)
            out, lse = out.flatten(1, rank), lse.flatten(1, rank)
        outs.append(out)
        logs.append(lse)
    return torch.cat(outs, 1), torch.cat(logs, 1)


def transformed() -> bool:
    """Whether a function transform or forward mode is at work."""
    return _functorch_active() or forward_ad._current_level >= 0


def attention_of_items(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    scale: float | None,
    rows: Any = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse), packed as query is. `rows` is the table as integers, if they are at hand."""
    query, key, value = autocast(query, key, value)
    if query.dtype not in _ops._DTYPES:
        raise NattenError("query must be float32, float64, float16 or bfloat16.")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.device != query.device or tensor.dtype != query.dtype:
            raise NattenError(
                f"query is {query.dtype} on {query.device}, but {name} is {tensor.dtype} on "
                f"{tensor.device}."
            )
    scale = scale_of(scale, query)
    if transformed():
        return _by_items(query, key, value, _rows_of(table) if rows is None else rows, scale)
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        result: tuple[Tensor, Tensor] = _items_traced(query, key, value, table, scale)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        result = _Items.apply(query, key, value, table, scale)
    else:
        result = _items(query, key, value, table, scale)
    return result
