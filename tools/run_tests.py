# SPDX-License-Identifier: MIT
"""Runs every test there is and adds up what they say; the last line is the sum.

A step is a command. Those that print "N passed, N failed, N skipped" (C programs) or pytest's
summary count as they say, others as one test. A step whose tools are missing is skipped, visibly.
Two steps run at a time: few of them keep two cores busy all the time.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LOGS = ROOT / "build/logs"
PROBLEMS = "tests/problems"
AT_ONCE = 2
OTHER_HALF = ["distributed", "process", "values"]
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
    after: list[str] = field(default_factory=list)  # steps that must have ended
    lint: bool = False
    quick: bool = False


@dataclass
class Result:
    output: str
    status: int = 0
    seconds: float = 0


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
    folder: str, flags: str, kernels: str, avx512: str = "", targets: str = ""
) -> list[str]:
    flags += " -fno-omit-frame-pointer -fno-sanitize-recover=all -g"
    return cmake(
        folder,
        "-DCMAKE_BUILD_TYPE=None",
        f"'-DCMAKE_C_FLAGS=-O1 {flags}'",
        f"'-DNATTEN_KERNEL_FLAGS={kernels}'",
        f"'-DNATTEN_AVX512_FLAGS={avx512}'",
        targets=targets,
    )


def unit_tests(folder: str, only: str = "") -> list[str]:
    return shell(f"ctest --test-dir {folder} --verbose --output-on-failure {only}")


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


def check_steps() -> list[Step]:
    """The references need minutes on models, and have passed on everything else, as have the
    unfused ops."""
    words = {
        "models backward": f"-k !cpu-reference -o backward {PROBLEMS}/models.txt",
        "models forward": f"-k !cpu-reference -o forward {PROBLEMS}/models.txt",
        "edge": f"{PROBLEMS}/edge.txt",
        "full": f"{PROBLEMS}/full.txt",
        "random": "--random 150",
    }
    check, steps = "build/release/tests/check", []
    for name, arguments in words.items():
        steps.append(Step(f"check {name}", [check, *arguments.split()], after=["build"]))
    amx = f"-k cpu-amx -o forward --with bf16 --some 300 {PROBLEMS}/edge.txt {PROBLEMS}/full.txt"
    return [*steps, Step("check AMX", [f"{check}_amx", *amx.split()], after=["build"])]


def device_texts() -> list[str]:
    """Every kernel for every architecture, by the NVRTC among our own requirements; those for
    Hopper as the problems of models want them."""
    found = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/lib/libnvrtc.so.*"))
    archs = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121"
    problems = f"{PROBLEMS}/sm90_models.txt"
    path = found[0] if found else ""
    return shell(f"NATTEN_NVRTC={path} build/release/tests/cuda_compile {archs} {problems}")


def sanitizer_steps() -> list[Step]:
    """For the vector kernels gcc takes half the time with -Og and -g1 that it takes with -O0, -O1
    or -g, and half of that where functions are called to look at memory."""
    calls = "--param=asan-instrumentation-with-call-threshold=0"
    asan = sanitized(
        "build/asan",
        "-fsanitize=address,undefined",
        f"-Og;-g1;{calls};-fno-sanitize=null,alignment,object-size",
        # Undefined behavior would take gcc a minute more: the same text is looked at as AVX2's and
        # as plain C.
        "-fno-sanitize=undefined",
    )
    targets = "test_queue test_threads test_tune"
    tsan = sanitized("build/tsan", "-fsanitize=thread", "-Og;-g1", targets=targets)
    random = ["build/asan/tests/check", "--random", "40"]
    return [
        Step("build asan", asan),
        Step("unit tests asan", unit_tests("build/asan", "-LE host"), after=["build asan"]),
        Step("check random asan", random, after=["build asan"]),
        Step("build tsan", tsan),
        Step("queue tsan", ["build/tsan/tests/test_queue"], after=["build tsan"]),
        Step("threads tsan", ["build/tsan/tests/test_threads"], after=["build tsan"]),
        Step("tuning tsan", ["build/tsan/tests/test_tune", "threads"], after=["build tsan"]),
    ]


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
    return [
        Step("build aarch64", build, needs),
        Step("unit tests aarch64", tests, needs, after=["build aarch64"]),
    ]


def clang_step() -> Step:
    """What gcc takes another compiler may refuse."""
    options = "-DCMAKE_C_COMPILER=clang -DCMAKE_COMPILE_WARNING_AS_ERROR=ON -DBUILD_TESTING=OFF"
    return Step("build clang", cmake("build/clang", options), needs=["clang"])


def c_steps() -> list[Step]:
    loops = python("tools/check_loops.py", "build/release/libnatten.so")
    tests = unit_tests("build/release", "-LE host")
    host = unit_tests("build/release", "-L host -j2")
    return [
        Step("loops", loops, needs=["objdump"], after=["build"], quick=True),
        Step("unit tests", tests, after=["build"], quick=True),
        *sanitizer_steps(),
        Step("device texts on the host", host, after=["build"]),
        Step("device texts by NVRTC", device_texts(), after=["build"]),
        *aarch64_steps(),
        clang_step(),
        Step("fuzz", shell("sh tests/fuzz/run.sh"), needs=["clang"], after=["build"]),
        *check_steps(),
    ]


def install_steps() -> list[Step]:
    header = "sh tests/install/header.sh"
    install = python("tests/install/check_install.py")
    return [
        Step("header as C", shell(f"{header} cc -std=c11")),
        Step("header as C++", shell(f"{header} g++ -std=c++11"), needs=["g++"]),
        Step("install", install, after=["build", "package"]),
    ]


def python_steps(quick: bool) -> list[Step]:
    """In halves that take about as long. What is quick is the source tree beside the build; all is
    the package as it is installed. Some tests are skipped where the build has no host device."""
    tests = python("-m", "pytest", "-q", "-rs", "--color=no", "-p", "no:cacheprovider")
    half = [f"tests/python/test_{name}.py" for name in OTHER_HALF]
    rest = ["tests/python", *(f"--ignore={path}" for path in half)]
    if quick:
        tests += ["-m", "not slow"]
    else:
        tests = ["env", "NATTEN_TEST_INSTALLED=1", *tests]
    after = ["build"] if quick else ["build", "package"]
    return [
        Step("pytest one half", [*tests, *rest], after=after, quick=True),
        Step("pytest other half", [*tests, *half], after=after, quick=True),
    ]


def steps(options: argparse.Namespace) -> list[Step]:
    """First what much has to wait for, then what takes long, so that both cores stay busy."""
    build = Step("build", cmake("build/release"), quick=True)
    package = Step("package", python("tests/install/check_package.py"))
    every = [build, *lint_steps(), package, *python_steps(options.quick), *c_steps()]
    every += install_steps()
    if options.lint:
        return [step for step in every if step.lint]
    if options.quick:
        return [step for step in every if step.lint or step.quick]
    return every


def count(name: str, result: Result, total: Sum) -> None:
    """Adds what a step said; a step that failed without saying so counts as one failure."""
    before = total.failed
    counts = [tuple(map(int, found)) for found in COUNTED.findall(result.output)]
    for found in counts:
        total.add(*found)
    summary = PYTEST.findall(result.output)
    if "pytest" in name and summary:
        for number, kind in re.findall(r"(\d+) (\w+)", summary[-1]):
            if kind in KINDS:
                sums = [0, 0, 0]
                sums[KINDS[kind]] = int(number)
                total.add(*sums)
        counts.append((0, 0, 0))
    if result.status and total.failed == before:
        total.add(0, 1, 0)
    elif not counts:
        total.add(1, 0, 0)


def run(step: Step) -> Result:
    missing = [tool for tool in step.needs if not shutil.which(tool)]
    if missing:
        skip = f"SKIP {step.name}: {' '.join(missing)} not found\n"
        return Result(skip + "tools: 0 passed, 0 failed, 1 skipped")
    environment = os.environ | SANITIZERS
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
    return Result(log.read_text(errors="replace"), status, time.monotonic() - begin)


def report(step: Step, result: Result, total: Sum) -> None:
    before = Sum(total.passed, total.failed, total.skipped)
    count(step.name, result, total)
    failed = total.failed > before.failed
    lines = result.output.splitlines()
    for line in lines:
        if line.lstrip("0123456789: ").startswith(("SKIP", "seed ")):
            print(f"     {line}")
    if failed:
        early = [line for line in lines[:-60] if "FAIL" in line or "Error" in line]
        print("\n".join(early[:40] + lines[-60:]))
    print(
        f"{'FAIL' if failed else 'ok  '} {step.name}: {total.passed - before.passed} passed, "
        f"{total.failed - before.failed} failed, {total.skipped - before.skipped} skipped "
        f"({result.seconds:.0f} s)",
        flush=True,
    )


def run_all(waiting: list[Step], total: Sum) -> None:
    """Some at a time, in order, each after those it has to wait for; reports come one by one."""
    running = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while waiting or running:
            unfinished = {step.name for step in [*waiting, *running.values()]}
            ready = [step for step in waiting if unfinished.isdisjoint(step.after)]
            for step in ready[: AT_ONCE - len(running)]:
                waiting.remove(step)
                running[pool.submit(run, step)] = step
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                report(running.pop(done), done.result(), total)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="what is run all the time")
    parser.add_argument("--lint", action="store_true", help="style, budgets and arrows only")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    total = Sum()
    run_all(steps(options), total)
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return total.failed > 0


if __name__ == "__main__":
    sys.exit(main())
