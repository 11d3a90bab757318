# SPDX-License-Identifier: MIT
"""Programs that measure on a GPU, rehearsed on this computer: that they run to their end, and that
what they compare is the same thing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("gpu_backward.py", "3-D on the CPU: error"),
        ("gpu_models.py", "gpu_models: 0 wrong"),
    ],
)
def test_rehearsal(program: str, says: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / program), "--rehearse"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
    assert "FAIL" not in done.stdout and "DIFFERENT" not in done.stdout
