# SPDX-License-Identifier: MIT
"""Helpers that programs import by name: argument checks, what the GPU can, logging."""
