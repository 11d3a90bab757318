# SPDX-License-Identifier: MIT
"""What neighborhood attention is, in float64 and without any of the library: the windows found by
search, the scores stored, autograd for the gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a map, and the blocks of queries and keys of it that are at hand."""

    extent: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    queries: tuple[int, int] | None = None  # begin and end; the whole axis unless given
    keys: tuple[int, int] | None = None

    @property
    def query_range(self) -> range:
        return range(*(self.queries or (0, self.extent)))

    @property
    def key_range(self) -> range:
        return range(*(self.keys or (0, self.extent)))


def window(axis: Axis, query: int) -> list[int | None]:
    """The keys of one query, kernel_size of them, first key first; None where a causal mask forbids
    the slot."""
    group = [t for t in range(axis.extent) if t % axis.dilation == query % axis.dilation]
    place = group.index(query)
    sharers = [p for p in range(len(group)) if p // axis.stride == place // axis.stride]
    size = axis.kernel_size
    if axis.causal:
        # The last of those who share the window sees the keys before it.
        full = sharers[0] // axis.stride * axis.stride + axis.stride - 1
        leader = min(full, len(group) - 1)
        start = max(leader - size + 1, 0)
        slots = range(start, start + size)
        return [group[p] if p <= place else None for p in slots]
    middle = min(sharers[0] + axis.stride // 2, len(group) - 1)
    wish = middle - size // 2
    start = min(range(len(group) - size + 1), key=lambda s: abs(s - wish))
    return list(group[start : start + size])


@dataclass
class Slots:
    """For each query (flattened) and slot: the key (flattened), whether it is allowed, and which
    entry of a bias belongs to it (flattened)."""

    key: Tensor
    allowed: Tensor
    bias: Tensor
    queries: list[int] = field(default_factory=list)


def slots(axes: list[Axis]) -> Slots:
    keys, allowed, biases = [], [], []
    windows = [{q: window(axis, q) for q in axis.query_range} for axis in axes]
    for query in itertools.product(*(axis.query_range for axis in axes)):
        row, ok, bias = [], [], []
        for choice in itertools.product(*(w[q] for w, q in zip(windows, query, strict=True))):
            here = all(t is not None for t in choice)
            flat = flat_bias = 0
            for axis, t, q in zip(axes, choice, query, strict=True):
                place = axis.key_range.index(t) if here else 0
                flat = flat * len(axis.key_range) + place
                relative = (t - q) // axis.dilation + axis.kernel_size - 1 if here else 0
                flat_bias = flat_bias * (2 * axis.kernel_size - 1) + relative
            row.append(flat)
            ok.append(here)
            bias.append(flat_bias)
        keys.append(row)
        allowed.append(ok)
        biases.append(bias)
    return Slots(
        torch.tensor(keys),
        torch.tensor(allowed),
        torch.tensor(biases),
        [len(axis.query_range) for axis in axes],
    )


def _gathered(tokens: Tensor, additional: Tensor | None, s: Slots, heads: int) -> Tensor:
    """[batch, queries, slots, heads, channels] from heads-last tokens."""
    repeats = heads // tokens.shape[-2]
    flat = tokens.flatten(1, -3)
    result = flat[:, s.key]
    if additional is not None:
        more = additional.unsqueeze(1).expand(-1, s.key.shape[0], -1, -1, -1)
        result = torch.cat([result, more], 2)
    return result.repeat_interleave(repeats, -2)


def scores(
    query: Tensor,
    key: Tensor,
    axes: list[Axis],
    scale: float = 1.0,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """[batch, queries..., heads, slots] of heads-last tensors; -inf where a slot is forbidden."""
    s = slots(axes)
    heads = query.shape[-2]
    keys = _gathered(key, additional_keys, s, heads)
    result = torch.einsum("bqhd,bqwhd->bqhw", query.flatten(1, -3), keys) * scale
    count = s.key.shape[1]
    extra = result.shape[-1] - count
    if rpb is not None:
        bias = rpb.flatten(1)[:, s.bias].permute(1, 0, 2)
        result = result + torch.nn.functional.pad(bias, (0, extra))
    allowed = torch.nn.functional.pad(s.allowed, (0, extra), value=True)
    result = result.masked_fill(~allowed[:, None], -torch.inf)
    return result.unflatten(1, s.queries)


def weighted(
    attn: Tensor, value: Tensor, axes: list[Axis], additional_values: Tensor | None = None
) -> Tensor:
    """Heads-last sums of values; attn as scores returns it, forbidden slots left out."""
    s = slots(axes)
    flat = attn.flatten(1, -3)
    values = _gathered(value, additional_values, s, flat.shape[-2])
    extra = flat.shape[-1] - s.key.shape[1]
    allowed = torch.nn.functional.pad(s.allowed, (0, extra), value=True)
    flat = flat.masked_fill(~allowed[:, None], 0)
    return torch.einsum("bqhw,bqwhe->bqhe", flat, values).unflatten(1, s.queries)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: list[Axis],
    scale: float,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of heads-last tensors."""
    logits = scores(query, key, axes, scale, rpb, additional_keys)
    weights = logits.softmax(-1)
    return weighted(weights, value, axes, additional_values), logits.logsumexp(-1)
