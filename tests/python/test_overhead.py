# SPDX-License-Identifier: MIT
"""What bench/overhead.py measures stays within its budget."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from natten import _ops

pytestmark = pytest.mark.slow

PATH = Path(__file__).resolve().parents[2] / "bench/overhead.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("overhead", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


overhead = load()


def within(budget: float, measure: Callable[[], float]) -> None:
    """The best of some tries: others' work on this machine only ever adds."""
    found = []
    for _ in range(5):
        found.append(measure())
        if found[-1] <= budget:
            return
        time.sleep(1)
    pytest.fail(f"{min(found):.3g}, and {budget:.3g} is the most allowed")


@pytest.mark.skipif(bool(_ops.WHY_PYTHON), reason="these are the Python kernels")
@pytest.mark.parametrize(("grad", "budget"), ((False, 2.0), (True, 3.0)))
def test_calls(grad: bool, budget: float) -> None:
    def ratio() -> float:
        ours, theirs = overhead.tiny_map(grad, 100)
        return float(ours / theirs)

    within(budget, ratio)


@pytest.mark.parametrize("name", overhead.PLANS)
def test_plans(name: str) -> None:
    within(100e-6, lambda: float(overhead.plan(*overhead.PLANS[name])))


def test_import() -> None:
    within(60e-3, lambda: float(overhead.imports(3)))
