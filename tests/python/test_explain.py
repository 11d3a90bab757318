# SPDX-License-Identifier: MIT
from __future__ import annotations

import torch

from natten.functional import na1d, na2d_av, na2d_qk
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
