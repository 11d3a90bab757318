# SPDX-License-Identifier: MIT
"""A CSV file of bench/results as a table of the documentation.

python bench/table.py bench/results/FILE.csv

Of bench/cpu.py: the contenders' milliseconds and ratios. Of bench/peak.py: percent of the peak.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

NAMES = {
    "natten": "natten",
    "C -O3": "C `-O3`",
    "C -Ofast native": "C, fast-math, native",
    "sdpa": "SDPA, dense mask",
    "sdpa, boolean": "SDPA, boolean mask",
    "flex": "FlexAttention, compiled",
    "gather": "gather + einsum",
    "gather, compiled": "the same, compiled",
}
DIRECTIONS = {"forward": "forward", "both": "forward and backward"}
Row = dict[str, str]


def cell(row: Row | None, reference: Row) -> str:
    if row is None:
        return ""
    median = float(row["median_ms"])
    ratio = median / float(reference["median_ms"])
    time = f"{median:.3g}" if median < 100 else f"{median:.0f}"
    if row is reference:
        return time
    return f"{time} ({ratio:.1f}x)" if ratio < 10 else f"{time} ({ratio:.0f}x)"


def contenders(rows: list[Row]) -> None:
    found = {(r["problem"], r["direction"], r["contender"]): r for r in rows}
    print("| problem | | " + " | ".join(NAMES.values()) + " |")
    print("|---|---|" + "---:|" * len(NAMES))
    for problem in dict.fromkeys(r["problem"] for r in rows):
        for direction, words in DIRECTIONS.items():
            reference = found.get((problem, direction, "natten"))
            if reference is None:
                continue
            cells = [cell(found.get((problem, direction, name)), reference) for name in NAMES]
            print(f"| `{problem.removesuffix('_f32')}` | {words} | " + " | ".join(cells) + " |")


def percents(rows: list[Row]) -> None:
    threads = list(dict.fromkeys(r["threads"] for r in rows))
    found = {(r["problem"], r["kernel"], r["threads"]): r for r in rows}
    heads = [f"{t} thread{'s' * (t != '1')}" for t in threads]
    print("| problem | kernel | " + " | ".join(f"{h}, ms | % of peak" for h in heads) + " |")
    print("|---|---|" + "---:|---:|" * len(threads))
    for problem, kernel in dict.fromkeys((r["problem"], r["kernel"]) for r in rows):
        cells = []
        for t in threads:
            row = found.get((problem, kernel, t))
            cells += [f"{float(row['median_ms']):.3g}", row["percent"]] if row else ["", ""]
        print(f"| `{problem}` | {kernel} | " + " | ".join(cells) + " |")


def main() -> None:
    rows = list(csv.DictReader(Path(sys.argv[1]).read_text().splitlines()))
    (percents if "percent" in rows[0] else contenders)(rows)
    row = rows[0]
    print(f"\n{row['cpu']}, {row['date']}, commit {row['commit']}")


if __name__ == "__main__":
    main()
