# SPDX-License-Identifier: MIT
"""The fused forward on a GPU beside torch's attention, in turns, in bursts with pauses.

    python3 bench/gpu_speed.py [--flex] [--only CASE] [--limit SECONDS] [--rehearse] [OUT]

Needs torch with CUDA and the library built in build/. Beside each case, in turns with it, run
cuDNN's and flash attention on 16k tokens without windows (a rate to hold against, as neither knows
windows), FlexAttention with the case's own mask, tokens in the order that needs the fewest blocks,
and a product of matrices. Effective TFLOP/s count the products of the windows only: 4 * batch *
heads * tokens * window * channels / time. Each case is also checked at sampled queries against
float64. Figures of one call compare with each other, not with another call's: the board runs into
its power limit. Ends with one table. --rehearse goes the same way on a CPU, in small: it proves
this program, not the kernel."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from flex import Neighborhood, tile_shape, window_of

ROOT = Path(__file__).resolve().parents[1]
if find_spec("natten") is None:
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
# Part of the rate of cuDNN's dense forward in the same run that the kernel is to reach.
TARGETS = {
    "flux 256x256 w80": 0.85,
    "hunyuan 30x48x80 w18x24x24": 0.68,
    "1-D 32k w2k": 0.87,
    "dense 16k": 0.98,
}
DENSE = "dense 16k"
REHEARSAL = {
    "2-D": ((13, 20), (5, 4), 2, 2, 8),
    "3-D": ((5, 6, 9), (3, 3, 4), 1, 1, 8),
    "1-D": ((70,), (9,), 1, 2, 16),
    DENSE: ((64,), (64,), 1, 2, 16),
}
ROUNDS, BURST_S, PAUSE_S = 5, 0.06, 0.03
DEVICE = "cuda"  # where tensors are made


def tensors(case: str) -> list[torch.Tensor]:
    extents, _, batch, heads, channels = CASES[case]
    shape = (batch, *extents, heads, channels)
    return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]


def flops(case: str) -> float:
    extents, window, batch, heads, channels = CASES[case]
    return 4.0 * batch * heads * math.prod(extents) * math.prod(window) * channels


def ours(case: str, qkv: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    extents, window = CASES[case][:2]
    op = (na1d, na2d, na3d)[len(extents) - 1]
    return lambda: op(*qkv, window)


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


def flex(case: str, qkv: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """FlexAttention under the neighborhood mask, tokens in tiles of 128, permuted beforehand."""
    # Shapes of one case must not make those of the next symbolic: the mask cannot take that.
    torch._dynamo.reset()
    extents, window = CASES[case][:2]
    neighborhood = Neighborhood(extents, window, device=DEVICE, compiled=DEVICE == "cuda")
    q, k, v = (neighborhood.permute(x) for x in qkv)
    return lambda: neighborhood.attend(q, k, v)


def clock() -> float:
    """MHz, from the driver; 0 if it does not say."""
    try:
        return float(torch.cuda.clock_rate())
    except Exception:  # noqa: BLE001
        return 0.0


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Of one call, by the GPU's clock."""
    if DEVICE != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repeats


def race(runs: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Medians over bursts taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    clocks: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        milliseconds(run, 1)
    for round_ in range(ROUNDS):
        names = list(runs)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            time.sleep(PAUSE_S)
            begin, taken = time.monotonic(), 0
            while taken < 3 or time.monotonic() - begin < BURST_S:
                times[name].append(milliseconds(runs[name], 4))
                taken += 1
            clocks[name].append(clock())
    return {
        name: {
            "ms": sorted(t)[len(t) // 2],
            "low": min(t),
            "mhz": sum(clocks[name]) / len(clocks[name]),
        }
        for name, t in times.items()
    }


def matmul() -> tuple[Callable[[], object], float]:
    """A product of matrices, and its work."""
    size = 8192 if DEVICE == "cuda" else 128
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3


def peers() -> dict[str, torch.nn.attention.SDPBackend]:
    backends = torch.nn.attention.SDPBackend
    if DEVICE != "cuda":
        return {"sdpa": backends.MATH}
    return {"cudnn": backends.CUDNN_ATTENTION, "flash": backends.FLASH_ATTENTION}


def measure(case: str, with_flex: bool) -> list[dict[str, object]]:
    qkv = tensors(case)
    run = ours(case, qkv)
    error = worst_error(case, qkv, run())
    runs: dict[str, Callable[[], object]] = {"natten": run}
    work = {"natten": flops(case)}
    runs["matmul"], work["matmul"] = matmul()
    dense = qkv if case == DENSE else tensors(DENSE)
    for name, backend in peers().items():
        runs[name] = sdpa(dense, backend)
        work[name] = flops(DENSE)
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


def show(rows: list[dict[str, object]]) -> None:
    for row in rows:
        print(
            f"{row['case']!s:28s} {row['what']!s:8s} {row['ms']:10.4f} ms (best {row['low']:10.4f})"
            f" {row['tflops']:7.1f} TFLOP/s {row['mhz']:5.0f} MHz",
            flush=True,
        )


def summary(table: list[dict[str, object]]) -> str:
    """A line for each case: the rate, its ratio to each peer's, percent of the matrix product's,
    and what was to be reached beside cuDNN."""
    cases = list(dict.fromkeys(str(row["case"]) for row in table))
    others = list(dict.fromkeys(str(row["what"]) for row in table if row["what"] != "natten"))
    titles = [f"/ {name}" if name != "matmul" else "% matmul" for name in others]
    lines = [f"{'effective TFLOP/s':28s} {'natten':>8s}" + "".join(f"{t:>10s}" for t in titles)]
    lines[0] += f"{'target':>10s}{'error':>10s}"
    for case in cases:
        rows = {str(row["what"]): row for row in table if row["case"] == case}
        own = float(rows["natten"]["tflops"])  # type: ignore[arg-type]
        line = f"{case:28s} {own:8.1f}"
        for name in others:
            if name not in rows:
                line += f"{'-':>10s}"
                continue
            ratio = own / float(rows[name]["tflops"])  # type: ignore[arg-type]
            line += f"{100 * ratio:9.1f}%" if name == "matmul" else f"{ratio:10.3f}"
        target = TARGETS.get(case)
        line += f"{target:10.2f}" if target else f"{'-':>10s}"
        lines.append(line + f"{rows['natten']['error']:10.1e}")
    return "\n".join(lines)


def measure_all(with_flex: bool, only: str, limit: float) -> tuple[list[dict[str, object]], int]:
    """The rows of all cases, and how many of these went wrong."""
    table: list[dict[str, object]] = []
    wrong = 0
    begin = time.monotonic()
    for case in CASES:
        if not case.startswith(only):
            continue
        if time.monotonic() - begin > limit:
            print(f"SKIP {case}: over {limit:.0f} s", flush=True)
            wrong += 1
            continue
        try:
            rows = measure(case, with_flex)
        except Exception as failure:  # noqa: BLE001
            print(f"FAIL {case}: {failure!r:.600}", flush=True)
            wrong += 1
            continue
        show(rows)
        wrong += not float(rows[0]["error"]) < 0.02  # type: ignore[arg-type]
        table += rows
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return table, wrong


def rehearse() -> None:
    """Small cases on the CPU, also FlexAttention's mask and order against ours."""
    global DEVICE, ROUNDS, BURST_S, PAUSE_S
    DEVICE, ROUNDS, BURST_S, PAUSE_S = "cpu", 2, 0.001, 0.0
    CASES.clear()
    CASES.update(REHEARSAL)
    for case, (extents, window, *_) in CASES.items():
        qkv = tensors(case)
        out = flex(case, qkv)()
        tile = tile_shape(extents, window)
        expected = ours(case, qkv)().flatten(1, -3).double()
        padded = [math.ceil(n / t) * t for n, t in zip(extents, tile, strict=True)]
        print(f"{case}: FlexAttention in tiles of {'x'.join(map(str, tile))}, padded to {padded}")
        inside = unpermuted(out, extents, tile, padded)
        error = (inside.double() - expected).abs().max().item()
        assert error < 0.03, error


def unpermuted(
    out: torch.Tensor, extents: tuple[int, ...], tile: tuple[int, ...], padded: list[int]
) -> torch.Tensor:
    """FlexAttention's result in the order of the map, without what was padded."""
    rank, (batch, heads, _, channels) = len(tile), out.shape
    rests = [p // t for p, t in zip(padded, tile, strict=True)]
    x = out.transpose(1, 2).reshape(batch, *rests, *tile, heads, channels)
    order = [y for a in range(rank) for y in (1 + a, 1 + rank + a)]
    x = x.permute(0, *order, 2 * rank + 1, 2 * rank + 2)
    x = x.reshape(batch, *padded, heads, channels)
    return x[(slice(None), *(slice(n) for n in extents))].flatten(1, -3)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flex", action="store_true", help="also FlexAttention (slow to start)")
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=float, default=1e9, help="begin no case after so long")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("out", nargs="?", default=os.environ.get("OUT", "."))
    options = parser.parse_args()
    if options.rehearse:
        rehearse()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "rehearsal on a CPU,"
    print(name, "torch", torch.__version__, "natten", natten.__version__)
    table, wrong = measure_all(options.flex, options.only, options.limit)
    if not options.rehearse:
        (Path(options.out) / "speed.json").write_text(json.dumps(table, indent=1))
    print(summary(table))
    print(f"gpu_speed: {wrong} cases wrong")
    return wrong != 0


if __name__ == "__main__":
    raise SystemExit(main())
