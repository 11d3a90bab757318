# SPDX-License-Identifier: MIT
"""Maps cut into blocks over processes, and data parallel training, against one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="torch has no gloo",
    ),
]


@pytest.mark.parametrize("count", (2, 4))
def test_processes_agree_with_one(count: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("processes.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(count), str(tmp_path / "meet")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(errors)
