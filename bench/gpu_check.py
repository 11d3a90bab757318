# SPDX-License-Identifier: MIT
"""Everything that needs a GPU, without a network, in nine minutes at most for each part:

    python3 bench/gpu_check.py [--correct] [--only STAGE] [OUT]
    python3 bench/gpu_check.py --gradients [OUT]
    python3 bench/gpu_check.py --speed [OUT]

--correct (what is done without a word) builds the library, runs the CUDA kernels against the CPU
reference, the Python tests on CUDA tensors, and compute-sanitizer. --gradients builds it and has
1000 random problems that the backward of Hopper takes checked, and some with KV parallelism, for
which there should be many processors. --speed builds it and measures
the forward beside torch's attention (gpu_speed.py) and the backward (gpu_backward.py).

Prints a short table; what the stages said goes to files in the folder OUT (default: $OUT, else
build/gpu_check)."""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
import types
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
WATCHED = BUILD / "watched"  # kernels for the race checker
RANDOM, RANDOM_ANY_ORDER = 1000, 300  # problems
STAGES = ("kernels", "python", "sanitizer")
LIMIT_S = 530  # of a part: nine minutes, and some for what is outside of stages
OPS = ("forward", "backward", "qk", "qk-backward", "av", "av-backward")
PROBLEMS = [
    str(ROOT / "tests/problems" / name)
    for name in ("smoke.txt", "edge.txt", "full.txt", "sm90.txt")
]


class Stages:
    def __init__(self, out: Path) -> None:
        self.out = out
        self.failed = 0
        self.end = time.monotonic() + LIMIT_S

    def run(self, name: str, command: list[str], limit: float, tail: int = 1) -> bool:
        """One command; its output goes to a file, its last lines are shown. It has `limit` seconds,
        or what is left of all: then it fails."""
        begin = time.monotonic()
        limit = max(1.0, min(limit, self.end - begin))
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                timeout=limit,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            text, good = done.stdout, done.returncode == 0
        except subprocess.TimeoutExpired as error:
            text = error.stdout or ""
            text = (text if isinstance(text, str) else text.decode()) + f"\nover {limit:.0f} s"
            good = False
        (self.out / f"{name}.txt").write_text(text)
        self.failed += not good
        lines = [line for line in text.splitlines() if line.strip()]
        wrong = [line for line in lines if "FAIL" in line][:4]
        print(
            f"{'ok  ' if good else 'FAIL'} {name:28} {time.monotonic() - begin:6.1f} s", flush=True
        )
        for line in [] if good else wrong + lines[-8:] if not wrong else wrong:
            print("       ", line[:230])
        for line in lines[-tail:] if good else []:
            print("       ", line[:230])
        return good


def build(s: Stages, folder: Path = BUILD, *options: str) -> bool:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    targets = ["--target", "natten", "check", "-j", str(os.cpu_count() or 1)]
    configure = ["cmake", "-S", ".", "-B", str(folder), *generator, *options]
    return s.run(f"configure-{folder.name}", configure, 60) and s.run(
        f"build-{folder.name}", ["cmake", "--build", str(folder), *targets], 180
    )


def kernels(s: Stages) -> None:
    """The reference on the CPU is the slow part: an op for each of some processors."""
    check = str(BUILD / "tests/check")

    def one(op: str) -> None:
        s.run(f"check-{op}", [check, "-k", "cuda", "-o", op, *PROBLEMS], 200, tail=4)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, OPS))
    s.run("check-random", [check, "-k", "cuda", "--random", "60"], 60, tail=8)


def gradients(s: Stages) -> None:
    """The backward of Hopper on random problems that it takes, both of its ways, against float64,
    and for the same bits again and again. What takes time is the compiler: hence many processes."""
    check = str(BUILD / "tests/check")
    jobs = max(1, min(16, os.cpu_count() or 1))
    command = [check, "-k", "cuda-sm90-backward", "-o", "backward"]

    def one(job: int) -> None:
        for way, count in (
            ("kvp_choice1", RANDOM_ANY_ORDER),
            ("kvp_little_choice1", RANDOM_ANY_ORDER),
            ("", RANDOM),
        ):
            more = ["--with", way] if way else []
            more += ["-s", str(1000 + job), "--some", str(math.ceil(count / jobs))]
            s.run(f"gradients-{way or 'plain'}-{job}", [*command, *more], 500, tail=1)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, range(jobs)))


def sanitizer(s: Stages) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("SKIP sanitizer: no compute-sanitizer here")
        return
    small = [
        "b1h2d16_9x10_w3x3_rpb_add3_lse",
        "b1h2d64_8x17_w3x5_bf16_lse",
        "b1h4d32_70_w9_hk2_f16",
        "b1h2d32_9x17_w3x5_rpb_add3_bf16_lse",
        "b1h1d16_100_w5_d16_f16",
        "b1h2d64_9x17_w3x5_bf16_lse_kvp_choice1",
    ]
    # Blocks that go from item to item, stages that are used again.
    larger = [
        "b2h4d64_50x61_w9x11_bf16_lse",
        "b1h4d64_12x20x21_w5x7x6_bf16",
        "b2h8d32_700_w65_bf16",
        "b2h4d64_50x61_w9x11_bf16_kvp_choice1",
    ]
    if not build(s, WATCHED, "-DNATTEN_EVERY_LANE_ARRIVES=ON"):
        return
    for mode, folder, kernel, problems in (
        ("memcheck", BUILD, "cuda", small),
        ("synccheck", BUILD, "cuda", small),
        ("racecheck", WATCHED, "cuda", small),
        ("racecheck", WATCHED, "cuda-sm90", larger),
    ):
        command = [tool, "--tool", mode, "--error-exitcode", "9", str(folder / "tests/check")]
        name = f"sanitizer-{mode}-{'larger' if problems is larger else 'small'}"
        s.run(name, [*command, "-k", kernel, *problems], 120)


def python(s: Stages) -> None:
    s.run("python", [sys.executable, __file__, "--only", "python-tests"], 120, tail=30)
    s.run("times", [sys.executable, __file__, "--only", "times"], 120, tail=8)


def speed(s: Stages) -> None:
    """No case of the forward begins so late that there would be no time for the backward."""
    folder = ROOT / "bench"
    forward = [sys.executable, str(folder / "gpu_speed.py"), "--flex", "--limit", "280"]
    s.run("forward", [*forward, str(s.out)], 400, tail=12)
    s.run("backward", [sys.executable, str(folder / "gpu_backward.py"), str(s.out)], 120, tail=30)


def times() -> int:
    """How long one call takes, forward and backward, in milliseconds."""
    sys.path.insert(0, str(ROOT / "python"))
    torch = importlib.import_module("torch")
    functional = importlib.import_module("natten.functional")
    for shape, window in (
        ((16, 56, 56, 4, 32), 7),
        ((2, 128, 128, 16, 64), 13),
        ((1, 16, 56, 56, 8, 64), 7),
        ((1, 8192, 16, 128), 513),
    ):
        function = getattr(functional, f"na{len(shape) - 3}d")
        made = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        q, k, v = (t.requires_grad_() for t in made)
        out = function(q, k, v, window)
        d_out = torch.randn_like(out)
        torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        marks[0].record()
        for _ in range(3):
            out = function(q, k, v, window)
        marks[1].record()
        torch.autograd.grad(out, (q, k, v), d_out)
        marks[2].record()
        torch.cuda.synchronize()
        forward, backward = marks[0].elapsed_time(marks[1]) / 3, marks[1].elapsed_time(marks[2])
        print(
            f"{'x'.join(map(str, shape))} w{window}: {forward:.3f} ms, backward {backward:.3f} ms"
        )
    return 0


class PlainPytest(types.ModuleType):
    """As much of pytest as tests/python/test_cuda.py uses."""

    def __init__(self) -> None:
        super().__init__("pytest")
        self.mark = types.SimpleNamespace(skipif=lambda *_, **__: None)
        self.raises = unittest.TestCase().assertRaises

    @staticmethod
    def skip(reason: str) -> None:
        raise unittest.SkipTest(reason)


def python_tests() -> int:
    """tests/python/test_cuda.py without pytest, in this process."""
    sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests/python")]
    sys.modules["pytest"] = PlainPytest()
    module = importlib.import_module("test_cuda")
    failed = 0
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        try:
            test()
            print("ok", name, flush=True)
        except unittest.SkipTest as reason:
            print("SKIP", name, reason, flush=True)
        except Exception:
            failed += 1
            print("FAIL", name, traceback.format_exc(limit=-2).replace("\n", " | "), flush=True)
    print(f"{failed} failed")
    return failed


def describe() -> None:
    for command in (
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"],
        [sys.executable, "-c", "import torch; print('torch', torch.__version__)"],
    ):
        if not shutil.which(command[0]):
            print(f"no {command[0]} here")
            continue
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        print(done.stdout.strip() or done.stderr.strip()[-200:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    halves = parser.add_mutually_exclusive_group()
    halves.add_argument("--correct", action="store_true", help="whether all is right (the default)")
    halves.add_argument("--gradients", action="store_true", help="random problems of training")
    halves.add_argument("--speed", action="store_true", help="how fast it is")
    halves.add_argument("--only", choices=(*STAGES, "python-tests", "times"))
    parser.add_argument("out", nargs="?", default=os.environ.get("OUT", str(BUILD / "gpu_check")))
    given = parser.parse_args()
    if given.only == "python-tests":
        return python_tests()
    if given.only == "times":
        return times()
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    os.environ["NATTEN_CACHE_DIR"] = str(out / "kernels")
    s = Stages(out)
    describe()
    if not build(s):
        return 1
    stages: dict[str, Callable[[Stages], None]] = dict(
        zip(STAGES, (kernels, python, sanitizer), strict=True)
    )
    parts = [speed] if given.speed else [gradients] if given.gradients else stages.values()
    for stage in parts:
        if given.only in (None, stage.__name__):
            stage(s)
    shutil.rmtree(out / "kernels", ignore_errors=True)
    print(f"gpu_check: {s.failed} stages failed")
    return s.failed > 0


if __name__ == "__main__":
    sys.exit(main())
