# SPDX-License-Identifier: MIT
"""Checks that what the documents point to exists: links, and paths in backquotes."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ROOMS = "bench|docs|examples|include|python|src|tests|tools"
PATH = re.compile(rf"`((?:{ROOMS})/[\w./-]+)`")


def targets(path: Path):
    text = (ROOT / path).read_text()
    for link in LINK.findall(text):
        if not re.match(r"\w+:", link):
            yield link, (ROOT / path).parent / link
    for name in PATH.findall(text):
        yield name, ROOT / name


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    wrong = [
        f"{path}: {name} is not there"
        for path in map(Path, listed)
        for name, target in targets(path)
        if not target.exists() and not target.with_suffix(".c").exists()  # a built program
    ]
    print("\n".join(wrong) if wrong else f"docs: what {len(listed)} documents point to exists")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
