# SPDX-License-Identifier: MIT
"""Which way of computing a problem is fastest, found by trying and remembered.

``natten.use_autotuner`` switches it on. The first call of a new problem then tries the choices of
its kernel (on a CPU: how the map is cut into tiles, and for tiny problems the number of threads; on
a GPU: tiles) and remembers the fastest, in this process and in a file for each device and version
of the library in the last of ``natten.cache.folders()``. Nothing is timed while PyTorch traces,
while a CUDA stream is captured, and in torch's deterministic mode, in which the default choices are
taken. Results and progress go to the logger ``natten.autotuner`` (levels INFO and DEBUG).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import _lib, _state
from ._errors import NattenTypeError, from_status
from ._state import AutotunerContext

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Choice", "choices", "clear", "export", "load", "share"]

_OPS = {
    "forward": (_lib.FORWARD, _lib.QK, _lib.AV),
    "backward": (_lib.BACKWARD, _lib.QK_BACKWARD, _lib.AV_BACKWARD),
}
_Settings = tuple[int, int, int]  # warmups, rounds, thorough
_applied: dict[str, _Settings | None] = dict.fromkeys(_OPS)
_shared = False


@dataclass(frozen=True)
class Choice:
    """What is remembered of one problem."""

    #: "forward f32 b1h4d32 56x56 w7x7"
    problem: str
    #: Of the device it was tuned on.
    device: str
    #: 0: the library's default; else the number of another choice.
    choice: int
    #: The choice in words.
    text: str
    #: How long a call took, and how long with choice 0.
    seconds: float
    default_seconds: float


def _check(status: int) -> None:
    if status:
        raise from_status(status, _lib.library.natten_last_error().decode())


def export() -> str:
    """All choices that are remembered, as a text for ``load``. It is good for the same version of
    the library and the same devices; elsewhere it is not wrong, but without effect."""
    size = 0
    while True:  # another thread may add to it meanwhile
        text = ctypes.create_string_buffer(size + 1)
        needed = _lib.library.natten_tuned_export(text, len(text))
        if needed <= size:
            return text.value.decode()
        size = needed


def load(text: str) -> None:
    """Adds the choices of a text that ``export`` made to those that are remembered.

    Raises:
        NattenError: it is no such text, or another version's.
        NattenTypeError: it is no text at all.
    """
    if not isinstance(text, str):
        raise NattenTypeError(f"load takes what export returned, got {type(text).__name__}.")
    _check(_lib.library.natten_tuned_import(text.encode()))


def clear() -> None:
    """Forgets all choices; files are left alone (``python -m natten.cache clear`` deletes them)."""
    _lib.library.natten_tuned_clear()


def choices() -> list[Choice]:
    """What is remembered."""
    found = []
    for line in export().splitlines()[1:]:
        _, choice, _, taken, usual, device, text, problem = line.split("\t")
        seconds = int(taken) * 1e-9, int(usual) * 1e-9
        found.append(Choice(problem, device, int(choice), text, *seconds))
    return found


def share(group: ProcessGroup | None = None, source: int = 0) -> None:
    """Has all processes of a torch.distributed group take the choices of one of them, so that all
    compute in the same way. Every process calls it, after ``source`` (a rank of the default group)
    has tuned what it wanted to.

    What others remembered before is forgotten. From then on nothing is tuned and no file is read:
    problems that ``source`` has not tuned get the default choice, in every process. A change of any
    setting of the autotuner ends that.
    """
    global _shared
    from torch import distributed

    table = [export() if distributed.get_rank() == source else ""]
    distributed.broadcast_object_list(table, src=source, group=group)
    with _state.lock:
        _shared = True
        follow()
        clear()
        load(table[0])


def _wanted(which: str) -> _Settings | None:
    def setting(name: str) -> int:
        return int(getattr(AutotunerContext, f"{name}_{which}"))

    if not setting("enabled_for") or torch.are_deterministic_algorithms_enabled():
        return None
    rounds = 0 if _shared else setting("steps")
    return setting("warmup_steps"), rounds, setting("thorough_mode")


def follow() -> None:
    """Has the library do what the settings, and torch's deterministic mode, say now."""
    with _state.lock:
        for which, ops in _OPS.items():
            wanted = _wanted(which)
            if wanted == _applied[which]:
                continue
            tuning = ctypes.byref(_lib.Tuning(*wanted)) if wanted else None
            for op in ops:
                _check(_lib.library.natten_autotune(op, tuning))
            _applied[which] = wanted
        _state.tunes = bool(
            AutotunerContext.enabled_for_forward or AutotunerContext.enabled_for_backward
        )


def changed() -> None:
    """A setting was changed."""
    global _shared
    with _state.lock:
        _shared = False
        follow()


def __getattr__(name: str) -> Any:
    if name == "autotune_fna":  # of 0.17
        from ._legacy import autotune_fna

        return autotune_fna
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
