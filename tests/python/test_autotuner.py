# SPDX-License-Identifier: MIT
"""natten.autotuner: tuned once, kept, shared; off where it must be."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import natten
import natten.functional as F
from natten import NattenError, autotuner, cache
from natten.context import AutotunerContext

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    torch.use_deterministic_algorithms(False)


def inputs(extent: int = 14, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, extent, extent, 2, 8, requires_grad=grad) for _ in range(3)]


def tuned(log: pytest.LogCaptureFixture) -> int:
    """How often something was tuned since the last time."""
    count = sum(r.levelno == logging.INFO for r in log.records if r.name == "natten.autotuner")
    log.clear()
    return count


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="natten")
    return caplog


def test_a_problem_is_tuned_once(log: pytest.LogCaptureFixture) -> None:
    tensors = inputs()
    before = F.na2d(*tensors, kernel_size=5)
    assert tuned(log) == 0
    natten.use_autotuner(True, False)
    first = F.na2d(*tensors, kernel_size=5)
    assert "choice 0" in log.text and "Tuned forward f32 b1h2d8 14x14 w5x5: choice" in log.text
    assert tuned(log) == 1
    again = F.na2d(*tensors, kernel_size=5)
    assert tuned(log) == 0
    torch.testing.assert_close(first, before)
    assert torch.equal(first, again)
    (choice,) = autotuner.choices()
    assert choice.problem == "forward f32 b1h2d8 14x14 w5x5"
    assert 0 < choice.seconds <= choice.default_seconds
    assert choice.choice >= 0 and "rows" in choice.text and choice.device
    natten.disable_autotuner()
    F.na2d(*tensors, kernel_size=3)
    assert tuned(log) == 0


def test_settings_without_effect_make_no_new_problem(log: pytest.LogCaptureFixture) -> None:
    """Those of GPUs, on a CPU."""
    query, key, value = inputs(grad=True)
    natten.use_autotuner(True, True, steps_forward=1, steps_backward=1)
    F.na2d(query, key, value, kernel_size=3).sum().backward()
    assert tuned(log) == 2
    natten.use_fused_na(True)
    natten.set_memory_usage_preference("strict")
    natten.enable_tf32(), natten.disable_gemm_na()
    F.na2d(query, key, value, kernel_size=3).sum().backward()
    assert tuned(log) == 0 and len(autotuner.choices()) == 2


def test_passes_are_switched_alone(log: pytest.LogCaptureFixture) -> None:
    query, key, value = inputs(grad=True)
    natten.use_autotuner(False, True, steps_backward=2, warmup_steps_backward=0)
    F.na2d(query, key, value, kernel_size=3).sum().backward()
    assert [c.problem.split()[0] for c in autotuner.choices()] == ["backward"]
    natten.use_autotuner(True, True, steps_forward=1)
    plain = F.na2d(query.detach(), key.detach(), value.detach(), kernel_size=3)
    attn = F.na2d_qk(plain.movedim(3, 1), key.detach().movedim(3, 1), kernel_size=3)
    F.na2d_av(attn, value.detach().movedim(3, 1), kernel_size=3)
    kinds = sorted(c.problem.split()[0] for c in autotuner.choices())
    assert kinds == ["av", "backward", "forward", "qk"]


def test_settings_are_followed_however_they_are_made(log: pytest.LogCaptureFixture) -> None:
    AutotunerContext.enabled_for_forward = True
    F.na2d(*inputs(), kernel_size=3)
    assert tuned(log) == 1
    AutotunerContext.reset()
    assert autotuner.choices() == []
    F.na2d(*inputs(), kernel_size=3)
    assert tuned(log) == 0


def test_files(log: pytest.LogCaptureFixture, folder: Path) -> None:
    natten.use_autotuner(True, True)
    F.na2d(*inputs(12), kernel_size=3)
    F.na2d(*inputs(13), kernel_size=3)
    assert tuned(log) == 2
    (path,) = folder.glob("*.tuned")
    text = autotuner.export()
    assert list(cache.files()) == [path]
    _, version, device = (cache.describe(path) or "").splitlines()
    assert version.endswith(natten.__version__) and device == autotuner.choices()[0].device
    autotuner.clear()  # as in a new process
    F.na2d(*inputs(12), kernel_size=3)
    assert tuned(log) == 0 and autotuner.export() == text
    content = path.read_bytes()
    for damage in (content[:-5], content[:60] + b"\0" + content[61:], b"", content + b"x"):
        path.write_bytes(damage)
        assert cache.describe(path) is None and cache.main(["verify"]) == 1
        autotuner.clear()
        F.na2d(*inputs(12), kernel_size=3)
        assert tuned(log) == 1
        assert cache.describe(path) is not None
    assert cache.clear() == 1 and not path.exists()


def test_without_a_folder(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATTEN_CACHE_DIR", "/proc/no/such/folder")
    natten.use_autotuner(True, True)
    F.na2d(*inputs(), kernel_size=3)
    assert "could not be kept" in log.text and tuned(log) == 1
    F.na2d(*inputs(), kernel_size=3)
    assert tuned(log) == 0


def test_texts() -> None:
    natten.use_autotuner(True, True)
    F.na2d(*inputs(), kernel_size=3)
    text, found = autotuner.export(), autotuner.choices()
    autotuner.clear()
    assert autotuner.choices() == []
    autotuner.load(text)
    assert autotuner.choices() == found
    with pytest.raises(NattenError, match="must begin with"):
        autotuner.load("something else")
    with pytest.raises(NattenError, match="Line 3"):
        autotuner.load(text + "something else\n")
    with pytest.raises(TypeError, match="load takes what export returned, got bytes"):
        autotuner.load(text.encode())  # type: ignore[arg-type]
    with pytest.raises(NattenError, match=natten.__version__):
        autotuner.load(text.replace(natten.__version__, "0.17.5", 1))
    assert autotuner.choices() == found


def test_deterministic_mode(log: pytest.LogCaptureFixture) -> None:
    natten.use_autotuner(True, True)
    torch.use_deterministic_algorithms(True)
    F.na2d(*inputs(), kernel_size=3)
    assert tuned(log) == 0 and autotuner.choices() == []
    natten.use_autotuner(True, True)  # a warning, and no error
    assert natten.is_autotuner_enabled()
    torch.use_deterministic_algorithms(False)
    F.na2d(*inputs(), kernel_size=3)
    assert tuned(log) == 1


@pytest.mark.parametrize("masked", (False, True))
def test_every_pass_looks_at_the_mode(log: pytest.LogCaptureFixture, masked: bool) -> None:
    """Whatever it was when the passes before it ran, with dropout and under transforms too."""
    query, key, value = inputs(grad=True)
    options = {"dropout_p": 0.5} if masked else {}
    natten.use_autotuner(True, True)
    out = F.na2d(query, key, value, kernel_size=3, **options)
    assert tuned(log) == 1
    torch.use_deterministic_algorithms(True)
    out.sum().backward()
    F.na2d(query, key, value, kernel_size=5, **options)
    plain = [t.detach() for t in (query, key, value)]
    torch.use_deterministic_algorithms(False)
    F.na2d(*plain, kernel_size=3, **options)  # looks, and knows
    torch.use_deterministic_algorithms(True)
    torch.func.vjp(lambda q: F.na2d(q, q, q, kernel_size=7, **options), plain[0])
    assert tuned(log) == 0 and len(autotuner.choices()) == 1
    torch.use_deterministic_algorithms(False)
    out = F.na2d(query, key, value, kernel_size=3, **options)
    out.sum().backward()
    assert tuned(log) == 1


def test_traces_are_not_timed(log: pytest.LogCaptureFixture) -> None:
    natten.use_autotuner(True, True)
    with FakeTensorMode() as mode:
        F.na2d(*(mode.from_tensor(t) for t in inputs()), kernel_size=3)
    assert tuned(log) == 0 and autotuner.choices() == []
    compiled = torch.compile(lambda *t: F.na2d(*t, kernel_size=3), backend="eager", fullgraph=True)
    tensors = inputs()
    torch.testing.assert_close(compiled(*tensors), F.na2d(*tensors, kernel_size=3))
    # Of one problem, when it ran and not when it was traced.
    assert tuned(log) == 1


def test_threads() -> None:
    natten.use_autotuner(True, True, steps_forward=2)
    problems = [inputs(extent) for extent in (9, 10, 11)]
    natten.disable_autotuner()
    expected = [F.na2d(*tensors, kernel_size=3) for tensors in problems]
    natten.use_autotuner(True, True, steps_forward=2)

    def call(i: int) -> None:
        torch.testing.assert_close(F.na2d(*problems[i % 3], kernel_size=3), expected[i % 3])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(60)))
    assert 1 <= len(autotuner.choices()) <= 3


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch has no gloo",
)
def test_two_processes_share_choices(tmp_path: Path) -> None:
    script, meeting = str(HERE / "tuned_processes.py"), str(tmp_path / "meeting")
    command = [sys.executable, script]
    running = [
        subprocess.Popen([*command, str(rank), meeting], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
