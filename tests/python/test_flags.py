# SPDX-License-Identifier: MIT
"""Settings change what they say they change: the kernel that was taken, read back from
explanations. On CUDA they are those of a GPU made of software (tests/host)."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import natten
import natten.functional as F
from natten import _lib, _preferences, autotuner
from natten.context import AutotunerContext, NattenContext
from natten.utils import explain

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).resolve().parent
WAYS = ("forward", "backward")
UNFUSED = ("qk", "qk_backward", "av", "av_backward")


def kernel(plan: str) -> str:
    """The one that was taken."""
    (found,) = [line for line in plan.splitlines() if ": taken" in line]
    return found.split(":")[0]


def operations(plans: list[str]) -> list[str]:
    return [kernel(plan).split("-", 2)[2] for plan in plans]


def line(plan: str, name: str) -> str:
    """What an explanation says of a kernel or a setting; empty if nothing."""
    found = [x.partition(": ")[2] for x in plan.splitlines() if x.startswith(f"{name}: ")]
    return found[0] if found else ""


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_the_road_of_the_modules(rank: int) -> None:
    module = getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, *[5] * rank, 8)

    def road() -> list[str]:
        with explain() as plans:
            module(x).sum().backward()
        return operations(plans)

    unfused = ["qk", "av", "av-backward", "qk-backward"]
    assert road() == unfused
    natten.use_fused_na()
    assert road() == ["forward", "backward"]
    natten.disable_fused_na()
    assert road() == unfused
    natten.enable_fused_na()
    assert road() == ["forward", "backward"]
    natten.context.NattenContext.reset()
    assert road() == unfused


def test_functions_do_not_care_for_the_road_of_the_modules() -> None:
    x = torch.randn(1, 7, 2, 4)
    for fused in (False, True):
        natten.use_fused_na(fused)
        with explain() as plans:
            first = F.na1d(x, x, x, 3).movedim(2, 1)
            F.na1d_av(F.na1d_qk(first, first, 3), first, 3)
        assert operations(plans) == ["forward", "qk", "av"]


def test_choices_of_the_autotuner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A table says which choice is taken, as long as the autotuner is on."""
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(tmp_path))
    caplog.set_level("DEBUG", logger="natten.autotuner")
    x = torch.randn(1, 14, 14, 2, 8)

    def choice() -> str:
        with explain() as plans:
            F.na2d(x, x, x, 5)
        return line(plans[0], kernel(plans[0])).removeprefix("taken (choice ").split(" ")[0]

    natten.use_autotuner(True, True, steps_forward=1)
    F.na2d(x, x, x, 5)
    tried = dict(re.findall(r" choice (\d+) \((.*)\): ", caplog.text))
    assert len(tried) > 2
    title, row = autotuner.export().splitlines()
    fields = row.split("\t")
    for wanted, text in tried.items():
        fields[1], fields[6] = wanted, text
        autotuner.clear()
        autotuner.load(f"{title}\n" + "\t".join(fields) + "\n")
        assert choice() == wanted
    torch.use_deterministic_algorithms(True)
    try:
        F.na2d(x, x, x, 5)  # looks at the mode
        assert choice() == "0"
    finally:
        torch.use_deterministic_algorithms(False)
    F.na2d(x, x, x, 5)
    assert choice() == wanted != "0"
    natten.disable_autotuner()
    assert choice() == "0"


SETTERS: list[Callable[[], Any]] = [
    natten.enable_fused_na,
    natten.disable_fused_na,
    natten.enable_tf32,
    natten.disable_tf32,
    natten.disable_gemm_na,
    natten.enable_gemm_na,
    natten.use_kv_parallelism_in_fused_na,
    lambda: natten.set_memory_usage_preference("strict"),
    natten.set_memory_usage_preference,
    NattenContext.reset,
]


def at_once(count: int, work: Callable[[random.Random], None]) -> None:
    """Several threads, each with numbers of its own; what goes wrong in one goes wrong here."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, [random.Random(i) for i in range(count)]))


def test_threads_leave_the_library_with_the_last_of_their_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []

    def prefer(value: int) -> None:
        time.sleep(0.0002)  # long enough for another thread to come between
        told.append(value)

    monkeypatch.setattr(_lib, "library", SimpleNamespace(natten_torch_prefer=prefer))
    for _ in range(40):
        at_once(4, lambda numbers: [numbers.choice(SETTERS)() for _ in range(20)] and None)
        _preferences.refresh()
        assert told[-1] == _preferences.current == _preferences._wanted()
    NattenContext.reset()


def test_settings_change_while_others_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call fails, and all results are right."""
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(tmp_path))
    quick = {f"{name}_{way}": 1 for name in ("steps", "warmup_steps") for way in WAYS}
    setters = [
        *SETTERS,
        lambda: natten.use_autotuner(True, True, **quick),  # type: ignore[arg-type]
        natten.disable_autotuner,
        autotuner.clear,
        lambda: autotuner.load(autotuner.export()),
        AutotunerContext.reset,
    ]
    module = natten.NeighborhoodAttention2D(8, 2, 3).double()
    x = torch.randn(1, 6, 7, 8, dtype=torch.float64)
    true = module(x)
    true_grads = torch.autograd.grad(true.sum(), list(module.parameters()))
    over = threading.Event()

    def change(numbers: random.Random) -> None:
        while not over.is_set():
            numbers.choice(setters)()

    def compute(numbers: random.Random) -> None:
        for _ in range(60):
            out = module(x)
            torch.testing.assert_close(out, true)
            grads = torch.autograd.grad(out.sum(), list(module.parameters()))
            torch.testing.assert_close(grads, true_grads)

    changers = [threading.Thread(target=change, args=(random.Random(i),)) for i in range(2)]
    for thread in changers:
        thread.start()
    try:
        at_once(2, compute)
    finally:
        over.set()
        for thread in changers:
            thread.join()


def host_device(capability: int, dtype: str, folder: Path) -> Any:
    """What host_device.py says with the software of tests/host for a driver and a compiler."""
    root = HERE.parents[1]
    builds = [root / "build/release", root / "build", Path(_lib.library._name).resolve().parent]
    hosts = [b / "tests/host" for b in builds if (b / "tests/host/libnvrtc-host.so").exists()]
    if not hosts:
        pytest.skip("tests/host is not built")
    settings = {
        "LD_LIBRARY_PATH": str(hosts[0]),
        "NATTEN_NVRTC": str(hosts[0] / "libnvrtc-host.so"),
        "NATTEN_CACHE_DIR": str(folder),
        "HOST_CAPABILITY": str(capability),
    }
    command = [sys.executable, str(HERE / "host_device.py"), dtype]
    ran = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def check_switch(found: Any, setting: str, name: str, ops: tuple[str, ...]) -> None:
    """A kind of kernels that is on at first, and in one setting off."""
    for op, plan in found["start"].items():
        on, off = line(plan, name), line(found[setting][op], name)
        if op not in ops:
            assert on == off == ""
            continue
        assert off == "switched off"
        uses = f"allowed, and {kernel(plan)} makes use of it"
        assert on in (uses, f"allowed, but {kernel(plan)} makes no use of it")
        # Without it another kernel is taken, if one was taken for its sake.
        assert (kernel(found[setting][op]) != kernel(plan)) == (on == uses)


def check_wish(found: Any, setting: str, name: str, ops: tuple[str, ...]) -> None:
    """What is off at first, and in one setting on."""
    for op, plan in found[setting].items():
        assert line(found["start"][op], name) == ""
        said = line(plan, name)
        if op not in ops:
            assert said == ""
            continue
        uses = f"allowed, and {kernel(plan)} makes use of it"
        assert said in (uses, f"allowed, but {kernel(plan)} makes no use of it")
        if said != uses:
            assert kernel(plan) == kernel(found["start"][op])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype"), ((75, "float32"), (90, "float32"), (90, "bfloat16"))
)
def test_a_gpu(capability: int, dtype: str, tmp_path: Path) -> None:
    found = host_device(capability, dtype, tmp_path)
    assert found["capability"] == capability
    assert found["has_cuda"] and found["has_half"] and found["has_fna"]
    assert found["has_bfloat"] == (capability >= 80)
    kernels = {op: kernel(plan) for op, plan in found["start"].items()}
    assert found["has_gemm"] == any("reference" not in kernels[op] for op in UNFUSED)
    fast = capability == 90 and dtype == "bfloat16"
    assert kernels["na"] == ("cuda-sm90-forward" if fast else "cuda-reference-forward")
    if capability == 75:
        assert "compute capability 7.5, and 9.0" in line(found["start"]["na"], "cuda-sm90-forward")
    elif not fast:
        assert "only float16 and bfloat16" in line(found["start"]["na"], "cuda-sm90-forward")
    check_switch(found, "gemm off", "GEMM kernels", UNFUSED)
    check_switch(found, "tiled off", "tiled kernels", UNFUSED)
    everything = tuple(found["start"])
    check_wish(found, "tf32 on", "TF32", everything if dtype == "float32" else ())
    for setting in ("kv on", "kv strict", "kv unrestricted"):
        check_wish(found, setting, "KV parallelism", ("na_backward",))
    check_wish(found, "kv strict", "little memory", ("na_backward",))
    check_wish(found, "kv unrestricted", "much memory", ("na_backward",))


def test_a_gpu_that_is_too_old(tmp_path: Path) -> None:
    found = host_device(61, "float32", tmp_path)
    assert found["capability"] == 0
    assert not any(value for name, value in found.items() if name.startswith("has_"))
    for plan in found["start"].values():
        assert "compute capability 6.1, and 7.5 is needed" in plan
