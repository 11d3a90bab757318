# SPDX-License-Identifier: MIT
"""Nested tensors, strided and jagged: each item as if it were alone, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import natten
import natten.functional as F
from natten import NattenError

LAYOUTS = pytest.mark.parametrize("layout", (torch.strided, torch.jagged), ids=str)
LENGTHS = (9, 5, 12)


def nested(items: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor(
        [i.detach() for i in items], layout=layout
    ).requires_grad_()


def items(*shape: int) -> list[Tensor]:
    """An item for each length, which stands where shape has a 0."""
    return [
        torch.randn([n or length for n in shape], dtype=torch.float64, requires_grad=True)
        for length in LENGTHS
    ]


def assert_items(ours: Tensor, wanted: list[Tensor]) -> None:
    assert ours.is_nested
    parts = ours.unbind()
    assert len(parts) == len(wanted)
    for mine, true in zip(parts, wanted, strict=True):
        assert torch.equal(mine, true)


@LAYOUTS
def test_fused(layout: torch.layout) -> None:
    singles = [items(0, 2, 4), items(0, 1, 4), items(0, 1, 3)]
    rpb = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    tensors = [nested(single, layout) for single in singles]
    out, lse = F.na1d(*tensors, 3, is_causal=True, rpb=rpb, return_lse=True)
    assert out.layout == layout
    pairs = [
        F.na1d(*(t.unsqueeze(0) for t in one), 3, is_causal=True, rpb=rpb, return_lse=True)
        for one in zip(*singles, strict=True)
    ]
    assert_items(out, [p[0][0] for p in pairs])
    assert_items(lse, [p[1][0] for p in pairs])
    total = sum((p[0].square().sum() for p in pairs), torch.zeros((), dtype=torch.float64))
    flat = [leaf for single in singles for leaf in single]
    wanted = torch.autograd.grad(total, [*flat, rpb])
    mine = torch.stack([part.square().sum() for part in out.unbind()]).sum()
    ours = torch.autograd.grad(mine, [*tensors, rpb])
    torch.testing.assert_close(ours[-1], wanted[-1])
    for i, grad in enumerate(ours[:-1]):
        for part, true in zip(grad.unbind(), wanted[3 * i : 3 * i + 3], strict=True):
            torch.testing.assert_close(part, true)


@LAYOUTS
def test_jagged_results_go_on(layout: torch.layout) -> None:
    """A residual connection: the result is as ragged as the argument."""
    x = nested(items(0, 2, 4), layout)
    out = x + F.na1d(x, x, x, 3)
    assert_items(out, [i + F.na1d(*[i[None]] * 3, 3)[0] for i in x.unbind()])


@LAYOUTS
@pytest.mark.parametrize("additional", (False, True))
def test_unfused(layout: torch.layout, additional: bool) -> None:
    query, value = items(2, 0, 3, 4), items(2, 0, 3, 5)
    keys = [torch.randn(2, 2, 4, dtype=torch.float64) for _ in LENGTHS]
    values = [torch.randn(2, 2, 5, dtype=torch.float64) for _ in LENGTHS]
    strided = torch.strided
    # torch's jagged tensors are ragged in one place: these have none, and stay strided.
    more = nested(keys, strided) if additional else None
    more_values = nested(values, strided) if additional else None
    if layout == torch.jagged:
        flipped = [nested([i.transpose(0, 1) for i in one], layout) for one in (query, value)]
        tensors = [t.transpose(1, 2) for t in flipped]
    else:
        tensors = [nested(one, layout) for one in (query, value)]
    attn = F.na2d_qk(tensors[0], tensors[0], (3, 1), additional_keys=more)
    out = F.na2d_av(attn, tensors[1], (3, 1), additional_values=more_values)
    wanted = []
    for i, q in enumerate(query):
        k, v = (keys[i][None], values[i][None]) if additional else (None, None)
        scores = F.na2d_qk(q[None], q[None], (3, 1), additional_keys=k)
        wanted.append(F.na2d_av(scores, value[i][None], (3, 1), additional_values=v)[0])
    assert_items(out, wanted)


def test_items_with_batches_of_their_own() -> None:
    batches = [torch.randn(b, 2, 7 + b, 4) for b in (1, 2, 3)]
    x = torch.nested.nested_tensor(batches)
    attn = F.na1d_qk(x, x, 3)
    assert_items(attn, [F.na1d_qk(b, b, 3) for b in batches])
    assert_items(F.na1d_av(attn, x, 3), [F.na1d_av(F.na1d_qk(b, b, 3), b, 3) for b in batches])


@LAYOUTS
@pytest.mark.parametrize("fused", (False, True))
def test_modules(layout: torch.layout, fused: bool) -> None:
    natten.use_fused_na(fused)
    single = items(0, 4)
    module = natten.NeighborhoodAttention1D(4, 2, 3, rel_pos_bias=True).double()
    x = nested(single, layout)
    out = x + module(x)
    assert_items(out, [i + module(i[None])[0] for i in single])
    parameters = list(module.parameters())
    ours = torch.autograd.grad(torch.stack([o.sum() for o in out.unbind()]).sum(), [x, *parameters])
    total = sum((module(i[None]).sum() + i.sum() for i in single), torch.zeros(()))
    true = torch.autograd.grad(total, [*single, *parameters])
    for mine, other in zip(ours[0].unbind(), true[: len(single)], strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(ours[1:], true[len(single) :])
    batches = torch.nested.nested_tensor([torch.randn(b, 5, 6, 4) for b in (1, 3)])
    plane = natten.NeighborhoodAttention2D(4, 2, 3)
    assert_items(plane(batches), [plane(b) for b in batches.unbind()])
    with pytest.raises(NotImplementedError, match="key_padding_mask"):
        plane(batches, torch.zeros(1, 5, 6, dtype=torch.bool))


def test_errors() -> None:
    x = nested(items(0, 2, 4), torch.strided)
    plain = torch.randn(3, 9, 2, 4, dtype=torch.float64)
    cases: list[tuple[Any, str]] = [
        (lambda: F.na1d(x, x, x, 7), "Item 1: kernel_size times dilation must be at most the"),
        (lambda: F.na1d(x, plain, x, 3), "query is a nested tensor: key must be, too."),
        (lambda: F.na1d(x, x, x, 3, rpb=x), "query is a nested tensor: rpb must not be."),
    ]
    for call, text in cases:
        with pytest.raises(NattenError) as caught:
            call()
        assert text in str(caught.value)
    with pytest.raises(NotImplementedError, match="key is a nested tensor"):
        F.na1d(plain, x, x, 3)


@LAYOUTS
def test_without_items(layout: torch.layout) -> None:
    nothing = torch.nested.nested_tensor([])
    if layout == torch.jagged:
        values = torch.zeros(0, 2, 4)
        nothing = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0]))
    for function in (F.na1d, F.attention):
        with pytest.raises(NattenError, match="query is a nested tensor without items"):
            function(*[nothing] * 3, *([3] if function is F.na1d else []))
    assert natten.NeighborhoodAttention1D(4, 2, 3)(nothing).size(0) == 0
