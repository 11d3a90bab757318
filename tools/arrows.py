# SPDX-License-Identifier: MIT
"""Checks which room of src/ includes what: the arrows of docs/map.md never turn."""

import re
import sys
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src"

# What a file of a room may include, by the beginning of the path.
ALLOWED = {
    "core": ("core/", "natten.h"),
    "cpu": ("cpu/", "core/", "natten.h"),
    "cuda": ("cuda/", "core/", "device/", "natten.h"),
    "device": ("device/", "host/", "core/window.h", "core/dropout.h", "natten.h"),
    "torch": ("torch/", "natten.h"),
    "natten.c": ("cpu/", "cuda/", "core/", "natten.h", "kernels.def", "table.h", "tune.h"),
    "tune.c": ("cpu/", "cuda/", "core/", "natten.h", "table.h", "tune.h", "tuned.h"),
    "tune.h": ("core/", "natten.h", "table.h"),
    "tuned.c": ("cuda/cache.h", "core/", "natten.h", "tuned.h"),
    "tuned.h": ("core/", "natten.h"),
    "table.c": ("core/", "natten.h", "table.h"),
    "table.h": ("core/", "natten.h"),
    "kernels.def": (),
}


def includes(path: Path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        if found:
            yield number, found.group(1)


def main() -> int:
    wrong = []
    for path in sorted(SRC.rglob("*")):
        if path.suffix not in (".c", ".h", ".cu", ".def"):
            continue
        room = path.relative_to(SRC).parts[0]
        if room not in ALLOWED:
            wrong.append(f"{path}: {room} is no known room")
            continue
        for number, name in includes(path):
            if not name.startswith(ALLOWED[room]):
                wrong.append(f"{path}:{number}: {room} may not include {name}")
    print("\n".join(wrong) if wrong else "arrows: none turned")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
