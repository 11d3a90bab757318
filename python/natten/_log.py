# SPDX-License-Identifier: MIT
"""What the library itself has to say (natten_log_set), for Python's loggers."""

from __future__ import annotations

import atexit
import logging

from . import _lib
from .utils.log import get_logger

_TUNER = get_logger("natten.autotuner")

#: Logger and level, by the library's level.
_LOGGERS = (
    (_TUNER, logging.DEBUG),
    (_TUNER, logging.INFO),
    (get_logger("natten"), logging.WARNING),
)


@_lib.Log
def _log(level: int, text: bytes) -> None:
    logger, level = _LOGGERS[level]
    logger.log(level, "%s", text.decode(errors="replace"))


def listen() -> None:
    """From now on until Python goes: threads may still compute then."""
    _lib.library.natten_log_set(_log)
    atexit.register(_lib.library.natten_log_set, _lib.Log())
