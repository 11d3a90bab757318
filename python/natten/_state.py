# SPDX-License-Identifier: MIT
"""The state behind natten.context."""

from __future__ import annotations

import enum
import threading
from typing import Any

from ._errors import NattenError, NattenTypeError

# Settings that belong together change together.
lock = threading.RLock()


class MemoryUsagePreference(enum.Enum):
    """How much memory beside its results KV parallelism may take."""

    Default = 0
    Strict = 1
    Unrestricted = 2


class NattenContext:
    """The settings themselves."""

    is_deterministic_mode_enabled = False
    is_fused_na_enabled = False
    is_kv_parallelism_enabled = False
    training_memory_preference = MemoryUsagePreference.Default
    use_flex_attention = False
    force_flex_attention = False
    flex_compile = False
    flex_compile_backprop = False
    is_gemm_enabled = True
    is_tiled_enabled = True
    is_tf32_enabled = False

    @staticmethod
    def reset() -> None:
        """Back to how a process starts."""
        from ._preferences import refresh

        _restore(NattenContext)
        refresh()


# Whether plain calls must have natten.autotuner look at torch's deterministic mode.
tunes = False


def follow_autotuner() -> None:
    """What a plain call does about it, forward or backward."""
    if tunes:
        from . import autotuner

        autotuner.follow()


class _Followed(type):
    """The library follows each change of a setting, whoever makes it."""

    def __setattr__(cls, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        from . import autotuner

        autotuner.changed()


class AutotunerContext(metaclass=_Followed):
    """The settings of natten.autotuner."""

    enabled_for_forward = False
    enabled_for_backward = False
    thorough_mode_forward = False
    thorough_mode_backward = False
    warmup_steps_forward = 5
    warmup_steps_backward = 5
    steps_forward = 5
    steps_backward = 5

    @staticmethod
    def reset() -> None:
        """Back to how a process starts: off, and nothing chosen."""
        from . import autotuner

        with lock:
            _restore(AutotunerContext)
            autotuner.clear()

    @staticmethod
    def set_enabled_for_forward(enabled: bool | None = None) -> None:
        """Switches tuning of the forward pass; None changes nothing."""
        set_autotuner(enabled_for_forward=enabled)

    @staticmethod
    def set_enabled_for_backward(enabled: bool | None = None) -> None:
        """Switches tuning of the backward pass; None changes nothing."""
        set_autotuner(enabled_for_backward=enabled)

    @staticmethod
    def set_thorough_mode_forward(enabled: bool | None = None) -> None:
        """Whether every choice is tried, and not only those that usually win."""
        set_autotuner(thorough_mode_forward=enabled)

    @staticmethod
    def set_thorough_mode_backward(enabled: bool | None = None) -> None:
        """Whether every choice is tried, and not only those that usually win."""
        set_autotuner(thorough_mode_backward=enabled)

    @staticmethod
    def set_warmup_steps_forward(steps: int | None = None) -> None:
        """Untimed runs of each choice of the forward pass."""
        set_autotuner(warmup_steps_forward=steps)

    @staticmethod
    def set_warmup_steps_backward(steps: int | None = None) -> None:
        """Untimed runs of each choice of the backward pass."""
        set_autotuner(warmup_steps_backward=steps)

    @staticmethod
    def set_steps_forward(steps: int | None = None) -> None:
        """Timed runs of each choice of the forward pass."""
        set_autotuner(steps_forward=steps)

    @staticmethod
    def set_steps_backward(steps: int | None = None) -> None:
        """Timed runs of each choice of the backward pass."""
        set_autotuner(steps_backward=steps)


_AT_START: dict[Any, dict[str, Any]] = {
    cls: {
        name: value
        for name, value in vars(cls).items()
        if isinstance(value, (bool, int, MemoryUsagePreference))
    }
    for cls in (NattenContext, AutotunerContext)
}


def _restore(cls: Any) -> None:
    with lock:
        for name, value in _AT_START[cls].items():
            setattr(cls, name, value)


def flag(name: str, value: Any) -> bool:
    """A setting that is on or off, and nothing else."""
    if not isinstance(value, bool):
        raise NattenTypeError(f"{name} must be a bool, got {value!r}.")
    return value


def set_autotuner(**values: Any) -> None:
    """Sets attributes of AutotunerContext: all of them, or none if one is wrong. None changes
    nothing."""
    given = {name: value for name, value in values.items() if value is not None}
    with lock:
        for name, value in given.items():
            _check(name, value)
        for name, value in given.items():
            setattr(AutotunerContext, name, value)


def _check(name: str, value: Any) -> None:
    if "steps" in name:
        _check_steps(name, value)
    elif flag(name, value) and name.startswith("enabled"):
        if NattenContext.is_deterministic_mode_enabled:
            raise NattenError(
                "The autotuner may choose differently in every run, and "
                "natten.use_deterministic_algorithms forbids that."
            )


_MOST_STEPS = 1 << 20  # what the library takes: it would refuse the settings after they were made


def _check_steps(name: str, steps: Any) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise NattenTypeError(f"{name} must be an integer, got {steps!r}.")
    least = 0 if name.startswith("warmup") else 1
    if not least <= steps <= _MOST_STEPS:
        raise NattenError(f"{name} must be {least} to {_MOST_STEPS}, got {steps}.")
