# SPDX-License-Identifier: MIT
"""Kernel settings that callers of NATTEN 0.20 and later pass.

They are hints about other implementations' kernels: checked, so that a mistake does not pass
unnoticed, and otherwise without effect. This library chooses its kernels and tiles itself.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch

from ._errors import NattenError, NattenTypeError


class KernelSchedule(enum.IntEnum):
    """How a kernel for Hopper GPUs shares its work among warps; a hint."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


SCHEDULES = ("non", "coop", "pp")

#: Names that the keyword ``backend`` takes, in neighborhood attention and in attention.
FNA_BACKENDS = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna")
FMHA_BACKENDS = ("cutlass-fmha", "hopper-fmha", "blackwell-fmha", "flex-fmha")


def _backend(name: str, value: Any, rank: int) -> None:
    known = FNA_BACKENDS + FMHA_BACKENDS
    if not isinstance(value, str):
        raise NattenTypeError(f"{name} must be a string, got {value!r}.")
    if value not in known:
        raise NotImplementedError(
            f"There is no backend {value!r}. Known names are {', '.join(known)}; they are hints, "
            "and this library takes its own kernels with each of them."
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _shape(name: str, value: Any, rank: int) -> None:
    if not isinstance(value, (tuple, list)) or not all(_is_int(size) for size in value):
        raise NattenTypeError(f"{name} must be a tuple of {rank} integers, got {value!r}.")
    if len(value) != rank:
        raise NattenError(
            f"{name} must have {rank} entries, one for each axis, got {len(value)}: {value!r}."
        )
    for axis, size in enumerate(value):
        if size < 1:
            raise NattenError(f"{name} must be at least 1, got {size} on axis {axis}.")


def _count(name: str, value: Any, rank: int) -> None:
    if not _is_int(value):
        raise NattenTypeError(f"{name} must be an integer, got {value!r}.")
    if value < 1:
        raise NattenError(f"{name} must be at least 1, got {value}.")


def _splits(name: str, value: Any, rank: int) -> None:
    (_shape if isinstance(value, (tuple, list)) else _count)(name, value, rank)


def _flag(name: str, value: Any, rank: int) -> None:
    if not isinstance(value, bool):
        raise NattenTypeError(f"{name} must be a bool, got {value!r}.")


def _schedule(name: str, value: Any, rank: int) -> None:
    if isinstance(value, KernelSchedule):
        return
    if not isinstance(value, str):
        raise NattenTypeError(f"{name} must be a string or a KernelSchedule, got {value!r}.")
    if value not in SCHEDULES:
        raise NattenError(f"{name} must be one of {', '.join(SCHEDULES)}, got {value!r}.")


def _arguments(name: str, value: Any, rank: int) -> None:
    if not isinstance(value, dict):
        raise NattenTypeError(f"{name} must be a dictionary, got {value!r}.")


# None is accepted for each of them, and means that nothing was said.
_CHECKS: dict[str, Callable[[str, Any, int], None]] = {
    "attention_kwargs": _arguments,
    "xformers_kwargs": _arguments,
    "backend": _backend,
    "q_tile_shape": _shape,
    "kv_tile_shape": _shape,
    "backward_q_tile_shape": _shape,
    "backward_kv_tile_shape": _shape,
    "q_tile_size": _count,
    "kv_tile_size": _count,
    "backward_q_tile_size": _count,
    "backward_kv_tile_size": _count,
    "backward_kv_splits": _splits,
    "backward_use_pt_reduction": _flag,
    "run_persistent_kernel": _flag,
    "kernel_schedule": _schedule,
    "torch_compile": _flag,
}
_PAIRS = (
    ("q_tile_shape", "kv_tile_shape"),
    ("backward_q_tile_shape", "backward_kv_tile_shape"),
    ("q_tile_size", "kv_tile_size"),
    ("backward_q_tile_size", "backward_kv_tile_size"),
)

ATTENTION_KNOBS = frozenset(n for n in _CHECKS if "shape" not in n and "kwargs" not in n)
WINDOW_KNOBS = frozenset(n for n in _CHECKS if "_size" not in n)


def check_knobs(
    function: str, rank: int, knobs: dict[str, Any], known: frozenset[str] = WINDOW_KNOBS
) -> None:
    """Checks the hints that a function was called with.

    Raises:
        TypeError: a keyword is no hint of this function.
        NattenTypeError: a value is of the wrong type.
        NattenError: a value is wrong, or one of two tiles is missing.
        NotImplementedError: there is no such backend.
    """
    for name, value in knobs.items():
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if value is not None:
            _CHECKS[name](name, value, rank)
    for query, key in _PAIRS:
        if (knobs.get(query) is None) != (knobs.get(key) is None):
            given, missing = (query, key) if knobs.get(key) is None else (key, query)
            raise NattenError(f"{query} and {key} go together: {given} is given, {missing} is not.")
