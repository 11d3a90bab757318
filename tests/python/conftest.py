# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[2]

# The source tree beside a build, unless the package is to be tested as it is installed.
if "NATTEN_TEST_INSTALLED" not in os.environ:
    sys.path.insert(0, str(ROOT / "python"))
    paths = [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

import torch  # noqa: E402

import natten  # noqa: E402
from natten import _ops, context  # noqa: E402

settings.register_profile(
    "default",
    deadline=None,
    derandomize=False,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.load_profile("default")


def pytest_report_header() -> str:
    kernels = f"Python kernels ({_ops.WHY_PYTHON})" if _ops.WHY_PYTHON else "native kernels"
    return f"natten {natten.__version__} at {natten.__file__}, torch {torch.__version__}: {kernels}"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Every test starts from the same settings and numbers."""
    context.NattenContext.reset()
    context.AutotunerContext.reset()
    torch.manual_seed(0)
    yield
    context.NattenContext.reset()
    context.AutotunerContext.reset()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many tiny calls: handing each to other threads costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
