# SPDX-License-Identifier: MIT
"""Tensors are taken as they lie in memory, forward and backward: nothing is copied of which the
channels are consecutive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import natten.functional as F

BATCH, EXTENTS, HEADS, DIM = 2, (12, 10), 4, 16


def watched(call: Callable[[], Any]) -> tuple[tuple[Tensor, ...], int, int]:
    """Results, how many tensors were copied, and the bytes that torch allocated."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        results = call()
    copies = sum(event.count for event in profile.key_averages() if "copy" in event.key)
    usage = (getattr(event, "self_cpu_memory_usage", 0) for event in profile.events())
    results = (results,) if isinstance(results, Tensor) else results
    return results, copies, sum(size for size in usage if size > 0)


def size_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def packed() -> Tensor:
    """One of three in a projection."""
    return torch.randn(BATCH, *EXTENTS, 3, HEADS, DIM).select(-3, 1)


def channels_last() -> Tensor:
    """A feature map [batch, channels, height, width] whose channels are consecutive."""
    features = torch.randn(BATCH, HEADS * DIM, *EXTENTS).to(memory_format=torch.channels_last)
    return features.unflatten(1, (HEADS, DIM)).permute(0, 3, 4, 1, 2)


def heads_first() -> Tensor:
    return torch.randn(BATCH, HEADS, *EXTENTS, DIM).movedim(1, -2)


def flipped() -> Tensor:
    """The width and the heads before the height, the batch inside."""
    return torch.randn(EXTENTS[1], HEADS, EXTENTS[0], BATCH, DIM).permute(3, 2, 0, 1, 4)


def sliced() -> Tensor:
    """A crop of a larger map, of some of its heads and channels."""
    whole = torch.randn(BATCH, EXTENTS[0] + 4, EXTENTS[1] + 3, HEADS + 1, DIM + 8)
    return whole[:, 2:-2, 3:, :HEADS, 4 : 4 + DIM]


MAKERS = (packed, channels_last, heads_first, flipped, sliced)
layouts = pytest.mark.parametrize("make", MAKERS, ids=[make.__name__ for make in MAKERS])


def slots(make: Callable[[], Tensor], count: int) -> Tensor:
    """As many slots, in scores that lie as strangely."""
    like = make().movedim(-2, 1)
    whole = torch.empty_strided(
        (*like.shape[:-1], 2 * DIM), [2 * step if step > 1 else 1 for step in like.stride()]
    )
    return whole.normal_()[..., :count]


def check(
    function: Callable[..., Any], tensors: Sequence[Tensor], d_outs: Sequence[Tensor]
) -> None:
    """Neither the function nor its backward copies anything or allocates more than its results,
    and both say what they say of contiguous tensors."""
    mine = [t.detach().requires_grad_() for t in tensors]
    assert all(t.stride() == given.stride() for t, given in zip(mine, tensors, strict=True))
    outs, copies, size = watched(lambda: function(*mine))
    assert (copies, size) == (0, size_of(outs))
    grads, copies, size = watched(lambda: torch.autograd.grad(outs, mine, d_outs))
    assert (copies, size) == (0, size_of(grads))
    usual = [t.detach().contiguous().requires_grad_() for t in tensors]
    wanted = function(*usual)
    wanted = (wanted,) if isinstance(wanted, Tensor) else wanted
    wanted_grads = torch.autograd.grad(wanted, usual, [d.contiguous() for d in d_outs])
    for ours, theirs in zip((*outs, *grads), (*wanted, *wanted_grads), strict=True):
        assert torch.equal(ours, theirs)


@layouts
def test_fused(make: Callable[[], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.na2d(q, k, v, (5, 3), (2, 1), return_lse=True)

    check(function, [make() for _ in range(3)], [make(), make()[..., 3]])


@layouts
def test_fused_with_everything(make: Callable[[], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
        more = {"additional_keys": ak, "additional_values": av, "return_lse": True}
        return F.na2d(q, k, v, 3, is_causal=(True, False), rpb=rpb, **more)

    rpb = torch.randn(5, 5, HEADS).permute(2, 0, 1)
    tokens = [make()[:, :2, 3] for _ in range(2)]
    check(function, [*(make() for _ in range(3)), rpb, *tokens], [make(), make()[..., 3]])


@layouts
def test_masked(make: Callable[[], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        return F.na2d(q, k, v, 3, key_padding_mask=mask, return_lse=True)

    check(function, [*(make() for _ in range(3)), make()[..., 5]], [make(), make()[..., 3]])


@layouts
def test_scores(make: Callable[[], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, ak: Tensor) -> Any:
        return F.na2d_qk(q, k, 3, 2, ak)

    query, key = (make().movedim(-2, 1) for _ in range(2))
    check(function, [query, key, key[:, :, 1, :4]], [slots(make, 9 + 4)])


@layouts
def test_weighted_sums(make: Callable[[], Tensor]) -> None:
    def function(attn: Tensor, v: Tensor, av: Tensor) -> Any:
        return F.na2d_av(attn, v, 3, 2, av)

    value = make().movedim(-2, 1)
    check(function, [slots(make, 9 + 4), value, value[:, :, 1, :4]], [make().movedim(-2, 1)])


def test_gradient_of_channels_last_map_is_channels_last() -> None:
    features = torch.randn(BATCH, HEADS * DIM, *EXTENTS).to(memory_format=torch.channels_last)
    features.requires_grad_()
    tokens = features.unflatten(1, (HEADS, DIM)).permute(0, 3, 4, 1, 2)
    out, d_out = F.na2d(tokens, tokens.detach(), tokens.detach(), 3), channels_last()
    (grad,), copies, _ = watched(lambda: torch.autograd.grad(out, features, d_out))
    assert copies == 0 and grad.is_contiguous(memory_format=torch.channels_last)


def test_scattered_channels_are_copied_once() -> None:
    def map_of_features() -> Tensor:
        features = torch.randn(BATCH, HEADS * DIM, *EXTENTS)
        return features.unflatten(1, (HEADS, DIM)).permute(0, 3, 4, 1, 2)

    tensors = [map_of_features() for _ in range(3)]
    (out,), copies, _ = watched(lambda: F.na2d(*tensors, 3))
    assert copies == 3
    assert torch.equal(out, F.na2d(*[t.contiguous() for t in tensors], 3))
