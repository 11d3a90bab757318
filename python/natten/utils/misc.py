# SPDX-License-Identifier: MIT
"""What the GPU is, and sizes of weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .._errors import NattenTypeError
from .._hardware import get_device_cc as get_device_cc

__all__ = ["get_device_cc", "get_num_na_weights", "make_attn_tensor_from_input"]


def get_num_na_weights(kernel_size: Any) -> int:
    """Tokens in a window, from a tuple of kernel sizes."""
    if not isinstance(kernel_size, tuple):
        raise NattenTypeError(f"kernel_size must be a tuple here, got {kernel_size!r}.")
    return math.prod(kernel_size)


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    """Memory for weights, ``[batch, heads, *map, attention_dim]``, like a heads-first tensor; not
    filled in."""
    return input_tensor.new_empty((*input_tensor.shape[:-1], attention_dim))
