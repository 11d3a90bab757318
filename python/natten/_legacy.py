# SPDX-License-Identifier: MIT
"""Names of NATTEN 0.14 to 0.17.4 that later versions dropped. Each says by a DeprecationWarning
what is called so now, and does the same."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import context, functional
from ._errors import NattenError, warn_of_old
from ._window import Bools, Ints
from .utils.checks import check_all_args

Optional = Tensor | None

_QK = {1: functional.na1d_qk, 2: functional.na2d_qk, 3: functional.na3d_qk}
_AV = {1: functional.na1d_av, 2: functional.na2d_av, 3: functional.na3d_av}
_FUSED = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}


def deprecated(old: str, new: str, depth: int = 3) -> None:
    """Says so, in the name of whoever called the caller; compiled code says nothing."""
    if not torch.compiler.is_compiling():
        text = f"{old} is a name of older versions: use {new}."
        warnings.warn(text, DeprecationWarning, stacklevel=depth)


def deprecated_module(old: str, new: str) -> None:
    """The same while a module is imported."""
    warn_of_old(f"{old} is a name of older versions: use {new}.")


def _check_order(query: Tensor, rpb: Optional) -> None:
    """Newer versions of transformers pass heads last, which the sizes of a bias give away."""
    if (
        not (isinstance(rpb, Tensor) and isinstance(query, Tensor))
        or rpb.dim() != 3
        or query.dim() != 5
        or rpb.shape[0] == query.shape[1]
    ):
        return
    if rpb.shape[0] == query.shape[3]:
        raise NattenError(
            f"query has {query.shape[1]} heads, but rpb has {rpb.shape[0]}: the tensors seem to be "
            "[batch, height, width, heads, head_dim], and must be [batch, heads, height, width, "
            "head_dim]. If this is Dinat of transformers: it works with transformers < 4.54."
        )


# -------------------------------------------------------------------------------------------------
# 0.14: functions


def natten1dqkrpb(
    query: Tensor, key: Tensor, rpb: Optional, kernel_size: Ints, dilation: Ints
) -> Tensor:
    """na1d_qk with a bias."""
    deprecated("natten1dqkrpb", "natten.functional.na1d_qk(..., rpb=...)")
    return functional.na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(
    query: Tensor, key: Tensor, rpb: Optional, kernel_size: Ints, dilation: Ints
) -> Tensor:
    """na2d_qk with a bias."""
    deprecated("natten2dqkrpb", "natten.functional.na2d_qk(..., rpb=...)")
    _check_order(query, rpb)
    return functional.na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Optional,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    """na3d_qk with a bias; the first axis has parameters of its own."""
    deprecated("natten3dqkrpb", "natten.functional.na3d_qk(..., rpb=...)")
    sizes, steps = _deep(kernel_size_d, kernel_size), _deep(dilation_d, dilation)
    return functional.na3d_qk(query, key, sizes, steps, rpb=rpb)


def natten1dqk(query: Tensor, key: Tensor, kernel_size: Ints, dilation: Ints) -> Tensor:
    """na1d_qk"""
    deprecated("natten1dqk", "natten.functional.na1d_qk")
    return functional.na1d_qk(query, key, kernel_size, dilation)


def natten2dqk(query: Tensor, key: Tensor, kernel_size: Ints, dilation: Ints) -> Tensor:
    """na2d_qk"""
    deprecated("natten2dqk", "natten.functional.na2d_qk")
    return functional.na2d_qk(query, key, kernel_size, dilation)


def natten3dqk(
    query: Tensor, key: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    """na3d_qk; the first axis has parameters of its own."""
    deprecated("natten3dqk", "natten.functional.na3d_qk")
    sizes, steps = _deep(kernel_size_d, kernel_size), _deep(dilation_d, dilation)
    return functional.na3d_qk(query, key, sizes, steps)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: Ints, dilation: Ints) -> Tensor:
    """na1d_av"""
    deprecated("natten1dav", "natten.functional.na1d_av")
    return functional.na1d_av(attn, value, kernel_size, dilation)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: Ints, dilation: Ints) -> Tensor:
    """na2d_av"""
    deprecated("natten2dav", "natten.functional.na2d_av")
    return functional.na2d_av(attn, value, kernel_size, dilation)


def natten3dav(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    """na3d_av; the first axis has parameters of its own."""
    deprecated("natten3dav", "natten.functional.na3d_av")
    sizes, steps = _deep(kernel_size_d, kernel_size), _deep(dilation_d, dilation)
    return functional.na3d_av(attn, value, sizes, steps)


def _deep(first: int, others: int) -> tuple[int, int, int]:
    return first, others, others


# -------------------------------------------------------------------------------------------------
# 0.15: functions


def na1d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Optional,
    kernel_size: Ints,
    dilation: Ints,
    additional_keys: Optional = None,
) -> Tensor:
    """na1d_qk with a bias."""
    deprecated("na1d_qk_with_bias", "natten.functional.na1d_qk(..., rpb=...)")
    return functional.na1d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Optional,
    kernel_size: Ints,
    dilation: Ints,
    additional_keys: Optional = None,
) -> Tensor:
    """na2d_qk with a bias."""
    deprecated("na2d_qk_with_bias", "natten.functional.na2d_qk(..., rpb=...)")
    return functional.na2d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Optional,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Optional = None,
) -> Tensor:
    """na3d_qk with a bias; the first axis has parameters of its own."""
    deprecated("na3d_qk_with_bias", "natten.functional.na3d_qk(..., rpb=...)")
    sizes, steps = _deep(kernel_size_d, kernel_size), _deep(dilation_d, dilation)
    return functional.na3d_qk(query, key, sizes, steps, additional_keys, rpb=bias)


def enable_autotuner(forward_pass: bool = True, backward_pass: bool = True, **steps: Any) -> None:
    """use_autotuner"""
    deprecated("enable_autotuner", "natten.use_autotuner")
    context.use_autotuner(forward_pass, backward_pass, **steps)


def autotune_fna(
    na_dim: int, input_tensor: Tensor, kernel_size: Any, dilation: Any, is_causal: Any
) -> tuple[Any, Any]:
    """What natten.autotuner of 0.17 hands to the classes below: tilings of a forward and of a
    backward. They have no effect here, and are those that 0.17 takes without tuning."""
    deprecated("natten.autotuner.autotune_fna", "natten.use_autotuner")
    check_all_args(na_dim, kernel_size, dilation, is_causal)
    tile = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}[na_dim]
    return (tile, tile), (tile, tile, (1,) * na_dim, False)


# -------------------------------------------------------------------------------------------------
# classes of autograd functions, of which clients call apply


class _Applied:
    """What has an apply, as torch.autograd.Function does, and no instances."""

    rank: int
    heir: str

    @classmethod
    def _say(cls) -> None:
        deprecated(cls.__name__, f"natten.functional.{cls.heir.format(cls.rank)}", depth=4)


class _AppliedQK(_Applied):
    heir = "na{}d_qk"

    @classmethod
    def apply(
        cls,
        query: Tensor,
        key: Tensor,
        bias: Optional,
        additional_keys: Any,
        kernel_size: Ints,
        dilation: Ints | None = None,
        is_causal: Bools = False,
    ) -> Tensor:
        """na*d_qk; 0.15.0 had no additional keys before the kernel size."""
        cls._say()
        if dilation is None:
            additional_keys, kernel_size, dilation = None, additional_keys, kernel_size
        return _QK[cls.rank](
            query, key, kernel_size, dilation, additional_keys, is_causal, rpb=bias
        )


class _AppliedAV(_Applied):
    heir = "na{}d_av"

    @classmethod
    def apply(
        cls,
        attn: Tensor,
        value: Tensor,
        additional_values: Any,
        kernel_size: Ints,
        dilation: Ints | None = None,
        is_causal: Bools = False,
    ) -> Tensor:
        """na*d_av; 0.15.0 had no additional values before the kernel size."""
        cls._say()
        if dilation is None:
            additional_values, kernel_size, dilation = None, additional_values, kernel_size
        return _AV[cls.rank](attn, value, kernel_size, dilation, additional_values, is_causal)


class _AppliedFused(_Applied):
    heir = "na{}d"

    @classmethod
    def apply(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Optional,
        kernel_size: Ints,
        dilation: Ints,
        is_causal: Bools,
        scale: float | None,
        *tilings: Any,
    ) -> Any:
        """na*d; tilings have no effect."""
        cls._say()
        return _FUSED[cls.rank](query, key, value, kernel_size, dilation, is_causal, bias, scale)


def _named(pattern: str, base: type[_Applied]) -> dict[str, Any]:
    names = {rank: pattern.format(rank) for rank in (1, 2, 3)}
    return {name: type(name, (base,), {"rank": rank}) for rank, name in names.items()}


def _renamed(pattern: str, *functions: Any) -> dict[str, Any]:
    return {
        pattern.format(rank + 1): type(
            pattern.format(rank + 1), (), {"apply": staticmethod(function)}
        )
        for rank, function in enumerate(functions)
    }


CLASSES = {
    **_named("NeighborhoodAttention{}DQKAutogradFunction", _AppliedQK),
    **_named("NeighborhoodAttention{}DAVAutogradFunction", _AppliedAV),
    **_named("FusedNeighborhoodAttention{}D", _AppliedFused),
    **_renamed("NATTEN{}DQKRPBFunction", natten1dqkrpb, natten2dqkrpb, natten3dqkrpb),
    **_renamed("NATTEN{}DAVFunction", natten1dav, natten2dav, natten3dav),
}
FUNCTIONS = {
    function.__name__: function
    for function in (
        natten1dqkrpb,
        natten2dqkrpb,
        natten3dqkrpb,
        natten1dqk,
        natten2dqk,
        natten3dqk,
        natten1dav,
        natten2dav,
        natten3dav,
        na1d_qk_with_bias,
        na2d_qk_with_bias,
        na3d_qk_with_bias,
        enable_autotuner,
    )
}
