# SPDX-License-Identifier: MIT
"""Where NATTEN 0.14 has NeighborhoodAttention1D."""

from ._legacy import deprecated_module
from .modules import NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]

deprecated_module("natten.natten1d", "natten.NeighborhoodAttention1D")
