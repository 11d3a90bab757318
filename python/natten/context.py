# SPDX-License-Identifier: MIT
"""Settings of the process: which road the modules take, and what the kernels may trade."""

from __future__ import annotations

import logging

import torch

__all__ = [
    "NattenContext",
    "are_deterministic_algorithms_enabled",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "use_deterministic_algorithms",
    "use_fna",
    "use_fused_na",
    "use_kv_parallelism_in_fused_na",
]

_logger = logging.getLogger("natten")


class NattenContext:
    """The settings themselves."""

    is_deterministic_mode_enabled = False
    is_fused_na_enabled = False
    is_kv_parallelism_enabled = False

    @staticmethod
    def reset() -> None:
        """Back to how a process starts."""
        NattenContext.is_deterministic_mode_enabled = False
        NattenContext.is_fused_na_enabled = False
        NattenContext.is_kv_parallelism_enabled = False


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Refuses settings that make results differ from run to run."""
    NattenContext.is_deterministic_mode_enabled = mode


def are_deterministic_algorithms_enabled() -> bool:
    """Whether use_deterministic_algorithms is on."""
    return NattenContext.is_deterministic_mode_enabled


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Lets the fused backward on CUDA split keys over blocks: faster, with a workspace, and dQ not
    bitwise repeatable. No effect on a CPU.

    Raises:
        RuntimeError: use_deterministic_algorithms is on.
    """
    if not mode:
        NattenContext.is_kv_parallelism_enabled = False
    elif torch.are_deterministic_algorithms_enabled():
        _logger.warning(
            "KV parallelism stays off: torch.use_deterministic_algorithms asks for repeatable "
            "results."
        )
    elif NattenContext.is_deterministic_mode_enabled:
        raise RuntimeError(
            "KV parallelism makes results differ from run to run, and "
            "natten.use_deterministic_algorithms forbids that."
        )
    else:
        NattenContext.is_kv_parallelism_enabled = True


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """Whether KV parallelism is on."""
    return NattenContext.is_kv_parallelism_enabled


def use_fused_na(mode: bool = True, kv_parallel: bool = True) -> None:
    """Makes the modules compute attention in one go (na1d, na2d, na3d), without stored weights."""
    if not mode:
        NattenContext.is_fused_na_enabled = False
        NattenContext.is_kv_parallelism_enabled = False
        return
    use_kv_parallelism_in_fused_na(kv_parallel)
    NattenContext.is_fused_na_enabled = True


def is_fused_na_enabled() -> bool:
    """Whether the modules use the fused operation; at first they do not."""
    return NattenContext.is_fused_na_enabled


use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled
