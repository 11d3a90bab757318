# SPDX-License-Identifier: MIT
"""Lengths of packed sequences, in the form that natten.attention takes."""

from .._sequence import generate_varlen_parameters

__all__ = ["generate_varlen_parameters"]
