# SPDX-License-Identifier: MIT
"""Checks that the sums of the innermost loops stay in registers: a compiler that stops to unroll
them keeps them in memory, and kernels are two to three times slower.

    python tools/check_loops.py build/release/libnatten.so

Reads the machine code of the functions correlate_ROWS_KEYS_MODE and aggregate_ROWS_HALVES
(also _one and _two), which the x86-64 kernels with multiply-adds consist of (the generic ones
have no such instruction, and are not looked at). A loop must have a multiply-add (or a product of
pairs) for each of its sums, or a multiple of that, and no vector may go to or come from the stack.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass

FUNCTION = re.compile(
    r"^([0-9a-f]+) <((?:half_)?(correlate|aggregate(?:_one|_two)?)_(\d)_(\d)(?:_NA_\w+)?)>:$"
)
OTHER = re.compile(r"^[0-9a-f]+ <.*>:$")
INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\s+(\S+)\s*(.*)$")
PRODUCT = re.compile(r"vfmadd\d+p[sd]|vdpbf16ps")
PAIRS = "vdpbf16ps"
STACK = re.compile(r"\(%rsp[,)]|-0x[0-9a-f]+\(%rbp\)")


@dataclass
class Instruction:
    address: int
    name: str
    operands: str


def functions(lines: list[str]):
    """(name, kind, sums, instructions) of each function of interest."""
    found, body = None, []
    for line in lines:
        head = FUNCTION.match(line)
        if head or OTHER.match(line):
            if found:
                yield (*found, body)
            found, body = None, []
            if head:
                found = (head[2], head[3], int(head[4]) * int(head[5]))
            continue
        code = INSTRUCTION.match(line)
        if found and code:
            body.append(Instruction(int(code[1], 16), code[2], code[3]))
    if found:
        yield (*found, body)


def innermost_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """Pieces of code from a jump's target to the jump, with products and without such a piece.
    Where there are products of pairs, others are of the scale: after the loop, which code moved
    behind the function's end and jumping back looks like."""
    pairs = any(code.name == PAIRS for code in body)
    index = {code.address: i for i, code in enumerate(body)}
    spans = []
    for i, code in enumerate(body):
        target = re.match(r"([0-9a-f]+) <", code.operands) if code.name.startswith("j") else None
        begin = index.get(int(target[1], 16)) if target else None
        if begin is not None and begin <= i:
            names = [c.name for c in body[begin : i + 1]]
            if PAIRS in names if pairs else any(map(PRODUCT.match, names)):
                spans.append((begin, i))
    inner = [
        (a, b)
        for a, b in spans
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]
    return [body[a : b + 1] for a, b in inner]


def complaint(kind: str, sums: int, loop: list[Instruction]) -> str | None:
    products = sum(bool(PRODUCT.match(code.name)) for code in loop)
    spilled = [c for c in loop if re.search(r"%[xyz]mm", c.operands) and STACK.search(c.operands)]
    if spilled:
        first = spilled[0]
        return f"{len(spilled)} vectors go through the stack ({first.name} {first.operands})"
    if kind == "correlate" and products % sums:
        return f"{products} products in a loop over {sums} sums"
    return None


def main() -> int:
    command = ["objdump", "-d", "--no-show-raw-insn", sys.argv[1]]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    wrong, checked = [], 0
    for name, kind, sums, body in functions(lines):
        if not any(PRODUCT.match(code.name) for code in body):
            continue
        loops = innermost_loops(body)
        if not loops:
            checked += 1
            wrong.append(f"{name} at {body[0].address:x}: no loop with products")
        for loop in loops:
            checked += 1
            why = complaint(kind, sums, loop)
            if why:
                wrong.append(f"{name}, loop at {loop[0].address:x}: {why}")
    for line in wrong:
        print(f"FAIL {line}")
    print(f"check_loops: {checked - len(wrong)} passed, {len(wrong)} failed, 0 skipped")
    return bool(wrong) or not checked


if __name__ == "__main__":
    sys.exit(main())
