# SPDX-License-Identifier: MIT
"""The switches of NATTEN 0.17's extension module. Its operations, which write into tensors that
they are given, are not here: natten.h is the interface of the library."""

from __future__ import annotations

from . import context
from .context import has_cuda as has_cuda
from .context import has_gemm as has_gemm


def get_gemm_na() -> bool:
    """context.is_gemm_na_enabled()"""
    return context.is_gemm_na_enabled()


def set_gemm_na(mode: bool) -> None:
    """context.use_gemm_na(mode)"""
    context.use_gemm_na(mode)


def get_tiled_na() -> bool:
    """context.is_tiled_na_enabled()"""
    return context.is_tiled_na_enabled()


def set_tiled_na(mode: bool) -> None:
    """context.use_tiled_na(mode)"""
    context.use_tiled_na(mode)


def get_gemm_tf32() -> bool:
    """context.is_tf32_in_gemm_na_enabled()"""
    return context.is_tf32_in_gemm_na_enabled()


def set_gemm_tf32(mode: bool) -> None:
    """context.use_tf32_in_gemm_na(mode)"""
    context.use_tf32_in_gemm_na(mode)
