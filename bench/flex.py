# SPDX-License-Identifier: MIT
"""Neighborhood attention by PyTorch's FlexAttention, with tokens in the order that suits its blocks
best: tiles of 128 neighbors of one dilation group."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # tokens


def window_of(query: int, extent: int, window: int) -> slice:
    start = min(max(query - window // 2, 0), extent - window)
    return slice(start, start + window)


def blocks_along(extent: int, window: int, tile: int) -> int:
    """Pairs of a tile of queries and a tile of keys that meet along one axis."""
    pairs = 0
    for first in range(0, extent, tile):
        last = min(first + tile, extent) - 1
        start = window_of(first, extent, window).start
        end = window_of(last, extent, window).stop
        pairs += (end - 1) // tile - start // tile + 1
    return pairs


def tile_shape(extents: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    """The box of BLOCK tokens with which the fewest blocks are needed: as windows are boxes, their
    number is a product."""
    sizes = [1 << i for i in range(BLOCK.bit_length())]
    shapes = [
        shape
        for shape in itertools.product(sizes, repeat=len(extents))
        if math.prod(shape) == BLOCK
    ]
    return min(
        shapes,
        key=lambda shape: math.prod(map(blocks_along, extents, window, shape)),
    )


class Neighborhood:
    """Windows of one kind on maps of one size. `compiled`: `attend` runs compiled code, as it must
    to be fast."""

    def __init__(
        self,
        extents: tuple[int, ...],
        window: tuple[int, ...],
        dilation: tuple[int, ...] = (),
        device: str = "cuda",
        compiled: bool = True,
    ) -> None:
        rank = len(extents)
        self.extents, self.window = extents, window
        self.dilation = dilation or (1,) * rank
        tiles = tile_shape(extents, window)
        steps = [t * d for t, d in zip(tiles, self.dilation, strict=True)]
        self.padded = [math.ceil(n / s) * s for n, s in zip(extents, steps, strict=True)]
        split = []
        for n, t, d in zip(self.padded, tiles, self.dilation, strict=True):
            split += [n // t // d, t, d]
        axes = [*range(2, 3 * rank, 3), *range(0, 3 * rank, 3), *range(1, 3 * rank, 3)]
        self.count = math.prod(self.padded)
        places = torch.arange(self.count, device=device).view(split)
        self.order = places.permute(axes).flatten()
        self.back = self.order.argsort()
        # Of each token, along each axis: which dilation group, which place in it, where its window
        # begins; and whether the token is on the map.
        groups: list[Tensor] = []
        within: list[Tensor] = []
        starts: list[Tensor] = []
        there = torch.ones(self.count, dtype=torch.bool, device=device)
        rest = self.order
        for n, padded, w, d in reversed(
            list(zip(extents, self.padded, window, self.dilation, strict=True))
        ):
            at = (rest % padded).to(torch.int32)
            rest = rest // padded
            there &= at < n
            length = (n - at % d + d - 1) // d
            groups.insert(0, at % d)
            within.insert(0, at // d)
            starts.insert(0, torch.minimum((at // d - w // 2).clamp(0), length - w))
        self.places = within

        def mask(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside = there[k]
            for group, place, start, w in zip(groups, within, starts, window, strict=True):
                inside = inside & (group[q] == group[k])
                inside = inside & (place[k] >= start[q]) & (place[k] < start[q] + w)
            return inside

        self.mask = mask
        self.blocks = self._blocks(device)
        self._attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def _blocks(self, device: str) -> BlockMask:
        """What create_block_mask returns. Not compiled it takes bytes by the square of the tokens,
        compiled ptxas took minutes for its one kernel (16k tokens, torch 2.11)."""
        every = torch.arange(self.count, device=device)
        pairs = torch.stack(
            [
                self.mask(every, every, queries[:, None], every[None, :])
                .expand(BLOCK, self.count)
                .unflatten(1, (-1, BLOCK))
                .sum((0, 2))
                for queries in every.split(BLOCK)
            ]
        )
        lists: list[Tensor] = []
        for some in ((pairs > 0) & (pairs < BLOCK**2), pairs == BLOCK**2):
            order = some.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
            lists += [some.sum(-1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]]
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=self.mask)

    def permute(self, x: Tensor) -> Tensor:
        """From [batch, *extents, heads, channels] to [batch, heads, tokens, channels]."""
        pad = [p - n for n, p in zip(self.extents, self.padded, strict=True)]
        widths = [y for p in reversed(pad) for y in (0, p)]
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, *widths)).flatten(1, -3)
        return x[:, self.order].transpose(1, 2).contiguous()

    def restore(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)[:, self.back].unflatten(1, self.padded)
        return x[(slice(None), *(slice(n) for n in self.extents))]

    def bias(self, rpb: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Pairs that the mask leaves out have no entry; any will do."""
        at = [
            (place[k] - place[q] + w - 1).clamp(0, 2 * w - 2)
            for place, w in zip(self.places, self.window, strict=True)
        ]
        return rpb[(h, *at)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        """Of permuted tensors."""
        if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
            return self._rehearse(q, k, v, rpb)
        if rpb is None:
            return self._attend(q, k, v, block_mask=self.blocks)  # type: ignore[no-any-return]

        def add_bias(s: Tensor, _: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + self.bias(rpb, h, i, j)

        return self._attend(  # type: ignore[no-any-return]
            q, k, v, score_mod=add_bias, block_mask=self.blocks
        )

    def _rehearse(self, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        """The same mask, order and bias, where FlexAttention has no backward."""
        every = torch.arange(self.count)
        queries, keys = every[:, None], every[None, :]
        scores = torch.einsum("bhqc,bhkc->bhqk", q, k) * q.shape[-1] ** -0.5
        if rpb is not None:
            scores = scores + self.bias(rpb, torch.arange(q.shape[1])[:, None, None], queries, keys)
        inside = self.mask(every, every, queries, keys)
        return scores.masked_fill(~inside, -math.inf).softmax(-1) @ v

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
        """[batch, *extents, heads, channels] each."""
        return self.restore(self.attend(*(self.permute(x) for x in (q, k, v)), rpb=rpb))
