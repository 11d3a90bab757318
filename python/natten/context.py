# SPDX-License-Identifier: MIT
"""Settings of the process: which road the modules take, and what kernels may trade.

Every setting may be changed at any time and from any thread; it holds for calls that start after.
"""

from __future__ import annotations

import torch

from ._errors import NattenError
from ._hardware import (
    has_bfloat,
    has_cuda,
    has_fna,
    has_fp32_gemm,
    has_fp64_gemm,
    has_fused_na,
    has_gemm,
    has_half,
    has_tf32_gemm,
)
from ._preferences import refresh
from ._state import (
    AutotunerContext,
    MemoryUsagePreference,
    NattenContext,
    flag,
    lock,
    set_autotuner,
)
from .utils.log import get_logger

__all__ = [
    "AutotunerContext",
    "MemoryUsagePreference",
    "NattenContext",
    "are_deterministic_algorithms_enabled",
    "disable_autotuner",
    "disable_fused_na",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_fused_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "set_memory_usage_preference",
    "should_force_flex_attention",
    "should_use_flex_attention",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]

_logger = get_logger("natten.context")
# -------------------------------------------------------------------------------------------------
# determinism, memory


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Refuses settings that make results, or the choice of kernels, differ from run to run: KV
    parallelism and the autotuner. It does not touch those that are on already."""
    NattenContext.is_deterministic_mode_enabled = flag("mode", mode)
    if mode:
        _logger.warning(
            "KV parallelism and the autotuner are refused from here on. Without them this library "
            "is deterministic anyway."
        )


def are_deterministic_algorithms_enabled() -> bool:
    """Whether use_deterministic_algorithms is on."""
    return NattenContext.is_deterministic_mode_enabled


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Lets the fused backward on CUDA split keys over blocks: faster, with a workspace, and dQ not
    bitwise repeatable. No effect on a CPU, and only with a CUDA device a warning, when it is
    switched on. Torch's deterministic mode keeps it off.

    Raises:
        NattenError: use_deterministic_algorithms is on.
    """
    with lock:
        if not flag("mode", mode):
            NattenContext.is_kv_parallelism_enabled = False
        elif torch.are_deterministic_algorithms_enabled():
            _logger.warning(
                "KV parallelism stays as it is: torch.use_deterministic_algorithms asks for "
                "repeatable results."
            )
        elif NattenContext.is_deterministic_mode_enabled:
            raise NattenError(
                "KV parallelism makes results differ from run to run, and "
                "natten.use_deterministic_algorithms forbids that."
            )
        else:
            # Counted without a context, which a forked child could not use.
            if not NattenContext.is_kv_parallelism_enabled and torch.cuda.device_count():
                _logger.warning(
                    "KV parallelism is on: gradients of queries on CUDA may differ from run to run."
                )
            NattenContext.is_kv_parallelism_enabled = True
        refresh()


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """Whether KV parallelism is on."""
    return NattenContext.is_kv_parallelism_enabled


def set_memory_usage_preference(pref: str = "default") -> None:
    """Bounds the workspace of KV parallelism: "strict", "default" or "unrestricted".

    Raises:
        NattenError: it is none of the three.
    """
    choices = {choice.name.lower(): choice for choice in MemoryUsagePreference}
    if not isinstance(pref, str) or pref not in choices:
        raise NattenError(
            f'The memory usage preference must be "default", "strict" or "unrestricted", got '
            f"{pref!r}."
        )
    NattenContext.training_memory_preference = choices[pref]
    refresh()


def get_memory_usage_preference() -> MemoryUsagePreference:
    """What set_memory_usage_preference was called with."""
    return NattenContext.training_memory_preference


def is_memory_usage_default() -> bool:
    """Whether the memory usage preference is "default"."""
    return NattenContext.training_memory_preference is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether the memory usage preference is "strict"."""
    return NattenContext.training_memory_preference is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether the memory usage preference is "unrestricted"."""
    return NattenContext.training_memory_preference is MemoryUsagePreference.Unrestricted


# -------------------------------------------------------------------------------------------------
# which road the modules take


def use_fused_na(
    mode: bool = True,
    kv_parallel: bool = True,
    use_flex_attention: bool = False,
    force_flex_attention: bool = False,
) -> None:
    """Makes the modules compute attention in one go (na1d, na2d, na3d), without stored weights.

    Args:
        mode: on or off. Off also switches KV parallelism off.
        kv_parallel: what use_kv_parallelism_in_fused_na is called with.
        use_flex_attention: remembered, without effect: this library computes with its own kernels.
        force_flex_attention: likewise.

    Raises:
        NattenError: kv_parallel, and use_deterministic_algorithms is on.
    """
    with lock:
        use_flex = flag("use_flex_attention", use_flex_attention)
        force_flex = flag("force_flex_attention", force_flex_attention)
        if not flag("mode", mode):
            use_flex = force_flex = False
            NattenContext.is_kv_parallelism_enabled = False
        else:
            use_kv_parallelism_in_fused_na(kv_parallel)
        NattenContext.is_fused_na_enabled = mode
        NattenContext.use_flex_attention = use_flex or force_flex
        NattenContext.force_flex_attention = force_flex
        refresh()


def is_fused_na_enabled() -> bool:
    """Whether the modules use the fused operation; at first they do not."""
    return NattenContext.is_fused_na_enabled


use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled


def enable_fused_na() -> None:
    """use_fused_na(True)"""
    use_fused_na(True)


def disable_fused_na() -> None:
    """use_fused_na(False)"""
    use_fused_na(False)


def use_flex_attention() -> None:
    """use_fused_na(True): there is no other implementation of the fused operation here."""
    use_fused_na(True, use_flex_attention=True)


def force_flex_attention() -> None:
    """use_fused_na(True): there is no other implementation of the fused operation here."""
    use_fused_na(True, force_flex_attention=True)


def should_use_flex_attention() -> bool:
    """Whether use_flex_attention was called; it changes nothing that is computed."""
    return NattenContext.use_flex_attention


def should_force_flex_attention() -> bool:
    """Whether force_flex_attention was called; it changes nothing that is computed."""
    return NattenContext.force_flex_attention


# -------------------------------------------------------------------------------------------------
# the autotuner


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Switches the autotuner for each pass, and sets how thoroughly it works; None leaves a setting
    as it is. With both passes False it is switched off, and nothing else changes. Torch's
    deterministic mode keeps it off.

    Raises:
        NattenError: use_deterministic_algorithms is on, or a number is too small.
        NattenTypeError: an argument is of the wrong type.
    """
    with lock:
        for name, value in (("forward_pass", forward_pass), ("backward_pass", backward_pass)):
            if value is not None:
                flag(name, value)
        if forward_pass is False and backward_pass is False:
            set_autotuner(enabled_for_forward=False, enabled_for_backward=False)
            return
        if (forward_pass or backward_pass) and torch.are_deterministic_algorithms_enabled():
            _logger.warning(
                "The autotuner stays as it is: torch.use_deterministic_algorithms asks for "
                "repeatable results."
            )
            return
        set_autotuner(
            enabled_for_forward=forward_pass,
            enabled_for_backward=backward_pass,
            thorough_mode_forward=thorough_mode_forward,
            thorough_mode_backward=thorough_mode_backward,
            warmup_steps_forward=warmup_steps_forward,
            warmup_steps_backward=warmup_steps_backward,
            steps_forward=steps_forward,
            steps_backward=steps_backward,
        )


def disable_autotuner() -> None:
    """Switches the autotuner off, thorough modes included; its choices are kept."""
    set_autotuner(
        enabled_for_forward=False,
        enabled_for_backward=False,
        thorough_mode_forward=False,
        thorough_mode_backward=False,
    )


def is_autotuner_enabled() -> bool:
    """Whether the autotuner is on for either pass."""
    return AutotunerContext.enabled_for_forward or AutotunerContext.enabled_for_backward


def is_autotuner_enabled_for_forward() -> bool:
    """Whether the autotuner is on for the forward pass."""
    return AutotunerContext.enabled_for_forward


def is_autotuner_enabled_for_backward() -> bool:
    """Whether the autotuner is on for the backward pass."""
    return AutotunerContext.enabled_for_backward


def is_autotuner_thorough_for_forward() -> bool:
    """Whether the autotuner tries every choice of the forward pass."""
    return AutotunerContext.thorough_mode_forward


def is_autotuner_thorough_for_backward() -> bool:
    """Whether the autotuner tries every choice of the backward pass."""
    return AutotunerContext.thorough_mode_backward


# -------------------------------------------------------------------------------------------------
# which CUDA kernels the unfused operations may take


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    """Lets CUDA kernels multiply float32 numbers in TF32, which keeps 11 bits of each; off at
    first. torch.backends.cuda.matmul.allow_tf32 does the same."""
    NattenContext.is_tf32_enabled = flag("mode", mode)
    refresh()


def is_tf32_in_gemm_na_enabled() -> bool:
    """Whether use_tf32_in_gemm_na is on."""
    return NattenContext.is_tf32_enabled


def use_tiled_na(mode: bool = True) -> None:
    """Lets the unfused operations take tiled CUDA kernels; on at first."""
    NattenContext.is_tiled_enabled = flag("mode", mode)
    refresh()


def is_tiled_na_enabled() -> bool:
    """Whether use_tiled_na is on."""
    return NattenContext.is_tiled_enabled


def use_gemm_na(mode: bool = True) -> None:
    """Lets the unfused operations take CUDA kernels over matrix units; on at first."""
    NattenContext.is_gemm_enabled = flag("mode", mode)
    refresh()


def is_gemm_na_enabled() -> bool:
    """Whether use_gemm_na is on."""
    return NattenContext.is_gemm_enabled


def enable_tf32() -> bool:
    """use_tf32_in_gemm_na(True); returns the setting."""
    use_tf32_in_gemm_na(True)
    return is_tf32_in_gemm_na_enabled()


def disable_tf32() -> bool:
    """use_tf32_in_gemm_na(False); returns the setting."""
    use_tf32_in_gemm_na(False)
    return is_tf32_in_gemm_na_enabled()


def enable_tiled_na() -> bool:
    """use_tiled_na(True); returns the setting."""
    use_tiled_na(True)
    return is_tiled_na_enabled()


def disable_tiled_na() -> bool:
    """use_tiled_na(False); returns the setting."""
    use_tiled_na(False)
    return is_tiled_na_enabled()


def enable_gemm_na() -> bool:
    """use_gemm_na(True); returns the setting."""
    use_gemm_na(True)
    return is_gemm_na_enabled()


def disable_gemm_na() -> bool:
    """use_gemm_na(False); returns the setting."""
    use_gemm_na(False)
    return is_gemm_na_enabled()
