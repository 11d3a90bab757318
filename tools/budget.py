# SPDX-License-Identifier: MIT
"""Checks the size budgets of CONTRIBUTING.md: files, functions, lines, macros, environment."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".c", ".h", ".cu", ".def", ".py"}
FILE_LINES = {"include/natten.h": 400, "CMakeLists.txt": 200}
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_KERNEL_LINES, MOST_COLUMNS = (
    500,
    60,
    150,
    100,
)
MOST_MACRO_STATEMENTS = 2
MOST_VARIABLES = 5


def files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    return [Path(name) for name in sorted(listed) if name and (ROOT / name).is_file()]


def c_functions(lines: list[str]):
    """The formatter puts a function's braces, and no others, alone at the left margin."""
    start = None
    for number, line in enumerate(lines, 1):
        if line == "{":
            start = number
        elif line == "}" and start:
            yield lines[start - 2].strip(), start, number - start + 1
            start = None


def python_functions(text: str):
    """Docstrings are prose and do not count."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            prose = len((ast.get_docstring(node, clean=False) or "").splitlines())
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1 - prose


def macros(lines: list[str]):
    body: list[str] = []
    for number, line in enumerate(lines, 1):
        if body or re.match(r"\s*#\s*define\b", line):
            body.append(line)
            if not line.endswith("\\"):
                yield number - len(body) + 1, "\n".join(body)
                body = []


def check_source(path: Path, text: str):
    lines = text.splitlines()
    is_kernel = path.name.endswith("_tmpl.h") or path.parts[:2] == ("src", "device")
    most = MOST_KERNEL_LINES if is_kernel else MOST_FUNCTION_LINES
    functions = python_functions(text) if path.suffix == ".py" else c_functions(lines)
    for name, line, length in functions:
        if length > most:
            yield f"{path}:{line}: {name}: {length} lines, at most {most}"
    if not any("SPDX-License-Identifier: MIT" in line for line in lines[:3]):
        yield f"{path}:1: needs an SPDX line"
    if path.suffix == ".py":
        return
    for line, body in macros(lines):
        if body.count(";") > MOST_MACRO_STATEMENTS:
            yield f"{path}:{line}: a body in a macro ({body.count(';')} statements)"
    for number, line in enumerate(lines, 1):
        if re.match(r"\s*(//|/\*).*[;{]\s*(\*/)?$", line) and " " not in line.strip(" /*;"):
            yield f"{path}:{number}: code commented out"


def check_file(path: Path):
    build_file = path.name in ("CMakeLists.txt", "Makefile")
    if path.suffix not in SOURCES and not build_file:
        return
    text = (ROOT / path).read_text()
    lines = text.splitlines()
    most = FILE_LINES.get(str(path), 200 if path.name == "CMakeLists.txt" else MOST_FILE_LINES)
    if len(lines) > most:
        yield f"{path}: {len(lines)} lines, at most {most}"
    for number, line in enumerate(lines, 1):
        if len(line) > MOST_COLUMNS:
            yield f"{path}:{number}: {len(line)} columns, at most {MOST_COLUMNS}"
    if path.suffix in SOURCES:
        yield from check_source(path, text)


def check_environment(paths: list[Path]):
    readers: dict[str, set[str]] = {"src": set(), "python": set()}
    names = set()
    for path in paths:
        if path.parts[0] not in readers or path.suffix not in SOURCES:
            continue
        text = (ROOT / path).read_text()
        names |= set(re.findall(r'"(NATTEN_[A-Z_]+)"', text))
        if re.search(r"\bgetenv\s*\(|os\.environ", text):
            readers[path.parts[0]].add(str(path))
    for where, found in readers.items():
        if len(found) > 1:
            yield f"{where} reads the environment in several files: {', '.join(sorted(found))}"
    if len(names) > MOST_VARIABLES:
        yield f"{len(names)} environment variables, at most {MOST_VARIABLES}: {sorted(names)}"


def main() -> int:
    paths = files()
    problems = [text for path in paths for text in check_file(path)]
    problems += check_environment(paths)
    print("\n".join(problems) if problems else "budgets: all kept")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
