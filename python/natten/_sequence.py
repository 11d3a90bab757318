# SPDX-License-Identifier: MIT
"""Attention of every query to every key: one axis whose window is the whole of it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._errors import NattenError, NattenTypeError
from ._front import Optional, fused, kind_of, public, result
from ._items import attention_of_items, transformed
from ._knobs import ATTENTION_KNOBS, check_knobs
from ._masked import check_generator, check_key_bias, dropout_of, is_masked, key_bias_of


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """What na1d would say about an axis of a map."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise NattenTypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
        kind = kind_of(tensor)
        if kind:
            raise NotImplementedError(
                f"{name} is a {kind} tensor. Items of different sizes go in packed, one after "
                "another along the token axis."
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


def check_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises unless these are packed tensors."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[0] != 1:
            raise NattenError(
                f"Packed items lie one after another in a batch of 1, but {name} has batch "
                f"{tensor.shape[0]}."
            )


def _check_lengths(name_q: str, of_queries: Any, name_kv: str, of_keys: Any) -> None:
    for name, lengths in ((name_q, of_queries), (name_kv, of_keys)):
        if not isinstance(lengths, Tensor):
            raise NattenTypeError(
                f"{name_q} and {name_kv} go together and must be tensors, but {name} is "
                f"{'missing' if lengths is None else type(lengths).__name__}."
            )
        if lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64):
            raise NattenError(
                f"{name} must have one dimension and be int32 or int64, got {lengths.dim()} and "
                f"{lengths.dtype}."
            )
    if of_queries.shape != of_keys.shape or of_queries.device != of_keys.device:
        raise NattenError(
            f"{name_q} and {name_kv} must have as many entries each and be on one device, got "
            f"{of_queries.shape[0]} on {of_queries.device} and {of_keys.shape[0]} on "
            f"{of_keys.device}."
        )


def _table(of_queries: Tensor, of_keys: Tensor, is_causal: bool) -> Tensor:
    """The table of the items (see _items.py), from the lengths of sequences. On a CPU, whatever
    device they are on: it is the host that goes through the items. Only on meta there are none."""
    place = "meta" if of_queries.is_meta else "cpu"
    queries, keys = of_queries.to(place, torch.int64), of_keys.to(place, torch.int64)
    ones = torch.ones_like(queries)
    return torch.stack(
        (queries, keys, torch.zeros_like(queries), ones, ones, ones * int(is_causal)), 1
    )


def _cut(cumulative: Tensor, name: str) -> Tensor:
    """Lengths from cumulative lengths."""
    unknown = torch.compiler.is_compiling() or cumulative.is_meta
    if cumulative.shape[0] < 1 or (not unknown and int(cumulative[0])):
        raise NattenError(f"{name} must begin with 0.")
    return cumulative.diff()


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Optional = None,
    seqlens_KV: Optional = None,
) -> tuple[Optional, Optional, int, int]:
    """The cumulative form of the lengths of packed sequences, which :func:`attention` takes.

    Args:
        query, key, value: ``[1, tokens, heads, channels]``, the packed sequences.
        seqlens_Q: int32 ``[sequences]``, the number of queries of each.
        seqlens_KV: int32 ``[sequences]``, the number of keys of each.

    Returns:
        ``(cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV)``: int32
        ``[sequences + 1]`` that begin with 0, on the device of the lengths, and two integers.
        ``(None, None, 0, 0)`` without lengths.

    Raises:
        NattenError: lengths that do not fit each other or the tensors.
        NattenTypeError: only one of the two, or no tensors.
    """
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    check_tensors(query, key, value)
    check_packed(query, key, value)
    _check_lengths("seqlens_Q", seqlens_Q, "seqlens_KV", seqlens_KV)
    assert seqlens_Q is not None and seqlens_KV is not None
    results: list[Any] = []
    for name, lengths, tensor in (
        ("seqlens_Q", seqlens_Q, query),
        ("seqlens_KV", seqlens_KV, key),
    ):
        if lengths.is_meta:
            raise NattenError(f"{name} is on meta, where there are no numbers to add up.")
        total, least = int(lengths.sum()), int(lengths.min()) if len(lengths) else 0
        if total != tensor.shape[1] or least < 0:
            raise NattenError(
                f"{name} must be at least 0 and add up to the {tensor.shape[1]} tokens, got a sum "
                f"of {total} and a least length of {least}."
            )
        sums = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        results += [sums, int(lengths.max()) if len(lengths) else 0]
    return results[0], results[2], results[1], results[3]


def _packed(lengths: Any, sums: Any, longest: Any, is_causal: bool) -> Optional:
    """The table of packed sequences; None if there are none."""
    has_lengths, has_sums, has_longest = (
        any(value is not None for value in pair) for pair in (lengths, sums, longest)
    )
    if not (has_lengths or has_sums or has_longest):
        return None
    for name, value in zip(("max_seqlen_Q", "max_seqlen_KV"), longest, strict=True):
        if value is not None and not isinstance(value, (int, torch.SymInt)):
            raise NattenTypeError(f"{name} must be an integer, got {value!r}.")
    if has_sums and has_lengths:
        raise NattenError("Give seqlens_Q and seqlens_KV, or the cumulative lengths, not both.")
    if not has_sums:
        _check_lengths("seqlens_Q", lengths[0], "seqlens_KV", lengths[1])
        return _table(lengths[0], lengths[1], is_causal)
    names = ("cumulative_seqlen_Q", "cumulative_seqlen_KV")
    _check_lengths(names[0], sums[0], names[1], sums[1])
    return _table(_cut(sums[0], names[0]), _cut(sums[1], names[1]), is_causal)


@functools.partial(public, rank=1)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Optional = None,
    seqlens_KV: Optional = None,
    cumulative_seqlen_Q: Optional = None,
    cumulative_seqlen_KV: Optional = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    *,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    key_padding_mask: Optional = None,
    generator: torch.Generator | None = None,
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
        seqlens_Q: int32 ``[sequences]``: query holds sequences of these lengths, packed one after
            another in a batch of 1, and a query sees the keys of its sequence. Any may be 0.
        seqlens_KV: int32 ``[sequences]``: the numbers of keys of the sequences, likewise.
        cumulative_seqlen_Q: instead of seqlens_Q the sums of lengths, int32 ``[sequences + 1]``,
            0 first.
        cumulative_seqlen_KV: likewise, instead of seqlens_KV.
        max_seqlen_Q, max_seqlen_KV: the longest lengths; without effect.
        return_lse: also return the logarithm of the sum of exponentials of the scores.
        dropout_p, generator: as for natten.functional.na2d; not for packed sequences.
        key_padding_mask: ``[batch, keys]``, likewise.
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
    check_generator(generator)
    check_tensors(query, key, value)
    table = _packed(
        (seqlens_Q, seqlens_KV),
        (cumulative_seqlen_Q, cumulative_seqlen_KV),
        (max_seqlen_Q, max_seqlen_KV),
        is_causal,
    )
    tokens = key.shape[1]
    masked = is_masked(dropout_p, key_padding_mask)
    compiled = torch.compiler.is_compiling() and not transformed() and not masked
    if table is not None and masked:
        raise NotImplementedError("Packed sequences take neither dropout nor key_padding_mask.")
    if table is not None:
        check_packed(query, key, value)
        if table.is_meta and not query.is_meta:
            raise NattenError(
                "Lengths of sequences are on meta, where there are no numbers, but query is on "
                f"{query.device}."
            )
    elif compiled or query.shape[1] == 0 or tokens == 0:
        # A window is a constant of a graph, a table is not: any number of tokens is one graph. And
        # a window has keys.
        if masked:
            dropout_of(dropout_p, generator)
            check_key_bias(key_bias_of(key_padding_mask, key, 1, 1), tuple(key.shape[:-1]))
        table = torch.tensor([[query.shape[1], tokens, 0, 1, 1, int(is_causal)]])
    if table is not None:
        out, lse = attention_of_items(query, key, value, table, scale)
        return result(out, lse, return_lse)
    window: Any = (tokens, 1, is_causal, None, scale, None, None, 1, return_lse, (0, 0, tokens), {})
    arguments: Any = (*window, dropout_p, key_padding_mask, generator)
    return fused(1, query, key, value, *arguments)
