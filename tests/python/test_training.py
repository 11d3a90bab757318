# SPDX-License-Identifier: MIT
"""What trainers do around a model: autocast, scaling, checkpointing, subclasses, deterministic
mode."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import natten
import natten.functional as F
from natten import NeighborhoodAttention2D, _ops


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 6, 6, 2, 8, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    halves = [t.detach().to(dtype) for t in (query, key, value, rpb)]
    with torch.autocast("cpu", dtype):
        out, lse = F.na2d(query, key, value, 3, rpb=rpb, return_lse=True)
        attn = F.na2d_qk(query.movedim(-2, 1), key.movedim(-2, 1), 3, rpb=rpb)
        mixed = F.na2d(query, key.to(dtype), value, 3)
        exact = F.na2d(*[t.detach().double() for t in (query, key, value)], 3)
    assert out.dtype == attn.dtype == mixed.dtype == dtype
    assert lse.dtype == torch.float32 and exact.dtype == torch.float64
    assert torch.equal(out, F.na2d(*halves[:3], 3, rpb=halves[3]))
    out.float().sum().backward()
    for t in (query, key, value, rpb):
        assert t.grad is not None and t.grad.dtype == torch.float32


@pytest.mark.parametrize("fused", (False, True))
def test_autocast_of_a_module(fused: bool) -> None:
    natten.use_fused_na(fused)
    module = NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 6, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), module(x), atol=0.05, rtol=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    changed = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert all(changed)


def test_selective_checkpointing_keeps_what_it_is_told_to() -> None:
    calls = {"na": 0}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls["na"] += op is _ops.na
            return op(*args, **(kwargs or {}))

    x = torch.randn(1, 6, 6, 2, 8, requires_grad=True)

    def block(t: Tensor) -> Tensor:
        return F.na2d(t, t, t, 3).square().sum()

    wanted = torch.autograd.grad(block(x), x)[0]
    contexts = functools.partial(create_selective_checkpoint_contexts, [_ops.na])
    for options, expected in (({}, 2), ({"context_fn": contexts}, 1)):
        calls["na"] = 0
        with Count():
            loss = checkpoint(block, x, use_reentrant=False, **options)
            (grad,) = torch.autograd.grad(loss, x)
        assert torch.equal(grad, wanted)
        assert calls["na"] == expected


class Named(Tensor):
    """A subclass that notes which functions it went through."""

    seen: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_pass_through() -> None:
    plain = torch.randn(1, 6, 6, 2, 8)
    named = plain.as_subclass(Named)
    Named.seen.clear()
    out = F.na2d(plain, key=plain, value=named, kernel_size=3)
    assert isinstance(out, Named) and F.na2d in Named.seen
    assert torch.equal(out.as_subclass(Tensor), F.na2d(plain, plain, plain, 3))


def test_parameters_and_default_device_modes() -> None:
    parameter = torch.nn.Parameter(torch.randn(1, 6, 2, 8))
    with torch.device("cpu"):
        F.na1d(parameter, parameter, parameter, 3).sum().backward()
    assert parameter.grad is not None


def test_deterministic_mode() -> None:
    module = NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    x = torch.randn(2, 9, 9, 16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            module.zero_grad()
            module(x).square().sum().backward()
            runs.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(runs[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inference_mode_and_no_grad() -> None:
    x = torch.randn(1, 6, 6, 2, 8, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = F.na2d(x, x, x, 3)
        assert not out.requires_grad


def test_profiler_shows_the_operator() -> None:
    x = torch.randn(1, 6, 6, 2, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.na2d(x, x, x, 3)
    assert "natten::na" in {event.key for event in profile.key_averages()}


def test_views_that_the_dispatcher_resolves() -> None:
    """Plain calls of Python kernels pass the dispatcher by, but not with tensors like these."""
    negative = torch.randn(1, 6, 2, 8, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    ours = F.na1d(negative, negative, negative, 3)
    resolved = negative.resolve_neg()
    torch.testing.assert_close(ours, F.na1d(resolved, resolved, resolved, 3))
    zero = torch._efficientzerotensor((1, 6, 2, 8))
    assert not F.na1d(resolved, resolved, zero, 3).any()
    x = torch.randn(1, 6, 2, 8)
    kept: list[Tensor] = []

    def leaky(t: Tensor) -> Tensor:
        kept.append(t * 2)
        return t.sum()

    leaf = x.clone().requires_grad_()
    torch.func.grad(leaky)(leaf)
    out = F.na1d(kept[0], kept[0], kept[0], 3)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    twice = 2 * leaf
    (wanted,) = torch.autograd.grad(F.na1d(twice, twice, twice, 3).square().sum(), leaf)
    torch.testing.assert_close(grad, wanted)
