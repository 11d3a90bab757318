# SPDX-License-Identifier: MIT
"""Where NATTEN 0.14 has NeighborhoodAttention2D."""

from ._legacy import deprecated_module
from .modules import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]

deprecated_module("natten.natten2d", "natten.NeighborhoodAttention2D")
