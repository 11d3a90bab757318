# SPDX-License-Identifier: MIT
"""Neighborhood attention layers: projection to queries, keys and values, attention, projection."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._errors import NattenError, NattenTypeError
from ._front import check_scale
from ._nested import nest
from ._window import Bools, Ints, bools, ints
from .context import is_fused_na_enabled

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]

_FUSED = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}
_QK = {1: functional.na1d_qk, 2: functional.na2d_qk, 3: functional.na3d_qk}
_AV = {1: functional.na1d_av, 2: functional.na2d_av, 3: functional.na3d_av}


def _renamed(old: str, old_value: Any, new: str, new_value: Any, default: Any) -> Any:
    """One of two names of an argument."""
    if old_value is None:
        return default if new_value is None else new_value
    if new_value is not None:
        raise NattenTypeError(f"{new} and {old} are the same argument: pass one of them.")
    return old_value


class _NeighborhoodAttention(nn.Module):
    """What the three modules share; `rank` is the number of axes of the map."""

    rank: int
    rpb: nn.Parameter | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # The fifth positional argument was a bias, on by default, until 0.17.
        if len(args) > 4 and args[4] is True:
            warnings.warn(
                f"The fifth positional argument of {cls.__name__} is is_causal; it was the "
                "relative position bias before 0.17. Pass is_causal=True or rel_pos_bias=True by "
                "keyword.",
                stacklevel=2,
            )
        return super().__new__(cls)

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: Ints | None = None,
        dilation: Ints = 1,
        is_causal: Bools = False,
        rel_pos_bias: bool | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
        *,
        stride: Ints = 1,
        embed_dim: int | None = None,
        bias: bool | None = None,
        pad_small_inputs: bool = False,
        kernel_size_d: int | None = None,
        dilation_d: int | None = None,
    ) -> None:
        super().__init__()
        dim = _renamed("embed_dim", embed_dim, "dim", dim, None)
        if dim is None or num_heads is None or kernel_size is None:
            raise NattenTypeError(f"{type(self).__name__} needs dim, num_heads and kernel_size.")
        kernel_size = self._deep("kernel_size", kernel_size, kernel_size_d)
        dilation = self._deep("dilation", dilation, dilation_d)
        rel_pos_bias = _renamed("bias", bias, "rel_pos_bias", rel_pos_bias, False)
        (dim,), (num_heads,) = ints("dim", dim, 1), ints("num_heads", num_heads, 1)
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise NattenError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        scale = check_scale(qk_scale)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.kernel_size = ints("kernel_size", kernel_size, self.rank)
        self.dilation = ints("dilation", dilation, self.rank)
        self.stride = ints("stride", stride, self.rank)
        self._check_window()
        self.is_causal = tuple(bool(x) for x in bools("is_causal", is_causal, self.rank))
        self.pad_small_inputs = pad_small_inputs
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.register_parameter("rpb", None)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.zeros(self._rpb_shape()))
            nn.init.trunc_normal_(self.rpb, std=0.02, mean=0.0, a=-2.0, b=2.0)
        self.attn_drop_rate = attn_drop
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _deep(self, name: str, others: Ints, first: int | None) -> Ints:
        """Until 0.17 the first of three axes had arguments of its own."""
        if first is None:
            return others
        if self.rank != 3 or not isinstance(others, int):
            raise NattenTypeError(
                f"{name}_d is for three axes and goes with an integer {name}, got {others!r} for "
                f"{self.rank} axes."
            )
        return first, others, others

    def _check_window(self) -> None:
        """What needs no map to be known."""
        for axis, numbers in enumerate(
            zip(self.kernel_size, self.dilation, self.stride, strict=True)
        ):
            for name, number in zip(("kernel_size", "dilation", "stride"), numbers, strict=True):
                if number < 1:
                    raise NattenError(f"{name} must be at least 1, got {number} for axis {axis}.")
            if numbers[2] > numbers[0]:
                raise NattenError(
                    f"stride must be at most kernel_size, got stride {numbers[2]} and kernel_size "
                    f"{numbers[0]} for axis {axis}."
                )

    def _rpb_shape(self) -> tuple[int, ...]:
        if any(size % 2 == 0 for size in self.kernel_size):
            raise NattenError(
                f"A relative position bias needs an odd kernel_size, got {self.kernel_size}."
            )
        return (self.num_heads, *(2 * size - 1 for size in self.kernel_size))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Modules that were pickled whole by 0.17 know of no stride and no padding."""
        super().__setstate__(state)
        self.__dict__.setdefault("stride", (1,) * self.rank)
        self.__dict__.setdefault("pad_small_inputs", False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = f"{prefix}rpb"
        if self.rpb is None and name in state_dict:
            warnings.warn(
                f"The state_dict holds {name}, and the module was made without a relative position "
                "bias: it has one now. Pass rel_pos_bias=True to make it with one.",
                stacklevel=2,
            )
            like = self.proj.weight
            self.rpb = nn.Parameter(
                torch.zeros(self._rpb_shape(), dtype=like.dtype, device=like.device)
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """``[batch, *map, dim]`` to the same shape; or a nested tensor of such items, with or
        without a batch each. The mask is that of :func:`natten.functional.na2d`, ``[batch,
        *map]``; with it attention is always fused."""
        if not isinstance(x, Tensor):
            raise NattenTypeError(f"The input must be a tensor, got {type(x).__name__}.")
        if x.is_nested:
            return self._over_items(x, key_padding_mask)
        if x.dim() != self.rank + 2:
            raise NattenError(
                f"{type(self).__name__} expected a rank-{self.rank + 2} input tensor; got "
                f"x.dim()={x.dim()}."
            )
        if x.shape[-1] != self.qkv.in_features:
            raise NattenError(
                f"{type(self).__name__} expected {self.qkv.in_features} channels, "
                f"got {x.shape[-1]}."
            )
        extents = x.shape[1:-1]
        if self.pad_small_inputs:
            if key_padding_mask is not None:
                key_padding_mask = self._pad_mask(key_padding_mask, x)
            x = self._pad(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.unbind(-3)
        if is_fused_na_enabled() or key_padding_mask is not None:
            out = self._fused(query, key, value, key_padding_mask)
        else:
            out = self._unfused(query, key, value)
        out = out.flatten(-2)
        if self.pad_small_inputs:
            for axis, extent in enumerate(extents):
                out = out.narrow(axis + 1, 0, extent)
        result: Tensor = self.proj_drop(self.proj(out))
        return result

    def _over_items(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """A nested tensor: item by item, which have a batch of their own or none."""
        if key_padding_mask is not None:
            raise NotImplementedError("key_padding_mask does not go with nested tensors.")
        batched = x.dim() == self.rank + 3
        items = [self(i) if batched else self(i.unsqueeze(0)).squeeze(0) for i in x.unbind()]
        return nest(items, x) if items else x

    def _pad(self, x: Tensor) -> Tensor:
        padding: list[int] = [0, 0]
        for extent, size, dilation in zip(
            reversed(x.shape[1:-1]),
            reversed(self.kernel_size),
            reversed(self.dilation),
            strict=True,
        ):
            padding += [0, max(0, size * dilation - extent)]
        return nn.functional.pad(x, padding) if any(padding) else x

    def _pad_mask(self, mask: Any, x: Tensor) -> Tensor:
        """Once padded, a mask of another size would fit."""
        if not isinstance(mask, Tensor):
            raise NattenTypeError(f"key_padding_mask must be a tensor, got {type(mask).__name__}.")
        axes = self.rank + 1
        if mask.dim() not in (axes, axes + 1) or mask.shape[:axes] != x.shape[:axes]:
            raise NattenError(
                f"key_padding_mask must be {tuple(x.shape[:axes])} as the input, or that with "
                f"heads, got {tuple(mask.shape)}."
            )
        if mask.dim() > axes:
            return self._pad(mask)
        return self._pad(mask.unsqueeze(-1)).squeeze(-1)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        out: Tensor = _FUSED[self.rank](
            query,
            key,
            value,
            self.kernel_size,
            self.dilation,
            self.is_causal,
            self.rpb,
            self.scale,
            stride=self.stride,
            dropout_p=self.attn_drop_rate if self.training else 0.0,
            key_padding_mask=key_padding_mask,
        )
        return out

    def _unfused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
        attn = _QK[self.rank](
            query * self.scale,
            key,
            self.kernel_size,
            self.dilation,
            is_causal=self.is_causal,
            rpb=self.rpb,
            stride=self.stride,
        )
        attn = self.attn_drop(attn.softmax(-1))
        out = _AV[self.rank](
            attn,
            value,
            self.kernel_size,
            self.dilation,
            is_causal=self.is_causal,
            stride=self.stride,
        )
        return out.movedim(1, -2)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, "
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"is_causal={self.is_causal}, has_bias={self.rpb is not None}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Neighborhood attention over ``[batch, length, dim]``. Arguments as for
    :class:`NeighborhoodAttention2D`."""

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Neighborhood attention over ``[batch, height, width, dim]``.

    Args:
        dim: channels of input and output; a multiple of num_heads. Also called embed_dim.
        num_heads: attention heads.
        kernel_size: keys per axis that a query attends to, an integer or one for each axis.
        dilation: step between the keys of a window, likewise.
        is_causal: whether only keys at or before the query are seen, a bool or one for each axis.
        rel_pos_bias: learn a relative position bias (odd kernel_size only). Also called bias.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_scale: multiplies query . key; ``head_dim ** -0.5`` unless given.
        attn_drop: dropout of the attention weights, while training.
        proj_drop: dropout of the output.
        stride: queries that share one window.
        kernel_size_d, dilation_d: of three axes the first one's, with integers for the others; the
            names of 0.14.
        pad_small_inputs: pad maps that are smaller than kernel_size * dilation with zeros, attend
            to those too, and crop; otherwise such a map is an error.

    The attention is computed in one go after ``natten.use_fused_na()``, otherwise by QK, softmax
    and AV. State: ``qkv.weight``, ``qkv.bias``, ``proj.weight``, ``proj.bias`` and, with
    rel_pos_bias, ``rpb``.

    Raises:
        NattenError: a number is wrong.
        NattenTypeError: an argument is of the wrong type.
    """

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Neighborhood attention over ``[batch, depth, height, width, dim]``. Arguments as for
    :class:`NeighborhoodAttention2D`."""

    rank = 3
