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
import ctypes
import statistics
import tempfile
import time
from dataclasses import dataclass, field

import machine
import torch
from contenders import Contenders, Problem, compile_plain, on_threads

import natten

PROBLEMS = [
    "b1h4d32_56x56_w7x7_f32",
    "b1h4d32_56x56_w7x7_d8x8_f32",
    "b1h16d32_14x14_w7x7_f32",
    "b8h4d32_28x28_w7x7_f32",
    "b1h4d64_48x48_w13x13_f32",
    "b1h4d64_2048_w257_f32",
    "b1h4d32_8x16x16_w3x5x5_f32",
]
LEAST_SHARE = 0.94
LEAST_SECONDS = 0.02  # a sample repeats the call until it is this long


@dataclass
class Samples:
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    rejected: int = 0

    def kept(self) -> list[float]:
        """Samples that had as much of the processors as the best of their kind. (Processor time is
        counted in ticks: a share may come out above 1.)"""
        least = LEAST_SHARE * min(1.0, max(self.shares))
        return [s for s, share in zip(self.seconds, self.shares, strict=True) if share >= least]


def undisturbed(library: ctypes.CDLL, threads: int) -> bool:
    """After a while in which torch's own threads, which watch for more work, have gone to sleep."""
    time.sleep(0.01)
    return min(on_threads(threads, lambda _: library.plain_share(0.002))) >= LEAST_SHARE


def repeat(call) -> int:
    """Calls again and again until that has taken long enough; returns how often."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < LEAST_SECONDS:
        call()
        calls += 1
    return calls


def sample(call, threads: int) -> tuple[float, float]:
    """Seconds per call, and the share of the processors that it used, after calls that are not
    timed: what the contender before left in the caches is not this one's."""
    repeat(call)
    wall, cpu = time.perf_counter(), time.process_time()
    calls = repeat(call)
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
            if busy:  # processor time is what is left to measure
                taken, share = sample(call, 1)
                results[name].seconds.append(taken * share)
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
    arguments.add_argument(
        "--busy", action="store_true", help="beside other programs: 1 thread, processor time"
    )
    options = arguments.parse_args()
    if options.busy:
        options.threads = 1
    torch.set_num_threads(options.threads)
    clock_name = "processor time" if options.busy else "wall time"
    print(f"{machine.processor()}, {options.threads} threads, {clock_name}, {machine.today()}")
    print(f"natten {natten.__version__}, torch {torch.__version__}; medians [quartiles], ratios")
    rows = []

    def write(*row) -> None:
        rows.append((*row, clock_name, options.threads, torch.__version__))

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
            groups = [("forward", contenders.forward, contenders.names)]
            groups.append(("both", contenders.both, contenders.trainable()))
            for direction, function, names in groups:
                calls = {name: (lambda n=name, f=function: f(n)) for name in names}
                results = measure(calls, clock, options.threads, options.seconds, options.busy)
                report(contenders.p, direction, results, write)
            for name, size in contenders.too_large.items():
                print(f"{text:34} {name} left out: needs at least {size / 1e9:.1f} GB")
    head = "problem direction contender median_ms low_ms high_ms ratio samples clock threads torch"
    machine.write("contenders", head.split(), rows)


if __name__ == "__main__":
    main()
