# SPDX-License-Identifier: MIT
"""Where NATTEN 0.14 has NeighborhoodAttention3D."""

from ._legacy import deprecated
from .modules import NeighborhoodAttention3D

__all__ = ["NeighborhoodAttention3D"]

deprecated("natten.natten3d", "natten.NeighborhoodAttention3D")
