# SPDX-License-Identifier: MIT
"""Loggers of this package.

They are children of the logger ``natten``, which writes to stderr at the level that the environment
variable NATTEN_LOG_LEVEL names (debug, info, warning, error, critical; info unless given), as long
as the program has set up no logging itself.
"""

from __future__ import annotations

import logging

from .._environment import variable

__all__ = ["get_logger"]


class _Fallback(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes only where nobody else does."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _set_up() -> logging.Logger:
    logger = logging.getLogger("natten")
    if not logger.handlers:
        name = variable("NATTEN_LOG_LEVEL").upper()
        level = logging.getLevelName(name)
        logger.setLevel(level if isinstance(level, int) else logging.INFO)
        handler = _Fallback()
        handler.setFormatter(
            logging.Formatter("| %(asctime)s | [[ %(name)s ]] [ %(levelname)s ]: %(message)s")
        )
        logger.addHandler(handler)
    return logger


def get_logger(name: str) -> logging.Logger:
    """A logger of this name; its messages go where those of ``natten`` go."""
    _set_up()
    return logging.getLogger(name if name.split(".")[0] == "natten" else f"natten.{name}")
