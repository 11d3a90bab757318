# SPDX-License-Identifier: MIT
"""Tensor subclasses that wrap others and see the operators only in ``__torch_dispatch__``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

import natten.functional as F
from natten import NattenError, NeighborhoodAttention2D


class Wrapped(Tensor):
    """A tensor without memory of its own, that notes which operators reach the one it wraps."""

    seen: set[str] = set()
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner.detach()
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Wrapped({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.add(op.name().removesuffix(".default"))
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, op(*args, **kwargs))


SHAPES = [(2, 6, 5, 4, 3), (2, 6, 5, 2, 3), (2, 6, 5, 2, 7), (4, 5, 5), (2, 2, 2, 3), (2, 2, 2, 7)]


def fused(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
    return F.na2d(q, k, v, 3, 1, (True, False), rpb, 0.5, ak, av, return_lse=True)


def unfused(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
    q, k, v, ak, av = (t.movedim(-2, 1) for t in (q, k, v, ak, av))
    attn = F.na2d_qk(q, k, 3, 1, ak, rpb=rpb)
    return attn, F.na2d_av(attn, v, 3, 1, av)


def masked(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
    return F.na2d(q, k, v, 3, 1, False, rpb, None, ak, av, key_padding_mask=v.sum(-1)).sin()


def dropped(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
    generator = torch.Generator().manual_seed(1)
    return F.na2d(q, k, v, 3, 1, False, rpb, None, ak, av, dropout_p=0.4, generator=generator)


def packed(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Any:
    q, k, v = (t.flatten(0, 2).unsqueeze(0) for t in (q, k, v))
    return F.neighborhood_attention_varlen(q, k, v, [(6, 5), (5, 6)], 3)


ROADS: list[tuple[Callable[..., Any], set[str]]] = [
    (fused, {"na", "na_backward"}),
    (unfused, {"qk", "qk_backward", "av", "av_backward"}),
    (masked, {"na_masked", "na_masked_backward"}),
    (dropped, {"na_masked", "na_masked_backward"}),
    (packed, {"items", "items_backward"}),
]
functions = pytest.mark.parametrize(
    ("function", "ops"), ROADS, ids=[function.__name__ for function, _ in ROADS]
)


def leaves() -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]


def derivatives(function: Callable[..., Any], tensors: list[Tensor], order: int) -> list[Tensor]:
    """Results, and derivatives up to `order`, of what is used."""
    tensors = [t.requires_grad_() for t in tensors]
    found = function(*tensors)
    found = list(found) if isinstance(found, tuple) else [found]
    last = found
    for _ in range(order):
        total = sum(t.square().sum() for t in last if t.requires_grad)
        grads = torch.autograd.grad(total, tensors, create_graph=order > 1, allow_unused=True)
        last = [grad for grad in grads if grad is not None]
        found += last
    return found


def assert_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    for mine, other in zip(ours, plain, strict=True):
        assert isinstance(mine, Wrapped)
        assert torch.equal(mine.inner, other.detach())


@functions
def test_forward_and_backward(function: Callable[..., Any], ops: set[str]) -> None:
    tensors = leaves()
    plain = derivatives(function, [t.clone() for t in tensors], 1)
    Wrapped.seen.clear()
    ours = derivatives(function, [Wrapped(t) for t in tensors], 1)
    assert_same(ours, plain)
    assert {f"natten::{op}" for op in ops} <= Wrapped.seen


@pytest.mark.parametrize("function", (fused, unfused, masked))
def test_second_derivatives(function: Callable[..., Any]) -> None:
    tensors = leaves()
    plain = derivatives(function, [t.clone() for t in tensors], 2)
    assert_same(derivatives(function, [Wrapped(t) for t in tensors], 2), plain)


@pytest.mark.parametrize("function", (fused, unfused, masked))
def test_forward_mode(function: Callable[..., Any]) -> None:
    tensors, tangents = leaves(), leaves()
    results = []
    for make in (Tensor.clone, Wrapped):
        with forward_ad.dual_level():
            pairs = zip(tensors, tangents, strict=True)
            found = function(*[forward_ad.make_dual(make(t), make(d)) for t, d in pairs])
            found = found if isinstance(found, tuple) else (found,)
            results.append([part for out in found for part in forward_ad.unpack_dual(out)])
    plain, ours = results
    assert_same(ours, plain)


@functions
def test_without_gradients(function: Callable[..., Any], ops: set[str]) -> None:
    tensors = leaves()
    plain = derivatives(function, [t.clone() for t in tensors], 0)
    with torch.no_grad():
        assert_same(derivatives(function, [Wrapped(t) for t in tensors], 0), plain)


@pytest.mark.parametrize("at", range(3))
def test_one_of_three_is_enough(at: int) -> None:
    tensors = leaves()[:1] * 3
    mixed = [Wrapped(t) if i == at else t for i, t in enumerate(tensors)]
    assert_same([F.na2d(*mixed, 3)], [F.na2d(*tensors, 3)])


def test_module_of_wrapped_input() -> None:
    module, x = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True), torch.randn(2, 6, 6, 8)
    out = module(Wrapped(x))
    assert_same([out], [module(x)])
    out.sum().backward()
    assert module.rpb is not None and isinstance(module.rpb.grad, Wrapped)


def test_wrong_sizes_are_named() -> None:
    query = Wrapped(torch.randn(1, 6, 5, 2, 4))
    with pytest.raises(NattenError, match="kernel_size 7, dilation 1 and extent 6 for axis 0"):
        F.na2d(query, query, query, 7)
