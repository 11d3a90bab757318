# SPDX-License-Identifier: MIT
"""Neighborhood attention. See natten.functional for functions and natten.modules for modules.

Names load when they are first used, so that ``import natten`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._errors import NattenError, NattenTypeError

if TYPE_CHECKING:
    from ._configs import *
    from .cache import *
    from .context import *
    from .functional import *
    from .modules import *

__version__ = "0.18.0"

#: That there is a compiled library; it is always there.
HAS_LIBNATTEN = True

_HOMES = {
    "_configs": (
        "allow_flex_compile",
        "allow_flex_compile_backprop",
        "disable_flex_compile",
        "disable_flex_compile_backprop",
        "get_bwd_configs_for_cutlass_blackwell_fmha",
        "get_bwd_configs_for_cutlass_blackwell_fna",
        "get_bwd_configs_for_cutlass_fmha",
        "get_bwd_configs_for_cutlass_fna",
        "get_bwd_configs_for_cutlass_hopper_fmha",
        "get_bwd_configs_for_cutlass_hopper_fna",
        "get_configs_for_cutlass_blackwell_fmha",
        "get_configs_for_cutlass_blackwell_fna",
        "get_configs_for_cutlass_fmha",
        "get_configs_for_cutlass_fna",
        "get_configs_for_cutlass_hopper_fmha",
        "get_configs_for_cutlass_hopper_fna",
        "get_configs_for_flex_fmha",
        "get_configs_for_flex_fna",
        "is_flex_compile_allowed",
        "is_flex_compile_backprop_allowed",
    ),
    "_hardware": (
        "has_bfloat",
        "has_cuda",
        "has_fna",
        "has_fp32_gemm",
        "has_fp64_gemm",
        "has_fused_na",
        "has_gemm",
        "has_half",
        "has_tf32_gemm",
    ),
    "cache": ("warmup",),
    "functional": (
        "attention",
        "merge_attentions",
        "na1d",
        "na2d",
        "na3d",
        "neighborhood_attention_generic",
        "neighborhood_attention_varlen",
    ),
    "modules": (
        "NeighborhoodAttention1D",
        "NeighborhoodAttention2D",
        "NeighborhoodAttention3D",
    ),
    "context": (
        "are_deterministic_algorithms_enabled",
        "disable_autotuner",
        "disable_fused_na",
        "disable_gemm_na",
        "disable_tf32",
        "disable_tiled_na",
        "enable_fused_na",
        "enable_gemm_na",
        "enable_tf32",
        "enable_tiled_na",
        "force_flex_attention",
        "get_memory_usage_preference",
        "is_autotuner_enabled",
        "is_autotuner_enabled_for_backward",
        "is_autotuner_enabled_for_forward",
        "is_autotuner_thorough_for_backward",
        "is_autotuner_thorough_for_forward",
        "is_fna_enabled",
        "is_fused_na_enabled",
        "is_gemm_na_enabled",
        "is_kv_parallelism_in_fused_na_enabled",
        "is_memory_usage_default",
        "is_memory_usage_strict",
        "is_memory_usage_unrestricted",
        "is_tf32_in_gemm_na_enabled",
        "is_tiled_na_enabled",
        "set_memory_usage_preference",
        "use_autotuner",
        "use_deterministic_algorithms",
        "use_flex_attention",
        "use_fna",
        "use_fused_na",
        "use_gemm_na",
        "use_kv_parallelism_in_fused_na",
        "use_tf32_in_gemm_na",
        "use_tiled_na",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = (
    "autotuner",
    "cache",
    "context",
    "distributed",
    "experimental",
    "flops",
    "functional",
    "libnatten",
    "modules",
    "natten1d",
    "natten2d",
    "natten3d",
    "nested",
    "numpy",
    "ops",
    "profiler",
    "token_permute",
    "types",
    "utils",
    "varlen",
)

__all__ = ["HAS_LIBNATTEN", "NattenError", "NattenTypeError", "__version__", *_HOME_OF]


def _load(module: str, name: str) -> Any:
    """The module that a name is from."""
    try:
        return importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        text = f"{__name__}.{name} needs torch, which is not installed; natten.numpy does not."
        raise ModuleNotFoundError(text, name="torch") from None


def __getattr__(name: str) -> Any:
    name = "libnatten" if name == "_C" else name
    if name in _SUBMODULES:
        return _load(name, name)
    if name.startswith("natten") or name == "enable_autotuner":
        # Functions of 0.14 to 0.17.4.
        return getattr(_load("functional", name), name)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_load(_HOME_OF[name], name), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, *_SUBMODULES})
