# SPDX-License-Identifier: MIT
"""Backwards raise what forwards raise, whichever road led there; what has no memory is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vjp

import natten.functional as F
import natten.numpy as N
from natten import NattenError
from natten._errors import NattenMemoryError

LAST = torch.randn(1, 32, 2, 8)
FIRST = torch.randn(1, 2, 32, 8)
ATTN = torch.randn(1, 2, 32, 3)
CALLS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "fused": (LAST, lambda x: F.na1d(x, x, x, 3)),
    "dropout": (LAST, lambda x: F.na1d(x, x, x, 3, dropout_p=0.5)),
    "qk": (FIRST, lambda x: F.na1d_qk(x, x, 3)),
    "av": (FIRST, lambda x: F.na1d_av(ATTN, x, 3)),
    "packed": (LAST, lambda x: F.attention(x, x, x, seqlens_Q=LENGTHS, seqlens_KV=LENGTHS)),
}
LENGTHS = torch.tensor([20, 12])


def unaligned(like: Tensor) -> Tensor:
    """Zeros at an odd address."""
    raw = np.zeros(like.numel() * 4 + 8, np.uint8)
    first = 1 - raw.ctypes.data % 2
    values = raw[first : first + like.numel() * 4].view(np.float32)
    return torch.from_numpy(values.reshape(like.shape))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("again", (False, True))
def test_class_of_an_error_in_a_backward(name: str, again: bool) -> None:
    x, call = CALLS[name]
    x = x.clone().requires_grad_()
    out = call(x)
    d_out = unaligned(out)
    with pytest.raises(NattenError, match="is not a multiple of its element size 4") as caught:
        torch.autograd.grad(out, x, d_out, create_graph=again)
    assert isinstance(caught.value, ValueError)
    out.backward(torch.ones_like(out))  # and nothing stays behind


@pytest.mark.parametrize("name", ("fused", "qk", "av"))
def test_class_of_an_error_under_a_transform(name: str) -> None:
    x, call = CALLS[name]
    out, pull = vjp(call, x)
    with pytest.raises(NattenError, match="is not a multiple of its element size 4"):
        pull(unaligned(out))


def test_errors_of_others_stay_as_they_are() -> None:
    """Also after a failure of an op that nobody asked about."""
    x = LAST.clone().requires_grad_()
    out = F.na1d(x, x, x, 3)
    with pytest.raises(RuntimeError):
        torch.ops.natten.na(x, x, x, None, None, None, (99, 1, 1, 0), None)
    F.na1d(x, x, x, 3)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time") as caught:
        out.sum().backward()
    assert not isinstance(caught.value, NattenError)


ENOUGH = 2 ** (12 + 12 + 20 + 6 + 2)


def test_results_without_memory() -> None:
    query = torch.zeros(1).expand(1 << 20, 1 << 6, 1 << 12, 1)
    with pytest.raises(NattenMemoryError, match=rf"^No memory for attn of {ENOUGH} bytes\.$"):
        F.na1d_qk(query, query, 1 << 12)
    array = np.broadcast_to(np.zeros(1, np.float32), query.shape)
    with pytest.raises(NattenMemoryError, match=rf"^No memory for attn of {ENOUGH} bytes\.$"):
        N.na1d_qk(array, array, 1 << 12)


def test_a_copy_without_memory() -> None:
    key = torch.zeros(2).as_strided((1 << 24, 1 << 22, 1, 2), (0, 0, 0, 0))
    with pytest.raises(NattenMemoryError, match=r"^No memory for a contiguous copy of query of "):
        F.na1d(key, key, key, 1)


LITTLE = """
import resource, torch, natten.functional as F
from natten._errors import NattenMemoryError
torch.set_num_threads(1)
small = torch.randn(1, 4, 8, 32, requires_grad=True)  # has all modules loaded
torch.autograd.grad(F.na1d(small, small, small, 3), small, small)
x = torch.randn(1, 1 << 14, 8, 32, requires_grad=True)
out = F.na1d(x, x, x, 3)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (12 << 20),) * 2)
try:
    torch.autograd.grad(out, x, out)
except NattenMemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_backward_without_memory() -> None:
    command = [sys.executable, "-c", LITTLE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "No memory for d_query of 16777216 bytes.\n", done.stderr
