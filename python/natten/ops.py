# SPDX-License-Identifier: MIT
"""Attention to additional tokens by itself, as NATTEN 0.17 has it. The functions of
natten.functional take additional tokens together with the window.

Queries and results are heads-first ``[batch, heads, *map, channels]`` in the first four functions,
which write into the tensors they are given, and heads-last in the others; tokens are heads-first
``[batch, heads, tokens, channels]``, or heads-last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _merge, _sequence
from ._legacy import deprecated_module

__all__ = [
    "additional_sdpa",
    "av_cross_backward",
    "av_cross_forward",
    "maybe_torch_compile",
    "merge_attentions",
    "qk_cross_backward",
    "qk_cross_forward",
]

deprecated_module("natten.ops", "additional_keys and additional_values in natten.functional")


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(2, -2)


def qk_cross_forward(query: Tensor, key: Tensor, out: Tensor) -> None:
    """Scores of additional keys into out, ``[batch, heads, *map, tokens]``."""
    out.copy_((_rows(query) @ key.mT).view(out.shape))


def qk_cross_backward(
    query: Tensor, d_attn: Tensor, key: Tensor, d_query: Tensor, d_key: Tensor
) -> None:
    """The derivatives of qk_cross_forward into d_query and d_key."""
    d_query.copy_((_rows(d_attn) @ key).view(d_query.shape))
    d_key.copy_(_rows(d_attn).mT @ _rows(query))


def av_cross_forward(attn: Tensor, value: Tensor, output: Tensor) -> None:
    """Sums of additional values, weighted by attn ``[batch, heads, *map, tokens]``, into output."""
    output.copy_((_rows(attn) @ value).view(output.shape))


def av_cross_backward(
    d_out: Tensor, value: Tensor, attn: Tensor, d_attn: Tensor, d_value: Tensor
) -> None:
    """The derivatives of av_cross_forward into d_attn and d_value."""
    d_attn.copy_((_rows(d_out) @ value.mT).view(d_attn.shape))
    d_value.copy_(_rows(attn).mT @ _rows(d_out))


def additional_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    attn_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``[batch, tokens, heads, channels]`` to additional tokens; attn_kwargs has no
    effect. Returns the result and the log-sum-exp ``[batch, heads, tokens]``."""
    out, lse = _sequence.attention(query, key, value, scale=scale, return_lse=True)
    return out, lse.transpose(1, 2)


merge_attentions = _merge.merge_with_additional


def maybe_torch_compile(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """A decorator that is torch.compile with these arguments."""
    return torch.compile(*args, **kwargs)
