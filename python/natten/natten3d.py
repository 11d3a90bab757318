# SPDX-License-Identifier: MIT
"""Where NATTEN 0.14 has NeighborhoodAttention3D."""

from ._legacy import deprecated_module
from .modules import NeighborhoodAttention3D

__all__ = ["NeighborhoodAttention3D"]

deprecated_module("natten.natten3d", "natten.NeighborhoodAttention3D")
