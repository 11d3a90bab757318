# SPDX-License-Identifier: MIT
"""Neighborhood attention. See natten.functional for functions and natten.modules for modules.

Names load when they are first used, so that ``import natten`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._errors import NattenError, NattenTypeError

if TYPE_CHECKING:
    from .cache import warmup
    from .context import (
        are_deterministic_algorithms_enabled,
        is_fna_enabled,
        is_fused_na_enabled,
        is_kv_parallelism_in_fused_na_enabled,
        use_deterministic_algorithms,
        use_fna,
        use_fused_na,
        use_kv_parallelism_in_fused_na,
    )
    from .functional import (
        attention,
        merge_attentions,
        na1d,
        na2d,
        na3d,
        neighborhood_attention_generic,
    )
    from .modules import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
    )

__version__ = "0.18.0"

_HOMES = {
    "cache": ("warmup",),
    "functional": (
        "attention",
        "merge_attentions",
        "na1d",
        "na2d",
        "na3d",
        "neighborhood_attention_generic",
    ),
    "modules": (
        "NeighborhoodAttention1D",
        "NeighborhoodAttention2D",
        "NeighborhoodAttention3D",
    ),
    "context": (
        "are_deterministic_algorithms_enabled",
        "is_fna_enabled",
        "is_fused_na_enabled",
        "is_kv_parallelism_in_fused_na_enabled",
        "use_deterministic_algorithms",
        "use_fna",
        "use_fused_na",
        "use_kv_parallelism_in_fused_na",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("cache", "context", "functional", "modules")

__all__ = [
    "NattenError",
    "NattenTypeError",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "are_deterministic_algorithms_enabled",
    "attention",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention_generic",
    "use_deterministic_algorithms",
    "use_fna",
    "use_fused_na",
    "use_kv_parallelism_in_fused_na",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, *_SUBMODULES})
