# SPDX-License-Identifier: MIT
"""Runs every test there is and adds up what they say; the last line is the sum.

A step is a command. Those that print "N passed, N failed, N skipped" (C programs) or pytest's
summary count as they say, others as one test. A step whose tools are missing is skipped, visibly.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LOGS = ROOT / "build/logs"
PROBLEMS = "tests/problems"
COUNTED = re.compile(r"^[\w./: -]+: (\d+) passed, (\d+) failed, (\d+) skipped$", re.MULTILINE)
PYTEST = re.compile(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s.*$", re.MULTILINE)
KINDS = {"passed": 0, "failed": 1, "error": 1, "errors": 1, "skipped": 2, "xfailed": 0}
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:die_after_fork=0",
}


@dataclass
class Step:
    name: str
    command: list[str]
    needs: list[str] = field(default_factory=list)  # programs
    lint: bool = False
    quick: bool = False


@dataclass
class Sum:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, passed: int, failed: int, skipped: int) -> None:
        self.passed += passed
        self.failed += failed
        self.skipped += skipped


def shell(text: str) -> list[str]:
    return ["sh", "-c", text]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def cmake(folder: str, *options: str, targets: str = "") -> list[str]:
    configure = " ".join(["cmake -S . -G Ninja -B", folder, *options])
    build = f"cmake --build {folder}" + (f" --target {targets}" if targets else "")
    return shell(f"{configure} >/dev/null && {build}")


def sanitized(
    folder: str, flags: str, kernel_flags: str = "-O0", avx512_flags: str = ""
) -> list[str]:
    flags += " -fno-omit-frame-pointer -fno-sanitize-recover=all -g"
    return cmake(
        folder,
        "-DCMAKE_BUILD_TYPE=None",
        f"'-DCMAKE_C_FLAGS=-O1 {flags}'",
        f"'-DNATTEN_KERNEL_FLAGS={kernel_flags}'",
        f"'-DNATTEN_AVX512_FLAGS={avx512_flags}'",
    )


# The longest first. The references need minutes on models, and have passed on everything else, as
# have the unfused ops.
CHECKS = [
    f"-k !cpu-reference -o backward {PROBLEMS}/models.txt",
    f"-k !cpu-reference -o forward {PROBLEMS}/models.txt",
    f"{PROBLEMS}/edge.txt",
    f"{PROBLEMS}/full.txt",
    "--random 150",
]

AMX_CHECKS = [
    f"-k cpu-amx -o forward --with bf16 {what}"
    for what in (f"{PROBLEMS}/edge.txt", f"{PROBLEMS}/full.txt", "--some 300")
]


def side_by_side(program: str, arguments: list[str]) -> list[str]:
    """A program with each of these arguments, two at a time, each one's output in one piece."""
    lines = " ".join(f"'{line}'" for line in arguments)
    one = f'out=$({program} "$@"); status=$?; flock build/logs printf "%s\\n" "$out"; exit $status'
    return shell(f"printf '%s\\n' {lines} | xargs -P 2 -L 1 sh -c '{one}' {program}")


def lint_steps() -> list[Step]:
    c_files = "git ls-files -co --exclude-standard '*.c' '*.h' '*.cu'"
    return [
        Step(
            "clang-format",
            shell(f"{c_files} | xargs clang-format --dry-run --Werror"),
            lint=True,
        ),
        Step("ruff format", shell("ruff format --check ."), lint=True),
        Step("ruff check", shell("ruff check ."), lint=True),
        Step("mypy", shell("mypy"), lint=True),
        Step("budgets", python("tools/budget.py"), lint=True),
        Step("arrows", python("tools/arrows.py"), lint=True),
        Step("ctypes", python("tools/check_ctypes.py"), lint=True),
        Step("docs", python("tools/check_docs.py"), lint=True),
    ]


def unit_tests(folder: str, only: str = "") -> list[str]:
    return shell(f"ctest --test-dir {folder} --verbose --output-on-failure {only}")


def device_texts() -> list[str]:
    """Every kernel for every architecture, by the NVRTC among our own requirements; those for
    Hopper as the problems of models want them."""
    found = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/lib/libnvrtc.so.*"))
    archs = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121"
    problems = f"{PROBLEMS}/sm90_models.txt"
    path = found[0] if found else ""
    return shell(f"NATTEN_NVRTC={path} build/release/tests/cuda_compile {archs} {problems}")


def aarch64_steps() -> list[Step]:
    """The library for another architecture, on a processor made of software. That one cannot start
    threads after a fork, so test_threads stays away."""
    folder = "build/aarch64"
    needs = ["aarch64-linux-gnu-gcc", "qemu-aarch64"]
    build = cmake(
        folder,
        "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
        "'-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu'",
        targets="check test_window test_problem test_blocks",
    )
    tests = unit_tests(folder, "-j2 -R 'check_smoke|test_window|test_problem|test_blocks'")
    return [Step("build aarch64", build, needs), Step("unit tests aarch64", tests, needs)]


def c_steps() -> list[Step]:
    check = "build/release/tests/check"
    asan = "build/asan/tests/check"
    return [
        Step("build", cmake("build/release"), quick=True),
        Step(
            "loops",
            python("tools/check_loops.py", "build/release/libnatten.so"),
            needs=["objdump"],
            quick=True,
        ),
        Step("unit tests", unit_tests("build/release", "-LE host"), quick=True),
        Step("device texts on the host", unit_tests("build/release", "-L host -j2")),
        Step("device texts by NVRTC", device_texts()),
        Step("check problems", side_by_side(check, CHECKS)),
        Step(
            "check problems AMX",
            side_by_side("build/release/tests/check_amx", AMX_CHECKS),
        ),
        Step(
            "build asan",
            sanitized(
                "build/asan",
                "-fsanitize=address,undefined",
                "-O0;-fno-sanitize=null,alignment,object-size",
                # Undefined behavior would take gcc three minutes more: the same text is looked at
                # as AVX2's and as plain C.
                "-fno-sanitize=undefined",
            ),
        ),
        Step("unit tests asan", unit_tests("build/asan", "-LE host")),
        Step("check random asan", [asan, "--random", "40"]),
        Step("build tsan", sanitized("build/tsan", "-fsanitize=thread")),
        Step("threads tsan", ["build/tsan/tests/test_threads"]),
        Step("tuning tsan", ["build/tsan/tests/test_tune", "threads"]),
        Step(
            "fuzz",
            shell("sh tests/fuzz/run.sh"),
            needs=["clang"],
        ),
        *aarch64_steps(),
    ]


def python_steps(quick: bool) -> list[Step]:
    tests = [
        "-m",
        "pytest",
        "-q",
        "-rs",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "tests/python",
    ]
    if quick:
        return [Step("pytest", python(*tests, "-m", "not slow"), quick=True)]
    return [
        Step("header as C", shell("sh tests/install/header.sh cc -std=c11")),
        Step(
            "header as C++",
            shell("sh tests/install/header.sh g++ -std=c++11"),
            needs=["g++"],
        ),
        Step("install", python("tests/install/check_install.py")),
        Step("package", python("tests/install/check_package.py")),
        Step("pytest", python(*tests)),
    ]


def count(name: str, output: str, status: int, total: Sum) -> None:
    """Adds what a step said; a step that failed without saying so counts as one failure."""
    before = total.failed
    counts = [tuple(map(int, found)) for found in COUNTED.findall(output)]
    for found in counts:
        total.add(*found)
    summary = PYTEST.findall(output)
    if "pytest" in name and summary:
        for number, kind in re.findall(r"(\d+) (\w+)", summary[-1]):
            if kind in KINDS:
                sums = [0, 0, 0]
                sums[KINDS[kind]] = int(number)
                total.add(*sums)
        counts.append((0, 0, 0))
    if status and total.failed == before:
        total.add(0, 1, 0)
    elif not counts:
        total.add(1, 0, 0)


def run(step: Step, total: Sum) -> None:
    missing = [tool for tool in step.needs if not shutil.which(tool)]
    if missing:
        print(f"SKIP {step.name}: {' '.join(missing)} not found", flush=True)
        total.add(0, 0, 1)
        return
    environment = os.environ | SANITIZERS | {"NATTEN_TEST_INSTALLED": "1"}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    log = LOGS / (step.name.replace(" ", "-") + ".log")
    begin = time.monotonic()
    with log.open("w") as file:
        status = subprocess.run(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    output = log.read_text(errors="replace")
    before = Sum(total.passed, total.failed, total.skipped)
    count(step.name, output, status, total)
    failed = total.failed > before.failed
    for line in output.splitlines():
        if line.lstrip("0123456789: ").startswith(("SKIP", "seed ")):
            print(f"     {line}")
    if failed:
        lines = output.splitlines()
        early = [line for line in lines[:-60] if "FAIL" in line or "Error" in line]
        print("\n".join(early[:40] + lines[-60:]))
    print(
        f"{'FAIL' if failed else 'ok  '} {step.name}: {total.passed - before.passed} passed, "
        f"{total.failed - before.failed} failed, {total.skipped - before.skipped} skipped "
        f"({time.monotonic() - begin:.0f} s)",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="what is run all the time")
    parser.add_argument("--lint", action="store_true", help="style, budgets and arrows only")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    steps = lint_steps()
    if not options.lint:
        steps += c_steps() + python_steps(options.quick)
    if options.quick:
        steps = [step for step in steps if step.lint or step.quick]
    total = Sum()
    for step in steps:
        run(step, total)
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return total.failed > 0


if __name__ == "__main__":
    sys.exit(main())
