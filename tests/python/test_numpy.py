# SPDX-License-Identifier: MIT
"""natten.numpy against natten.functional, and without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import natten.numpy as nn
from natten import NattenError, NattenTypeError, functional

CASES = {
    1: ((11,), 5, {"dilation": 2, "is_causal": True}),
    2: ((7, 9), (3, 5), {"dilation": (2, 1), "is_causal": (False, True), "stride": (2, 3)}),
    3: ((4, 5, 6), (2, 3, 3), {"dilation": (1, 1, 2)}),
}


def arrays(*shapes: tuple[int, ...], dtype: type = np.float64) -> list[np.ndarray]:
    random = np.random.default_rng(len(shapes))
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def tensors(*values: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(value, requires_grad=True) for value in values]


def same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    np.testing.assert_array_equal(ours, theirs.detach().numpy())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fused(rank: int) -> None:
    extents, kernel_size, window = CASES[rank]
    inputs = arrays(
        (2, *extents, 4, 8), (2, *extents, 2, 8), (2, *extents, 2, 5), (2, 3, 2, 8), (2, 3, 2, 5)
    )
    query, key, value, more_keys, more_values = inputs
    more = {"additional_keys": more_keys, "additional_values": more_values}
    ours = getattr(nn, f"na{rank}d")(
        query, key, value, kernel_size, **window, **more, return_lse=True
    )
    given = tensors(*inputs)
    theirs = getattr(functional, f"na{rank}d")(
        *given[:3],
        kernel_size,
        **window,
        additional_keys=given[3],
        additional_values=given[4],
        return_lse=True,
    )
    same(ours[0], theirs[0])
    same(ours[1], theirs[1])
    d_out, d_lse = arrays(ours[0].shape, ours[1].shape)
    grads = getattr(nn, f"na{rank}d_backward")(
        d_out, query, key, value, *ours, kernel_size, **window, **more, d_lse=d_lse
    )
    torch.autograd.backward(theirs, [torch.tensor(d_out), torch.tensor(d_lse)])
    assert grads[3] is None and grads[6] is None
    for ours_grad, tensor in zip((*grads[:3], *grads[4:6]), given, strict=True):
        assert tensor.grad is not None
        same(ours_grad, tensor.grad)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_unfused(rank: int) -> None:
    extents, kernel_size, window = CASES[rank]
    query, key, value = arrays((2, 3, *extents, 8), (2, 3, *extents, 8), (2, 3, *extents, 5))
    given = tensors(query, key, value)
    attn = getattr(nn, f"na{rank}d_qk")(query, key, kernel_size, **window)
    scores = getattr(functional, f"na{rank}d_qk")(given[0], given[1], kernel_size, **window)
    same(attn, scores)
    weights = scores.detach().softmax(-1).requires_grad_()
    out = getattr(nn, f"na{rank}d_av")(weights.detach().numpy(), value, kernel_size, **window)
    result = getattr(functional, f"na{rank}d_av")(weights, given[2], kernel_size, **window)
    same(out, result)
    (d_out,) = arrays(out.shape)
    d_attn, d_value, none = getattr(nn, f"na{rank}d_av_backward")(
        d_out, weights.detach().numpy(), value, kernel_size, **window
    )
    result.backward(torch.tensor(d_out))
    assert none is None and weights.grad is not None and given[2].grad is not None
    same(d_attn, weights.grad)
    same(d_value, given[2].grad)
    d_query, d_key, d_rpb, none = getattr(nn, f"na{rank}d_qk_backward")(
        d_attn, query, key, kernel_size, **window
    )
    scores.backward(torch.tensor(d_attn))
    assert d_rpb is None and none is None
    assert given[0].grad is not None and given[1].grad is not None
    same(d_query, given[0].grad)
    same(d_key, given[1].grad)


def test_masks_and_dropout() -> None:
    query, key, value, key_bias = arrays(
        (2, 9, 10, 4, 8), (2, 9, 10, 2, 8), (2, 9, 10, 2, 8), (2, 9, 10, 2)
    )
    key_bias[:, :, 6:] = -np.inf
    more = {"key_bias": key_bias, "dropout_p": 0.4}
    out, lse = nn.na2d(query, key, value, 3, **more, seed=(5 << 32) + 7, return_lse=True)
    given = tensors(query, key, value, key_bias)
    theirs = torch.ops.natten.na_masked(
        *given[:3],
        None,
        None,
        None,
        given[3],
        [3, 3, 1, 1, 1, 1, 0, 0],
        8**-0.5,
        0.4,
        torch.tensor([7, 5]),
    )
    same(out, theirs[0])
    same(lse, theirs[1])
    d_out = np.ones_like(out)
    grads = nn.na2d_backward(d_out, query, key, value, out, lse, 3, **more, seed=(5 << 32) + 7)
    exact = nn.na2d_backward(
        *(x.astype(np.float64) for x in (d_out, query, key, value, out, lse)),
        3,
        key_bias=key_bias.astype(np.float64),
        dropout_p=0.4,
        seed=(5 << 32) + 7,
    )
    assert grads[3:6] == (None, None, None)
    for i in (0, 1, 2, 6):
        np.testing.assert_allclose(grads[i], exact[i], rtol=1e-4, atol=1e-5)


def test_bias() -> None:
    query, key, value, rpb = arrays((1, 6, 7, 2, 4), (1, 6, 7, 2, 4), (1, 6, 7, 2, 4), (2, 5, 9))
    out, lse = nn.na2d(query, key, value, (3, 5), rpb=rpb, return_lse=True)
    given = tensors(query, key, value, rpb)
    result = functional.na2d(*given[:3], (3, 5), rpb=given[3])
    same(out, result)
    grads = nn.na2d_backward(np.ones_like(out), query, key, value, out, lse, (3, 5), rpb=rpb)
    result.backward(torch.ones_like(result))
    assert given[3].grad is not None and grads[3] is not None
    same(grads[3], given[3].grad)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_orders_and_dtypes(dtype: type) -> None:
    query, key, value = arrays(*[(2, 6, 7, 3, 8)] * 3, dtype=dtype)
    last = nn.na2d(query, key, value, 3)
    first = [np.moveaxis(x, 3, 1) for x in (query, key, value)]
    assert last.dtype == dtype
    np.testing.assert_array_equal(nn.na2d(*first, 3, order="heads_first"), np.moveaxis(last, 3, 1))
    scores = nn.na2d_qk(*first[:2], 3)
    np.testing.assert_array_equal(nn.na2d_qk(query, key, 3, order="heads_last"), scores)


def test_views() -> None:
    query, key, value = arrays((2, 8, 14, 2, 4), (2, 8, 14, 2, 8), (1, 8, 14, 1, 4))
    # Backwards, every other token, channels apart, one head and batch for all.
    views = [query[:, ::-1, ::2], key[:, :, ::2, :, ::2], np.broadcast_to(value, query.shape)]
    views[2] = views[2][:, :, ::2]
    copies = [np.ascontiguousarray(x) for x in views]
    np.testing.assert_array_equal(nn.na2d(*views, 3), nn.na2d(*copies, 3))
    misaligned = np.frombuffer(b"\0" + copies[0].tobytes(), np.uint8)[1:].view(np.float64)
    misaligned = misaligned.reshape(copies[0].shape)
    assert not misaligned.flags.aligned
    np.testing.assert_array_equal(nn.na2d(misaligned, *copies[1:], 3), nn.na2d(*copies, 3))
    swapped = copies[0].astype(">f8")
    np.testing.assert_array_equal(nn.na2d(swapped, *copies[1:], 3), nn.na2d(*copies, 3))


def test_blocks() -> None:
    query, key, value = arrays(*[(1, 12, 2, 4)] * 3)
    whole = nn.na1d(query, key, value, 5)
    block = nn.na1d(
        query[:, 4:7],
        key[:, 2:9],
        value[:, 2:9],
        5,
        query_origin=4,
        key_origin=2,
        global_extent=12,
    )
    np.testing.assert_allclose(block, whole[:, 4:7], rtol=0, atol=1e-14)


def test_errors() -> None:
    query, key, value = arrays((1, 6, 2, 4), (1, 6, 2, 4), (1, 6, 2, 4))
    bad = [
        (NattenError, "got kernel_size 4, dilation 2 and extent 6 for axis 0", (4, 2)),
        (NattenError, "kernel_size must be at least 1, got 0 for axis 0", (0,)),
        (NattenTypeError, "is_causal must be a bool", (3, 1, 1)),
    ]
    for error, text, arguments in bad:
        with pytest.raises(error, match=text):
            nn.na1d(query, key, value, *arguments)
    more: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (NattenError, "kernel_size must be less than 2.62, got 1844", {"kernel_size": 2**64 + 3}),
        (NattenError, "order must be 'heads_last' or 'heads_first'", {"order": ["heads_last"]}),
        (NattenError, "scale must be finite", {"scale": 10**400}),
        (NattenError, "seed must be at least 0 and less than 2.64, got -1", {"seed": -1}),
        (NattenTypeError, "seed must be an integer, got 1.5", {"seed": 1.5}),
        (NattenTypeError, "dropout_p must be a number, got '0.5'", {"dropout_p": "0.5"}),
        (NattenTypeError, "return_lse must be a bool, got 1", {"return_lse": 1}),
        (NattenTypeError, "rpb must be a NumPy array, got float", {"rpb": 0.5}),
        (NattenTypeError, "value must be a NumPy array, got NoneType", {"value": None}),
    ]
    for error, text, changed in more:
        with pytest.raises(error, match=text):
            nn.na1d(**{"query": query, "key": key, "value": value, "kernel_size": 3} | changed)
    with pytest.raises(NattenError, match="query must have 5 dimensions for a map of rank 2"):
        nn.na2d(query, key, value, 3)
    with pytest.raises(NattenTypeError, match="query must be a NumPy array, got list"):
        nn.na1d(query.tolist(), key, value, 3)
    for masked in ("query", "value", "key_bias"):
        given: dict[str, Any] = {"query": query, "key": key, "value": value, "key_bias": None}
        given[masked] = np.ma.masked_less(query[..., 0] if masked == "key_bias" else query, 0)
        with pytest.raises(NattenTypeError, match=f"^{masked} is a masked array, whose mask"):
            nn.na1d(**given, kernel_size=3)
    with pytest.raises(NattenError, match="order must be 'heads_last' or 'heads_first'"):
        nn.na1d(query, key, value, 3, order="last")
    with pytest.raises(NattenError, match="key has head_dim 2, but query has head_dim 4"):
        nn.na1d(query, key[..., :2], value, 3)


def test_without_torch() -> None:
    program = "import sys, natten.numpy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


NO_TORCH = """
import sys
sys.modules["torch"] = None
import natten
assert natten.has_cuda() is False and natten.has_fna(0) is False
for name in ("na2d", "modules", "natten2dqk", "use_fused_na", "profiler"):
    try:
        getattr(natten, name)
    except ModuleNotFoundError as error:
        print(error)
import natten.profiler
"""


def test_names_that_need_torch() -> None:
    done = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True)
    needs = "natten.{} needs torch, which is not installed; natten.numpy does not."
    names = ("na2d", "modules", "natten2dqk", "use_fused_na", "profiler")
    assert done.stdout.splitlines() == [needs.format(name) for name in names]
    assert done.stderr.endswith("ModuleNotFoundError: natten.profiler needs torch.\n")
