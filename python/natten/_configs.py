# SPDX-License-Identifier: MIT
"""What programs ask about the kernels of NATTEN 0.20 and later: which tiles there are to choose
from, and whether FlexAttention may be compiled.

None of those kernels is here. The lists are therefore empty, as they are there for tensors that a
kernel does not take, and the settings are remembered without effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._errors import NattenError, NattenTypeError
from ._state import NattenContext, flag

_Getter = Callable[[Tensor, Tensor, Tensor], list[Any]]


def _getter(name: str, *, one_axis: bool) -> _Getter:
    dims = (4,) if one_axis else (4, 5, 6)

    def getter(query: Tensor, key: Tensor, value: Tensor) -> list[Any]:
        for role, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise NattenTypeError(f"{role} must be a tensor, got {type(tensor).__name__}.")
            if tensor.dim() not in dims:
                raise NattenError(
                    f"{role} must have {' or '.join(map(str, dims))} dimensions, got "
                    f"{tensor.dim()}."
                )
        return []

    getter.__name__ = getter.__qualname__ = name
    getter.__doc__ = (
        "Settings to choose from for these heads-last tensors: none. This library chooses itself."
    )
    return getter


get_configs_for_cutlass_fna = _getter("get_configs_for_cutlass_fna", one_axis=False)
get_configs_for_cutlass_hopper_fna = _getter("get_configs_for_cutlass_hopper_fna", one_axis=False)
get_configs_for_cutlass_blackwell_fna = _getter(
    "get_configs_for_cutlass_blackwell_fna", one_axis=False
)
get_configs_for_flex_fna = _getter("get_configs_for_flex_fna", one_axis=False)
get_configs_for_cutlass_fmha = _getter("get_configs_for_cutlass_fmha", one_axis=True)
get_configs_for_cutlass_hopper_fmha = _getter("get_configs_for_cutlass_hopper_fmha", one_axis=True)
get_configs_for_cutlass_blackwell_fmha = _getter(
    "get_configs_for_cutlass_blackwell_fmha", one_axis=True
)
get_configs_for_flex_fmha = _getter("get_configs_for_flex_fmha", one_axis=True)
get_bwd_configs_for_cutlass_fna = _getter("get_bwd_configs_for_cutlass_fna", one_axis=False)
get_bwd_configs_for_cutlass_hopper_fna = _getter(
    "get_bwd_configs_for_cutlass_hopper_fna", one_axis=False
)
get_bwd_configs_for_cutlass_blackwell_fna = _getter(
    "get_bwd_configs_for_cutlass_blackwell_fna", one_axis=False
)
get_bwd_configs_for_cutlass_fmha = _getter("get_bwd_configs_for_cutlass_fmha", one_axis=True)
get_bwd_configs_for_cutlass_hopper_fmha = _getter(
    "get_bwd_configs_for_cutlass_hopper_fmha", one_axis=True
)
get_bwd_configs_for_cutlass_blackwell_fmha = _getter(
    "get_bwd_configs_for_cutlass_blackwell_fmha", one_axis=True
)


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Remembers whether FlexAttention may be compiled, and for gradients too; without effect."""
    backprop = flag("backprop", backprop)
    NattenContext.flex_compile = flag("mode", mode)
    NattenContext.flex_compile_backprop = mode and backprop


def disable_flex_compile() -> None:
    """allow_flex_compile(False)."""
    allow_flex_compile(False)


def is_flex_compile_allowed() -> bool:
    """Whether allow_flex_compile was called; it changes nothing that is computed."""
    return NattenContext.flex_compile


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """Remembers whether FlexAttention may be compiled for gradients; without effect."""
    NattenContext.flex_compile_backprop = flag("mode", mode)


def disable_flex_compile_backprop() -> None:
    """allow_flex_compile_backprop(False)."""
    allow_flex_compile_backprop(False)


def is_flex_compile_backprop_allowed() -> bool:
    """Whether allow_flex_compile_backprop was called; it changes nothing that is computed."""
    return NattenContext.flex_compile_backprop
