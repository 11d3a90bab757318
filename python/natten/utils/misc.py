# SPDX-License-Identifier: MIT
"""What the GPU is, and sizes of weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .._errors import NattenTypeError
from .._hardware import get_device_cc as get_device_cc
from .._window import ints
from .checks import check_tensor

__all__ = ["get_device_cc", "get_num_na_weights", "make_attn_tensor_from_input"]


def get_num_na_weights(kernel_size: Any) -> int:
    """Tokens in a window, from a tuple of kernel sizes."""
    if not isinstance(kernel_size, tuple) or not all(isinstance(k, int) for k in kernel_size):
        raise NattenTypeError(f"kernel_size must be a tuple of integers here, got {kernel_size!r}.")
    return math.prod(kernel_size)


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    """Memory for weights, ``[batch, heads, *map, attention_dim]``, like a heads-first tensor; not
    filled in."""
    shape = check_tensor("input_tensor", input_tensor).shape
    return input_tensor.new_empty((*shape[:-1], *ints("attention_dim", attention_dim, 1)))
