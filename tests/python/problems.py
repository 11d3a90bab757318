# SPDX-License-Identifier: MIT
"""Random problems for hypothesis, and tensors for them that lie in memory in all sorts of ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dense import Axis

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Error allowed, relative to the largest element of the exact result.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}

LAYOUTS = ("contiguous", "heads first", "sliced", "flipped axes", "scattered channels")


@dataclass(frozen=True)
class Problem:
    axes: tuple[Axis, ...]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    tokens: int
    rpb: bool
    dtype: torch.dtype
    layout: str
    seed: int

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def window(self) -> dict[str, Any]:
        """The keyword arguments."""
        return {
            "kernel_size": tuple(a.kernel_size for a in self.axes),
            "dilation": tuple(a.dilation for a in self.axes),
            "is_causal": tuple(a.causal for a in self.axes),
            "stride": tuple(a.stride for a in self.axes),
        }

    @property
    def slots(self) -> int:
        count = 1
        for axis in self.axes:
            count *= axis.kernel_size
        return count + self.tokens

    def tensors(self) -> dict[str, Tensor | None]:
        """Heads-last inputs, in this problem's dtype and memory layout."""
        generator = torch.Generator().manual_seed(self.seed)
        queries = [len(a.query_range) for a in self.axes]
        keys = [len(a.key_range) for a in self.axes]
        biases = [2 * a.kernel_size - 1 for a in self.axes]
        tokens = [self.tokens]
        shapes = {
            "query": [self.batch, *queries, self.heads, self.head_dim],
            "key": [self.batch, *keys, self.kv_heads, self.head_dim],
            "value": [self.batch, *keys, self.kv_heads, self.value_dim],
            "rpb": [self.heads, *biases] if self.rpb else None,
            "additional_keys": [self.batch, *tokens, self.kv_heads, self.head_dim],
            "additional_values": [self.batch, *tokens, self.kv_heads, self.value_dim],
        }
        if not self.tokens:
            shapes["additional_keys"] = shapes["additional_values"] = None
        return {
            name: None
            if shape is None
            else arranged(
                torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype),
                self.layout if name != "rpb" else "contiguous",
            )
            for name, shape in shapes.items()
        }


def arranged(tensor: Tensor, layout: str) -> Tensor:
    """The same tensor with other strides."""
    if layout == "heads first":
        return tensor.movedim(-2, 1).contiguous().movedim(1, -2)
    if layout == "sliced":
        big = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
        inner = tuple(slice(2, 2 + size) for size in tensor.shape)
        big[inner] = tensor
        return big[inner]
    if layout == "flipped axes":
        order = [*range(tensor.dim() - 2, -1, -1), tensor.dim() - 1]
        return tensor.permute(order).contiguous().permute(order)
    if layout == "scattered channels":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    return tensor.contiguous()


@st.composite
def axes(draw: Any, largest: int, dilated: int = 3) -> Axis:
    kernel_size = draw(st.integers(1, largest))
    dilation = draw(st.integers(1, dilated))
    extent = kernel_size * dilation + draw(st.integers(0, 5))
    stride = draw(st.integers(1, kernel_size))
    return Axis(extent, kernel_size, stride, dilation, draw(st.booleans()))


@st.composite
def problems(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Problem:
    rank = draw(st.integers(1, 3))
    chosen = [draw(axes((9, 5, 3)[rank - 1], (4, 3, 2)[rank - 1])) for _ in range(rank)]
    kv_heads = draw(st.integers(1, 2))
    odd = all(axis.kernel_size % 2 for axis in chosen)
    return Problem(
        axes=tuple(chosen),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 20)),
        value_dim=draw(st.integers(1, 20)),
        tokens=draw(st.integers(0, 3)),
        rpb=odd and draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**31)),
    )


def assert_close(
    name: str, ours: Tensor, exact: Tensor, dtype: torch.dtype, more: float = 1
) -> None:
    """Within the dtype's tolerance of the exact result; infinities must match."""
    assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
    ours, exact = ours.detach().double(), exact.detach()
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), name
    assert torch.equal(ours[~finite], exact[~finite]), name
    if not finite.any():
        return
    size = max(exact[finite].abs().max().item(), 1.0)
    error = (ours[finite] - exact[finite]).abs().max().item()
    assert error <= TOLERANCE[dtype] * more * size, (name, error, size)
