# SPDX-License-Identifier: MIT
"""natten.cache and natten.warmup, without a GPU: the NVRTC of its package compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import natten
from natten import cache

FOUND = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/lib/libnvrtc.so.*"))
SHAPE = ["--shape", "1,9,8,2,32", "--kernel-size", "3", "--dtype", "bfloat16"]


def run(folder: Path, *words: str) -> tuple[int, str]:
    environment = dict(os.environ, NATTEN_CACHE_DIR=str(folder))
    environment["PYTHONPATH"] = str(Path(natten.__file__).parents[1])
    if FOUND:
        environment["NATTEN_NVRTC"] = str(FOUND[0])
    done = subprocess.run(
        [sys.executable, "-m", "natten.cache", *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode, done.stdout


def test_empty(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    assert run(folder, "list") == (0, f"{folder}\n")
    assert run(folder, "verify") == (0, "0 files, 0 damaged\n")
    assert run(folder, "clear") == (0, "0 files deleted\n")
    assert not folder.exists()


def test_damaged(tmp_path: Path) -> None:
    (tmp_path / "0.kernel").write_bytes(b"nothing")
    assert run(tmp_path, "verify")[0] == 1
    assert "damaged" in run(tmp_path, "list")[1]
    assert run(tmp_path, "clear") == (0, "1 files deleted\n")


@pytest.mark.skipif(not FOUND, reason="no nvidia-cuda-nvrtc here")
def test_warm(tmp_path: Path) -> None:
    status, said = run(tmp_path, "warm", *SHAPE, "--arch", "sm_80", "--forward-only")
    assert status == 0, said
    status, said = run(tmp_path, "list")
    assert "sm_80" in said and "nvrtc" in said
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.kernel")}
    assert before
    assert run(tmp_path, "warm", *SHAPE, "--arch", "sm_80", "--forward-only")[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.kernel")}
    for path in before:
        text = path.read_bytes()
        path.write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    assert run(tmp_path, "verify")[0] == 1
    assert run(tmp_path, "warm", *SHAPE, "--arch", "sm_80", "--forward-only")[0] == 0
    assert run(tmp_path, "verify")[0] == 0


@pytest.mark.skipif(not FOUND, reason="no nvidia-cuda-nvrtc here")
def test_both_ways_of_the_backward(tmp_path: Path) -> None:
    large = ["--shape", "1,32768,8,128", "--kernel-size", "2048", "--dtype", "bfloat16"]
    assert run(tmp_path, "warm", *large, "--arch", "sm_90")[0] == 0
    said = run(tmp_path, "list")[1]
    assert "sm90_forward.cu" in said and "sm90_convert.cu" in said
    assert said.count("NA_ADDS=0") == 2 and said.count("NA_ADDS=1") == 1


def test_words(tmp_path: Path) -> None:
    status, said = run(tmp_path, "warm", *SHAPE, "--arch", "sm_70")
    assert status == 1 and "sm_70" in said
    with pytest.raises(natten.NattenError, match="shape"):
        cache.warmup((1, 2), 3)
    with pytest.raises(natten.NattenError, match="kernel_size"):
        cache.warmup((1, 9, 9, 1, 8), (3,), arch="sm_80")
    with pytest.raises(natten.NattenError, match="dtype"):
        cache.warmup((1, 9, 1, 8), 3, dtype="int8")
