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


def has_fully_shard() -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed import fsdp

    return "fully_shard" in dir(fsdp)


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("blocks", 2),
        ("blocks", 4),
        ("data parallel", 2),
        pytest.param(
            "data parallel on GPUs",
            2,
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 GPUs"),
        ),
        ("sharded tensors", 2),
        pytest.param(
            "fully sharded",
            2,
            marks=pytest.mark.skipif(
                not has_fully_shard(),
                reason="FSDP2 of this torch needs CUDA",
            ),
        ),
    ],
)
def test_processes_agree_with_one(part: str, count: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("processes.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), part, str(rank), str(count), str(tmp_path / "meet")],
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
