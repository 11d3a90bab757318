# SPDX-License-Identifier: MIT
from __future__ import annotations

import torch

from natten.functional import (
    attention,
    na1d,
    na2d_av,
    na2d_qk,
    neighborhood_attention_varlen,
)
from natten.utils import explain


def test_every_op_is_explained() -> None:
    query = torch.randn(1, 20, 2, 8, requires_grad=True)
    plain = na1d(query, query, query, kernel_size=5)
    with explain() as plans:
        out = na1d(query, query, query, kernel_size=5)
        out.sum().backward()
    assert torch.equal(out, plain)
    taken = [plan.splitlines()[-1] for plan in plans]
    assert len(taken) == 2
    assert taken[0].split("-", 2)[2].startswith("forward: taken")
    assert taken[1].split("-", 2)[2].startswith("backward: taken")
    na1d(query, query, query, kernel_size=5)
    assert len(plans) == 2  # nobody listens any more


def test_unfused_ops_are_explained() -> None:
    query = torch.randn(1, 2, 6, 7, 8)
    with explain() as plans:
        na2d_av(na2d_qk(query, query, kernel_size=3), query, kernel_size=3)
    assert ["-qk: taken" in plans[0], "-av: taken" in plans[1]] == [True, True]


def taken(plans: list[str]) -> list[str]:
    """Operations of the kernels that were taken."""
    return [plan.splitlines()[-1].split(":")[0].split("-", 2)[2] for plan in plans]


def test_masked_calls_are_explained() -> None:
    query = torch.randn(1, 20, 2, 8, requires_grad=True)
    with explain() as plans:
        na1d(query, query, query, 5, dropout_p=0.5).sum().backward()
    assert taken(plans) == ["forward", "backward"]


def test_packed_items_are_explained() -> None:
    """Equal neighbours once, items without keys not at all."""
    query = torch.randn(1, 20, 2, 8, requires_grad=True)
    with explain() as plans:
        out = neighborhood_attention_varlen(query, query, query, [(2, 3), (2, 3), (4, 2)], 2)
        out.sum().backward()
    assert taken(plans) == ["forward"] * 2 + ["backward"] * 2
    lengths = torch.tensor([5, 0, 15]), torch.tensor([7, 3, 10])
    with explain() as plans:
        attention(query, query, query, seqlens_Q=lengths[0], seqlens_KV=lengths[1])
    assert taken(plans) == ["forward"] * 2
    with explain() as plans:
        attention(*[query.detach().reshape(2, 10, 2, 8)] * 3)
    assert taken(plans) == ["forward"]
