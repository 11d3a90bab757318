# SPDX-License-Identifier: MIT
"""Items of different sizes in packed tensors: maps with windows, and sequences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dense
import natten.functional as F
from natten import NattenError, NattenTypeError
from natten.utils.varlen import generate_varlen_parameters
from problems import DTYPES, arranged, axes
from test_sequence import compare
from test_sequence import dense as dense_sequence


def packed(
    seed: int, tokens: tuple[int, int], sizes: tuple[int, ...], dtype: torch.dtype, layout: str
) -> list[Tensor]:
    heads, kv_heads, head_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (1, tokens[0], heads, head_dim),
        (1, tokens[1], kv_heads, head_dim),
        (1, tokens[1], kv_heads, value_dim),
    )
    return [
        arranged(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype), layout)
        for s in shapes
    ]


def dense_items(inputs: Any, items: Any, scale: float) -> tuple[Tensor, Tensor]:
    outs, logs, at = [], [], 0
    for item in items:
        extents = [axis.extent for axis in item]
        part = slice(at, at + math.prod(extents))
        at = part.stop
        maps = [t[:, part].unflatten(1, extents) for t in inputs]
        out, lse = dense.attention(*maps, list(item), scale)
        outs.append(out.flatten(1, len(item)))
        logs.append(lse.flatten(1, len(item)))
    return torch.cat(outs, 1), torch.cat(logs, 1)


@st.composite
def lists_of_items(draw: Any) -> list[tuple[dense.Axis, ...]]:
    rank = draw(st.integers(1, 3))
    largest, dilated = (7, 4, 2)[rank - 1], (3, 2, 2)[rank - 1]
    items = []
    for _ in range(draw(st.integers(1, 3))):
        item = tuple(draw(axes(largest, dilated)) for _ in range(rank))
        items += [item] * draw(st.integers(1, 3))
    return items


LAYOUTS = st.sampled_from(("contiguous", "heads first", "sliced", "scattered channels"))


@settings(max_examples=15)
@given(
    lists_of_items(),
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 17), st.integers(1, 17)),
    st.sampled_from(DTYPES),
    LAYOUTS,
)
def test_maps(items: Any, seed: int, sizes: Any, dtype: torch.dtype, layout: str) -> None:
    groups, kv_heads, *dims = sizes
    tokens = sum(math.prod(axis.extent for axis in item) for item in items)
    made = packed(seed, (tokens, tokens), (groups * kv_heads, kv_heads, *dims), dtype, layout)
    inputs = [t.requires_grad_() for t in made]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    ours = F.neighborhood_attention_varlen(
        *inputs,
        token_layouts=[tuple(axis.extent for axis in item) for item in items],
        kernel_size_list=[tuple(axis.kernel_size for axis in item) for item in items],
        stride_list=[tuple(axis.stride for axis in item) for item in items],
        dilation_list=[tuple(axis.dilation for axis in item) for item in items],
        is_causal_list=[tuple(axis.causal for axis in item) for item in items],
        scale=0.6,
        return_lse=True,
    )
    compare(ours, dense_items(exact_inputs, items, 0.6), inputs, exact_inputs)


def dense_sequences(
    inputs: Any, queries: list[int], keys: list[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    pairs = zip(inputs[0].split(queries, 1), *(t.split(keys, 1) for t in inputs[1:]), strict=True)
    results = [dense_sequence(q, k, v, causal, scale) for q, k, v in pairs]
    return torch.cat([o for o, _ in results], 1), torch.cat([lse for _, lse in results], 1)


LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5)


@given(
    LENGTHS,
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 17), st.integers(1, 17)),
    st.booleans(),
    st.booleans(),
    st.sampled_from(DTYPES),
    LAYOUTS,
)
def test_sequences(
    lengths: Any,
    seed: int,
    sizes: Any,
    causal: bool,
    cumulative: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    groups, kv_heads, *dims = sizes
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    made = packed(
        seed, (sum(queries), sum(keys)), (groups * kv_heads, kv_heads, *dims), dtype, layout
    )
    inputs = [t.requires_grad_() for t in made]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    each = [torch.tensor(x, dtype=torch.int32) for x in (queries, keys)]
    if cumulative:
        names = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")
        values = generate_varlen_parameters(*inputs, *each)
        assert values[2:] == (max(queries), max(keys))
        more: Any = dict(zip(names, values, strict=True))
    else:
        more = {"seqlens_Q": each[0], "seqlens_KV": each[1]}
    ours = F.attention(*inputs, is_causal=causal, scale=0.6, return_lse=True, **more)
    exact = dense_sequences(exact_inputs, queries, keys, causal, 0.6)
    compare(ours, exact, inputs, exact_inputs)


LAYOUT = [(2, 3), (2, 2), (2, 2)]


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.requires_grad_() for t in packed(7, (14, 14), (2, 1, 1, 2), dtype, "contiguous")]


def two(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return F.neighborhood_attention_varlen(q, k, v, LAYOUT, 2, is_causal=True, return_lse=True)


@pytest.mark.usefixtures("one_thread")
def test_derivatives() -> None:
    inputs = tensors()
    torch.autograd.gradcheck(two, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(two, inputs)


@pytest.mark.usefixtures("one_thread")
def test_derivatives_of_sequences() -> None:
    inputs = packed(8, (5, 6), (2, 1, 2, 3), torch.float64, "contiguous")
    inputs = [t.requires_grad_() for t in inputs]
    lengths = (torch.tensor([2, 0, 3]), torch.tensor([1, 3, 2]))

    def function(*tensors: Tensor) -> Any:
        return F.attention(*tensors, False, None, *lengths, return_lse=True)

    torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(function, inputs)


def test_function_transforms() -> None:
    inputs = [t.detach() for t in tensors()]
    grads = torch.autograd.grad(two(*(t.requires_grad_() for t in inputs))[0].sum(), inputs)
    inputs = [t.detach() for t in inputs]
    theirs = torch.func.grad(lambda q, k, v: two(q, k, v)[0].sum(), (0, 1, 2))(*inputs)
    for one, other in zip(grads, theirs, strict=True):
        torch.testing.assert_close(one, other)
    stacked = [torch.stack([t, 2 * t]) for t in inputs]
    for i, out in enumerate(torch.vmap(two)(*stacked)[0]):
        torch.testing.assert_close(out, two(*(t[i] for t in stacked))[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    inputs = tensors(torch.float32)
    compiled = torch.compile(two, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    ours, plain = compiled(*inputs), two(*inputs)
    weights = [torch.randn_like(t) for t in plain]
    for one, other in zip(
        (*ours, *torch.autograd.grad(ours, inputs, weights)),
        (*plain, *torch.autograd.grad(plain, inputs, weights)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_compiled_sequences() -> None:
    inputs = tensors(torch.float32)
    lengths = torch.tensor([5, 0, 9]), torch.tensor([0, 6, 8])
    sums = [torch.nn.functional.pad(t.cumsum(0), (1, 0)) for t in lengths]

    def function(*t: Tensor) -> Any:
        return F.attention(
            *t[:3], is_causal=True, cumulative_seqlen_Q=t[3], cumulative_seqlen_KV=t[4]
        )

    ours = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs, *sums)
    torch.testing.assert_close(ours, F.attention(*inputs, True, None, *lengths))


def test_opcheck() -> None:
    table = torch.tensor(
        [[3, 3, 2, 1, 1, 1, 2, 2, 2, 1, 1, 0], [2, 2, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]]
    )
    inputs = packed(9, (8, 8), (2, 1, 4, 3), torch.float32, "contiguous")
    inputs = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.natten.items_traced.default, (*inputs, table, 0.5))


def test_tables_of_other_integers() -> None:
    x = torch.randn(1, 20, 2, 8)
    row = [[20, 20, 3, 1, 1, 0]]
    narrow, wide = (
        torch.ops.natten.items(x, x, x, torch.tensor(row, dtype=dtype), 1.0)
        for dtype in (torch.int32, torch.int64)
    )
    assert torch.equal(narrow[0], wide[0])


def test_bits_do_not_depend_on_threads_or_neighbours() -> None:
    sizes = [(5, 9), (12, 7), (3, 3), (30, 20), (8, 8)] * 3
    tokens = sum(a * b for a, b in sizes)
    q, k, v = packed(10, (tokens, tokens), (2, 2, 16, 16), torch.float32, "contiguous")
    q.requires_grad_()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = F.neighborhood_attention_varlen(q, k, v, sizes, 3)
        results.append((out, *torch.autograd.grad(out.square().sum(), q)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    last = slice(tokens - 64, tokens)
    alone = F.na2d(*(t[:, last].unflatten(1, (8, 8)) for t in (q, k, v)), 3)
    assert torch.equal(results[0][0][:, last], alone.flatten(1, 2))


def test_nothing_outside_an_item_is_read() -> None:
    """Each item between two that are NaN."""
    q, k, v = packed(11, (36, 36), (1, 1, 8, 8), torch.float32, "contiguous")
    for t in (q, k, v):
        t[:, :12] = torch.nan
        t[:, 24:] = torch.nan
    out = F.neighborhood_attention_varlen(q, k, v, [(4, 3), (3, 4), (2, 6)], 2)
    assert out[:, 12:24].isfinite().all()


def test_tables_are_kept_for_whoever_comes_next() -> None:
    layouts = [(3, 5), (4, 2)]
    q = torch.randn(1, 23, 2, 4)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert F.neighborhood_attention_varlen(fake, fake, fake, layouts, 2).shape == q.shape
    with torch.inference_mode():
        first = F.neighborhood_attention_varlen(q, q, q, layouts, 2)
    out = F.neighborhood_attention_varlen(q.requires_grad_(), q, q, layouts, 2)
    out.sum().backward()
    assert torch.equal(out, first)


def test_tables_are_found_by_what_is_in_them() -> None:
    """1 and True are equal, and tensors may change."""
    q, size = torch.randn(1, 23, 2, 4), torch.tensor(2)
    numbers = [(np.int64(3), 5), (4, np.int64(2))]
    call = functools.partial(F.neighborhood_attention_varlen, q, q, q, [(3, 5), (4, 2)])
    two, one = call(2), call(1)
    assert torch.equal(call(size), two)
    size.fill_(1)
    assert torch.equal(call(size), one)
    assert torch.equal(F.neighborhood_attention_varlen(q, q, q, numbers, 2), two)
    one_axis = functools.partial(F.neighborhood_attention_varlen, q, q, q)
    assert torch.equal(one_axis([np.int64(11), 12], 2), one_axis([11, 12], 2))
    call(2, is_causal=True)
    for wrong in ({"is_causal": 1}, {"kernel_size": True}, {"stride": True}):
        with pytest.raises(NattenTypeError):
            call(**{"kernel_size": 2, **wrong})


def test_no_items_and_empty_ones() -> None:
    q = torch.zeros(1, 0, 2, 4)
    assert F.neighborhood_attention_varlen(q, q, q, [], 3).shape == (1, 0, 2, 4)
    assert F.neighborhood_attention_varlen(q, q, q, [(0, 5)], 3).shape == (1, 0, 2, 4)
    q = torch.randn(1, 6, 2, 4)
    out = F.neighborhood_attention_varlen(q, q, q, [0, 6, 0], 3)
    torch.testing.assert_close(out, F.na1d(q, q, q, 3))
    lengths = torch.zeros(0, dtype=torch.int32)
    assert F.attention(q[:, :0], q[:, :0], q[:, :0], False, None, lengths, lengths).numel() == 0
    assert generate_varlen_parameters(q, q, q) == (None, None, 0, 0)


def test_autocast() -> None:
    q, k, v = tensors(torch.float32)
    k = k.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = two(q, k, v)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


X = torch.zeros(1, 20, 2, 4)
I32 = torch.tensor([8, 12], dtype=torch.int32)


def varlen(layouts: Any = ((2, 4), (3, 4)), kernel_size: Any = 2, **more: Any) -> Any:
    return F.neighborhood_attention_varlen(X, X, X, layouts, kernel_size, **more)


def sequences(*lengths: Any, x: Tensor = X, **more: Any) -> Any:
    return F.attention(x, x, x, False, None, *lengths, **more)


TABLE: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: varlen([(2, 4)]), NattenError, "query has 20 tokens, but the items have 8 together."),
    (lambda: varlen([(2, 4), 12]), NattenError, "item 0 has 2 and item 1 has extents 12."),
    (lambda: varlen([12, (2, 4)]), NattenError, "item 0 has 1 and item 1 has extents (2, 4)."),
    (lambda: varlen(5), NattenTypeError, "token_layouts must be a list with the extents of each"),
    (lambda: varlen([(2, 4.0), (3, 4)]), NattenTypeError, "token_layouts[0] must be an integer or"),
    (lambda: varlen((2.0, 3.0)), NattenTypeError, "token_layouts[0] must be an integer or"),
    (lambda: varlen([10**30]), NattenError, "token_layouts[0] must be less than 2^62"),
    (lambda: varlen([(1 << 40, 1 << 40)]), NattenError, "Extents must be at least 0 and not that"),
    (lambda: varlen(stride_list={1}), NattenTypeError, "stride_list must be a list, got set."),
    (lambda: varlen(return_lse=None), NattenTypeError, "return_lse must be a bool, got None."),
    (lambda: varlen([(1, 1, 1, 20)]), NattenError, "Items must have 1, 2 or 3 axes"),
    (lambda: varlen([(-2, -10)]), NattenError, "Item 0: extents must be at least 0 and fit into"),
    (
        lambda: varlen(kernel_size=3),
        NattenError,
        "Item 0: kernel_size times dilation must be at most the extent, got kernel_size 3, dilation"
        " 1 and extent 2 for axis 0.",
    ),
    (lambda: varlen(kernel_size=0), NattenError, "Item 0: kernel_size must be at least 1, got (0"),
    (lambda: varlen(kernel_size_list=[2, (2, -1)]), NattenError, "Item 1: kernel_size must be at"),
    (lambda: varlen(kernel_size_list=[2, 4]), NattenError, "Item 1: kernel_size times dilation"),
    (lambda: varlen(stride_list=[1, 3]), NattenError, "Item 1: stride"),
    (lambda: varlen(dilation_list=[1]), NattenError, "an entry for each of the 2 items, got 1."),
    (lambda: varlen(is_causal_list=[1, 0]), NattenTypeError, "is_causal_list[0] must be a bool"),
    (lambda: varlen(kernel_size=None), NattenTypeError, "kernel_size or kernel_size_list must be"),
    (lambda: varlen(backend="fast"), NotImplementedError, "There is no backend 'fast'"),
    (
        lambda: F.neighborhood_attention_varlen(X, X.double(), X, [20], 3),
        NattenError,
        "query is torch.float32 on cpu, but key is torch.float64 on cpu.",
    ),
    (
        lambda: F.neighborhood_attention_varlen(*(X.reshape(2, 10, 2, 4),) * 3, [20], 3),
        NattenError,
        "in a batch of 1, but query has batch 2.",
    ),
    (
        lambda: F.neighborhood_attention_varlen(
            *(torch.nested.nested_tensor([X[0]]),) * 3, [20], 3
        ),
        NotImplementedError,
        "query is a nested tensor",
    ),
    (lambda: sequences(I32), NattenTypeError, "but seqlens_KV is missing."),
    (
        lambda: sequences(I32, I32, dropout_p=0.1),
        NotImplementedError,
        "neither dropout nor key_pad",
    ),
    (lambda: sequences(I32, [8, 12]), NattenTypeError, "but seqlens_KV is list."),
    (lambda: sequences(I32, I32[:1]), NattenError, "must have as many entries each"),
    (lambda: sequences(I32, I32.float()), NattenError, "be int32 or int64, got 1 and torch.float"),
    (lambda: sequences(I32, I32, I32, I32), NattenError, "or the cumulative lengths, not both."),
    (lambda: sequences(None, None, I32, I32), NattenError, "cumulative_seqlen_Q must begin with 0"),
    (lambda: sequences(I32, I32, max_seqlen_Q=1.0), NattenTypeError, "must be an integer, got 1.0"),
    (lambda: sequences(I32, I32 - 1), NattenError, "key has 20 tokens, but the items have 18 tog"),
    (lambda: sequences(I32 + 9, I32), NattenError, "Item 1: extents must be at least 0 and fit"),
    (lambda: sequences(I32, I32, x=X.repeat(2, 1, 1, 1)), NattenError, "in a batch of 1, but que"),
    (lambda: generate_varlen_parameters(X, X, X, I32), NattenTypeError, "seqlens_KV is missing."),
    (
        lambda: generate_varlen_parameters(X, X, X, I32, I32 - 1),
        NattenError,
        "seqlens_KV must be at least 0 and add up to the 20 tokens, got a sum of 18 and a least",
    ),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[2][:40])
def test_errors(case: tuple[Callable[[], Any], type[Exception], str]) -> None:
    call, kind, text = case
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value)
