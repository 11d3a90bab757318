# SPDX-License-Identifier: MIT
"""The fused forward on a GPU beside torch's attention, in turns, in bursts with pauses.

    python3 bench/gpu_speed.py [--flex] [--only CASE] [OUT]

Needs torch with CUDA and the library built in build/. Effective TFLOP/s count the products of the
windows only: 4 * batch * heads * tokens * window * channels / time. Each case is also checked at
sampled queries against float64. Figures of one call compare with each other, not with another
call's: the board runs into its power limit."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

import natten  # noqa: E402
from natten.functional import na1d, na2d, na3d  # noqa: E402

# name: extents, window, batch, heads, channels
CASES = {
    "flux 256x256 w80": ((256, 256), (80, 80), 1, 24, 128),
    "hunyuan 30x48x80 w18x24x24": ((30, 48, 80), (18, 24, 24), 1, 24, 128),
    "1-D 32k w2k": ((32768,), (2048,), 1, 24, 128),
    "dense 16k": ((16384,), (16384,), 1, 24, 128),
    "56x56 w7 d32": ((56, 56), (7, 7), 128, 4, 32),
    "128x128 w13 d64": ((128, 128), (13, 13), 4, 16, 64),
    "16x56x56 w7 d64": ((16, 56, 56), (7, 7, 7), 1, 8, 64),
}
ROUNDS, BURST_S, PAUSE_S = 5, 0.06, 0.03


def tensors(case: str) -> list[torch.Tensor]:
    extents, _, batch, heads, channels = CASES[case]
    shape = (batch, *extents, heads, channels)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def flops(case: str) -> float:
    extents, window, batch, heads, channels = CASES[case]
    return 4.0 * batch * heads * math.prod(extents) * math.prod(window) * channels


def ours(case: str, qkv: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    extents, window = CASES[case][:2]
    op = (na1d, na2d, na3d)[len(extents) - 1]
    return lambda: op(*qkv, window)


def window_of(query: int, extent: int, window: int) -> slice:
    start = min(max(query - window // 2, 0), extent - window)
    return slice(start, start + window)


def worst_error(case: str, qkv: list[torch.Tensor], out: torch.Tensor) -> float:
    """At the corners and some queries inside, all heads, relative to the largest value."""
    extents, window, batch, _, channels = CASES[case]
    generator = torch.Generator().manual_seed(7)
    places = list(itertools.product(*[(0, n - 1) for n in extents]))
    places += [
        tuple(int(torch.randint(n, (1,), generator=generator)) for n in extents) for _ in range(24)
    ]
    worst = 0.0
    for place in places:
        box = tuple(window_of(*args) for args in zip(place, extents, window, strict=True))
        b = int(torch.randint(batch, (1,), generator=generator))
        q = qkv[0][(b, *place)].double()
        k, v = (x[(b, *box)].flatten(0, len(extents) - 1).double() for x in qkv[1:])
        scores = torch.einsum("hc,khc->hk", q, k) * channels**-0.5
        exact = torch.einsum("hk,khc->hc", scores.softmax(-1), v)
        error = (out[(b, *place)].double() - exact).abs().max() / exact.abs().max()
        worst = max(worst, float(error.nan_to_num(math.inf)))
    return worst


def sdpa(qkv: list[torch.Tensor], backend: torch.nn.attention.SDPBackend) -> Callable[[], object]:
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in qkv)

    def run() -> object:
        with torch.nn.attention.sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return run


def tile_shape(case: str) -> tuple[int, ...]:
    """Token tiles of FlexAttention's blocks of 128."""
    return {1: (128,), 2: (8, 16), 3: (4, 4, 8)}[len(CASES[case][0])]


def flex(case: str, qkv: list[torch.Tensor]) -> Callable[[], object]:
    """FlexAttention under the neighborhood mask, tokens in tiles of 128, permuted beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    extents, window = CASES[case][:2]
    tile = tile_shape(case)
    padded = [math.ceil(n / t) * t for n, t in zip(extents, tile, strict=True)]
    count = math.prod(padded)
    places = torch.arange(count, device="cuda").view(padded)
    split = [x for n, t in zip(padded, tile, strict=True) for x in (n // t, t)]
    axes = [*range(0, 2 * len(tile), 2), *range(1, 2 * len(tile), 2)]
    order = places.view(split).permute(axes).flatten()
    at = []
    rest = order
    for n in reversed(padded):
        at.insert(0, (rest % n).to(torch.int32))
        rest = rest // n

    def mask(b, h, q, k):  # noqa: ANN001, ANN202, ARG001
        inside = q >= 0
        for place, n, w in zip(at, extents, window, strict=True):
            start = (place[q] - w // 2).clamp(0, n - w)
            inside = inside & (place[k] >= start) & (place[k] < start + w) & (place[k] < n)
        return inside

    def permute(x: torch.Tensor) -> torch.Tensor:
        pad = [p - n for n, p in zip(extents, padded, strict=True)]
        widths = [y for p in reversed(pad) for y in (0, p)]
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, *widths)).flatten(1, -3)
        return x[:, order].transpose(1, 2).contiguous()

    # Shapes of one case must not make those of the next symbolic: the mask cannot take that.
    torch._dynamo.reset()
    compiled_mask = torch.compile(create_block_mask, dynamic=False)
    blocks = compiled_mask(mask, None, None, count, count, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (permute(x) for x in qkv)
    return lambda: compiled(q, k, v, block_mask=blocks)


def clock() -> float:
    """MHz, from the driver; 0 if it does not say."""
    try:
        return float(torch.cuda.clock_rate())
    except Exception:  # noqa: BLE001
        return 0.0


def race(runs: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Medians over bursts taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    clocks: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:
        runs[name]()
    torch.cuda.synchronize()
    for round_ in range(ROUNDS):
        names = list(runs)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            time.sleep(PAUSE_S)
            begin, events = time.monotonic(), []
            while len(events) < 3 or time.monotonic() - begin < BURST_S:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                repeats = 4
                first.record()
                for _ in range(repeats):
                    runs[name]()
                last.record()
                last.synchronize()
                events.append(first.elapsed_time(last) / repeats)
            clocks[name].append(clock())
            times[name] += events
    return {
        name: {
            "ms": sorted(t)[len(t) // 2],
            "low": min(t),
            "mhz": sum(clocks[name]) / len(clocks[name]),
        }
        for name, t in times.items()
    }


def matmul() -> Callable[[], object]:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def measure(case: str, with_flex: bool) -> list[dict[str, object]]:
    qkv = tensors(case)
    run = ours(case, qkv)
    error = worst_error(case, qkv, run())
    runs: dict[str, Callable[[], object]] = {"natten": run, "matmul": matmul()}
    work = {"natten": flops(case), "matmul": 2.0 * 8192**3}
    peers = torch.nn.attention.SDPBackend
    if case.startswith("dense") or not with_flex:
        dense = qkv if case.startswith("dense") else tensors("dense 16k")
        for name, backend in (("cudnn", peers.CUDNN_ATTENTION), ("flash", peers.FLASH_ATTENTION)):
            if case.startswith("dense") or name == "cudnn":
                runs[name + " dense 16k"] = sdpa(dense, backend)
                work[name + " dense 16k"] = flops("dense 16k")
    if with_flex:
        runs["flex"] = flex(case, qkv)
        work["flex"] = flops(case)
    rows = []
    for name, row in race(runs).items():
        rate = work[name] / row["ms"] / 1e9
        rows.append({"case": case, "what": name, "tflops": rate, **row})
        if name == "natten":
            rows[-1]["error"] = error
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flex", action="store_true", help="also FlexAttention (slow to start)")
    parser.add_argument("--only", default="")
    parser.add_argument("out", nargs="?", default=os.environ.get("OUT", "."))
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "natten", natten.__version__)
    table: list[dict[str, object]] = []
    wrong = 0
    for case in CASES:
        if not case.startswith(options.only):
            continue
        try:
            rows = measure(case, options.flex)
        except Exception as failure:  # noqa: BLE001
            print(f"FAIL {case}: {failure!r:.600}", flush=True)
            wrong += 1
            continue
        first = rows[0]
        for row in rows:
            ratio = float(first["tflops"]) / float(row["tflops"])  # type: ignore[arg-type]
            note = f"error {row['error']:.1e}" if "error" in row else f"natten / this {ratio:.3f}"
            print(
                f"{case:28s} {row['what']!s:16s} {row['ms']:9.4f} ms (best {row['low']:9.4f})"
                f" {row['tflops']:7.1f} TFLOP/s {row['mhz']:5.0f} MHz  {note}",
                flush=True,
            )
        wrong += float(first["error"]) > 0.02  # type: ignore[arg-type]
        table += rows
        torch.cuda.empty_cache()
    (Path(options.out) / "speed.json").write_text(json.dumps(table, indent=1))
    print(f"gpu_speed: {wrong} cases wrong")
    return wrong != 0


if __name__ == "__main__":
    raise SystemExit(main())
