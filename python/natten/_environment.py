# SPDX-License-Identifier: MIT
"""The environment variables that the Python side reads: NATTEN_LOG_LEVEL, NATTEN_DISABLE."""

from __future__ import annotations

import os


def variable(name: str) -> str:
    """Its value, empty if it is not set."""
    return os.environ.get(name, "")
