# SPDX-License-Identifier: MIT
"""The package in a process: what importing it loads, threads, forks, both kinds of kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import natten
import natten.functional as F
from natten import _ops

HERE = Path(__file__).resolve().parent
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    path = str(Path(natten.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_needs_no_torch() -> None:
    code = "import sys, natten; print(natten.__version__, 'torch' in sys.modules)"
    assert python(code) == "0.18.0 False"


def test_import_loads_no_compiler() -> None:
    code = """
import sys, torch, natten, natten.functional, natten.modules, natten.context
x = torch.randn(1, 8, 8, 2, 4, requires_grad=True)
natten.na2d(x, x, x, 3).sum().backward()
heavy = ("torch._dynamo", "torch.distributed.tensor")
print([name for name in heavy if name in sys.modules])
"""
    assert python(code) == "[]"


def test_names() -> None:
    for name in natten.__all__:
        assert getattr(natten, name) is not None
    assert set(natten.__all__) <= set(dir(natten))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        natten.nothing  # noqa: B018


@pytest.mark.slow
@pytest.mark.skipif(bool(_ops.WHY_PYTHON), reason="these are the Python kernels")
def test_suite_with_python_kernels() -> None:
    """All that is not slow once more, with the kernels that older versions of torch get."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    env = {**os.environ, "NATTEN_DISABLE": "native"}
    result = subprocess.run(
        [*command, str(HERE)], env=env, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_many_threads() -> None:
    x = torch.randn(1, 12, 12, 2, 8, requires_grad=True)
    windows = [(k, d) for k in (3, 4, 5) for d in (1, 2)]

    def work(kernel_size: int, dilation: int) -> tuple[torch.Tensor, ...]:
        out = F.na2d(x, x, x, kernel_size, dilation)
        return out.detach(), *torch.autograd.grad(out.square().sum(), x)

    wanted = {w: work(*w) for w in windows}
    failures: list[Any] = []

    def loop(start: int) -> None:
        try:
            for i in range(20):
                window = windows[(start + i) % len(windows)]
                for mine, true in zip(work(*window), wanted[window], strict=True):
                    if not torch.equal(mine, true):
                        failures.append(window)
                if i % 5 == 0:
                    with pytest.raises(natten.NattenError, match="extent 12"):
                        F.na2d(x, x, x, 13)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


FORK = """
import os, sys, torch, natten
torch.set_num_threads(2)
x = torch.randn(1, 32, 32, 4, 16)
wanted = natten.na2d(x, x, x, 7)
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        result = natten.na2d(x, x, x, 7)
        # torch's own operations wait for ever, in a child, for threads that it does not have.
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(result, wanted) else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(codes, torch.equal(natten.na2d(x, x, x, 7), wanted), bool(natten._ops.WHY_PYTHON))
"""


@pytest.mark.parametrize("disable", ("", "native"))
def test_fork_after_use(disable: str) -> None:
    python_kernels = disable == "native" or TORCH < (2, 10)
    assert python(FORK, NATTEN_DISABLE=disable) == f"[0, 0, 0] True {python_kernels}"


class Maps(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        x = torch.full((1, 8, 8, 2, 4), float(index))
        return F.na2d(x, x, x, 3)[0]


def test_data_loader_workers() -> None:
    F.na2d(*[torch.randn(1, 32, 32, 4, 16)] * 3, 7)
    loader = torch.utils.data.DataLoader(Maps(), batch_size=2, num_workers=2)
    batches = list(loader)
    wanted = torch.arange(8.0).view(4, 2, 1, 1, 1, 1).expand(4, 2, 8, 8, 2, 4)
    torch.testing.assert_close(torch.stack(batches), wanted)
