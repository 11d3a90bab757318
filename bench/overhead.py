# SPDX-License-Identifier: MIT
"""What a call costs beside the computation: a tiny map against scaled_dot_product_attention on the
same numbers, plans of new problems, importing the package. `NATTEN_DISABLE=native` measures the
kernels that torch before 2.10 gets.

    python bench/overhead.py

Each figure is the best of many in turns: what disturbs a machine only ever adds.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from natten import _call, _lib, _ops
from natten.functional import na2d

PLANS = {
    "b1h4d32_56x56_w7x7": ((1, 56, 56, 4, 32), (7, 7, 1, 1, 1, 1, 0, 0)),
    "b1h4d32_56x56_w7x7_d8x8": ((1, 56, 56, 4, 32), (7, 7, 1, 1, 8, 8, 0, 0)),
    "b1h4d64_4096_w513_c1": ((1, 4096, 4, 64), (513, 1, 1, 1)),
    "b1h24d128_30x48x80_w18x24x24": ((1, 30, 48, 80, 24, 128), (18, 24, 24, *[1] * 6, 0, 0, 0)),
}


def best(calls: Sequence[Callable[[], Any]], rounds: int = 300, repeats: int = 20) -> list[float]:
    """Seconds of one call of each, taken in turns."""
    found = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            found[i] = min(found[i], (time.perf_counter() - begin) / repeats)
    return found


def tiny_map(grad: bool, rounds: int = 300) -> tuple[float, float]:
    """Seconds of na2d on 2 x 4 x 4 tokens, a head of 8 channels and windows of 3 x 3, on one
    thread, and of scaled_dot_product_attention of the same tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        maps = torch.randn(2, 4, 4, 1, 8)
        rows = maps.flatten(1, 2).transpose(1, 2).contiguous().requires_grad_(grad)
        maps.requires_grad_(grad)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        calls = [lambda: na2d(maps, maps, maps, 3), lambda: sdpa(rows, rows, rows)]
        ours, theirs = best(calls, rounds)
    finally:
        torch.set_num_threads(threads)
    return ours, theirs


def plan(shape: tuple[int, ...], window: tuple[int, ...], count: int = 200) -> float:
    """Seconds to find and prepare a kernel for a forward that was not seen before."""
    strides = torch.empty(shape, device="meta").stride()
    view = _call.View(shape, strides, _lib.F32, _lib.CPU, 0)
    taken = []
    for i in range(count):
        # The scale is part of the problem: each of these is a new one.
        views = [view] * 3 + [None] * 3
        call = _call.Call(_call.NA, views, window, 1 + i * 1e-3, 3)
        size = ctypes.c_size_t()
        begin = time.perf_counter()
        status = _lib.library.natten_workspace(call.struct.problem, size)
        taken.append(time.perf_counter() - begin)
        assert status == 0
    return sorted(taken)[count // 2]


def imports(count: int = 8) -> float:
    """Processor seconds that importing natten takes where torch is imported."""
    code = (
        "import torch, time; begin = time.process_time(); "
        "import natten.functional, natten.modules; print(time.process_time() - begin)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, check=True, capture_output=True) for _ in range(count)]
    return min(float(run.stdout) for run in runs)


def main() -> None:
    kernels = f"Python kernels ({_ops.WHY_PYTHON})" if _ops.WHY_PYTHON else "native kernels"
    print(f"torch {torch.__version__}, {kernels}")
    for grad in (False, True):
        ours, theirs = tiny_map(grad)
        what = "with gradients" if grad else "without gradients"
        print(
            f"a tiny map {what}: {ours * 1e6:.1f} us, SDPA {theirs * 1e6:.1f} us: "
            f"{ours / theirs:.2f} times"
        )
    for name, problem in PLANS.items():
        print(f"a new plan for {name}: {plan(*problem) * 1e6:.0f} us")
    print(f"import natten after torch: {imports() * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
