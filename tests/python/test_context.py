# SPDX-License-Identifier: MIT
"""Settings: what they start as, what they refuse, and where their names are found."""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import natten
from natten import _call, _lib, _preferences, _state, context
from natten.context import AutotunerContext, MemoryUsagePreference, NattenContext

# What the guide and the clients of 0.14 to 0.17 import, and from where.
NAMES = {
    "natten": """
        NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D
        are_deterministic_algorithms_enabled use_deterministic_algorithms
        use_kv_parallelism_in_fused_na is_kv_parallelism_in_fused_na_enabled use_fna is_fna_enabled
        use_fused_na is_fused_na_enabled use_autotuner disable_autotuner is_autotuner_enabled
        is_autotuner_enabled_for_forward is_autotuner_enabled_for_backward
        is_autotuner_thorough_for_forward is_autotuner_thorough_for_backward has_cuda has_half
        has_bfloat has_gemm has_fna has_fused_na has_tf32_gemm has_fp32_gemm has_fp64_gemm
        use_tf32_in_gemm_na use_tiled_na use_gemm_na is_tf32_in_gemm_na_enabled is_tiled_na_enabled
        is_gemm_na_enabled set_memory_usage_preference get_memory_usage_preference
        is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted enable_tf32
        disable_tf32 enable_gemm_na disable_gemm_na enable_tiled_na disable_tiled_na
        enable_fused_na disable_fused_na use_flex_attention force_flex_attention autotuner context
        functional na1d na2d na3d nested ops types utils libnatten flops experimental natten1d
        natten2d natten3d distributed numpy
        """,
    "natten.functional": """
        na1d na2d na3d na1d_qk na2d_qk na3d_qk na1d_av na2d_av na3d_av has_gemm has_tf32_gemm
        has_fp32_gemm has_fp64_gemm disable_gemm_na enable_gemm_na disable_tiled_na enable_tiled_na
        enable_tf32 disable_tf32 has_cuda has_half has_bfloat has_fna has_fused_na
        """,
    "natten.context": """
        NattenContext AutotunerContext MemoryUsagePreference should_use_flex_attention
        should_force_flex_attention
        """,
}


@pytest.fixture
def torch_is_deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    home = importlib.import_module(module)
    for name in NAMES[module].split():
        assert getattr(home, name) is not None
    assert set(getattr(home, "__all__", ())) <= set(dir(home))


def test_start() -> None:
    assert not natten.is_fused_na_enabled() and not natten.is_fna_enabled()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    assert not natten.are_deterministic_algorithms_enabled()
    assert natten.get_memory_usage_preference() is MemoryUsagePreference.Default
    assert [choice.value for choice in MemoryUsagePreference] == [0, 1, 2]
    assert not natten.is_autotuner_enabled()
    assert natten.is_gemm_na_enabled() and natten.is_tiled_na_enabled()
    assert not natten.is_tf32_in_gemm_na_enabled()
    assert not context.should_use_flex_attention() and not context.should_force_flex_attention()


def test_reset() -> None:
    start = {name: getattr(NattenContext, name) for name in _state._AT_START[NattenContext]}
    natten.use_fused_na(True)
    natten.set_memory_usage_preference("strict")
    natten.force_flex_attention()
    natten.allow_flex_compile(backprop=True)
    natten.enable_tf32(), natten.disable_gemm_na(), natten.disable_tiled_na()
    natten.use_deterministic_algorithms()
    natten.allow_flex_compile(True, backprop=True)
    for name, value in start.items():
        assert getattr(NattenContext, name) != value, name
    NattenContext.reset()
    for name, value in start.items():
        assert getattr(NattenContext, name) == value, name


def test_reset_of_the_autotuner() -> None:
    start = {name: getattr(AutotunerContext, name) for name in _state._AT_START[AutotunerContext]}
    natten.use_autotuner(True, True, True, True, 1, 2, 3, 4)
    for name, value in start.items():
        assert getattr(AutotunerContext, name) != value, name
    AutotunerContext.reset()
    for name, value in start.items():
        assert getattr(AutotunerContext, name) == value, name


def test_fused() -> None:
    natten.use_fused_na()
    assert natten.is_fused_na_enabled() and natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_fused_na(kv_parallel=False)
    assert natten.is_fused_na_enabled() and not natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_fna(True, True)
    natten.use_fused_na(False)
    assert not natten.is_fused_na_enabled() and not natten.is_kv_parallelism_in_fused_na_enabled()
    natten.enable_fused_na()
    assert natten.is_fused_na_enabled()
    natten.disable_fused_na()
    assert not natten.is_fused_na_enabled()
    natten.use_flex_attention()
    assert natten.is_fused_na_enabled() and context.should_use_flex_attention()
    assert not context.should_force_flex_attention()
    natten.use_fused_na(False)
    assert not context.should_use_flex_attention()


def test_kv_parallelism_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    natten.use_kv_parallelism_in_fused_na(True)
    natten.use_kv_parallelism_in_fused_na(True)
    assert len(caplog.records) == 1 and "KV parallelism is on" in caplog.text


def test_kv_parallelism_is_silent_without_a_gpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    natten.use_fused_na()
    assert natten.is_kv_parallelism_in_fused_na_enabled() and not caplog.records


def test_deterministic_natten(caplog: pytest.LogCaptureFixture) -> None:
    natten.use_deterministic_algorithms()
    assert natten.are_deterministic_algorithms_enabled() and len(caplog.records) == 1
    for refused in (
        lambda: natten.use_kv_parallelism_in_fused_na(True),
        lambda: natten.use_fused_na(True),
        lambda: natten.use_autotuner(True),
        lambda: AutotunerContext.set_enabled_for_backward(True),
    ):
        with pytest.raises(RuntimeError, match="use_deterministic_algorithms"):
            refused()
    assert not natten.is_fused_na_enabled() and not natten.is_autotuner_enabled()
    natten.use_fused_na(True, kv_parallel=False)
    natten.use_fused_na(False, kv_parallel=True)
    natten.use_deterministic_algorithms(False)
    assert len(caplog.records) == 1
    natten.use_autotuner(True)
    assert natten.is_autotuner_enabled()


@pytest.mark.usefixtures("torch_is_deterministic")
def test_deterministic_torch(caplog: pytest.LogCaptureFixture) -> None:
    natten.use_fused_na(True)
    assert natten.is_fused_na_enabled() and not natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_autotuner(True, steps_forward=9)
    assert not natten.is_autotuner_enabled() and AutotunerContext.steps_forward == 5
    assert len(caplog.records) == 2 and caplog.text.count("stays as it is") == 2


def test_memory_preference() -> None:
    for text, choice in (
        ("strict", MemoryUsagePreference.Strict),
        ("unrestricted", MemoryUsagePreference.Unrestricted),
        ("default", MemoryUsagePreference.Default),
    ):
        natten.set_memory_usage_preference(text)
        assert natten.get_memory_usage_preference() is choice
        assert natten.is_memory_usage_strict() == (text == "strict")
        assert natten.is_memory_usage_default() == (text == "default")
        assert natten.is_memory_usage_unrestricted() == (text == "unrestricted")
    for wrong in ("generous", None, ["strict"], MemoryUsagePreference.Strict):
        with pytest.raises(ValueError, match='"strict"'):
            natten.set_memory_usage_preference(wrong)  # type: ignore[arg-type]
    assert natten.is_memory_usage_default()


def test_autotuner() -> None:
    natten.use_autotuner(forward_pass=True, backward_pass=False)
    assert natten.is_autotuner_enabled() and natten.is_autotuner_enabled_for_forward()
    assert not natten.is_autotuner_enabled_for_backward()
    natten.use_autotuner(backward_pass=True, thorough_mode_backward=True, steps_backward=7)
    assert natten.is_autotuner_enabled_for_forward() and natten.is_autotuner_enabled_for_backward()
    assert natten.is_autotuner_thorough_for_backward()
    assert not natten.is_autotuner_thorough_for_forward()
    natten.use_autotuner(False, False, thorough_mode_backward=False, steps_backward=9)
    assert not natten.is_autotuner_enabled() and natten.is_autotuner_thorough_for_backward()
    natten.disable_autotuner()
    assert not natten.is_autotuner_thorough_for_backward()
    assert AutotunerContext.steps_backward == 7


@pytest.mark.parametrize(
    ("arguments", "error"),
    (
        ({"forward_pass": 1}, TypeError),
        ({"backward_pass": torch.ones(2)}, TypeError),
        ({"thorough_mode_forward": "yes"}, TypeError),
        ({"steps_forward": 1.5}, TypeError),
        ({"warmup_steps_backward": True}, TypeError),
        ({"warmup_steps_backward": -1}, ValueError),
        ({"steps_backward": 0}, ValueError),
        ({"steps_backward": 1 << 64}, ValueError),
        ({"forward_pass": True, "steps_forward": (1 << 20) + 1}, ValueError),
        ({"forward_pass": True, "warmup_steps_forward": (1 << 20) + 1}, ValueError),
    ),
)
def test_autotuner_refuses(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="must be") as caught:
        natten.use_autotuner(**arguments)
    assert isinstance(caught.value, ValueError)
    assert not natten.is_autotuner_enabled()


def test_the_library_takes_the_most_steps_there_may_be() -> None:
    most = 1 << 20
    natten.use_autotuner(True, True, steps_forward=most, warmup_steps_backward=most)
    assert natten.is_autotuner_enabled()


def test_a_wrong_setting_leaves_all_as_they_were() -> None:
    with pytest.raises(ValueError, match="steps_forward must be 1 to 1048576, got 0"):
        natten.use_autotuner(True, True, steps_backward=9, steps_forward=0)
    assert not natten.is_autotuner_enabled() and AutotunerContext.steps_backward == 5
    natten.use_deterministic_algorithms()
    with pytest.raises(RuntimeError, match="use_deterministic_algorithms"):
        natten.use_autotuner(backward_pass=True, thorough_mode_forward=True)
    assert not natten.is_autotuner_thorough_for_forward()
    with pytest.raises(TypeError, match="force_flex_attention must be a bool"):
        natten.use_fused_na(True, False, force_flex_attention=1)  # type: ignore[arg-type]
    assert not natten.is_fused_na_enabled() and not context.should_force_flex_attention()
    with pytest.raises(TypeError, match="backprop must be a bool"):
        natten.allow_flex_compile(True, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mode must be a bool"):
        natten.allow_flex_compile_backprop("yes")  # type: ignore[arg-type]
    assert not natten.is_flex_compile_allowed()


@pytest.mark.parametrize(
    ("on", "off", "use", "ask"),
    (
        ("enable_tf32", "disable_tf32", "use_tf32_in_gemm_na", "is_tf32_in_gemm_na_enabled"),
        ("enable_gemm_na", "disable_gemm_na", "use_gemm_na", "is_gemm_na_enabled"),
        ("enable_tiled_na", "disable_tiled_na", "use_tiled_na", "is_tiled_na_enabled"),
    ),
)
def test_dispatcher_switches(on: str, off: str, use: str, ask: str) -> None:
    assert getattr(natten, off)() is False and getattr(natten, ask)() is False
    assert getattr(natten, on)() is True and getattr(natten, ask)() is True
    getattr(natten, use)(False)
    assert getattr(natten, ask)() is False
    getattr(natten, use)()
    assert getattr(natten, ask)() is True
    with pytest.raises(TypeError, match="must be a bool"):
        getattr(natten, use)(None)


HAS = (
    "has_half",
    "has_bfloat",
    "has_fna",
    "has_fused_na",
    "has_gemm",
    "has_tf32_gemm",
    "has_fp32_gemm",
    "has_fp64_gemm",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu() -> None:
    assert natten.has_cuda() is False
    for name in HAS:
        assert getattr(natten, name)() is False and getattr(natten, name)(0) is False


def test_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs that are only claimed to be there; the last has no usable driver."""

    class Library:
        natten_kernel_name = _lib.library.natten_kernel_name

        @staticmethod
        def natten_cuda_capability(index: int) -> int:
            return (75, 90, 0)[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(_lib, "library", Library)
    assert natten.has_cuda() and natten.has_half() and natten.has_fna()
    assert natten.has_half(0) and natten.has_half(torch.device("cuda", 0))
    assert natten.has_half("cuda:1") and not natten.has_half("cpu")
    assert natten.has_bfloat() and natten.has_bfloat(1) and not natten.has_bfloat(0)
    for name in HAS:
        assert not getattr(natten, name)(2)
    numbers = itertools.count()
    names = iter(lambda: Library.natten_kernel_name(next(numbers)), None)
    fast = [n for n in names if n.startswith(b"cuda-sm") and n.endswith((b"-qk", b"-av"))]
    assert natten.has_gemm(1) == bool(fast)
    assert not natten.has_fp64_gemm(0)


def test_library_without_a_driver() -> None:
    if not torch.cuda.is_available():
        assert _lib.library.natten_cuda_capability(0) == 0
    for index in (-1, 1 << 40):
        assert _lib.library.natten_cuda_capability(index) == 0


def test_threads() -> None:
    """Settings that belong together are never seen half changed by those that change them."""
    wrong = []

    def flip(steps: int) -> None:
        for _ in range(300):
            with context.lock:
                natten.use_autotuner(True, True, steps_forward=steps, steps_backward=steps)
                if AutotunerContext.steps_forward != AutotunerContext.steps_backward:
                    wrong.append(steps)
            natten.use_autotuner(True, steps_forward=steps, steps_backward=steps)
            natten.disable_autotuner()

    threads = [threading.Thread(target=flip, args=(i + 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not natten.is_autotuner_enabled()
    assert AutotunerContext.steps_forward == AutotunerContext.steps_backward


def explained(op: _call.Op, dtype: int = _lib.F32, device: int = _lib.CUDA) -> str:
    """What the plan of a call that begins now says; without a GPU, why there is none."""
    first = op.order == _lib.HEADS_FIRST
    token = _call.View((1, 2, 9, 4) if first else (1, 9, 2, 4), (72, 36, 4, 1), dtype, device, 0)
    slots = _call.View((1, 2, 9, 3), (54, 27, 3, 1), dtype, device, 0)
    lse = _call.View((1, 9, 2), (18, 2, 1), _lib.F32, device, 0)
    views = []
    for role in op.inputs:
        special = {_lib.ATTN: slots, _lib.D_ATTN: slots, _lib.LSE: lse}
        left_out = role in _call.OPTIONAL
        views.append(None if left_out else special.get(role, token))
    call = _call.Call(op, views, (3, 1, 1, 0), 1.0, 1, _preferences.refresh())
    try:
        return call.explain()
    except NotImplementedError as error:
        return str(error)


def line(text: str, name: str) -> str:
    """What an explanation says about a preference; empty if nothing."""
    found = [x.partition(": ")[2] for x in text.splitlines() if x.startswith(f"{name}: ")]
    return found[0] if found else ""


@pytest.mark.parametrize(
    ("name", "use", "start"),
    (("GEMM kernels", "use_gemm_na", True), ("tiled kernels", "use_tiled_na", True)),
)
@pytest.mark.parametrize("op", (_call.QK, _call.QK_BACKWARD, _call.AV, _call.AV_BACKWARD))
def test_kernels_of_the_unfused_operations(op: _call.Op, name: str, use: str, start: bool) -> None:
    assert line(explained(op), name).startswith("allowed")
    getattr(natten, use)(False)
    assert line(explained(op), name) == "switched off"
    assert "without effect on a CPU" in line(explained(op, device=_lib.CPU), name)
    getattr(natten, use)(True)
    assert line(explained(op), name).startswith("allowed")
    assert line(explained(op, device=_lib.CPU), name) == ""
    assert line(explained(_call.NA), name) == ""


def test_tf32_is_off_unless_asked_for() -> None:
    assert line(explained(_call.NA), "TF32") == ""
    natten.use_tf32_in_gemm_na()
    assert line(explained(_call.NA), "TF32").startswith("allowed")
    assert line(explained(_call.QK), "TF32").startswith("allowed")
    assert line(explained(_call.NA, _lib.F16), "TF32") == ""
    assert "without effect" in line(explained(_call.NA, device=_lib.CPU), "TF32")
    natten.disable_tf32()
    assert line(explained(_call.NA), "TF32") == ""


def test_tf32_as_torch_says() -> None:
    """Both of torch's ways to say so; mixing them is an error of its own."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    try:
        assert line(explained(_call.NA), "TF32").startswith("allowed")
        matmul.allow_tf32 = False
        assert line(explained(_call.NA), "TF32") == ""
        if hasattr(matmul, "fp32_precision"):
            for precision, allowed in (("tf32", True), ("ieee", False)):
                matmul.fp32_precision = precision
                assert bool(line(explained(_call.NA), "TF32")) == allowed
    finally:
        matmul.allow_tf32 = False


def test_kv_parallelism_and_memory() -> None:
    def lines(device: int = _lib.CUDA) -> list[str]:
        text = explained(_call.NA_BACKWARD, device=device)
        names = ("KV parallelism", "little memory", "much memory")
        return [name for name in names if line(text, name)]

    assert lines() == []
    natten.set_memory_usage_preference("strict")
    assert lines() == []
    natten.use_kv_parallelism_in_fused_na()
    assert lines() == ["KV parallelism", "little memory"]
    assert lines(_lib.CPU) == ["KV parallelism", "little memory"]
    text = explained(_call.NA_BACKWARD, device=_lib.CPU)
    assert line(text, "KV parallelism") == "allowed, without effect on a CPU"
    natten.set_memory_usage_preference("unrestricted")
    assert lines() == ["KV parallelism", "much memory"]
    natten.set_memory_usage_preference("default")
    assert lines() == ["KV parallelism"]
    assert line(explained(_call.NA), "KV parallelism") == ""
    torch.use_deterministic_algorithms(True)
    try:
        assert lines() == []
    finally:
        torch.use_deterministic_algorithms(False)
    natten.use_fused_na(False)
    assert lines() == []


def test_settings_reach_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setter tells the library, and a reset too; what others change is seen by the next call
    on CUDA."""
    told = []

    class Library:
        natten_torch_prefer = staticmethod(told.append)

    monkeypatch.setattr(_preferences._lib, "library", Library)
    natten.use_tf32_in_gemm_na()
    natten.disable_gemm_na()
    natten.disable_tiled_na()
    natten.use_fused_na()
    natten.set_memory_usage_preference("unrestricted")
    usual = _lib.PREFER_USUAL
    assert told == [usual | 4, 2 | 4, 4, 4 | 8, 4 | 8 | 32]
    NattenContext.reset()
    assert told[-1] == usual
    NattenContext.is_kv_parallelism_enabled = True
    assert len(told) == 6 and _preferences.refresh() == usual | 8 and told[-1] == usual | 8
    NattenContext.reset()
