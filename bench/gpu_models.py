# SPDX-License-Identifier: MIT
"""Steps of training, forward and backward, of whole models on a GPU: with natten, with the same
attention by FlexAttention, and with dense attention; time, also as CUDA graphs, and peak memory.

    python3 bench/gpu_models.py [--only MODEL] [--by CONTENDER...] [--rehearse] [OUT]

Needs torch with CUDA and the library built in build/. natten appears twice, without and with KV
parallelism. All models are compiled, and take turns. Dense attention computes something else, of
more tokens; how alike the gradients of the others are is printed. --rehearse runs everything in
small on the CPU, not compiled: it proves this program, and times nothing."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from flex import Neighborhood
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
if find_spec("natten") is None:
    sys.path.insert(0, str(ROOT / "python"))

import natten  # noqa: E402
from natten.functional import na1d, na2d, na3d  # noqa: E402

CONTENDERS = ("natten", "natten kvp", "flex", "dense")
STEPS, ROUNDS = 4, 5

Extents = tuple[int, ...]


@functools.cache
def neighborhood(extents: Extents, window: Extents, dilation: Extents, device: str) -> Neighborhood:
    """Shared by layers of one kind: each of its own would be compiled anew, for minutes."""
    return Neighborhood(extents, window, dilation, device, device == "cuda")


class Attention(nn.Module):
    """Of maps of one size, by one of the contenders."""

    def __init__(
        self,
        by: str,
        dim: int,
        heads: int,
        extents: Extents,
        window: Extents,
        dilation: Extents,
        bias: bool,
        device: str,
    ) -> None:
        super().__init__()
        self.by, self.heads, self.window, self.dilation = by, heads, window, dilation
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        shape = (heads, *(2 * w - 1 for w in window))
        self.rpb = nn.Parameter(torch.randn(shape) * 0.02) if bias and by != "dense" else None
        if by == "flex":
            self.neighborhood = neighborhood(extents, window, dilation, device)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if self.by == "flex":
            out = self.neighborhood(q, k, v, self.rpb)
        elif self.by == "dense":
            flat = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(*flat).transpose(1, 2).view(q.shape)
        else:
            op = (na1d, na2d, na3d)[len(self.window) - 1]
            out = op(q, k, v, self.window, self.dilation, False, self.rpb)
        return self.project(out.flatten(-2))


class Block(nn.Module):
    def __init__(self, dim: int, ratio: float, attention: Attention) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.attention = attention
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Shrink(nn.Module):
    """Half as many tokens along each axis, and more channels."""

    def __init__(self, dim: int, to: int, step: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, to, 3, step, 1, bias=False)
        self.norm = nn.LayerNorm(to)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1))


def dinat(by: str, device: str, small: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """A classifier of images with the sizes of transformers' Dinat-mini, position biases too."""
    side, dim, window = (32, 16, 3) if small else (56, 64, 7)
    depths, heads = ((1, 2), (1, 2)) if small else ((3, 4, 6, 5), (2, 4, 8, 16))
    parts: list[nn.Module] = [Shrink(3, dim // 2, 2), Shrink(dim // 2, dim, 2)]
    for level, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        for i in range(depth):
            dilation = side // window if i % 2 else 1
            attention = Attention(
                by, dim, count, (side, side), (window,) * 2, (dilation,) * 2, True, device
            )
            parts.append(Block(dim, 3, attention))
        if level < len(depths) - 1:
            parts.append(Shrink(dim, 2 * dim, 2))
            side, dim = side // 2, 2 * dim
    full = 4 * (32 if small else 56)
    return nn.Sequential(*parts), (1 if small else 64, full, full, 3)


def diffusion(by: str, device: str, small: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """Blocks as of HDiT's levels of high resolution: a large map, small windows."""
    side, dim, heads, window = (16, 32, 2, 5) if small else (128, 512, 8, 7)
    blocks = [
        Block(dim, 3, Attention(by, dim, heads, (side, side), (window,) * 2, (1, 1), False, device))
        for _ in range(1 if small else 4)
    ]
    return nn.Sequential(*blocks), (1 if small else 4, side, side, dim)


def video(by: str, device: str, small: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """A block of a diffusion transformer of videos, on a latent of 30x48x80."""
    extents, window, dim, heads = (
        ((5, 6, 8), (3, 4, 4), 32, 2) if small else ((30, 48, 80), (16, 24, 24), 3072, 24)
    )
    attention = Attention(by, dim, heads, extents, window, (1, 1, 1), False, device)
    return Block(dim, 4, attention), (1, *extents, dim)


MODELS = {"dinat-mini": dinat, "diffusion 2-D": diffusion, "video 3-D": video}


class Contender:
    """A model and its step. All have the same parameters, as far as they have them."""

    def __init__(self, model: str, by: str, device: str, small: bool) -> None:
        torch.manual_seed(1)
        self.by = by
        made, shape = MODELS[model](by.split()[0], device, small)
        dtype = torch.float32 if small else torch.bfloat16
        self.model = made.to(device, dtype)
        torch.manual_seed(2)
        self.x = torch.randn(shape).to(device, dtype).requires_grad_()
        self.run: Callable[[Tensor], Tensor] = self.model
        if not small:
            self.run = torch.compile(self.model, dynamic=False)

    def step(self) -> None:
        natten.use_kv_parallelism_in_fused_na(self.by == "natten kvp")
        self.x.grad = None
        self.model.zero_grad()
        self.run(self.x).float().square().mean().backward()

    def gradients(self) -> list[Tensor]:
        self.step()
        parts = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [self.x.grad, *parts] if self.x.grad is not None else parts


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest, relative to each tensor's size."""
    if len(a) != len(b):
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        size = y.float().norm()
        worst = max(worst, float(((x.float() - y.float()).norm() / size).nan_to_num(math.inf)))
    return worst


def captured(contender: Contender) -> Callable[[], None]:
    """A step as a CUDA graph: without what the processor takes to launch it."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            contender.step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        contender.step()
    return graph.replay


def time_steps(step: Callable[[], None]) -> float:
    """Milliseconds of a step."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(STEPS):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / STEPS


def peak(contender: Contender) -> float:
    """Megabytes that a step needs besides what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def compare(
    model: str, contenders: list[str], device: str, small: bool
) -> tuple[list[dict[str, object]], int]:
    rows: dict[str, dict[str, object]] = {}
    able: dict[str, Contender] = {}
    expected: list[Tensor] = []
    wrong = 0
    for by in contenders:
        row: dict[str, object] = {"model": model, "by": by}
        try:
            begin = time.monotonic()
            contender = Contender(model, by, device, small)
            gradients = contender.gradients()
            print(f"{model} {by}: ready after {time.monotonic() - begin:.0f} s", flush=True)
        except Exception as failure:  # noqa: BLE001
            print(f"FAIL {model} {by}: {failure!r:.500}", flush=True)
            wrong += by.startswith("natten")
            continue
        if by == "natten":
            expected = [g.clone() for g in gradients]
        elif by != "dense" and expected:
            row["difference"] = found = difference(gradients, expected)
            wrong += found > (1e-4 if small else 0.05)
        able[by], rows[by] = contender, row
    if small:
        return list(rows.values()), wrong
    for by, contender in able.items():
        rows[by]["peak_mb"] = peak(contender)
    for key in ("ms", "graph ms"):
        steps = {by: c.step if key == "ms" else captured(c) for by, c in able.items()}
        times: dict[str, list[float]] = {by: [] for by in able}
        for i in range(ROUNDS):
            names = list(able)
            for by in names[i % len(names) :] + names[: i % len(names)]:
                times[by].append(time_steps(steps[by]))
        for by, row in rows.items():
            row[key] = sorted(times[by])[ROUNDS // 2]
    return list(rows.values()), wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--by", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("out", nargs="?", default=os.environ.get("OUT", "."))
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    natten.use_fused_na(True)
    logging.getLogger("natten.context").setLevel(logging.ERROR)  # settings change with every step
    if not options.rehearse:
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    table: list[dict[str, object]] = []
    failed = 0
    for model in MODELS:
        if not model.startswith(options.only):
            continue
        torch._dynamo.reset()
        rows, wrong = compare(model, options.by, device, options.rehearse)
        failed += wrong
        for row in rows:
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{value!s:14s}"
                    for key, value in row.items()
                ),
                flush=True,
            )
        table += rows
        if not options.rehearse:
            torch.cuda.empty_cache()
    if not options.rehearse:
        (Path(options.out) / "models.json").write_text(json.dumps(table, indent=1))
    print(f"gpu_models: {failed} wrong")
    return failed != 0


if __name__ == "__main__":
    raise SystemExit(main())
