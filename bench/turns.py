# SPDX-License-Identifier: MIT
"""Two or more builds of the library in turns (docs/measure.md): is the new one faster?

    python bench/turns.py build/old build/release forward_b1h4d32_56x56_w7x7
    python bench/turns.py build/old build/old build/release FILE    shows the noise, too

Each sample is a process of its own, `check --bench --busy` (one thread, processor time): of
several copies in one process each has its own place in memory, which alone makes up to 4 % of
a difference. Printed are the median time of the first build, and of each other one the median
of its ratios to the first, with the ratio of their best times.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from pathlib import Path

import machine

MEDIAN = 3  # column of check --csv


def milliseconds(build: Path, problem: str, flags: list[str]) -> dict[str, float]:
    """The times of a problem, or of each problem of a file, in one process."""
    words = [str(build / "tests/check"), "--bench", "--busy", "--csv", *flags, problem]
    lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(",") for line in lines if line.count(",") > MEDIAN]
    return {f"{row[0]} {row[1]}": float(row[MEDIAN]) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="builds of the library in turns")
    parser.add_argument("words", nargs="+", metavar="BUILD|PROBLEM|FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernel", help="kernels whose names begin so")
    options = parser.parse_args()
    builds = [Path(word) for word in options.words if Path(word, "tests/check").is_file()]
    problems = [word for word in options.words if not Path(word, "tests/check").is_file()]
    if len(builds) < 2 or not problems:
        parser.error("two builds and a problem are the least")
    flags = ["-k", options.kernel] if options.kernel else ["--taken"]
    print(f"{machine.processor()}, {machine.today()}, commit {machine.commit()}")
    for problem in problems:
        times: dict[str, list[list[float]]] = {}
        for _ in range(options.rounds):
            for i, build in enumerate(builds):
                for name, time in milliseconds(build, problem, flags).items():
                    times.setdefault(name, [[] for _ in builds])[i].append(time)
        for name, (first, *others) in times.items():
            ratios = (
                f"{statistics.median(map(float.__truediv__, other, first)):.3f}"
                f" ({min(other) / min(first):.3f})"
                for other in others
            )
            print(f"{name:66} {statistics.median(first):10.4f} ms  {'  '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
