# SPDX-License-Identifier: MIT
"""Counting the floating point operations of neighborhood attention.

Counted are the products of matrices: one multiplication and one addition (2 FLOPs, 1 MAC) for each
channel of each pair of a query and a token. Softmax, scaling, bias and masks are not counted (but
where a bias or mask is itself a product of one channel, in add_rpb and for the scores of na*d_qk).

Nominal counts, the default, take every window to be full, ``prod(kernel_size)`` tokens, as NATTEN
0.17.4 does. Exact ones leave out what causal masks forbid. (Windows at the borders are shifted, not
cut, so both agree without causal masks.) Additional tokens are counted in both. A backward of the
fused operation computes the scores again.

- ``torch.utils.flop_counter.FlopCounterMode`` counts these operations by itself, in FLOPs, forward
  and backward; ``FlopCounterMode(custom_mapping=flop_formulas(exact=True))`` counts exactly.
- fvcore's ``FlopCountAnalysis`` counts them, in MACs and the forward only, after
  ``add_natten_handle``; ``get_flops`` does it all. (It names packed items, whose sizes it cannot
  see, among the operations that it does not count.)
- ``fna_flop_count``, ``na_qk_flop_count``, ``na_av_flop_count`` count from shapes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import _call, _items, _lib, _ops
from ._errors import NattenError, NattenTypeError, from_status
from ._window import Bools, Ints, bools, ints

__all__ = [
    "add_natten_handle",
    "fna_flop_count",
    "flop_formulas",
    "get_flops",
    "has_fvcore",
    "na_av_flop_count",
    "na_qk_flop_count",
]

#: Whether fvcore is installed, which get_flops needs.
has_fvcore = importlib.util.find_spec("fvcore") is not None

Shape = Sequence[int]


# -------------------------------------------------------------------------------------------------
# pairs of queries and tokens


def _exact_pairs(queries: Shape, keys: Shape, parts: Sequence[Shape], tokens: int) -> int:
    problem = _lib.Problem()
    library = _lib.library
    library.natten_problem_init(problem, _lib.QK, _lib.F32, len(queries))
    fields = ("window", "stride", "dilation", "causal", "query_origin", "key_origin")
    for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
        axis = problem.axis[i]
        axis.query_extent, axis.key_extent = query, key
        for field, values in zip((*fields, "global_extent"), parts, strict=False):
            setattr(axis, field, int(values[i]))
    problem.head_dim = 1
    problem.additional_tokens = tokens
    if tokens:
        problem.roles |= 1 << _lib.ADDITIONAL_KEY
    library.natten_problem_pack(problem, _lib.HEADS_LAST)
    pairs = ctypes.c_int64()
    status = library.natten_pairs(problem, pairs)
    if status:
        raise from_status(status, library.natten_last_error().decode())
    return pairs.value


def _pairs(queries: Shape, keys: Shape, parts: Sequence[Shape], tokens: int, exact: bool) -> int:
    """For one head of one batch entry."""
    if exact:
        return _exact_pairs(queries, keys, parts, tokens)
    return math.prod(queries) * (math.prod(parts[0]) + tokens)


def _cost(op: int, wanted: set[int], head_dim: int, value_dim: int) -> int:
    """MACs for each pair."""
    keys = bool(wanted & {_lib.D_KEY, _lib.D_ADDITIONAL_KEY})
    values = bool(wanted & {_lib.D_VALUE, _lib.D_ADDITIONAL_VALUE})
    query, weights = _lib.D_QUERY in wanted, _lib.D_ATTN in wanted
    scores = wanted - {_lib.D_VALUE, _lib.D_ADDITIONAL_VALUE}
    return {
        _lib.FORWARD: head_dim + value_dim,
        _lib.BACKWARD: head_dim * (1 + query + keys) + value_dim * (bool(scores) + values),
        _lib.QK: head_dim,
        _lib.QK_BACKWARD: head_dim * (query + keys),
        _lib.AV: value_dim,
        _lib.AV_BACKWARD: value_dim * (weights + values),
    }[op]


# -------------------------------------------------------------------------------------------------
# operations as torch sees them


def _wanted(op: _call.Op, given: dict[str, Any]) -> set[int]:
    bits = given.get("wanted", (1 << len(op.outputs)) - 1)
    return {role for i, role in enumerate(op.outputs) if bits >> i & 1}


def _macs(op: _call.Op, given: dict[str, Any], exact: bool) -> int:
    """MACs of a call: shapes by the names of tensors, and its numbers."""
    first = op.order == _lib.HEADS_FIRST
    row = given.get("query") or given.get("attn")
    column = given.get("key") or given.get("value")
    assert row is not None and column is not None
    more = given.get("additional_keys") or given.get("additional_values")
    window = tuple(given["window"])
    extents = (row[2:-1], column[2:-1]) if first else (row[1:-2], column[1:-2])
    tokens = more[2 if first else 1] if more else 0
    heads = row[1] if first else row[-2]
    pairs = _pairs(*extents, _call.parts(window), tokens, exact)
    head_dim = row[-1] if given.get("query") else 0
    value_dim = given["value"][-1] if given.get("value") else 0
    cost = _cost(op.op, _wanted(op, given), head_dim, value_dim)
    return int(row[0] * heads * pairs * cost)


def _items_macs(op: _call.Op, given: dict[str, Any], exact: bool) -> int:
    """MACs of a call on packed items (see _items.py), whose sizes are in a tensor."""
    query, value = given["query"].shape, given["value"].shape
    pairs = 0
    for item in given["table"].reshape(given["table"].shape[0], -1, _items.COLUMNS).tolist():
        queries, keys, sizes, *others = zip(*item, strict=True)
        sizes = tuple(size or key for size, key in zip(sizes, keys, strict=True))
        if all(queries) and all(keys):
            pairs += _pairs(queries, keys, (sizes, *others), 0, exact)
    cost = _cost(op.op, _wanted(op, given), query[-1], value[-1])
    return int(query[0] * query[-2] * pairs * cost)


def _operations() -> dict[str, tuple[Any, _call.Op]]:
    """The ops whose problem is in their arguments."""
    names = {op.name: op for op in (*_call.OPS, *_call.MASKED_OPS)}
    names.update({_ops.TRACED[name]: op for name, op in names.items() if name in _ops.TRACED})
    return {name: (getattr(torch.ops.natten, name), op) for name, op in names.items()}


def _names(packet: Any) -> list[str]:
    return [argument.name for argument in packet.default._schema.arguments]


def _formula(packet: Any, op: _call.Op, exact: bool) -> Callable[..., int]:
    names = _names(packet)

    def formula(*arguments: Any, out_shape: Any = None, **named: Any) -> int:
        given = dict(zip(names, arguments, strict=False)) | named
        return 2 * _macs(op, given, exact)

    return formula


def _items_formula(packet: Any, op: _call.Op, exact: bool) -> Callable[..., int]:
    names = _names(packet)

    def formula(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        given = dict(zip(names, arguments, strict=False)) | named
        return 2 * _items_macs(op, given, exact)

    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def flop_formulas(exact: bool = False) -> dict[Any, Callable[..., int]]:
    """Formulas of all operations, for the argument ``custom_mapping`` of torch's
    ``FlopCounterMode``. (The nominal ones it has already.)"""
    formulas = {packet: _formula(packet, op, exact) for packet, op in _operations().values()}
    for name, op in (
        ("items", _call.NA),
        ("items_traced", _call.NA),
        ("items_backward", _call.NA_BACKWARD),
    ):
        packet = getattr(torch.ops.natten, name)
        formulas[packet] = _items_formula(packet, op, exact)
    return formulas


def _register() -> None:
    for packet, formula in flop_formulas().items():
        if packet not in flop_registry:
            register_flop_formula(packet, get_raw=hasattr(formula, "_get_raw"))(formula)


_register()


# -------------------------------------------------------------------------------------------------
# fvcore


def _constant(value: Any) -> Any:
    """A number, a list of numbers, or None, from a traced graph."""
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        return [_constant(item) for item in node.inputs()]
    return value.toIValue()


def _handle(packet: Any, op: _call.Op, exact: bool) -> Callable[..., int]:
    names = _names(packet)

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        given: dict[str, Any] = {}
        for name, value in zip(names, inputs, strict=False):
            tensor = value.isCompleteTensor()
            given[name] = value.type().sizes() if tensor else _constant(value)
        return _macs(op, given, exact)

    return handle


def add_natten_handle(flop_ctr: Any, exact: bool = False) -> Any:
    """Makes fvcore's ``FlopCountAnalysis`` count these operations, in MACs; returns it."""
    operations = _operations().items()
    handles = {f"natten::{name}": _handle(*operation, exact) for name, operation in operations}
    return flop_ctr.set_op_handle(**handles)


def get_flops(model: Any, input: Any, disable_warnings: bool = False, exact: bool = False) -> int:
    """What fvcore counts for the forward of a model, in MACs.

    Args:
        model: a ``torch.nn.Module``.
        input: its arguments, a tensor or a tuple.
        disable_warnings: say nothing of operations that are not counted.
        exact: leave out what causal masks forbid.

    Raises:
        ImportError: fvcore is not installed.
    """
    if not has_fvcore:
        raise ImportError("get_flops needs fvcore: pip install fvcore.")
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(model, input), exact)
    if disable_warnings:
        counter = counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    return int(counter.total())


# -------------------------------------------------------------------------------------------------
# from shapes


def _check_widths(shapes: dict[str, Shape], is_heads_last: bool) -> None:
    """Raises unless heads and channels go together as the functions themselves would have it."""
    at = -2 if is_heads_last else 1
    row, column, *_ = shapes.values()
    if any(min(shape[at], shape[-1]) < 1 or row[at] % shape[at] for shape in shapes.values()):
        raise NattenError(
            "Heads of queries must be a multiple of those of keys and values, and no size 0, got "
            f"{[tuple(shape) for shape in shapes.values()]}."
        )
    if "key" in shapes and row[-1] != column[-1]:
        raise NattenError(f"Queries have {row[-1]} channels, but keys have {column[-1]}.")
    if "value" in shapes and shapes["value"][at] != column[at]:
        raise NattenError(f"Keys have {column[at]} heads, but values {shapes['value'][at]}.")


def _from_shapes(
    op: _call.Op,
    shapes: dict[str, Shape],
    window: tuple[Ints, Ints, Ints | None, Bools | None],
    is_heads_last: bool,
    additional_tokens: int,
    exact: bool,
) -> int:
    for name, shape in shapes.items():
        if not isinstance(shape, (tuple, list)) or not all(isinstance(n, int) for n in shape):
            raise NattenTypeError(f"{name} must be a shape, a tuple of integers, got {shape!r}.")
    rank = len(next(iter(shapes.values()))) - 3
    for name, shape in shapes.items():
        if rank not in (1, 2, 3) or len(shape) != rank + 3:
            raise NattenError(
                f"{name} must have 4, 5 or 6 dimensions, as many as the others, got {tuple(shape)}."
            )
    batches = {shape[0] for shape in shapes.values()}
    maps = {tuple(shape[1:-2] if is_heads_last else shape[2:-1]) for shape in shapes.values()}
    if len(batches) > 1 or len(maps) > 1:
        raise NattenError(
            f"Batch and extents must agree, got {[tuple(shape) for shape in shapes.values()]}."
        )
    kernel_size, stride, dilation, is_causal = window
    _check_widths(shapes, is_heads_last)
    order = _lib.HEADS_LAST if is_heads_last else _lib.HEADS_FIRST
    given: dict[str, Any] = dict(shapes)
    given["window"] = (
        *ints("kernel_size", kernel_size, rank),
        *ints("stride", stride, rank),
        *ints("dilation", 1 if dilation is None else dilation, rank),
        *bools("is_causal", is_causal, rank),
    )
    if ints("additional_tokens", additional_tokens, 1) < (0,):
        raise NattenError(f"additional_tokens must be at least 0, got {additional_tokens}.")
    if additional_tokens:
        place = 1 if is_heads_last else 2
        given["additional_keys"] = [additional_tokens if i == place else 0 for i in range(4)]
    return _macs(_call.Op(op.name, op.op, order, op.inputs, op.outputs), given, exact)


def fna_flop_count(
    q_shape: Shape,
    k_shape: Shape,
    v_shape: Shape,
    kernel_size: Ints,
    dilation: Ints | None,
    is_causal: Bools | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    stride: Ints = 1,
    additional_tokens: int = 0,
    backward: bool = False,
    exact: bool = False,
) -> int:
    """FLOPs of na1d, na2d or na3d.

    Args:
        q_shape, k_shape, v_shape: ``[batch, *map, heads, channels]`` with is_heads_last, else
            ``[batch, heads, *map, channels]``. Keys and values may have fewer heads, and values
            other channels.
        kernel_size, dilation, is_causal, stride: as for the function.
        return_macs: count MACs, half as many.
        additional_tokens: how many each query attends to.
        backward: count the backward, all gradients wanted, instead of the forward.
        exact: leave out what causal masks forbid.

    Raises:
        NattenError: shapes that do not fit each other, or (exact) a window that does not fit.
    """
    op = _call.NA_BACKWARD if backward else _call.NA
    shapes = {"query": q_shape, "key": k_shape, "value": v_shape}
    window = (kernel_size, stride, dilation, is_causal)
    macs = _from_shapes(op, shapes, window, is_heads_last, additional_tokens, exact)
    return macs if return_macs else 2 * macs


def na_qk_flop_count(
    q_shape: Shape,
    k_shape: Shape,
    kernel_size: Ints,
    dilation: Ints | None,
    is_causal: Bools | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    stride: Ints = 1,
    additional_tokens: int = 0,
    backward: bool = False,
    exact: bool = False,
) -> int:
    """FLOPs of na1d_qk, na2d_qk or na3d_qk; arguments and errors as for :func:`fna_flop_count`."""
    op = _call.QK_BACKWARD if backward else _call.QK
    shapes = {"query": q_shape, "key": k_shape}
    window = (kernel_size, stride, dilation, is_causal)
    macs = _from_shapes(op, shapes, window, is_heads_last, additional_tokens, exact)
    return macs if return_macs else 2 * macs


def na_av_flop_count(
    a_shape: Shape,
    v_shape: Shape,
    kernel_size: Ints,
    dilation: Ints | None,
    is_causal: Bools | None,
    is_heads_last: bool,
    return_macs: bool = False,
    *,
    stride: Ints = 1,
    additional_tokens: int = 0,
    backward: bool = False,
    exact: bool = False,
) -> int:
    """FLOPs of na1d_av, na2d_av or na3d_av; a_shape is that of the weights. Arguments and errors as
    for :func:`fna_flop_count`."""
    op = _call.AV_BACKWARD if backward else _call.AV
    shapes = {"attn": a_shape, "value": v_shape}
    window = (kernel_size, stride, dilation, is_causal)
    macs = _from_shapes(op, shapes, window, is_heads_last, additional_tokens, exact)
    return macs if return_macs else 2 * macs
