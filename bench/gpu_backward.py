# SPDX-License-Identifier: MIT
"""The fused backward for Hopper on a GPU: whether it is right, and how fast, beside torch's.

    python3 bench/gpu_backward.py [--flex] [--only CASE] [--rehearse] [OUT]

Needs torch with CUDA and the library built in build/. The kernel is asked for by name, and runs
both ways: the same bits every time, and with KV parallelism. Each case is checked at sampled tokens
against float64, twice for the same bits (with KV parallelism, of d_key and d_value), and timed in
turns with cuDNN's dense backward (and FlexAttention's, where there is a goal). Effective TFLOP/s
count the products of the windows only, 10 * batch * heads * tokens * window * channels / time of
all kernels of the backward; `goal` is what is wanted on an H100. --rehearse does the checks on the
CPU, in small: it proves this program, not the kernel."""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_speed import CASES, clock, flex, race, sdpa, tensors, window_of

from natten import _lib

KERNEL = b"cuda-sm90-backward"
#: Of the two ways.
WAYS = {"natten": 0, "natten kvp": _lib.PREFER_KV_PARALLEL}
GOALS = {
    "flux 256x256 w80": (410, 470),
    "hunyuan 30x48x80 w18x24x24": (315, 360),
    "1-D 32k w2k": (415, 470),
    "dense 16k": (480, 560),
}
REHEARSAL = {
    "1-D": ((50,), (9,), 2, 2, 16),
    "2-D": ((12, 17), (5, 4), 1, 2, 8),
    "3-D": ((4, 9, 10), (3, 5, 2), 1, 1, 8),
}
ROLES = {
    "query": _lib.QUERY,
    "key": _lib.KEY,
    "value": _lib.VALUE,
    "out": _lib.OUT,
    "lse": _lib.LSE,
    "d_out": _lib.D_OUT,
    "d_query": _lib.D_QUERY,
    "d_key": _lib.D_KEY,
    "d_value": _lib.D_VALUE,
}
RESULTS = ("d_query", "d_key", "d_value")

Case = tuple[tuple[int, ...], tuple[int, ...], int, int, int]


def problem_of(case: Case, op: int, device: torch.device, preferences: int) -> _lib.Problem:
    extents, window, batch, heads, channels = case
    problem = _lib.Problem()
    _lib.library.natten_problem_init(problem, op, _lib.BF16, len(extents))
    for axis, extent, size in zip(problem.axis, extents, window, strict=False):
        axis.query_extent, axis.window = extent, size
    problem.batch, problem.heads, problem.head_dim = batch, heads, channels
    problem.scale = channels**-0.5
    problem.preferences |= preferences
    problem.roles |= 1 << _lib.LSE
    problem.device = _lib.CUDA if device.type == "cuda" else _lib.CPU
    _lib.library.natten_problem_pack(problem, _lib.HEADS_LAST)
    return problem


class Plan:
    """A plan by name, run on tensors of roles."""

    def __init__(
        self, case: Case, op: int, device: torch.device, only: bytes | None, preferences: int = 0
    ) -> None:
        self.plan = ctypes.c_void_p()
        problem = problem_of(case, op, device, preferences)
        if _lib.library.natten_plan_create(problem, only, self.plan):
            raise RuntimeError(_lib.library.natten_last_error().decode())
        size = _lib.library.natten_plan_workspace(self.plan)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.cuda = device.type == "cuda"
        said = ctypes.create_string_buffer(4096)
        _lib.library.natten_plan_explain(self.plan, said, len(said))
        self.explanation = said.value.decode().strip()

    def run(self, parts: dict[str, torch.Tensor]) -> None:
        run = _lib.Run(workspace=self.workspace.data_ptr() or None)
        if self.cuda:
            run.stream = torch.cuda.current_stream().cuda_stream
        for name, tensor in parts.items():
            run.data[ROLES[name]] = tensor.data_ptr()
        if _lib.library.natten_plan_run(self.plan, run):
            raise RuntimeError(_lib.library.natten_last_error().decode())


def prepare(case: Case, qkv: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """All that a backward reads, from a forward; and places for its results, filled with NaN."""
    parts = dict(zip(("query", "key", "value"), qkv, strict=True))
    parts["out"] = torch.empty_like(qkv[0])
    parts["lse"] = torch.empty(qkv[0].shape[:-1], dtype=torch.float32, device=qkv[0].device)
    Plan(case, _lib.FORWARD, qkv[0].device, None).run(parts)
    parts["d_out"] = torch.randn_like(qkv[0])
    for name, like in zip(RESULTS, qkv, strict=True):
        parts[name] = torch.full_like(like, math.nan)
    return parts


def visitors(key: int, extent: int, window: int) -> slice:
    """The queries whose windows hold the key: neighbours."""
    found = [
        query
        for query in range(max(0, key - window), min(extent, key + window + 1))
        if key in range(*window_of(query, extent, window).indices(extent))
    ]
    return slice(found[0], found[-1] + 1)


def exact(case: Case, parts: dict[str, torch.Tensor], batch: int, place: tuple[int, ...]) -> tuple:
    """The three gradients of the token at `place`, of all heads, in float64."""
    extents, window, _, _, channels = case
    scale, last = channels**-0.5, len(extents) - 1
    keys = (batch, *(window_of(*a) for a in zip(place, extents, window, strict=True)))
    queries = (batch, *(visitors(*a) for a in zip(place, extents, window, strict=True)))
    one = {name: parts[name][(batch, *place)].double() for name in parts}

    def many(name: str, box: tuple) -> torch.Tensor:
        return parts[name][box].flatten(0, last).double()

    k, v = many("key", keys), many("value", keys)
    p = (torch.einsum("hc,khc->kh", one["query"], k) * scale - one["lse"]).exp()
    delta = (one["out"] * one["d_out"]).sum(-1)
    ds = p * (torch.einsum("hc,khc->kh", one["d_out"], v) - delta)
    d_query = torch.einsum("kh,khc->hc", ds, k) * scale

    q, d_out = many("query", queries), many("d_out", queries)
    delta = (many("out", queries) * d_out).sum(-1)
    p = (torch.einsum("qhc,hc->qh", q, one["key"]) * scale - many("lse", queries)).exp()
    ds = p * (torch.einsum("qhc,hc->qh", d_out, one["value"]) - delta)
    d_key = torch.einsum("qh,qhc->hc", ds, q) * scale
    return d_query, d_key, torch.einsum("qh,qhc->hc", p, d_out)


def worst_error(case: Case, parts: dict[str, torch.Tensor]) -> float:
    """At the corners and some tokens inside, relative to the largest value there."""
    extents, _, batch, _, _ = case
    generator = torch.Generator().manual_seed(7)
    places = list(itertools.product(*[(0, n - 1) for n in extents]))
    places += [
        tuple(int(torch.randint(n, (1,), generator=generator)) for n in extents) for _ in range(16)
    ]
    worst = 0.0
    for place in places:
        b = int(torch.randint(batch, (1,), generator=generator))
        for name, expected in zip(RESULTS, exact(case, parts, b, place), strict=True):
            got = parts[name][(b, *place)].double()
            error = (got - expected).abs().max() / expected.abs().max()
            worst = max(worst, float(error.nan_to_num(math.inf)))
    return worst


def prove(
    case: Case, qkv: list[torch.Tensor], only: bytes | None, preferences: int = 0
) -> tuple[Callable, float, bool]:
    """The backward as a call, its worst error, and whether it gave the same bits twice."""
    parts = prepare(case, qkv)
    plan = Plan(case, _lib.BACKWARD, qkv[0].device, only, preferences)
    print(plan.explanation, f"({plan.workspace.numel() / 1e6:.1f} MB)", flush=True)
    plan.run(parts)
    first = {name: parts[name].clone() for name in RESULTS}
    for name in RESULTS:
        parts[name].fill_(math.nan)
    plan.run(parts)
    steady = RESULTS[1:] if preferences & _lib.PREFER_KV_PARALLEL else RESULTS
    same = all(torch.equal(first[name], parts[name]) for name in steady)
    return lambda: plan.run(parts), worst_error(case, parts), same


def derivative(run: Callable, leaves: list[torch.Tensor]) -> Callable[[], object]:
    """The backward of a call of torch's, alone."""
    for leaf in leaves:
        leaf.requires_grad_()
    out = run()
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def work_of(case: Case) -> float:
    extents, window, batch, heads, channels = case
    return 10.0 * batch * heads * math.prod(extents) * math.prod(window) * channels


def measure(name: str, with_flex: bool) -> list[dict[str, object]]:
    qkv = tensors(name)
    runs: dict[str, Callable[[], object]] = {}
    work: dict[str, float] = {}
    notes: dict[str, dict[str, object]] = {}
    for i, (way, preferences) in enumerate(WAYS.items()):
        runs[way], error, same = prove(CASES[name], qkv, KERNEL, preferences)
        work[way] = work_of(CASES[name])
        goal = GOALS[name][i] if name in GOALS else None
        notes[way] = {"error": error, "same": same, "goal": goal}
    dense = [t.requires_grad_() for t in tensors("dense 16k")]
    run = sdpa(dense, torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    runs["cudnn dense 16k"] = derivative(run, dense)
    work["cudnn dense 16k"] = work_of(CASES["dense 16k"])
    if with_flex:
        leaves = [t.clone().requires_grad_() for t in qkv]
        runs["flex"] = derivative(flex(name, leaves), leaves)
        work["flex"] = work_of(CASES[name])
    rows = []
    for what, row in race(runs).items():
        rate = {"tflops": work[what] / row["ms"] / 1e9}
        rows.append({"case": name, "what": what, **rate, **row, **notes.get(what, {})})
    return rows


def rehearse() -> int:
    torch.manual_seed(3)
    wrong = 0
    for name, case in REHEARSAL.items():
        extents, _, batch, heads, channels = case
        qkv = [torch.randn(batch, *extents, heads, channels).bfloat16() for _ in range(3)]
        for preferences in WAYS.values():
            _, error, same = prove(case, qkv, None, preferences)
            bits = "same bits" if same else "DIFFERENT BITS"
            print(f"{name} on the CPU: error {error:.1e}, {bits}")
            wrong += error > 0.02 or not same
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flex", action="store_true", help="also FlexAttention (slow to start)")
    parser.add_argument("--only", default="")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("out", nargs="?", default=os.environ.get("OUT", "."))
    options = parser.parse_args()
    if options.rehearse:
        return rehearse()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, f"{clock():.0f} MHz")
    table: list[dict[str, object]] = []
    wrong = 0
    for name in CASES:
        if not name.startswith(options.only):
            continue
        try:
            rows = measure(name, options.flex and name in GOALS)
        except Exception as failure:  # noqa: BLE001
            print(f"FAIL {name}: {failure!r:.600}", flush=True)
            wrong += 1
            continue
        for row in rows:
            print(
                f"{name:28s} {row['what']!s:16s} {row['ms']:9.4f} ms (best {row['low']:9.4f})"
                f" {row['tflops']:7.1f} TFLOP/s {row['mhz']:5.0f} MHz",
                end="",
            )
            if "error" in row:
                print(f"  error {row['error']:.1e}, same bits {row['same']}", end="")
                print(f", goal {row['goal']}" if row["goal"] else "", end="")
                wrong += not (float(row["error"]) < 0.02 and row["same"])  # type: ignore[arg-type]
            print(flush=True)
        table += rows
        torch.cuda.empty_cache()
    (Path(options.out) / "backward.json").write_text(json.dumps(table, indent=1))
    print(f"gpu_backward: {wrong} cases wrong")
    return wrong != 0


if __name__ == "__main__":
    raise SystemExit(main())
