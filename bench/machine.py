# SPDX-License-Identifier: MIT
"""What stands beside every figure: the processor, the day, the commit; and where figures go."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent


def processor() -> str:
    """Its name, and in a guest that hides it the family and model."""
    if platform.system() != "Linux":
        return platform.processor()
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    family = f"family {facts.get('cpu family')} model {facts.get('model')}"
    return f"{facts.get('model name', platform.processor())} ({family})"


def today() -> str:
    return datetime.date.today().isoformat()


def commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    words = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip()
    return found or "unknown"


def write(name: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """A CSV file of this day and processor in bench/results."""
    facts = (processor(), today(), commit())
    machine = re.sub(r"\W+", "-", facts[0]).strip("-").lower()
    path = HERE / "results" / f"{facts[1]}-{machine}-{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*head, "cpu", "date", "commit"])
        writer.writerows((*row, *facts) for row in rows)
    print(f"written: {path}")
    return path
