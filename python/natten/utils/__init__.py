# SPDX-License-Identifier: MIT
"""Helpers that programs import by name: argument checks, what the GPU can, logging."""

from . import checks, log, misc, tensor
from .checks import (
    check_additional_keys,
    check_additional_values,
    check_all_args,
    check_backward_tiling_config,
    check_causal_arg,
    check_dilation_arg,
    check_input_size_arg,
    check_kernel_size_arg,
    check_stride_arg,
    check_tiling_config,
)
from .explain import explain
from .misc import get_device_cc, get_num_na_weights, make_attn_tensor_from_input

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_backward_tiling_config",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "check_tiling_config",
    "checks",
    "explain",
    "get_device_cc",
    "get_num_na_weights",
    "log",
    "make_attn_tensor_from_input",
    "misc",
    "tensor",
]
