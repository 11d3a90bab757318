# SPDX-License-Identifier: MIT
"""Values and gradients of every operation against attention written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import dense
import natten.functional as F
from problems import DTYPES, Problem, arranged, assert_close, problems

FUSED = {1: F.na1d, 2: F.na2d, 3: F.na3d}
QK = {1: F.na1d_qk, 2: F.na2d_qk, 3: F.na3d_qk}
AV = {1: F.na1d_av, 2: F.na2d_av, 3: F.na3d_av}


def exact_inputs(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {
        name: None if t is None else t.detach().double().requires_grad_()
        for name, t in tensors.items()
    }


def grads(outputs: Any, weights: Any, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    given_ = {name: t for name, t in inputs.items() if t is not None}
    results = torch.autograd.grad(outputs, list(given_.values()), weights)
    return dict(zip(given_, results, strict=True))


def check_fused(p: Problem, layout_of_grad: str = "contiguous", **extra: Any) -> None:
    ours = {n: None if t is None else t.requires_grad_() for n, t in p.tensors().items()}
    exact = exact_inputs(ours)
    scale = 0.6
    out, lse = FUSED[p.rank](**ours, **p.window, **extra, scale=scale, return_lse=True)
    out_, lse_ = dense.attention(**exact, axes=list(p.axes), scale=scale)
    assert out.dtype == p.dtype
    assert lse.dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)
    assert_close("out", out, out_, p.dtype)
    assert_close("lse", lse, lse_, p.dtype)
    d_out = torch.randn(out.shape, dtype=torch.float64).to(p.dtype)
    d_lse = torch.randn(lse.shape, dtype=torch.float64).to(lse.dtype)
    mine = grads((out, lse), (arranged(d_out, layout_of_grad), d_lse), ours)
    true = grads((out_, lse_), (d_out.double(), d_lse.double()), exact)
    for name, grad in mine.items():
        assert grad.dtype == p.dtype
        assert_close(f"d_{name}", grad, true[name], p.dtype, more=4)


def check_unfused(p: Problem, layout_of_grad: str = "contiguous", **extra: Any) -> None:
    def first(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.movedim(-2, 1)

    t = {n: None if t is None else t.requires_grad_() for n, t in p.tensors().items()}
    exact = exact_inputs(t)
    attn = QK[p.rank](
        first(t["query"]),
        first(t["key"]),
        additional_keys=first(t["additional_keys"]),
        rpb=t["rpb"],
        **p.window,
        **extra,
    )
    attn_ = dense.scores(
        exact["query"], exact["key"], list(p.axes), 1.0, exact["rpb"], exact["additional_keys"]
    )
    assert attn.shape[-1] == p.slots
    assert_close("attn", attn, attn_.movedim(-2, 1), p.dtype)
    allowed = attn_.detach().isfinite()
    d_attn = torch.randn(attn_.shape, dtype=torch.float64).to(p.dtype)
    # Forbidden slots are not read: whatever is in them.
    d_attn[~allowed] = torch.nan
    names = [n for n in ("query", "key", "rpb", "additional_keys") if t[n] is not None]
    mine = grads(attn, arranged(d_attn.movedim(-2, 1), layout_of_grad), {n: t[n] for n in names})
    true = grads(attn_, torch.where(allowed, d_attn.double(), 0), {n: exact[n] for n in names})
    for name in names:
        assert_close(f"d_{name}", mine[name], true[name], p.dtype, more=4)

    weights = torch.randn(attn_.shape, dtype=torch.float64).to(p.dtype)
    weights[~allowed] = torch.nan
    weights_ = torch.where(allowed, weights.double(), 0).requires_grad_()
    weights = arranged(weights.movedim(-2, 1), layout_of_grad).requires_grad_()
    out = AV[p.rank](
        weights,
        first(t["value"]),
        additional_values=first(t["additional_values"]),
        **p.window,
        **extra,
    )
    out_ = dense.weighted(weights_, exact["value"], list(p.axes), exact["additional_values"])
    assert_close("out", out, out_.movedim(-2, 1), p.dtype)
    d_out = torch.randn(out_.shape, dtype=torch.float64).to(p.dtype)
    names = [n for n in ("value", "additional_values") if t[n] is not None]
    mine = grads(out, d_out.movedim(-2, 1), {"attn": weights, **{n: t[n] for n in names}})
    true = grads(out_, d_out.double(), {"attn": weights_, **{n: exact[n] for n in names}})
    true["attn"] = true["attn"].movedim(-2, 1)
    for name in ("attn", *names):
        assert_close(f"d_{name}", mine[name], true[name], p.dtype, more=4)


@given(problems())
def test_fused(p: Problem) -> None:
    check_fused(p, p.layout)


@given(problems())
def test_unfused(p: Problem) -> None:
    check_unfused(p, p.layout)


@pytest.mark.slow
@settings(max_examples=150)
@given(problems())
def test_fused_more(p: Problem) -> None:
    check_fused(p, p.layout)


@pytest.mark.slow
@settings(max_examples=150)
@given(problems())
def test_unfused_more(p: Problem) -> None:
    check_unfused(p, p.layout)


AXES = {
    1: (dense.Axis(23, 7, 2, 3),),
    2: (dense.Axis(11, 3, 1, 2, True), dense.Axis(9, 5)),
    3: (dense.Axis(5, 3), dense.Axis(6, 2, 2, 2), dense.Axis(4, 3, causal=True)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", (1, 2, 3))
def test_every_dtype_and_rank(rank: int, dtype: torch.dtype) -> None:
    odd = all(axis.kernel_size % 2 for axis in AXES[rank])
    p = Problem(AXES[rank], 2, 4, 2, 32, 16, 2, odd, dtype, "contiguous", 1)
    check_fused(p)
    check_unfused(p)


@pytest.mark.parametrize("cut", (1, 4, 6))
@pytest.mark.parametrize("causal", (False, True))
def test_blocks_are_parts_of_the_whole(cut: int, causal: bool) -> None:
    """Both halves of a map cut in two, each with the keys its windows reach, make the whole."""
    extent, other = 9, dense.Axis(5, 3)
    whole = dense.Axis(extent, 3, 1, 2, causal)
    query, key, value = (torch.randn(2, extent, 5, 2, 8, dtype=torch.float64) for _ in range(3))
    for t in (query, key, value):
        t.requires_grad_()
    window = {"kernel_size": 3, "dilation": (2, 1), "is_causal": (causal, False)}
    out, lse = F.na2d(query, key, value, **window, return_lse=True)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad((out, lse), (query, key, value), (d_out, d_lse))
    sums = [torch.zeros_like(t) for t in (query, key, value)]
    for begin, end in ((0, cut), (cut, extent)):
        reach = [t for q in range(begin, end) for t in dense.window(whole, q) if t is not None]
        low, high = min(reach), max(reach) + 1
        q, k, v = query[:, begin:end], key[:, low:high], value[:, low:high]
        part, part_lse = F.na2d(
            q,
            k,
            v,
            **window,
            return_lse=True,
            query_origin=(begin, 0),
            key_origin=(low, 0),
            global_extent=(extent, other.extent),
        )
        assert_close("out", part, out[:, begin:end], torch.float64)
        assert_close("lse", part_lse, lse[:, begin:end], torch.float64)
        grads_ = torch.autograd.grad(
            (part, part_lse), (q, k, v), (d_out[:, begin:end], d_lse[:, begin:end])
        )
        sums[0][:, begin:end] += grads_[0]
        sums[1][:, low:high] += grads_[1]
        sums[2][:, low:high] += grads_[2]
    for mine, true in zip(sums, wanted, strict=True):
        assert_close("gradient", mine, true, torch.float64)


@pytest.mark.parametrize("scale", (None, 0.0, 2, 1.0))
def test_scale(scale: Any) -> None:
    query, key, value = (torch.randn(1, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    out = F.na1d(query, key, value, 5, scale=scale)
    number = 4**-0.5 if scale is None else float(scale)
    exact, _ = dense.attention(query, key, value, [dense.Axis(9, 5)], number)
    assert_close("out", out, exact, torch.float64)


def test_whole_window_is_self_attention() -> None:
    query, key, value = (torch.randn(2, 7, 6, 3, 8, dtype=torch.float64) for _ in range(3))
    out = F.na2d(query, key, value, (7, 6))
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(*flat)
    assert_close("out", out.flatten(1, 2).transpose(1, 2), exact, torch.float64)


def test_empty_batch() -> None:
    query = torch.randn(0, 8, 8, 2, 4, requires_grad=True)
    out, lse = F.na2d(query, query, query, 3, return_lse=True)
    assert out.shape == (0, 8, 8, 2, 4) and lse.shape == (0, 8, 8, 2)
    out.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape
    heads_first = query.detach().movedim(-2, 1)
    attn = F.na2d_qk(heads_first, heads_first, 3)
    assert attn.shape == (0, 2, 8, 8, 9)
    assert F.na2d_av(attn, heads_first, 3).shape == heads_first.shape


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_same_bits_for_any_thread_count(threads: int) -> None:
    query, key, value = (torch.randn(1, 17, 19, 4, 24) for _ in range(3))
    for t in (query, key, value):
        t.requires_grad_()
    before = torch.get_num_threads()

    def run(count: int) -> Any:
        torch.set_num_threads(count)
        out = F.na2d(query, key, value, 5, 2)
        return out, *torch.autograd.grad(out.square().sum(), (query, key, value))

    try:
        for one, other in zip(run(1), run(threads), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


def test_bias_of_another_dtype_is_cast() -> None:
    query = torch.randn(1, 6, 6, 2, 8).bfloat16()
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    F.na2d(query, query, query, 3, rpb=rpb).sum().backward()
    assert rpb.grad is not None and rpb.grad.dtype == torch.float32
    weights = torch.randn(1, 2, 6, 6, 9)
    assert F.na2d_av(weights, query.movedim(-2, 1), 3).dtype == torch.bfloat16


# Widths for which kernels lay the rows of several heads side by side.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("width", "heads"), [(28, 8), (14, 16), (20, 4), (24, 3), (7, 16)])
def test_what_is_wrong_with_one_head_stays_there(
    width: int, heads: int, dtype: torch.dtype
) -> None:
    tensors = [torch.randn(1, 9, width, heads, 32, dtype=dtype) for _ in range(3)]
    others = [h for h in range(heads) if h != 1]

    def run(inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = F.na2d(*leaves, kernel_size=5)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    d_out = torch.randn_like(tensors[0])
    right = run(tensors, d_out)
    for i in range(4):
        wrong = [t.clone() for t in (*tensors, d_out)]
        wrong[i][..., 1, :] = torch.nan
        got = run(wrong[:3], wrong[3])
        assert any(t[..., 1, :].isnan().any() for t in got)
        for mine, true in zip(got, right, strict=True):
            assert torch.equal(mine[..., others, :], true[..., others, :])


# Lines whose last row of a tile has one to five queries, which kernels may score in another way.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extent", [17, 18, 49, 50, 52, 53])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_wrong_with_one_query_stays_there(
    extent: int, dtype: torch.dtype, wrong: float
) -> None:
    query, key, value = (torch.randn(1, extent, 2, 32, dtype=dtype) for _ in range(3))
    right = F.na1d(query, key, value, kernel_size=extent)
    for at in (0, extent // 16 * 16, extent - 1):
        spoilt = query.clone()
        spoilt[0, at, 1, 3] = wrong
        got = F.na1d(spoilt, key, value, kernel_size=extent)
        assert got[0, at, 1].isnan().all()
        got[0, at, 1] = right[0, at, 1]
        assert torch.equal(got, right)
