# SPDX-License-Identifier: MIT
"""What the library itself has to say (natten_log_set), for Python's loggers."""

from __future__ import annotations

import atexit
import logging

from . import _lib

#: Logger and level, by the library's level.
_LOGGERS = (
    ("natten.autotuner", logging.DEBUG),
    ("natten.autotuner", logging.INFO),
    ("natten", logging.WARNING),
)


@_lib.Log
def _log(level: int, text: bytes) -> None:
    from .utils.log import get_logger  # which imports what imports this

    name, importance = _LOGGERS[level]
    get_logger(name).log(importance, "%s", text.decode(errors="replace"))


def listen() -> None:
    """From now on until Python goes: threads may still compute then."""
    _lib.library.natten_log_set(_log)
    atexit.register(_lib.library.natten_log_set, _lib.Log())
