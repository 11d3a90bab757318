# SPDX-License-Identifier: MIT
"""The CPU kernels beside the peak of the processor's multiply-adds (docs/measure.md).

    python bench/peak.py                          the problems of bench/peak.txt, on 1 and 2 threads
    python bench/peak.py --threads 1 --busy       by processor time, beside other programs
    python bench/peak.py --huge                   tensors on huge pages
    python bench/peak.py forward_b1h4d32_56x56_w7x7

Each problem is timed with the kernel that is taken for it; --all times every kernel there is.
"""

from __future__ import annotations

import argparse
import subprocess

import machine

CHECK = machine.HERE.parent / "build/release/tests/check"
HEAD = "problem kernel threads median_ms low_ms high_ms gflops peak percent kept samples".split()


def measure(problems: list[str], threads: int, flags: list[str]) -> list[list[str]]:
    """The lines of check --bench --csv, printed as they come."""
    words = [str(CHECK), "--bench", "--csv", "-t", str(threads), *flags, *problems]
    rows = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        for line in program.stdout:
            row = line.strip().split(",")
            if len(row) != len(HEAD):
                continue
            rows.append(row)
            numbers = dict(zip(HEAD, row, strict=True))
            spread = f"[{numbers['low_ms']} .. {numbers['high_ms']}]"
            print(
                f"{row[0]:44} {row[1]:24} {threads} threads {numbers['median_ms']:>10} ms"
                f" {spread:24} {numbers['percent']:>5} % of {numbers['peak']} GFLOP/s,"
                f" {numbers['kept']} of {numbers['samples']} samples",
                flush=True,
            )
    if program.returncode:
        raise SystemExit(program.returncode)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU kernels as percent of the peak")
    parser.add_argument("problems", nargs="*", default=[str(machine.HERE / "peak.txt")])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--busy", action="store_true", help="1 thread, by processor time")
    parser.add_argument("--huge", action="store_true", help="tensors on huge pages")
    parser.add_argument("--all", action="store_true", help="every kernel, not only the taken one")
    parser.add_argument("--kernel", help="kernels whose names begin so")
    options = parser.parse_args()
    flags = ["--busy"] * options.busy + ["--huge"] * options.huge
    flags += ["--taken"] * (not options.all and not options.kernel)
    if options.kernel:
        flags += ["-k", options.kernel]
    if options.busy:
        options.threads = [1]
    print(f"{machine.processor()}, {machine.today()}, commit {machine.commit()}")
    rows = [row for t in options.threads for row in measure(options.problems, t, flags)]
    kernel = f"-{options.kernel}" if options.kernel else ""
    machine.write("peak" + kernel + "-huge" * options.huge, HEAD, rows)


if __name__ == "__main__":
    main()
