# SPDX-License-Identifier: MIT
"""What test_flags.py asks of a GPU that is made of software (tests/host): how every operation is
computed under every setting, as JSON. host_device.py DTYPE"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

import natten
from natten import _call, _lib, _preferences
from natten.context import NattenContext

SETTINGS: dict[str, Callable[[], object]] = {
    "start": lambda: None,
    "gemm off": natten.disable_gemm_na,
    "tiled off": natten.disable_tiled_na,
    "tf32 on": natten.enable_tf32,
    "kv on": natten.use_kv_parallelism_in_fused_na,
    "kv strict": lambda: (
        natten.use_kv_parallelism_in_fused_na(),
        natten.set_memory_usage_preference("strict"),
    ),
    "kv unrestricted": lambda: (
        natten.use_kv_parallelism_in_fused_na(),
        natten.set_memory_usage_preference("unrestricted"),
    ),
}


def explained(op: _call.Op, dtype: int) -> str:
    """2 heads of 9 tokens with 16 channels, windows of 3."""
    first = op.order == _lib.HEADS_FIRST
    strides = (288, 144, 16, 1) if first else (288, 32, 16, 1)
    token = _call.View((1, 2, 9, 16) if first else (1, 9, 2, 16), strides, dtype, _lib.CUDA, 0)
    slots = _call.View((1, 2, 9, 3), (54, 27, 3, 1), dtype, _lib.CUDA, 0)
    lse = _call.View((1, 9, 2), (18, 2, 1), _lib.F32, _lib.CUDA, 0)
    special = {_lib.ATTN: slots, _lib.D_ATTN: slots, _lib.LSE: lse}
    views = [None if r in _call.OPTIONAL else special.get(r, token) for r in op.inputs]
    try:
        return _call.Call(op, views, (3, 1, 1, 0), 1.0, 1, _preferences.refresh()).explain()
    except NotImplementedError as error:
        return str(error)


def main() -> None:
    # torch has no part in this: only the library believes in the device.
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    dtype = {"float32": _lib.F32, "bfloat16": _lib.BF16}[sys.argv[1]]
    found: dict[str, object] = {"capability": natten.utils.get_device_cc()}
    for name in ("cuda", "half", "bfloat", "fna", "gemm", "tf32_gemm", "fp64_gemm"):
        found[f"has_{name}"] = getattr(natten, f"has_{name}")()
    for setting, change in SETTINGS.items():
        NattenContext.reset()
        change()
        found[setting] = {op.name: explained(op, dtype) for op in _call.OPS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
