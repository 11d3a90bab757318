# SPDX-License-Identifier: MIT
"""Neighborhood attention on a CPU, beside what one would use without this package.

Every contender takes its turn within each round, so that all see the same machine; a sample taken
while the machine was held back is thrown away (docs/measure.md). Inputs, sizes and thread count are
the same for all, float32. Tables that do not depend on the inputs (masks, indices) are made
beforehand and cost nothing here.

    python bench/cpu.py                              the table
    python bench/cpu.py b1h4d32_56x56_w7x7_f32       one problem
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import math
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import natten
from natten.functional import na1d, na2d, na3d

HERE = Path(__file__).parent
PROBLEMS = [
    "b1h4d32_56x56_w7x7_f32",
    "b1h4d32_56x56_w7x7_d8x8_f32",
    "b1h16d32_14x14_w7x7_f32",
    "b8h4d32_28x28_w7x7_f32",
    "b1h4d64_48x48_w13x13_f32",
    "b1h4d64_2048_w257_f32",
    "b1h4d32_8x16x16_w3x5x5_f32",
]
MEMORY_LIMIT = 3e9  # bytes an alternative may need for its largest tensors
LEAST_SHARE = 0.94
LEAST_SECONDS = 0.005  # a sample repeats the call until it is this long


@dataclass
class Problem:
    """The part of a problem string (tests/problem_string.h) that all contenders can do."""

    text: str
    batch: int
    heads: int
    dim: int
    extents: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @classmethod
    def parse(cls, text: str) -> Problem:
        number = r"\d+(?:x\d+)*"
        form = rf"b(\d+)h(\d+)d(\d+)_({number})_w({number})(?:_d({number}))?(?:_c([01]+))?(?:_f32)?"
        found = re.fullmatch(form, text)
        if not found:
            raise SystemExit(f"cannot read the problem {text}: here only window, d, c and f32")
        batch, heads, dim, extents, window, dilation, causal = found.groups()
        rank = extents.count("x") + 1
        numbers = [tuple(map(int, s.split("x"))) for s in (extents, window)]
        steps = tuple(map(int, dilation.split("x"))) if dilation else (1,) * rank
        bits = tuple(c == "1" for c in causal or "0" * rank)
        return cls(text, int(batch), int(heads), int(dim), numbers[0], numbers[1], steps, bits)

    @property
    def tokens(self) -> int:
        return math.prod(self.extents)

    @property
    def slots(self) -> int:
        return math.prod(self.window)

    @property
    def scale(self) -> float:
        return self.dim**-0.5


class Axis(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("extent", "window", "stride", "dilation", "causal")]


class Map(ctypes.Structure):
    _fields_ = [
        ("axis", Axis * 2),
        ("heads", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


def compile_plain(flags: list[str], folder: str) -> ctypes.CDLL:
    path = Path(folder, f"plain{len(flags)}.so")
    source = ["-shared", "-fPIC", f"-I{HERE.parent / 'src'}", "-o", path, HERE / "plain.c", "-lm"]
    subprocess.run(["cc", *flags, *source], check=True)
    library = ctypes.CDLL(str(path))
    library.plain_forward.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2
    library.plain_share.argtypes = [ctypes.c_double]
    library.plain_share.restype = ctypes.c_double
    return library


def on_threads(count: int, work) -> list:
    """Calls work(0), work(1), ... at the same time."""
    results = [None] * count

    def one(i: int) -> None:
        results[i] = work(i)

    helpers = [threading.Thread(target=one, args=(i,)) for i in range(1, count)]
    for helper in helpers:
        helper.start()
    one(0)
    for helper in helpers:
        helper.join()
    return results


def axes_of(p: Problem) -> list[Axis]:
    sizes = zip(p.extents, p.window, p.dilation, p.causal, strict=True)
    return [Axis(extent, window, 1, dilation, causal) for extent, window, dilation, causal in sizes]


def index_table(p: Problem, rule: ctypes.CDLL) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token the tokens of its window, [tokens, slots], and which of them are allowed."""
    index = torch.zeros((1, 1), dtype=torch.int64)
    allowed = torch.ones((1, 1), dtype=torch.bool)
    for axis, extent in zip(axes_of(p), p.extents, strict=True):
        step = torch.arange(axis.window)
        first, count = [], []
        for query in range(extent):
            window = (ctypes.c_int * 2)()
            rule.plain_window(ctypes.byref(axis), query, window)
            first.append(window[0])
            count.append(window[1])
        keys = torch.tensor(first)[:, None] + step * axis.dilation
        inside = step < torch.tensor(count)[:, None]
        keys = keys.where(inside, torch.tensor(first)[:, None])
        joined = index[:, None, :, None] * extent + keys[None, :, None, :]
        index = joined.reshape(index.shape[0] * extent, -1)
        allowed = (allowed[:, None, :, None] & inside[None, :, None, :]).reshape(index.shape)
    return index, allowed


class Contenders:
    """The same attention by each means: forward(name) on [B, ..., H, D] tensors."""

    def __init__(self, p: Problem, plain: dict[str, ctypes.CDLL], threads: int):
        self.p, self.plain, self.threads = p, plain, threads
        torch.manual_seed(0)
        shape = (p.batch, *p.extents, p.heads, p.dim)
        self.inputs = [torch.randn(shape) for _ in range(3)]
        self.grad = torch.randn(shape)
        self.too_large: dict[str, float] = {}
        index, allowed = index_table(p, next(iter(plain.values())))
        self.index, self.allowed = index, None if allowed.all() else allowed
        self.names = ["natten"]
        if len(p.extents) < 3:
            self.names += list(plain)
        # What each builds at least: scores (or a mask), gathered keys and values.
        needs = {
            "sdpa": 4.0 * p.tokens**2,
            "gather": 8.0 * p.batch * p.tokens * p.slots * p.heads * p.dim,
        }
        for name, size in needs.items():
            if size > MEMORY_LIMIT:
                self.too_large[name] = size
            else:
                self.names.append(name)
        if "sdpa" in self.names:
            seen = torch.zeros((p.tokens, p.tokens), dtype=torch.bool)
            seen.scatter_(1, index, True)
            self.mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            # Heads first, as it wants them; not timed.
            flat = [t.flatten(1, -3).transpose(1, 2).contiguous() for t in self.inputs]
            self.heads_first = flat

    def call(self, name: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        p = self.p
        if name == "natten":
            function = (na1d, na2d, na3d)[len(p.extents) - 1]
            return function(*inputs, p.window, dilation=p.dilation, is_causal=p.causal)
        if name == "sdpa":
            return F.scaled_dot_product_attention(*inputs, attn_mask=self.mask)
        if name == "gather":
            q, k, v = (t.flatten(1, -3) for t in inputs)
            scores = torch.einsum("bqhd,bqwhd->bqhw", q * p.scale, k[:, self.index])
            if self.allowed is not None:
                scores = scores.masked_fill(~self.allowed[:, None], -torch.inf)
            out = torch.einsum("bqhw,bqwhd->bqhd", scores.softmax(-1), v[:, self.index])
            return out.view(inputs[0].shape)
        return self.call_plain(self.plain[name], inputs)

    def call_plain(self, library: ctypes.CDLL, inputs: list[torch.Tensor]) -> torch.Tensor:
        p = self.p
        axes = [Axis(1, 1, 1, 1, 0)] * (2 - len(p.extents)) + axes_of(p)
        job = Map((Axis * 2)(*axes), p.heads, p.dim, p.scale)
        out = torch.empty_like(inputs[0])
        data = [t.data_ptr() for t in (*inputs, out)]
        lines = p.batch * axes[0].extent
        if lines == 1:
            library.plain_forward(ctypes.byref(job), *data, 0, 1)
            return out

        def part(i: int) -> None:
            begin, end = i * lines // self.threads, (i + 1) * lines // self.threads
            library.plain_forward(ctypes.byref(job), *data, begin, end)

        on_threads(self.threads, part)
        return out

    def inputs_of(self, name: str) -> list[torch.Tensor]:
        return self.heads_first if name == "sdpa" else self.inputs

    def forward(self, name: str) -> torch.Tensor:
        with torch.no_grad():
            return self.call(name, self.inputs_of(name))

    def both(self, name: str) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in self.inputs_of(name)]
        out = self.call(name, inputs)
        grad = self.grad
        if name == "sdpa":
            grad = grad.flatten(1, -3).transpose(1, 2)
        return list(torch.autograd.grad(out, inputs, grad))

    def check(self) -> None:
        """All compute the same thing, or there is nothing to compare."""
        expected = self.forward("natten")
        gradients = self.both("natten")
        for name in self.names[1:]:
            out = self.forward(name)
            if name == "sdpa":
                out = out.transpose(1, 2).view(expected.shape)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            if name in self.plain:
                continue
            for mine, theirs in zip(gradients, self.both(name), strict=True):
                if name == "sdpa":
                    theirs = theirs.transpose(1, 2).view(mine.shape)
                torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)


@dataclass
class Samples:
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    rejected: int = 0

    def kept(self) -> list[float]:
        """Samples that had as much of the processors as the best of their kind."""
        least = LEAST_SHARE * max(self.shares)
        return [s for s, share in zip(self.seconds, self.shares, strict=True) if share >= least]


def undisturbed(library: ctypes.CDLL, threads: int) -> bool:
    return min(on_threads(threads, lambda _: library.plain_share(0.002))) >= LEAST_SHARE


def processor_seconds(call) -> float:
    """Processor time per call: what is left to measure, on one thread, beside other programs."""
    calls, start = 0, time.process_time()
    while calls == 0 or time.process_time() - start < LEAST_SECONDS:
        call()
        calls += 1
    return (time.process_time() - start) / calls


def sample(call, threads: int) -> tuple[float, float]:
    """Seconds per call, and the share of the processors that it used."""
    calls = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - wall < LEAST_SECONDS:
        call()
        calls += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / calls, cpu / (wall * threads)


def measure(
    calls: dict, library: ctypes.CDLL, threads: int, seconds: float, busy: bool
) -> dict[str, Samples]:
    results = {name: Samples() for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    rounds = 0
    while rounds < 5 or (time.perf_counter() - start < seconds and rounds < 200):
        for name, call in calls.items():
            if busy:
                results[name].seconds.append(processor_seconds(call))
                results[name].shares.append(1)
                continue
            for _ in range(4):
                before = undisturbed(library, threads)
                taken, share = sample(call, threads)
                if before and undisturbed(library, threads):
                    results[name].seconds.append(taken)
                    results[name].shares.append(share)
                    break
                results[name].rejected += 1
                time.sleep(0.1)
        rounds += 1
        if time.perf_counter() - start > 4 * seconds:
            break
    return results


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    words = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    return (
        subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip()
        or "unknown"
    )


def report(problem: Problem, direction: str, results: dict[str, Samples], write) -> None:
    kept = {name: samples.kept() for name, samples in results.items() if samples.seconds}
    if "natten" not in kept:
        print(f"{problem.text:34} {direction:8} the machine was never quiet: no figures")
        return
    ours = statistics.median(kept["natten"])
    for name, seconds in kept.items():
        median = statistics.median(seconds)
        low, high = min(seconds), max(seconds)
        if len(seconds) > 3:
            low, _, high = statistics.quantiles(seconds, n=4)
        discarded = results[name].rejected + len(results[name].seconds) - len(seconds)
        spread = f"[{low * 1e3:.3f} .. {high * 1e3:.3f}]"
        print(
            f"{problem.text:34} {direction:8} {name:14} {median * 1e3:10.3f} ms {spread:22}"
            f" {median / ours:7.1f}x   {len(seconds)} samples, {discarded} rejected"
        )
        numbers = [f"{1e3 * s:.4f}" for s in (median, low, high)]
        write(problem.text, direction, name, *numbers, f"{median / ours:.2f}", len(seconds))


def main() -> None:
    arguments = argparse.ArgumentParser(description="neighborhood attention beside alternatives")
    arguments.add_argument("problems", nargs="*", default=PROBLEMS)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--seconds", type=float, default=4, help="for each table line group")
    arguments.add_argument("--output", type=Path, help="CSV file (default: bench/results/...)")
    arguments.add_argument(
        "--busy", action="store_true", help="beside other programs: 1 thread, processor time"
    )
    options = arguments.parse_args()
    if options.busy:
        options.threads = 1
    torch.set_num_threads(options.threads)
    today = datetime.date.today().isoformat()
    machine = re.sub(r"\W+", "-", processor()).strip("-").lower()
    output = options.output or HERE / "results" / f"{today}-{machine}.csv"
    clock_name = "processor time" if options.busy else "wall time"
    print(f"{processor()}, {options.threads} threads, {clock_name}, {today}, commit {commit()}")
    print(f"natten {natten.__version__}, torch {torch.__version__}; medians [quartiles], ratios")
    rows = []

    def write(*row) -> None:
        rows.append(
            (*row, clock_name, options.threads, processor(), torch.__version__, today, commit())
        )

    with tempfile.TemporaryDirectory() as folder:
        fast = ["-O3", "-march=native", "-ffast-math"]
        plain = {
            "C -O3": compile_plain(["-O3"], folder),
            "C -Ofast native": compile_plain(fast, folder),
        }
        clock = plain["C -O3"]
        for text in options.problems:
            contenders = Contenders(Problem.parse(text), plain, options.threads)
            contenders.check()
            trainable = [name for name in contenders.names if name not in plain]
            groups = [("forward", contenders.forward, contenders.names)]
            groups.append(("both", contenders.both, trainable))
            for direction, function, names in groups:
                calls = {name: (lambda n=name, f=function: f(n)) for name in names}
                results = measure(calls, clock, options.threads, options.seconds, options.busy)
                report(contenders.p, direction, results, write)
            for name, size in contenders.too_large.items():
                print(f"{text:34} {name} left out: needs at least {size / 1e9:.1f} GB")
    head = (
        "problem direction contender median_ms low_ms high_ms ratio samples clock threads cpu torch"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*head.split(), "date", "commit"])
        writer.writerows(rows)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
