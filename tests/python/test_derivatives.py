# SPDX-License-Identifier: MIT
"""Derivatives in float64: first and second, backward and forward, eager and under transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import natten.functional as F

pytestmark = pytest.mark.usefixtures("one_thread")
Case = tuple[Callable[..., Any], tuple[Tensor, ...]]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def finite(attn: Tensor) -> Tensor:
    return torch.where(attn == -torch.inf, 0, attn)


def fused_plain() -> Case:
    return lambda q, k, v: F.na1d(q, k, v, 3), (
        leaf(1, 5, 1, 2),
        leaf(1, 5, 1, 2),
        leaf(1, 5, 1, 3),
    )


def fused_everything() -> Case:
    """A causal axis, a strided one, a bias, additional tokens, fewer heads of keys, the LSE."""

    def function(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
        options = {"stride": (1, 2), "return_lse": True}
        return F.na2d(q, k, v, (1, 3), (2, 1), (True, False), rpb, 0.7, ak, av, **options)

    query, key, value = leaf(1, 3, 4, 2, 2), leaf(1, 3, 4, 1, 2), leaf(1, 3, 4, 1, 1)
    return function, (query, key, value, leaf(2, 1, 5), leaf(1, 1, 1, 2), leaf(1, 1, 1, 1))


def fused_causal_bias() -> Case:
    def function(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Any:
        return F.na1d(q, k, v, 3, 2, True, rpb, return_lse=True)

    return function, (leaf(1, 7, 1, 2), leaf(1, 7, 1, 2), leaf(1, 7, 1, 2), leaf(1, 5))


def fused_blocks() -> Case:
    def function(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Any:
        origins = {"query_origin": 2, "key_origin": 1, "global_extent": 7}
        return F.na1d(q, k, v, 3, rpb=rpb, **origins)

    return function, (leaf(1, 3, 1, 2), leaf(1, 5, 1, 2), leaf(1, 5, 1, 2), leaf(1, 5))


def fused_3d() -> Case:
    args = leaf(1, 2, 3, 2, 1, 1), leaf(1, 2, 3, 2, 1, 1), leaf(1, 2, 3, 2, 1, 1)
    return lambda q, k, v: F.na3d(q, k, v, (1, 2, 2), is_causal=(False, True, False)), args


def qk_everything() -> Case:
    def function(q: Tensor, k: Tensor, ak: Tensor, rpb: Tensor) -> Any:
        return finite(F.na2d_qk(q, k, (3, 1), 1, ak, (True, False), rpb, stride=(2, 1)))

    return function, (leaf(1, 2, 4, 2, 2), leaf(1, 1, 4, 2, 2), leaf(1, 1, 2, 2), leaf(2, 5, 1))


def av_everything() -> Case:
    args = leaf(1, 2, 4, 3, 8), leaf(1, 1, 4, 3, 2), leaf(1, 1, 2, 2)
    return lambda a, v, x: F.na2d_av(a, v, (2, 3), (2, 1), x, (False, True)), args


CASES = [
    fused_plain,
    fused_everything,
    fused_causal_bias,
    fused_blocks,
    fused_3d,
    qk_everything,
    av_everything,
]
SMALL = [fused_everything, fused_causal_bias, qk_everything, av_everything]


@pytest.mark.parametrize("case", CASES)
def test_first(case: Callable[[], Case]) -> None:
    function, args = case()
    assert gradcheck(function, args, check_forward_ad=True, fast_mode=False)


@pytest.mark.parametrize("case", CASES)
def test_second(case: Callable[[], Case]) -> None:
    function, args = case()
    assert gradgradcheck(function, args, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_second_entry_by_entry(case: Callable[[], Case]) -> None:
    function, args = case()
    assert gradgradcheck(function, args, check_fwd_over_rev=True, fast_mode=False)


def test_third() -> None:
    function, args = fused_causal_bias()

    def gradient(*inputs: Tensor) -> Any:
        out, lse = function(*inputs)
        loss = out.square().sum() + lse.square().sum()
        return torch.autograd.grad(loss, inputs, create_graph=True)

    assert gradgradcheck(gradient, args, fast_mode=True, atol=1e-4)


# -------------------------------------------------------------------------------------------------
# transforms, against plain backward


def loss_of(case: Callable[[], Case]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    function, args = case()

    def loss(*inputs: Tensor) -> Tensor:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((out.square().sum() for out in outputs), torch.zeros((), dtype=torch.float64))

    return loss, args


def all_of(args: Any) -> tuple[int, ...]:
    return tuple(range(len(args)))


def assert_same(ours: Any, true: Any) -> None:
    ours = ours if isinstance(ours, (tuple, list)) else (ours,)
    true = true if isinstance(true, (tuple, list)) else (true,)
    for mine, other in zip(ours, true, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def detached(args: Any) -> tuple[Tensor, ...]:
    return tuple(t.detach() for t in args)


def tangent_by_difference(function: Any, args: Any, tangents: Any) -> Any:
    step = 1e-6
    up = function(*(a + step * t for a, t in zip(args, tangents, strict=True)))
    down = function(*(a - step * t for a, t in zip(args, tangents, strict=True)))
    return (up - down) / (2 * step)


@pytest.mark.parametrize("case", SMALL)
def test_func_grad(case: Callable[[], Case]) -> None:
    loss, args = loss_of(case)
    wanted = torch.autograd.grad(loss(*args), args)
    ours = torch.func.grad(loss, argnums=all_of(args))(*detached(args))
    assert_same(ours, wanted)


@pytest.mark.parametrize("case", SMALL)
def test_forward_mode(case: Callable[[], Case]) -> None:
    loss, args = loss_of(case)
    args = detached(args)
    tangents = tuple(torch.randn_like(a) for a in args)
    wanted = tangent_by_difference(loss, args, tangents)
    assert wanted.abs() > 1e-3
    _, ours = torch.func.jvp(loss, args, tangents)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, t) for a, t in zip(args, tangents, strict=True)]
        ours = forward_ad.unpack_dual(loss(*duals)).tangent
    assert ours is not None
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("which", ("all", "first", "last"))
def test_vmap(case: Callable[[], Case], which: str) -> None:
    function, args = case()
    args = detached(args)
    mapped = {"all": all_of(args), "first": (0,), "last": (len(args) - 1,)}[which]
    stacks = [
        torch.stack([a, a * 0.5, a.flip(0) - 1], -1) if i in mapped else a
        for i, a in enumerate(args)
    ]
    in_dims = tuple(-1 if i in mapped else None for i in all_of(args))
    ours = torch.vmap(function, in_dims=in_dims)(*stacks)
    singles = [
        function(*(s[..., j] if i in mapped else s for i, s in enumerate(stacks))) for j in range(3)
    ]
    if isinstance(singles[0], tuple):
        wanted: Any = [torch.stack(parts) for parts in zip(*singles, strict=True)]
    else:
        wanted = torch.stack(singles)
    assert_same(ours, wanted)


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("which", ("all", "last"))
def test_vmap_over_nothing(case: Callable[[], Case], which: str) -> None:
    function, args = case()
    mapped = {"all": all_of(args), "last": (len(args) - 1,)}[which]
    none = [a.unsqueeze(0)[:0] if i in mapped else a for i, a in enumerate(args)]
    in_dims = tuple(0 if i in mapped else None for i in all_of(args))
    ours, single = torch.vmap(function, in_dims=in_dims)(*none), function(*args)
    ours, single = (r if isinstance(r, tuple) else (r,) for r in (ours, single))
    for mine, one in zip(ours, single, strict=True):
        assert mine.shape == (0, *one.shape)
    for grad in torch.autograd.grad(sum(mine.sum() for mine in ours), args):
        assert not grad.any()


@pytest.mark.parametrize("case", SMALL)
def test_vmap_of_grad(case: Callable[[], Case]) -> None:
    loss, args = loss_of(case)
    stacks = [torch.stack([a.detach(), a.detach() * 0.5]) for a in args]
    ours = torch.vmap(torch.func.grad(loss, argnums=all_of(args)))(*stacks)
    for j in range(2):
        leaves = [s[j].clone().requires_grad_() for s in stacks]
        wanted = torch.autograd.grad(loss(*leaves), leaves)
        assert_same([o[j] for o in ours], wanted)


@pytest.mark.parametrize("case", SMALL)
def test_hessian(case: Callable[[], Case]) -> None:
    loss, args = loss_of(case)
    args = detached(args)
    for i in (0, len(args) - 1):

        def of_one(x: Tensor, i: int = i) -> Tensor:
            return loss(*args[:i], x, *args[i + 1 :])

        wanted = torch.autograd.functional.hessian(of_one, args[i])
        assert wanted.abs().max() > 1e-3
        assert_same(torch.func.hessian(of_one)(args[i]), wanted)
        assert_same(torch.func.jacrev(torch.func.jacrev(of_one))(args[i]), wanted)


@pytest.mark.parametrize("case", SMALL)
def test_forward_over_forward_is_refused(case: Callable[[], Case]) -> None:
    loss, args = loss_of(case)
    args = detached(args)

    def of_one(x: Tensor) -> Tensor:
        return loss(x, *args[1:])

    with pytest.raises(NotImplementedError, match="jacfwd"):
        torch.func.jvp(
            lambda x: torch.func.jvp(of_one, (x,), (torch.ones_like(x),))[1],
            (args[0],),
            (torch.ones_like(args[0]),),
        )


def test_gradient_through_the_lse_alone() -> None:
    query, key, value = leaf(1, 6, 2, 3), leaf(1, 6, 2, 3), leaf(1, 6, 2, 3)
    _, lse = F.na1d(query, key, value, 3, return_lse=True)
    d_query, d_value = torch.autograd.grad(lse.sum(), (query, value), allow_unused=True)
    assert d_query.abs().max() > 1e-3
    assert d_value is None or not d_value.any()


def test_only_wanted_gradients() -> None:
    query, key, value = leaf(1, 6, 2, 3).detach(), leaf(1, 6, 2, 3), leaf(1, 6, 2, 3).detach()
    F.na1d(query, key, value, 3).sum().backward()
    assert key.grad is not None and query.grad is None and value.grad is None


def test_no_tangent_of_what_is_constant() -> None:
    query, key, value = (leaf(1, 6, 2, 3).detach() for _ in range(3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        out, lse = F.na1d(query, key, dual, 3, return_lse=True)
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, torch.ones_like(tangent))
        of_lse = forward_ad.unpack_dual(lse).tangent
        assert of_lse is None or not of_lse.any()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_forward_mode_of_half_types(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 9, 2, 8) for _ in range(3))
    tangents = tuple(torch.randn(1, 9, 2, 8) for _ in range(3))

    def function(*inputs: Tensor) -> Any:
        return F.na1d(*inputs, 5, return_lse=True)

    halves = tuple(x.to(dtype) for x in (query, key, value))
    half_tangents = tuple(x.to(dtype) for x in tangents)
    exact = tuple(x.double() for x in halves), tuple(x.double() for x in half_tangents)
    _, ours = torch.func.jvp(function, halves, half_tangents)
    _, wanted = torch.func.jvp(function, *exact)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for mine, true in zip(ours, wanted, strict=True):
        assert (mine.double() - true).abs().max() < 0.1 * true.abs().max()
