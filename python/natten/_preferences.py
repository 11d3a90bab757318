# SPDX-License-Identifier: MIT
"""From the settings of natten.context, and those of torch that say the same, to preferences of the
library (natten_preference)."""

from __future__ import annotations

import torch

from . import _lib
from ._state import MemoryUsagePreference, NattenContext, lock

_MEMORY = {
    MemoryUsagePreference.Strict: _lib.PREFER_LITTLE_MEMORY,
    MemoryUsagePreference.Unrestricted: _lib.PREFER_MUCH_MEMORY,
}

#: Those of calls that begin now.
current: int = _lib.PREFER_USUAL


def _torch_allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:  # since a program has used the newer name
        return getattr(matmul, "fp32_precision", "ieee") == "tf32"


def _wanted() -> int:
    context = NattenContext
    found = 0
    if context.is_gemm_enabled:
        found |= _lib.PREFER_GEMM
    if context.is_tiled_enabled:
        found |= _lib.PREFER_TILED
    if context.is_tf32_enabled or _torch_allows_tf32():
        found |= _lib.PREFER_TF32
    if context.is_kv_parallelism_enabled and not torch.are_deterministic_algorithms_enabled():
        found |= _lib.PREFER_KV_PARALLEL
        found |= _MEMORY.get(context.training_memory_preference, 0)
    return found


def refresh() -> int:
    """Reads the settings again. Whoever changes one calls this, and so does every call on CUDA, as
    torch's may have changed."""
    global current
    with lock:  # or the library might keep what another thread found before
        found = _wanted()
        if found != current:
            current = found
            _lib.library.natten_torch_prefer(found)
    return found
