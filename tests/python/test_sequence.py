# SPDX-License-Identifier: MIT
"""attention, merge_attentions, neighborhood_attention_generic and the hints they take."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import natten.functional as F
from natten import NattenError, NattenTypeError
from natten._knobs import KernelSchedule
from natten._merge import merge_with_additional
from natten.utils.varlen import generate_varlen_parameters
from problems import DTYPES, arranged, assert_close


def dense(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention as it is written in books, (out, lse). Queries that see no key give 0 and -inf."""
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * scale
    if causal:
        seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("bqhk,bkhe->bqhe", scores.softmax(-1), value), scores.logsumexp(-1)


def tensors(
    seed: int, sizes: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous"
) -> list[Tensor]:
    batch, queries, keys, heads, kv_heads, head_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, queries, heads, head_dim),
        (batch, keys, kv_heads, head_dim),
        (batch, keys, kv_heads, value_dim),
    )
    return [
        arranged(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype), layout)
        for s in shapes
    ]


def compare(
    ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], inputs: Any, exact_inputs: Any
) -> None:
    """Values, and gradients for random weights of every result."""
    dtype = ours[0].dtype
    for name, mine, true in zip(("out", "lse"), ours, exact, strict=True):
        assert_close(name, mine, true, dtype)
    weights = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in ours]
    # Where a LSE is -inf it is no function of anything.
    weights[1] = weights[1].masked_fill(~ours[1].isfinite(), 0)
    mine = torch.autograd.grad(ours, inputs, weights, allow_unused=True)
    exact = (exact[0], exact[1].masked_fill(~exact[1].isfinite(), 0))
    true = torch.autograd.grad(exact, exact_inputs, [w.double() for w in weights])
    for i, (a, b) in enumerate(zip(mine, true, strict=True)):
        assert_close(f"gradient {i}", torch.zeros_like(b) if a is None else a, b, dtype, more=4)


SIZES = st.tuples(
    st.integers(1, 2), st.integers(0, 20), st.integers(0, 20), st.integers(1, 3), st.integers(1, 2)
)


@given(
    st.integers(0, 2**31),
    SIZES,
    st.integers(1, 20),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from(("contiguous", "heads first", "sliced", "scattered channels")),
)
def test_attention(
    seed: int,
    sizes: tuple[int, ...],
    head_dim: int,
    value_dim: int,
    causal: bool,
    dtype: torch.dtype,
    layout: str,
) -> None:
    batch, queries, keys, groups, kv_heads = sizes
    shape = (batch, queries, keys, groups * kv_heads, kv_heads, head_dim, value_dim)
    inputs = [t.requires_grad_() for t in tensors(seed, shape, dtype, layout)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    ours = F.attention(*inputs, is_causal=causal, scale=0.6, return_lse=True)
    compare(ours, dense(*exact_inputs, causal, 0.6), inputs, exact_inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_agrees_with_torch(causal: bool) -> None:
    q, k, v = tensors(1, (2, 9, 14, 4, 2, 8, 8), torch.float32)
    out = F.attention(q, k, v, causal)
    first = [t.transpose(1, 2) for t in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *first, is_causal=causal, enable_gqa=True
    )
    assert_close("out", out, theirs.transpose(1, 2).double(), torch.float32)


def test_attention_derivatives() -> None:
    inputs = [t.requires_grad_() for t in tensors(2, (1, 3, 4, 2, 1, 2, 3), torch.float64)]

    def function(*tensors: Tensor) -> Any:
        return F.attention(*tensors, is_causal=True, return_lse=True)

    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_compiled_attention_is_one_graph_for_all_lengths(causal: bool) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch._dynamo.reset()
    function = torch.compile(F.attention, backend=backend, fullgraph=True)
    for queries in (7, 11, 16, 20):
        packed = torch.randn(2, queries, 3, 2, 8, requires_grad=True)
        q, k, v = packed[:, :5], packed[:, : queries - 1], packed[:, : queries - 1]
        q, k, v = (t[:, :, i] for i, t in enumerate((q, k, v)))
        weights = torch.randn(2, 5, 2, 8)
        ours, plain = (f(q, k, v, causal) for f in (function, F.attention))
        torch.testing.assert_close(ours, plain)
        one, other = (torch.autograd.grad(out, packed, weights)[0] for out in (ours, plain))
        torch.testing.assert_close(one, other)
    assert len(graphs) <= 2


def test_compiled_attention_without_keys() -> None:
    q, k, v = tensors(6, (2, 5, 0, 2, 1, 4, 3), torch.float32)
    function = torch.compile(F.attention, backend="aot_eager", fullgraph=True)
    out, lse = function(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(2, 5, 2, 3))
    assert torch.equal(lse, torch.full((2, 5, 2), -torch.inf))


def test_attention_with_a_mask_of_keys_and_dropout() -> None:
    q, k, v = tensors(12, (2, 5, 9, 2, 1, 4, 3), torch.float64)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 4:] = mask[1, :3] = True
    out = F.attention(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(out[:1], F.attention(q[:1], k[:1, :4], v[:1, :4]))
    torch.testing.assert_close(out[1:], F.attention(q[1:], k[1:, 3:], v[1:, 3:]))
    ones = torch.ones_like(v)
    kept = [
        F.attention(q, k, ones, dropout_p=0.5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert 0.5 < kept[0].mean() < 1.5


def test_attention_over_a_mapped_axis() -> None:
    q, k, v = tensors(3, (3, 5, 7, 2, 1, 4, 4), torch.float64)
    one = torch.vmap(lambda q, k, v: F.attention(q[None], k[None], v[None])[0])(q, k, v)
    torch.testing.assert_close(one, F.attention(q, k, v))


def test_attention_of_nested_tensors() -> None:
    items = [tensors(i, (1, 3 + i, 5 - i, 2, 1, 4, 4), torch.float32) for i in range(3)]
    nested = [torch.nested.nested_tensor([item[i][0] for item in items]) for i in range(3)]
    for one, item in zip(F.attention(*nested).unbind(), items, strict=True):
        torch.testing.assert_close(one, F.attention(*item)[0])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_attention_to_all_keys(count: int, dtype: torch.dtype) -> None:
    q, *_ = tensors(4, (2, 6, 1, 4, 2, 5, 3), dtype)
    parts = [tensors(5 + i, (2, 1, 2 + i, 4, 2, 5, 3), dtype)[1:] for i in range(count)]
    inputs = [q, *(t for part in parts for t in part)]
    inputs = [t.requires_grad_() for t in inputs]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    results = [F.attention(q, k, v, scale=0.6, return_lse=True) for k, v in parts]
    before = [(out.detach().clone(), lse.detach().clone()) for out, lse in results]
    ours = F.merge_attentions([out for out, _ in results], [lse for _, lse in results])
    keys, values = (torch.cat(exact_inputs[i::2], 1) for i in (1, 2))
    exact = dense(exact_inputs[0], keys, values, False, 0.6)
    compare(ours, exact, inputs, exact_inputs)
    for (out, lse), (out_before, lse_before) in zip(results, before, strict=True):
        assert torch.equal(out, out_before)
        assert torch.equal(lse, lse_before)


def test_merge_gradients() -> None:
    shape = (1, 3, 2, 2)
    outputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    logs = [torch.randn(shape[:-1], dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def function(*tensors: Tensor) -> Any:
        return F.merge_attentions(tensors[:3], tensors[3:])

    torch.autograd.gradcheck(function, (*outputs, *logs), check_forward_ad=True)
    torch.autograd.gradgradcheck(function, (*outputs, *logs))


def test_merge_with_sets_without_keys() -> None:
    outputs = [torch.randn(1, 4, 1, 3) for _ in range(2)]
    logs = [torch.randn(1, 4, 1) for _ in range(2)]
    logs[0][0, :2] = -torch.inf
    logs[1][0, 1:3] = -torch.inf
    logs = [lse.requires_grad_() for lse in logs]
    out, lse = F.merge_attentions(outputs, logs)
    assert torch.equal(out[0, 0], outputs[1][0, 0])
    assert torch.equal(out[0, 2], outputs[0][0, 2])
    assert not out[0, 1].any()
    assert lse[0, 1] == -torch.inf
    grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), logs)
    assert all(grad.isfinite().all() for grad in grads)


def test_merge_compiles() -> None:
    parts = [(torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2)) for _ in range(3)]
    lists = [list(part) for part in zip(*parts, strict=True)]
    compiled = torch.compile(F.merge_attentions, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*lists), F.merge_attentions(*lists), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_generic(rank: int) -> None:
    function = (F.na1d, F.na2d, F.na3d)[rank - 1]
    q, k, v = (torch.randn(1, *(6, 5, 4)[:rank], 2, 4) for _ in range(3))
    more = torch.randn(1, 2, 2, 4)
    ours = F.neighborhood_attention_generic(
        q, k, v, 2, 2, 1, True, 0.3, more, more, return_lse=True, backend="cutlass-fna"
    )
    theirs = function(
        *(q, k, v, 2, 1, True),
        scale=0.3,
        additional_keys=more,
        additional_values=more,
        stride=2,
        return_lse=True,
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_cosmos_call() -> None:
    q = torch.randn(1, 4, 4, 8, 1, 16, dtype=torch.bfloat16)
    hints = {
        "q_tile_shape": (4, 4, 8),
        "kv_tile_shape": (4, 4, 8),
        "backward_q_tile_shape": (4, 4, 4),
        "backward_kv_tile_shape": (4, 4, 8),
    }
    window = {"kernel_size": (4, 2, 6), "stride": (1, 2, 3), "dilation": 1, "is_causal": False}
    plain = F.neighborhood_attention_generic(query=q, key=q, value=q, **window)
    for backend, more in (
        ("hopper-fna", {"run_persistent_kernel": True, "kernel_schedule": "coop"}),
        ("cutlass-fna", {"backward_use_pt_reduction": False, "backward_kv_splits": (1, 2, 1)}),
        ("blackwell-fna", {"kernel_schedule": KernelSchedule.NonPersistent}),
        ("flex-fna", {"torch_compile": False, "attention_kwargs": {"backend": "flex-fmha"}}),
    ):
        out = F.neighborhood_attention_generic(
            query=q, key=q, value=q, **window, backend=backend, **hints, **more
        )
        assert torch.equal(out, plain)


X = torch.zeros(1, 6, 2, 4)
M = torch.zeros(1, 6, 6, 2, 4)


def na(**knobs: Any) -> Any:
    return F.na2d(M, M, M, 3, **knobs)


TABLE: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: na(backend="fast"), NotImplementedError, "There is no backend 'fast'"),
    (lambda: na(backend=3), NattenTypeError, "backend must be a string, got 3."),
    (lambda: na(q_tile_shape=(8, 8)), NattenError, "q_tile_shape is given, kv_tile_shape is not."),
    (
        lambda: na(q_tile_shape=(8,), kv_tile_shape=(8,)),
        NattenError,
        "q_tile_shape must have 2 entries, one for each axis, got 1: (8,).",
    ),
    (
        lambda: na(q_tile_shape=(8, 0), kv_tile_shape=(8, 8)),
        NattenError,
        "q_tile_shape must be at least 1, got 0 on axis 1.",
    ),
    (lambda: na(q_tile_shape=64), NattenTypeError, "must be a tuple of 2 integers, got 64."),
    (lambda: na(backward_kv_splits=0), NattenError, "backward_kv_splits must be at least 1, got 0"),
    (lambda: na(kernel_schedule="fast"), NattenError, "one of non, coop, pp, got 'fast'."),
    (lambda: na(kernel_schedule=1), NattenTypeError, "a string or a KernelSchedule, got 1."),
    (lambda: na(torch_compile=1), NattenTypeError, "torch_compile must be a bool, got 1."),
    (lambda: na(attention_kwargs=1), NattenTypeError, "attention_kwargs must be a dictionary"),
    (lambda: na(q_tile_size=64, kv_tile_size=64), TypeError, "unexpected keyword argument"),
    (
        lambda: F.neighborhood_attention_generic(X[0], X[0], X[0], 3),
        NattenError,
        "1, 2 or 3 axes in the map, got 3 dimensions.",
    ),
    (lambda: F.neighborhood_attention_generic(3, X, X, 3), NattenTypeError, "query must be a ten"),
    (lambda: F.attention(X, M, M), NattenError, "key must be [batch, tokens, heads, head_dim]"),
    (lambda: F.attention(X, X, X[:, :5]), NattenError, "key and value must have the same batch"),
    (lambda: F.attention(X, X[:0], X[:0]), NattenError, "query has batch 1, but key has 0."),
    (lambda: F.attention(X, X[..., :3], X), NattenError, "query has head_dim 4, but key has 3."),
    (
        lambda: F.attention(X, X.repeat(1, 1, 2, 1)[:, :, :3], X.repeat(1, 1, 2, 1)[:, :, :3]),
        NattenError,
        "query has 2 heads, which is no multiple of the 3 of key.",
    ),
    (lambda: F.attention(X, X, X, 1), NattenTypeError, "is_causal must be a bool, got 1."),
    (lambda: F.attention(X, X.double(), X), NattenError, "key is float64, but query is float32."),
    (lambda: F.attention(X, X, X, dropout_p=2), NattenError, "dropout_p must be between 0 and 1"),
    (
        lambda: F.attention(X, X, X, key_padding_mask=torch.zeros(1, 5)),
        NattenError,
        "key_padding_mask",
    ),
    (lambda: F.attention(X, X, X, q_tile_size=64), NattenError, "kv_tile_size is not."),
    (lambda: F.attention(X, X, X, q_tile_shape=(1,)), TypeError, "unexpected keyword argument"),
    (lambda: F.attention(X.to_sparse(), X, X), NotImplementedError, "query is a torch.sparse_coo"),
    (lambda: F.merge_attentions([X], [X[..., 0]]), NattenError, "at least two outputs"),
    (lambda: F.merge_attentions([X, X], [X[..., 0]]), NattenError, "got 2 and 1."),
    (lambda: F.merge_attentions(X, X), NattenTypeError, "outputs must be a list of tensors"),
    (
        lambda: F.merge_attentions([X, X[:, :5]], [X[..., 0]] * 2),
        NattenError,
        "outputs[1] is (1, 5, 2, 4) of torch.float32, outputs[0] is (1, 6, 2, 4)",
    ),
    (
        lambda: F.merge_attentions([X, X], [X[..., 0], X[0, ..., 0]]),
        NattenError,
        "lse_tensors[1] must be (1, 6, 2), as the outputs without their channels, got (6, 2).",
    ),
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case[2][:40])
def test_errors(case: tuple[Callable[[], Any], type[Exception], str]) -> None:
    call, kind, text = case
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value)


def test_merge_of_017() -> None:
    q, k, v = (torch.randn(2, 4, 5, 2, 8) for _ in range(3))
    more = [torch.randn(2, 3, 2, 8) for _ in range(2)]
    out, lse = F.na2d(q, k, v, 3, return_lse=True)
    extra, extra_lse = F.attention(q.flatten(1, 2), *more, return_lse=True)
    merged = merge_with_additional(out, extra, lse, extra_lse.movedim(-1, 1))
    again = merge_with_additional(out, extra.view_as(out), lse, extra_lse.view_as(lse))
    assert torch.equal(merged, again)
    whole = F.na2d(q, k, v, 3, additional_keys=more[0], additional_values=more[1])
    torch.testing.assert_close(merged, whole)
    with pytest.raises(NattenError, match="of the same queries"):
        merge_with_additional(out, extra[:, :7], lse, extra_lse.movedim(-1, 1))


@pytest.mark.parametrize("empty", ("query", "key"))
def test_errors_without_tokens(empty: str) -> None:
    """Where there is nothing to compute, what is wrong is wrong nevertheless."""
    x = torch.randn(1, 5, 2, 4)
    q, k = (x[:, :0], x) if empty == "query" else (x, x[:, :0])
    cases: list[tuple[Any, str]] = [
        (lambda: F.attention(q.int(), k.int(), k.int()), "query must be float32, float64"),
        (lambda: F.attention(q, k.double(), k.double()), "but key is torch.float64"),
        (lambda: F.attention(q, k, k.to("meta")), "but value is torch.float32 on meta"),
        (lambda: F.attention(q, k, k, dropout_p=2), "dropout_p must be between 0 and 1, got 2."),
        (
            lambda: F.attention(q, k, k, key_padding_mask=torch.zeros(1, 9)),
            f"is for keys of (1, 9, 2) (batch, map, heads), but key has (1, {k.shape[1]}, 2).",
        ),
    ]
    for call, text in cases:
        with pytest.raises(NattenError, match=re.escape(text)):
            call()


def test_lengths_on_meta() -> None:
    """Shapes do not depend on them, numbers do."""
    x = torch.randn(1, 10, 2, 8)
    meta, lengths = x.to("meta").requires_grad_(), torch.tensor([4, 6]).to("meta")
    sums = torch.tensor([0, 4, 10]).to("meta")
    out, lse = F.attention(
        meta, meta, meta[..., :3], seqlens_Q=lengths, seqlens_KV=lengths, return_lse=True
    )
    assert out.is_meta and out.shape == (1, 10, 2, 3) and lse.shape == (1, 10, 2)
    (grad,) = torch.autograd.grad(out.sum(), meta, retain_graph=True)
    assert grad.is_meta and grad.shape == meta.shape
    again = F.attention(meta, meta, meta, cumulative_seqlen_Q=sums, cumulative_seqlen_KV=sums)
    assert again.is_meta and again.shape == meta.shape
    with pytest.raises(NattenError, match="on meta, where there are no numbers, but query is on c"):
        F.attention(x, x, x, cumulative_seqlen_Q=sums, cumulative_seqlen_KV=sums)
    with pytest.raises(NattenError, match="seqlens_Q is on meta, where there are no numbers"):
        generate_varlen_parameters(meta, meta, meta, lengths, lengths)
    with pytest.raises(NattenError, match="second derivatives go item by item, but the lengths"):
        torch.autograd.grad(out.sum(), meta, create_graph=True)
