# SPDX-License-Identifier: MIT
"""Where NATTEN 0.17.4 and 0.17.5 have fused operations that torch.compile and torch's FLOP counter
see. All operations here are seen by them: these are natten.functional's."""

from ._legacy import deprecated_module
from .functional import na1d, na2d, na3d

__all__ = ["na1d", "na2d", "na3d"]

deprecated_module("natten.experimental", "natten.functional")
