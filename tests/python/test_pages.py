# SPDX-License-Identifier: MIT
"""Large outputs lie in memory that the system was asked to give huge pages for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import natten
from natten import functional as F
from test_process import python

MAPS = Path("/proc/self/smaps")
TOKENS = 16_000  # of 128 channels: 8 MiB

# "never" still lets a process ask.
pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir() or not MAPS.exists(),
    reason="this system has no huge pages to ask for",
)


def asked_for(tensor: torch.Tensor) -> bool:
    """Whether huge pages were asked for in the middle of a tensor."""
    middle = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    for line in MAPS.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, _, end = first.partition("-")
            inside = int(begin, 16) <= middle < int(end, 16)
        elif inside and first == "VmFlags:":
            return "hg" in rest.split()
    raise AssertionError("no mapping holds the tensor")


def inputs(tokens: int, *, grad: bool = False) -> list[torch.Tensor]:
    shape = 1, tokens, 1, 128
    return [torch.zeros(shape, requires_grad=grad) for _ in range(3)]


def test_large_outputs() -> None:
    tensors = inputs(TOKENS, grad=True)
    out = natten.na1d(*tensors, 3)
    assert asked_for(out)
    grads = torch.autograd.grad(out, tensors, out.detach())
    assert all(map(asked_for, grads))


def test_large_attention_weights() -> None:
    query, key = (torch.zeros(1, 1, TOKENS, 8) for _ in range(2))
    assert asked_for(F.na1d_qk(query, key, 129))


def test_packed_items() -> None:
    layout = [(TOKENS // 2,)] * 2
    assert asked_for(natten.neighborhood_attention_varlen(*inputs(TOKENS), layout, 3))


def asked_for_in_fresh_process(tokens: int, **environment: str) -> bool:
    """Whether the output of so many tokens is, where no memory of earlier outputs is used again."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import natten, test_pages
print(test_pages.asked_for(natten.na1d(*test_pages.inputs({tokens}), 3)))
"""
    return {"True": True, "False": False}[python(code, **environment)]


def test_small_outputs_are_left_alone() -> None:
    assert not asked_for_in_fresh_process(TOKENS // 4)


def test_python_kernels() -> None:
    assert asked_for_in_fresh_process(TOKENS, NATTEN_DISABLE="native")
