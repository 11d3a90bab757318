# SPDX-License-Identifier: MIT
"""Attention of every query to every key: one axis whose window is the whole of it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._errors import NattenError, NattenTypeError
from ._front import fused, public, scale_of
from ._knobs import ATTENTION_KNOBS, check_knobs


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """What na1d would say about an axis of a map."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise NattenTypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise NotImplementedError(
                f"{name} is a {kind} tensor. Sequences of different lengths go in packed, with "
                "seqlens_Q and seqlens_KV."
            )
        if tensor.dim() != 4:
            raise NattenError(
                f"{name} must be [batch, tokens, heads, head_dim], got {tensor.dim()} dimensions."
            )
    if key.shape[:3] != value.shape[:3]:
        raise NattenError(
            "key and value must have the same batch, tokens and heads, got "
            f"{tuple(key.shape[:3])} and {tuple(value.shape[:3])}."
        )
    if query.shape[0] != key.shape[0]:
        raise NattenError(f"query has batch {query.shape[0]}, but key has {key.shape[0]}.")
    if query.shape[3] != key.shape[3]:
        raise NattenError(f"query has head_dim {query.shape[3]}, but key has {key.shape[3]}.")
    if key.shape[2] < 1 or query.shape[2] % key.shape[2]:
        raise NattenError(
            f"query has {query.shape[2]} heads, which is no multiple of the {key.shape[2]} of key."
        )


def _without_tokens(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """No queries or no keys: nothing, or zeros, that gradients pass through."""
    groups = query.unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bqhgk", groups, key) * scale
    out = torch.einsum("bqhgk,bkhe->bqhge", scores.softmax(-1), value).flatten(2, 3)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, scores.to(dtype).logsumexp(-1).flatten(2, 3)


@functools.partial(public, rank=1)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    **knobs: Any,
) -> Any:
    """Attention of every query to every key: softmax(scale * query . key) value.

    Args:
        query: ``[batch, queries, heads, head_dim]``. Strides are free.
        key: ``[batch, keys, kv_heads, head_dim]``; heads is a multiple of kv_heads. There may be
            more or fewer keys than queries, and none of either.
        value: ``[batch, keys, kv_heads, value_dim]``.
        is_causal: query i sees keys 0 to i, however many keys there are (aligned at the beginning,
            as torch's scaled_dot_product_attention is).
        scale: multiplies query . key; ``head_dim ** -0.5`` unless given.
        return_lse: also return the logarithm of the sum of exponentials of the scores.
        knobs: kernel settings of NATTEN 0.20 and later are checked and have no effect.

    Returns:
        ``[batch, queries, heads, value_dim]`` of the dtype of query; with return_lse a pair of it
        and ``[batch, queries, heads]``, float32 (float64 for float64), natural logarithm. Both can
        be differentiated. Without keys out is 0 and lse -inf.

    Raises:
        NattenError, NattenTypeError, NotImplementedError: as for natten.functional.na2d.
    """
    check_knobs("attention", 1, knobs, ATTENTION_KNOBS)
    if not isinstance(is_causal, bool):
        raise NattenTypeError(f"is_causal must be a bool, got {is_causal!r}.")
    check_tensors(query, key, value)
    tokens = key.shape[1]
    if query.shape[1] == 0 or tokens == 0:
        out, lse = _without_tokens(query, key, value, scale_of(scale, query))
        return (out, lse) if return_lse else out
    return fused(
        1,
        query,
        key,
        value,
        tokens,
        1,
        is_causal,
        None,
        scale,
        None,
        None,
        1,
        return_lse,
        (0, 0, tokens),
        {},
    )
