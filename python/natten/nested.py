# SPDX-License-Identifier: MIT
"""Names of NATTEN 0.15 to 0.17 for unfused operations on nested tensors, which the functions of
natten.functional take as they are, gradients included."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import functional
from ._legacy import deprecated
from ._window import Bools, Ints

__all__ = [
    "na1d_av_nested",
    "na1d_qk_nested",
    "na2d_av_nested",
    "na2d_qk_nested",
    "na3d_av_nested",
    "na3d_qk_nested",
]

Optional = Tensor | None


def _qk(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def nested(
        query: Tensor,
        key: Tensor,
        bias: Optional,
        kernel_size: Ints,
        dilation: Ints,
        additional_keys: Optional = None,
        is_causal: Bools = False,
    ) -> Tensor:
        deprecated(f"{function.__name__}_nested", f"natten.functional.{function.__name__}")
        return function(query, key, kernel_size, dilation, additional_keys, is_causal, rpb=bias)

    return nested


def _av(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def nested(
        attn: Tensor,
        value: Tensor,
        kernel_size: Ints,
        dilation: Ints,
        additional_values: Optional = None,
        is_causal: Bools = False,
    ) -> Tensor:
        deprecated(f"{function.__name__}_nested", f"natten.functional.{function.__name__}")
        return function(attn, value, kernel_size, dilation, additional_values, is_causal)

    return nested


na1d_qk_nested = _qk(functional.na1d_qk)
na2d_qk_nested = _qk(functional.na2d_qk)
na3d_qk_nested = _qk(functional.na3d_qk)
na1d_av_nested = _av(functional.na1d_av)
na2d_av_nested = _av(functional.na2d_av)
na3d_av_nested = _av(functional.na3d_av)
