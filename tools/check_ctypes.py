# SPDX-License-Identifier: MIT
"""Compares python/natten/_lib.py with the C headers: sizes, offsets, constants, functions.

Each Structure of _lib.py names its C type in its docstring; a C program prints the C side."""

import ast
import ctypes
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIRROR = ROOT / "python/natten/_lib.py"
HEADERS = ["include/natten.h", "src/torch/bind.h"]


def load_mirror() -> dict[str, object]:
    """The module without the line that loads the library."""
    tree = ast.parse(MIRROR.read_text())
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.Assign) and ast.unparse(node.value) == "_load()")
    ]
    module: dict[str, object] = {"__name__": "mirror", "__file__": str(MIRROR)}
    exec(compile(tree, str(MIRROR), "exec"), module)
    return module


def structures(mirror: dict[str, object]) -> dict[str, type[ctypes.Structure]]:
    return {
        (value.__doc__ or "").split()[0]: value
        for value in mirror.values()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value is not ctypes.Structure
    }


def header_text() -> str:
    return "\n".join((ROOT / name).read_text() for name in HEADERS)


def enumerators(text: str) -> list[str]:
    bodies = re.findall(r"enum natten_\w+ \{(.*?)\}", text, re.DOTALL)
    return [name for body in bodies for name in re.findall(r"\b(NATTEN_[A-Z0-9_]+) =", body)]


def c_values(expressions: list[str]) -> dict[str, int]:
    lines = "".join(f'    printf("%lld\\n", (long long)({text}));\n' for text in expressions)
    includes = "".join(f'#include "{ROOT / name}"\n' for name in HEADERS)
    program = f"#include <stdio.h>\n{includes}int main(void)\n{{\n{lines}    return 0;\n}}\n"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "sizes.c"), Path(folder, "sizes")
        source.write_text(program)
        include = [f"-I{ROOT / 'include'}", f"-I{ROOT / 'src'}"]
        subprocess.run(["cc", *include, "-o", binary, source], check=True)
        printed = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    return dict(zip(expressions, map(int, printed.split()), strict=True))


def wanted(mirror: dict[str, object], text: str) -> dict[str, int]:
    """What C expressions must come to."""
    values: dict[str, int] = {}
    for name, structure in structures(mirror).items():
        values[f"sizeof({name})"] = ctypes.sizeof(structure)
        for field, kind in structure._fields_:
            values[f"offsetof({name}, {field})"] = getattr(structure, field).offset
            values[f"sizeof((({name} *)0)->{field})"] = ctypes.sizeof(kind)
    for name in enumerators(text):
        mirrored = mirror.get(name.removeprefix("NATTEN_"))
        if isinstance(mirrored, int):
            values[name] = mirrored
    return values


def missing_functions(text: str) -> list[str]:
    declared = set(re.findall(r"NATTEN_API [^;(]*?\b(natten_\w+)\(", text))
    return sorted(declared - set(re.findall(r'"(natten_\w+)": \(', MIRROR.read_text())))


def main() -> int:
    if not MIRROR.exists():
        print("no Python package here")
        return 1
    text = header_text()
    mirror = load_mirror()
    values = wanted(mirror, text)
    actual = c_values(list(values))
    wrong = [
        f"{name} is {actual[name]} in C, {value} in Python"
        for name, value in values.items()
        if actual[name] != value
    ]
    fields = {name: len(structure._fields_) for name, structure in structures(mirror).items()}
    for name, count in fields.items():
        body = re.search(rf"typedef struct {name} \{{(.*?)\n\}}", text, re.DOTALL)
        declared = len(re.findall(r";", re.sub(r"/\*.*?\*/", "", body.group(1), flags=re.DOTALL)))
        if declared != count:
            wrong.append(f"{name} has {declared} fields in C, {count} in Python")
    wrong += [f"{name} is not in {MIRROR.name}" for name in missing_functions(text)]
    print("\n".join(wrong) if wrong else f"ctypes: {len(values)} sizes, offsets, constants agree")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
