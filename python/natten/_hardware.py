# SPDX-License-Identifier: MIT
"""What the GPUs of this machine can do with this library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _lib

if TYPE_CHECKING:
    import torch

    Device = int | torch.device | str | None


def get_device_cc(device_index: Device = None) -> int:
    """Compute capability of a GPU, times ten: 90 for 9.0. Torch's current CUDA device unless given;
    0 if there is none that this library can use, as on a machine without a GPU, or without torch.
    """
    try:
        import torch
    except ModuleNotFoundError:
        return 0
    if not torch.cuda.is_available():
        return 0
    index = device_index
    if isinstance(index, (str, torch.device)):
        device = torch.device(index)
        if device.type != "cuda":
            return 0
        index = device.index
    index = torch.cuda.current_device() if index is None else index
    return int(_lib.library.natten_cuda_capability(index))


def has_cuda() -> bool:
    """Whether torch has a CUDA device, and this library can use it: there is a driver, and kernels
    can be compiled or have been."""
    return get_device_cc() > 0


def has_half(device_index: Device = None) -> bool:
    """Whether float16 can be computed on the GPU."""
    return get_device_cc(device_index) > 0


def has_bfloat(device_index: Device = None) -> bool:
    """Whether bfloat16 can be computed on the GPU at speed, which takes compute capability 8.0."""
    return get_device_cc(device_index) >= 80


def has_fused_na(device_index: Device = None) -> bool:
    """Whether the fused operation can be computed on the GPU. (On a CPU it always can.)"""
    return get_device_cc(device_index) > 0


has_fna = has_fused_na


def _kernel_generations(*operations: str) -> list[int]:
    """The oldest GPUs that kernels for matrix units were written for, of these operations."""
    generations, index = [], 0
    while name := _lib.library.natten_kernel_name(index):
        device, generation, operation = name.decode().split("-", 2)
        if device == "cuda" and generation.startswith("sm") and operation in operations:
            generations.append(int(generation[2:]))
        index += 1
    return generations


def has_gemm(device_index: Device = None) -> bool:
    """Whether the unfused operations have kernels for this GPU's matrix units. Without them other
    kernels compute the same, more slowly."""
    capability = get_device_cc(device_index)
    return any(capability >= oldest for oldest in _kernel_generations("qk", "av"))


def has_tf32_gemm(device_index: Device = None) -> bool:
    """has_gemm, in TF32 for float32 tensors: from compute capability 8.0 on."""
    return get_device_cc(device_index) >= 80 and has_gemm(device_index)


def has_fp64_gemm(device_index: Device = None) -> bool:
    """has_gemm, for float64: from compute capability 8.0 on."""
    return get_device_cc(device_index) >= 80 and has_gemm(device_index)


has_fp32_gemm = has_tf32_gemm
