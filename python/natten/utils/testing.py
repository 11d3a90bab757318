# SPDX-License-Identifier: MIT
"""Decorators that skip a test where something is missing, for test suites written for NATTEN."""

from __future__ import annotations

import importlib.util
import unittest
from collections.abc import Callable
from typing import Any

from .._hardware import has_cuda, has_fna, has_fp64_gemm, has_gemm

__all__ = [
    "fna_supports_additional_kv",
    "skip_if_cuda_is_not_supported",
    "skip_if_experimental_ops_are_not_supported",
    "skip_if_fna_is_not_supported",
    "skip_if_fvcore_is_not_available",
    "skip_if_gemm_does_not_support_double_precision",
    "skip_if_gemm_is_not_supported",
    "skip_if_nested_is_not_supported",
    "skip_if_torch_compile_is_not_supported",
    "skip_if_torch_flop_count_is_not_supported",
    "skip_if_triton_is_not_supported",
]

_IS_CUDA_AVAILABLE = has_cuda()
_HAS_GEMM_KERNELS = has_gemm()
_GEMM_WITH_DOUBLE_PRECISION = has_fp64_gemm()
_HAS_FNA_KERNELS = has_fna()
_IS_FVCORE_AVAILABLE = importlib.util.find_spec("fvcore") is not None
_IS_TRITON_SUPPORTED = importlib.util.find_spec("triton") is not None
# Every torch that this package takes has them.
_SUPPORTS_NESTED = True
_IS_TORCH_COMPILE_SUPPORTED = True
_IS_TORCH_FLOP_COUNT_SUPPORTED = True
_SUPPORTS_EXPERIMENTAL_OPS = True
_PYTHON_SUPPORTS_DYNAMO = True
# The fused operation takes additional tokens by itself.
_HAS_XFORMERS_PARTIAL_ATTENTION = True

Decorator = Callable[[Any], Any]


def skip_if_cuda_is_not_supported() -> Decorator:
    """Skips without a CUDA device that this library can use."""
    return unittest.skipUnless(_IS_CUDA_AVAILABLE, "CUDA is not available.")


def skip_if_gemm_is_not_supported() -> Decorator:
    """Skips without unfused kernels for matrix units."""
    return unittest.skipUnless(_HAS_GEMM_KERNELS, "There are no GEMM kernels for this GPU.")


def skip_if_gemm_does_not_support_double_precision() -> Decorator:
    """Skips without unfused kernels for matrix units in float64."""
    reason = "There are no GEMM kernels in double precision for this GPU."
    return unittest.skipUnless(_GEMM_WITH_DOUBLE_PRECISION, reason)


def skip_if_fna_is_not_supported() -> Decorator:
    """Skips without a GPU for the fused operation."""
    return unittest.skipUnless(_HAS_FNA_KERNELS, "There is no GPU for the fused operation.")


def skip_if_nested_is_not_supported() -> Decorator:
    """Skips where torch has no nested tensors."""
    return unittest.skipUnless(_SUPPORTS_NESTED, "This torch has no nested tensors.")


def skip_if_experimental_ops_are_not_supported() -> Decorator:
    """Skips where torch has no custom operations."""
    return unittest.skipUnless(_SUPPORTS_EXPERIMENTAL_OPS, "This torch has no custom operations.")


def skip_if_torch_compile_is_not_supported() -> Decorator:
    """Skips where torch.compile does not work."""
    return unittest.skipUnless(_IS_TORCH_COMPILE_SUPPORTED, "torch.compile is not available.")


def skip_if_torch_flop_count_is_not_supported() -> Decorator:
    """Skips where torch counts no FLOPs."""
    return unittest.skipUnless(_IS_TORCH_FLOP_COUNT_SUPPORTED, "This torch counts no FLOPs.")


def skip_if_fvcore_is_not_available() -> Decorator:
    """Skips without fvcore."""
    return unittest.skipUnless(_IS_FVCORE_AVAILABLE, "fvcore is not installed.")


def skip_if_triton_is_not_supported() -> Decorator:
    """Skips without Triton."""
    return unittest.skipUnless(_IS_TRITON_SUPPORTED, "Triton is not installed.")


def fna_supports_additional_kv(head_dim: int, device_index: int | None = None) -> bool:
    """Whether the fused operation takes additional tokens: it always does."""
    return True
