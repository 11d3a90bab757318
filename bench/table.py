# SPDX-License-Identifier: MIT
"""A CSV file of bench/cpu.py as the table of the README.

python bench/table.py bench/results/FILE.csv
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
    "flex": "FlexAttention, compiled",
    "gather": "gather + einsum",
    "gather, compiled": "the same, compiled",
}
DIRECTIONS = {"forward": "forward", "both": "forward and backward"}


def cell(row: dict[str, str] | None, reference: dict[str, str]) -> str:
    if row is None:
        return ""
    median = float(row["median_ms"])
    ratio = median / float(reference["median_ms"])
    time = f"{median:.3g}" if median < 100 else f"{median:.0f}"
    if row is reference:
        return time
    return f"{time} ({ratio:.1f}x)" if ratio < 10 else f"{time} ({ratio:.0f}x)"


def main() -> None:
    rows = list(csv.DictReader(Path(sys.argv[1]).read_text().splitlines()))
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
    row = rows[0]
    facts = f"{row['cpu']}, {row['threads']} threads, {row['clock']}, {row['date']}"
    print(f"\n{facts}, commit {row['commit']}")


if __name__ == "__main__":
    main()
