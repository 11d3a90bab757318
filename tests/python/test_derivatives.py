# SPDX-License-Identifier: MIT
"""Derivatives in float64: first and second, backward and forward, eager and under transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import natten.functional as F

Args = tuple[Tensor, ...]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def finite(attn: Tensor) -> Tensor:
    return torch.where(attn == -torch.inf, 0, attn)


def fused_plain() -> tuple[Callable[..., Any], Args]:
    args = leaf(1, 5, 2, 2), leaf(1, 5, 2, 2), leaf(1, 5, 2, 3)
    return lambda q, k, v: F.na1d(q, k, v, 3), args


def fused_everything() -> tuple[Callable[..., Any], Args]:
    """Causal, strided and dilated axes, a bias, additional tokens, fewer heads of keys, the LSE."""
    args = (
        leaf(1, 4, 3, 2, 2),
        leaf(1, 4, 3, 1, 2),
        leaf(1, 4, 3, 1, 1),
        leaf(2, 3, 5),
        leaf(1, 1, 1, 2),
        leaf(1, 1, 1, 1),
    )

    def function(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
        return F.na2d(
            q,
            k,
            v,
            (1, 3) if rpb.shape[1] == 1 else (2 * 1, 3)[:0] or (rpb.shape[1] // 2 + 1, 3),
            (2, 1),
            (True, False),
            rpb,
            0.7,
            ak,
            av,
            stride=(1, 2),
            return_lse=True,
        )

    return function, args


def fused_blocks() -> tuple[Callable[..., Any], Args]:
    args = leaf(1, 3, 1, 2), leaf(1, 5, 1, 2), leaf(1, 5, 1, 2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.na1d(q, k, v, 3, query_origin=2, key_origin=1, global_extent=7)

    return function, args


def qk_everything() -> tuple[Callable[..., Any], Args]:
    args = leaf(1, 2, 4, 3, 2), leaf(1, 1, 4, 3, 2), leaf(2, 3, 5), leaf(1, 1, 2, 2)

    def function(q: Tensor, k: Tensor, rpb: Tensor, ak: Tensor) -> Any:
        return finite(F.na2d_qk(q, k, (2, 3)[:0] or (2, 3), (1, 1), ak, (True, False), stride=(2, 1)))

    def with_bias(q: Tensor, k: Tensor, rpb: Tensor, ak: Tensor) -> Any:
        scores = F.na2d_qk(q, k, (2, 3)[:0] or (3, 3), 1, ak, (True, False), rpb, stride=(2, 1))
        return finite(scores)

    return with_bias if False else function, args


def av_everything() -> tuple[Callable[..., Any], Args]:
    args = leaf(1, 2, 4, 3, 8), leaf(1, 1, 4, 3, 2), leaf(1, 1, 2, 2)
    return lambda a, v, x: F.na2d_av(a, v, (2, 3), (2, 1), x, (False, True)), args
