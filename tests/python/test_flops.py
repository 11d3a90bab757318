# SPDX-License-Identifier: MIT
"""Counts of FLOPs: pure functions against formulas and against counting pairs one by one, and what
torch's and fvcore's counters make of calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dense
import natten
from natten import flops
from natten.flops import fna_flop_count, na_av_flop_count, na_qk_flop_count
from natten.functional import attention, na1d, na2d, na2d_av, na2d_qk, na3d
from problems import Problem, problems

pytestmark = pytest.mark.usefixtures("one_thread")
NA = {1: na1d, 2: na2d, 3: na3d}


def counted(function: Any, **options: Any) -> int:
    """What torch counts while the function runs."""
    mode = FlopCounterMode(display=False, **options)
    with mode:
        function()
    return int(mode.get_total_flops())


def exactly(function: Any) -> int:
    return counted(function, custom_mapping=flops.flop_formulas(exact=True))


def test_from_shapes() -> None:
    last, first = (2, 6, 7, 4, 8), (2, 4, 6, 7, 8)
    tokens, window = 2 * 4 * 6 * 7, 3 * 5
    nominal = tokens * window * 8
    for shape, is_last in ((last, True), (first, False)):
        count = fna_flop_count(shape, shape, shape, (3, 5), 1, False, is_last)
        assert count == 2 * 2 * nominal
        assert fna_flop_count(shape, shape, shape, (3, 5), 1, False, is_last, True) == 2 * nominal
    attn = (2, 4, 6, 7, window)
    assert na_qk_flop_count(first, first, (3, 5), 1, False, False) == 2 * nominal
    assert na_av_flop_count(attn, first, (3, 5), 1, False, False) == 2 * nominal
    assert na_av_flop_count(attn, first, (3, 5), 1, False, False, return_macs=True) == nominal
    backward = fna_flop_count(last, last, last, (3, 5), None, None, True, backward=True)
    assert backward == 2 * 5 * nominal
    for count in (
        na_qk_flop_count(first, first, (3, 5), 1, False, False, backward=True),
        na_av_flop_count(attn, first, (3, 5), 1, False, False, backward=True),
    ):
        assert count == 2 * 2 * nominal


def test_other_widths() -> None:
    q, k, v = (1, 9, 6, 8), (1, 9, 2, 8), (1, 9, 2, 5)
    count = fna_flop_count(q, k, v, 3, 1, False, True, True, additional_tokens=4)
    assert count == 9 * 6 * (3 + 4) * (8 + 5)
    exact = fna_flop_count(q, k, v, 3, 1, True, True, True, additional_tokens=4, exact=True)
    assert exact == 6 * (1 + 2 + 7 * 3 + 9 * 4) * (8 + 5)


def test_wrong_shapes() -> None:
    shape, window = (1, 9, 6, 8), (3, 1, False, True)
    with pytest.raises(TypeError, match="key must be a shape, a tuple of integers, got 7"):
        na_qk_flop_count(shape, 7, *window)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="additional_tokens must be at least 0, got -1"):
        na_qk_flop_count(shape, shape, *window, additional_tokens=-1)
    with pytest.raises(ValueError, match="8 channels, but keys have 7"):
        fna_flop_count(shape, (1, 9, 6, 7), (1, 9, 6, 7), *window)
    with pytest.raises(ValueError, match="a multiple"):
        na_av_flop_count((1, 9, 6, 3), (1, 9, 4, 8), *window)
    with pytest.raises(ValueError, match="no size 0"):
        na_qk_flop_count(shape, (1, 9, 0, 8), *window)
    with pytest.raises(ValueError, match="Keys have 2 heads, but values 3"):
        fna_flop_count(shape, (1, 9, 2, 8), (1, 9, 3, 8), *window)
    with pytest.raises(ValueError, match="4, 5 or 6 dimensions"):
        na_qk_flop_count((1, 9, 2, 8), (1, 9, 9, 2, 8), 3, 1, False, True)
    with pytest.raises(ValueError, match="must agree"):
        na_qk_flop_count((1, 9, 2, 8), (1, 8, 2, 8), 3, 1, False, True)
    with pytest.raises(ValueError, match="kernel_size 5, dilation 2 and extent 9"):
        na_qk_flop_count((1, 9, 2, 8), (1, 9, 2, 8), 5, 2, False, True, exact=True)
    with pytest.raises(TypeError, match="kernel_size"):
        na_qk_flop_count((1, 9, 2, 8), (1, 9, 2, 8), "5", 2, False, True)


def pairs_of(problem: Problem) -> int:
    """One by one."""
    windows = int(dense.slots(list(problem.axes)).allowed.sum())
    queries = math.prod(len(axis.query_range) for axis in problem.axes)
    return problem.batch * problem.heads * (windows + queries * problem.tokens)


@given(problems(dtypes=(torch.float32,)))
def test_exact_counts(problem: Problem) -> None:
    pairs = pairs_of(problem)
    tensors = problem.tensors()
    call = calls(problem, tensors)
    assert exactly(call) == 2 * pairs * (problem.head_dim + problem.value_dim)
    nominal = math.prod(len(axis.query_range) for axis in problem.axes)
    nominal *= problem.batch * problem.heads * problem.slots
    assert counted(call) == 2 * nominal * (problem.head_dim + problem.value_dim)


def calls(problem: Problem, tensors: dict[str, Tensor]) -> Any:
    return lambda: NA[problem.rank](**tensors, **problem.window)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_torch_counts_forward_and_backward() -> None:
    q, k, v = leaves((1, 8, 9, 4, 8), (1, 8, 9, 2, 8), (1, 8, 9, 2, 6))
    pairs = 8 * 9 * 4 * 9
    assert counted(lambda: na2d(q, k, v, 3)) == 2 * pairs * 14
    assert counted(lambda: na2d(q, k, v, 3).sum().backward()) == 2 * pairs * (14 + 3 * 8 + 2 * 6)
    v.requires_grad_(False)
    k.requires_grad_(False)
    assert counted(lambda: na2d(q, k, v, 3).sum().backward()) == 2 * pairs * (14 + 2 * 8 + 6)
    causal = sum(min(i + 1, 3) for i in range(8)) * 9 * 3 * 4
    count = exactly(lambda: na2d(q, k, v, 3, is_causal=(True, False)).sum().backward())
    assert count == 2 * causal * (14 + 2 * 8 + 6)


def test_torch_counts_the_unfused() -> None:
    q, k, v, more_k, more_v = leaves(
        *[(1, 4, 8, 9, 8)] * 2, (1, 4, 8, 9, 6), (1, 4, 5, 8), (1, 4, 5, 6)
    )
    pairs = 8 * 9 * 4 * (9 + 5)

    def run() -> None:
        attn = na2d_qk(q, k, 3, 1, more_k)
        na2d_av(attn, v, 3, 1, more_v).sum().backward()

    assert counted(run) == 2 * pairs * 3 * (8 + 6)


def test_masks_and_dropout_cost_nothing_more() -> None:
    q, k, v = leaves((1, 8, 9, 4, 8), (1, 8, 9, 2, 8), (1, 8, 9, 2, 6))
    mask = torch.zeros(1, 8, 9, 2, requires_grad=True)
    pairs = 8 * 9 * 4 * 9

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = na2d(q, k, v, 3, key_padding_mask=mask, dropout_p=0.1)
            return result

    model, forward, backward = Model(), 8 + 6, 3 * 8 + 2 * 6
    assert counted(lambda: model(q, k, v, mask)) == 2 * pairs * forward
    assert counted(lambda: model(q, k, v, mask).sum().backward()) == 2 * pairs * (
        forward + backward
    )
    if flops.has_fvcore:
        plain = tuple(t.detach() for t in (q, k, v, mask))
        assert flops.get_flops(model, plain, disable_warnings=True) == pairs * forward


class Attend(torch.nn.Module):
    """One or the other way, with additional tokens."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor) -> Tensor:
        causal = (True, False)
        if self.fused:
            return na2d(  # type: ignore[no-any-return]
                q, k, v, 3, 1, causal, additional_keys=more_k, additional_values=more_v
            )
        attn = na2d_qk(q, k, 3, 1, more_k, causal).softmax(-1)
        return na2d_av(attn, v, 3, 1, more_v, causal)


@pytest.mark.parametrize("exact", (False, True))
@pytest.mark.parametrize("fused", (False, True))
def test_all_counters_agree(fused: bool, exact: bool) -> None:
    """Grouped heads, values of another width, additional tokens, a causal axis."""
    q, k, v, more_k, more_v = leaves(
        (2, 8, 9, 4, 8), (2, 8, 9, 2, 8), (2, 8, 9, 2, 6), (2, 5, 2, 8), (2, 5, 2, 6)
    )
    windows = (1 + 2 + 6 * 3) * 9 * 3 if exact else 8 * 9 * 9
    pairs = 2 * 4 * (windows + 8 * 9 * 5)
    forward = pairs * (8 + 6)
    backward = pairs * ((3 if fused else 2) * 8 + 2 * 6)
    inputs = [q, k, v, more_k, more_v]
    if not fused:
        inputs = [t.detach().movedim(-2, 1).requires_grad_() for t in inputs]
    model = Attend(fused)
    count = exactly if exact else counted
    assert count(lambda: model(*inputs)) == 2 * forward
    assert count(lambda: model(*inputs).sum().backward()) == 2 * (forward + backward)
    q_shape, k_shape, v_shape = (t.shape for t in inputs[:3])
    window = (3, 1, (True, False), fused)
    more: dict[str, Any] = {"additional_tokens": 5, "exact": exact}
    if fused:
        shapes = (q_shape, k_shape, v_shape)
        assert fna_flop_count(*shapes, *window, **more) == 2 * forward
        assert fna_flop_count(*shapes, *window, **more, backward=True) == 2 * backward
    else:
        for both, true in ((False, forward), (True, backward)):
            scores = na_qk_flop_count(q_shape, k_shape, *window, **more, backward=both)
            attn = (*q_shape[:-1], 9 + 5)
            assert scores + na_av_flop_count(attn, v_shape, *window, **more, backward=both) == (
                2 * true
            )
    if flops.has_fvcore:
        plain = tuple(t.detach() for t in inputs)
        assert flops.get_flops(model, plain, disable_warnings=True, exact=exact) == forward


def test_torch_counts_attention() -> None:
    q, k, v = leaves((2, 7, 4, 8), (2, 11, 2, 8), (2, 11, 2, 8))
    assert counted(lambda: attention(q, k, v)) == 2 * 2 * 4 * 7 * 11 * 16
    lengths = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([5, 6], dtype=torch.int32)
    packed = [t[:1] for t in (q, k, v)]
    run = lambda: attention(*packed, seqlens_Q=lengths[0], seqlens_KV=lengths[1])  # noqa: E731
    assert counted(run) == exactly(run) == 2 * 4 * (3 * 5 + 4 * 6) * 16


def test_torch_counts_compiled_code() -> None:
    q, k, v = (t.detach() for t in leaves(*[(1, 8, 9, 4, 8)] * 3))
    compiled = torch.compile(lambda q, k, v: na2d(q, k, v, 3), backend="aot_eager")
    compiled(q, k, v)
    assert counted(lambda: compiled(q, k, v)) == 2 * 8 * 9 * 4 * 9 * 16


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("fused", (False, True))
def test_modules(rank: int, fused: bool) -> None:
    """As the tests of NATTEN 0.17.5 have it: linear layers without biases, both halves."""
    natten.use_fused_na(fused)
    kind = getattr(natten, f"NeighborhoodAttention{rank}D")
    extents, dim = (8, 9, 10)[:rank], 16
    module = kind(dim, 4, kernel_size=3, dilation=2)
    x = torch.randn(2, *extents, dim)
    tokens = 2 * math.prod(extents)
    macs = tokens * dim * 3 * dim + 2 * tokens * 3**rank * dim + tokens * dim * dim
    assert counted(lambda: module(x)) == 2 * macs
    if flops.has_fvcore:
        assert flops.get_flops(module, x, disable_warnings=True) == macs


@pytest.mark.skipif(not flops.has_fvcore, reason="fvcore is not installed")
def test_fvcore() -> None:
    from fvcore.nn import FlopCountAnalysis

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rpb = torch.nn.Parameter(torch.zeros(4, 5))
            self.more = torch.nn.Parameter(torch.randn(2, 1, 6, 4, 8))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result: Tensor = na1d(
                q, k, v, 3, is_causal=True, rpb=self.rpb,
                additional_keys=self.more[0], additional_values=self.more[1],
            )  # fmt: skip
            return result

    inputs = tuple(leaves(*[(1, 9, 4, 8)] * 3))
    counter = flops.add_natten_handle(FlopCountAnalysis(Model(), inputs))
    counter.unsupported_ops_warnings(False)
    assert counter.total() == 9 * 4 * (3 + 6) * 16
    assert counter.by_operator()["na_traced"] == counter.total()
    exact = flops.get_flops(Model(), inputs, disable_warnings=True, exact=True)
    assert exact == 4 * (1 + 2 + 7 * 3 + 9 * 6) * 16


def test_without_fvcore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "has_fvcore", False)
    with pytest.raises(ImportError, match="pip install fvcore"):
        flops.get_flops(torch.nn.Identity(), torch.ones(1))
