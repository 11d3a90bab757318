# SPDX-License-Identifier: MIT
"""Each wrong input gives one clear error, with the axis and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, jvp, vmap

import natten.functional as F
from natten import NattenError, NattenTypeError, NeighborhoodAttention1D, NeighborhoodAttention2D

Q = torch.zeros(2, 6, 8, 4, 16)
FIRST = torch.zeros(2, 4, 6, 8, 16)
ATTN = torch.zeros(2, 4, 6, 8, 9)
META = Q.to("meta")
ONE = (Q[:, 0], Q[:, 0], Q[:, 0])
COMPLEX = torch.zeros(4, 5, 5, dtype=torch.cfloat)

# What is added to tensors: under a transform, one of many zeros.
zero: Any = 0


def seen(x: Any) -> Any:
    usual = isinstance(x, torch.Tensor) and x.layout is torch.strided and x.is_cpu
    return x + zero if usual and x.is_floating_point() and not x.is_quantized else x


def na(q: Any = Q, k: Any = Q, v: Any = Q, kernel_size: Any = 3, *args: Any, **kwargs: Any) -> Any:
    kwargs = {name: seen(value) for name, value in kwargs.items()}
    return F.na2d(seen(q), seen(k), seen(v), kernel_size, *args, **kwargs)


def qk(q: Any = FIRST, k: Any = FIRST, kernel_size: Any = 3, **kwargs: Any) -> Any:
    kwargs = {name: seen(value) for name, value in kwargs.items()}
    return F.na2d_qk(seen(q), seen(k), kernel_size, **kwargs)


def av(a: Any = ATTN, v: Any = FIRST, kernel_size: Any = 3, **kwargs: Any) -> Any:
    kwargs = {name: seen(value) for name, value in kwargs.items()}
    return F.na2d_av(seen(a), seen(v), kernel_size, **kwargs)


EXTENT = (
    "kernel_size times dilation must be at most the extent, got kernel_size 3, dilation 3 and "
    "extent 6 for axis 0."
)
GENERATOR = "generator must be a torch.Generator, got 1."
REAL = "rpb must be real, got torch.complex64."
TABLE: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    (
        "rank of query",
        lambda: na(Q[0], Q[0], Q[0]),
        NattenError,
        "query must have 5 dimensions for a map of rank 2, got 4.",
    ),
    (
        "rank of key",
        lambda: na(k=Q[0]),
        NattenError,
        "key must have 5 dimensions for a map of rank 2, got 4.",
    ),
    (
        "rank of attn",
        lambda: av(ATTN[0]),
        NattenError,
        "attn must have 5 dimensions for a map of rank 2, got 4.",
    ),
    (
        "extent of key and value",
        lambda: na(k=Q[:, :5], v=Q[:, :5]),
        NattenError,
        "key has extent 5 on axis 0, but query has 6. (Blocks of a larger map need query_origin, "
        "key_origin and global_extent.)",
    ),
    (
        "extent of value",
        lambda: na(v=Q[:, :, :7]),
        NattenError,
        "value has extent 7 on axis 1, but key has extent 8 on axis 1.",
    ),
    (
        "batch",
        lambda: na(k=Q[:1]),
        NattenError,
        "key has batch 1, but query has batch 2.",
    ),
    (
        "head_dim",
        lambda: na(k=Q[..., :8]),
        NattenError,
        "key has head_dim 8, but query has head_dim 16.",
    ),
    (
        "heads of key and value",
        lambda: na(v=Q[..., :2, :]),
        NattenError,
        "value has heads 2, but key has heads 4.",
    ),
    (
        "heads not a multiple",
        lambda: na(k=Q[..., :3, :], v=Q[..., :3, :]),
        NattenError,
        "heads must be a multiple of kv_heads, got 4 and 3.",
    ),
    ("dtype", lambda: na(k=Q.double()), NattenError, "key is float64, but query is float32."),
    (
        "integers",
        lambda: na(Q.int(), Q.int(), Q.int()),
        NattenError,
        "query must be float32, float64, float16 or bfloat16.",
    ),
    ("device", lambda: na(k=META), NattenError, "must be on one device"),
    ("too large a window", lambda: na(dilation=3), NattenError, EXTENT),
    ("too large a window in QK", lambda: qk(dilation=3), NattenError, EXTENT),
    ("too large a window in AV", lambda: av(dilation=3), NattenError, EXTENT),
    ("too large a window on meta", lambda: na(META, META, META, dilation=3), NattenError, EXTENT),
    (
        "far too large a window",
        lambda: qk(kernel_size=2**40),
        NattenError,
        "got kernel_size 1099511627776, dilation 1 and extent 6 for axis 0.",
    ),
    (
        "stride",
        lambda: na(stride=(1, 4)),
        NattenError,
        "stride must be at most kernel_size, got stride 4 and kernel_size 3 for axis 1.",
    ),
    ("stride 0", lambda: na(stride=0), NattenError, "stride must be at least 1, got 0 for axis 0."),
    (
        "kernel_size 0",
        lambda: na(kernel_size=(3, 0)),
        NattenError,
        "kernel_size must be at least 1, got 0 for axis 1.",
    ),
    (
        "negative kernel_size in QK",
        lambda: qk(kernel_size=-3),
        NattenError,
        "kernel_size must be at least 1, got -3 for axis 0.",
    ),
    (
        "dilation 0",
        lambda: na(dilation=0),
        NattenError,
        "dilation must be at least 1, got 0 for axis 0.",
    ),
    (
        "too few kernel sizes",
        lambda: na(kernel_size=(3,)),
        NattenError,
        "kernel_size must be an integer or have 2 of them, one for each axis, got 1: (3,).",
    ),
    (
        "kernel_size of a wrong type",
        lambda: na(kernel_size="3"),
        NattenTypeError,
        "kernel_size must be an integer or a tuple of 2 integers, got '3' of type str.",
    ),
    (
        "kernel_size true",
        lambda: na(kernel_size=True),
        NattenTypeError,
        "kernel_size must be an integer or a tuple of 2 integers, got True of type bool.",
    ),
    (
        "kernel_size in a tensor of fractions",
        lambda: na(kernel_size=torch.tensor(3.5)),
        NattenTypeError,
        "kernel_size must be an integer or a tuple of 2 integers, got tensor(3.5000)",
    ),
    (
        "kernel_size of more than 64 bits",
        lambda: na(kernel_size=10**30),
        NattenError,
        "kernel_size must be less than 2^62, got 1000000000000000000000000000000",
    ),
    (
        "return_lse of a wrong type",
        lambda: na(return_lse=Q),
        NattenTypeError,
        "return_lse must be a bool, got tensor(",
    ),
    ("generator", lambda: na(generator=1), NattenTypeError, GENERATOR),
    ("generator of sequences", lambda: F.attention(*ONE, generator=1), NattenTypeError, GENERATOR),
    (
        "dropout_p of a wrong type",
        lambda: na(dropout_p=Q),
        NattenTypeError,
        "dropout_p must be a number, got tensor(",
    ),
    (
        "quantized",
        lambda: na(torch.quantize_per_tensor(Q, 0.1, 0, torch.qint8)),
        NotImplementedError,
        "query is a quantized tensor, which this function does not take.",
    ),
    (
        "no bias to add",
        lambda: F.add_rpb(ATTN, None, 3),
        NattenTypeError,
        "rpb must be a tensor, got NoneType.",
    ),
    ("complex bias", lambda: na(rpb=COMPLEX), NattenTypeError, REAL),
    ("complex bias of scores", lambda: qk(rpb=COMPLEX), NattenTypeError, REAL),
    ("complex bias to add", lambda: F.add_rpb(ATTN, COMPLEX, 3), NattenTypeError, REAL),
    (
        "negative kernel_size of a bias to add",
        lambda: F.add_rpb(ATTN, torch.zeros(4, 5, 5), (3, -5)),
        NattenError,
        "kernel_size must be at least 1, got -5 for axis 1.",
    ),
    (
        "far too large a window of a bias to add",
        lambda: F.add_rpb(ATTN, torch.zeros(4, 5, 5), 2**31),
        NattenError,
        "rpb has 5 entries on axis 0, but kernel_size 2147483648 asks for 4294967295.",
    ),
    (
        "negative kernel_size in AV",
        lambda: av(kernel_size=-3),
        NattenError,
        "kernel_size must be at least 1, got -3 for axis 0.",
    ),
    (
        "far too large a window in AV",
        lambda: av(kernel_size=2**40),
        NattenError,
        "attn has 9 slots in its last dimension, but the window has more than 2147483647.",
    ),
    (
        "a bias without axes",
        lambda: F.add_rpb(ATTN[0, 0, 0], torch.zeros(4), 3),
        NattenError,
        "rpb must be [heads, ...] for a map of 1, 2 or 3 axes, got 1 dimensions.",
    ),
    (
        "keys to add a bias for begin past the end",
        lambda: F.add_rpb(ATTN, torch.zeros(4, 5, 5), 3, key_origin=(0, 8)),
        NattenError,
        "key_origin < global_extent <= 536870912 must hold, got 8 and 8 for axis 1.",
    ),
    (
        "more keys to add a bias for than an axis may have",
        lambda: F.add_rpb(ATTN, torch.zeros(4, 5, 5), 3, global_extent=(2**31, 8)),
        NattenError,
        "key_origin < global_extent <= 536870912 must hold, got 0 and 2147483648 for axis 0.",
    ),
    (
        "dilation of a wrong type",
        lambda: na(dilation=1.5),
        NattenTypeError,
        "dilation must be an integer or a tuple of 2 integers, got 1.5 of type float.",
    ),
    (
        "the order of 0.20",
        lambda: na(Q, Q, Q, 3, 1, 1),
        NattenTypeError,
        "is_causal must be a bool or a tuple of 2 bools, got 1. The positional order is that of "
        "NATTEN 0.17",
    ),
    (
        "too few causal flags",
        lambda: na(is_causal=(True,)),
        NattenError,
        "is_causal must be a bool or have 2 of them, one for each axis, got 1: (True,).",
    ),
    (
        "even kernel_size with a bias",
        lambda: na(kernel_size=(3, 4), rpb=torch.zeros(4, 5, 7)),
        NattenError,
        "A relative position bias needs an odd kernel_size, got 4 for axis 1.",
    ),
    (
        "size of the bias",
        lambda: na(rpb=torch.zeros(4, 5, 3)),
        NattenError,
        "rpb has 3 entries on axis 1, but kernel_size 3 asks for 5.",
    ),
    (
        "heads of the bias",
        lambda: na(rpb=torch.zeros(2, 5, 5)),
        NattenError,
        "rpb has heads 2, but query has heads 4.",
    ),
    (
        "one additional tensor",
        lambda: na(additional_keys=torch.zeros(2, 3, 4, 16)),
        NattenError,
        "additional_keys and additional_values go together, got only one of them.",
    ),
    (
        "number of additional tokens",
        lambda: na(
            additional_keys=torch.zeros(2, 3, 4, 16), additional_values=torch.zeros(2, 2, 4, 16)
        ),
        NattenError,
        "additional_values has additional tokens 2, but additional_keys has additional tokens 3.",
    ),
    (
        "channels of additional tokens",
        lambda: qk(additional_keys=torch.zeros(2, 4, 3, 8)),
        NattenError,
        "additional_keys has head_dim 8, but query has head_dim 16.",
    ),
    (
        "no additional tokens",
        lambda: qk(additional_keys=torch.zeros(2, 4, 0, 16)),
        NattenError,
        "There are 0 additional tokens: leave additional_keys and additional_values out instead.",
    ),
    (
        "slots",
        lambda: av(ATTN[..., :8]),
        NattenError,
        "attn has 8 slots in its last dimension, but the window has 9.",
    ),
    (
        "slots of additional tokens",
        lambda: av(additional_values=torch.zeros(2, 4, 2, 16)),
        NattenError,
        "attn has 9 slots in its last dimension, but the window and the additional tokens have 11.",
    ),
    (
        "no heads",
        lambda: na(Q[..., :0, :], Q[..., :0, :], Q[..., :0, :]),
        NattenError,
        "query has heads 0: there must be at least 1.",
    ),
    (
        "no channels",
        lambda: na(v=Q[..., :0]),
        NattenError,
        "value has head_dim 0: there must be at least 1.",
    ),
    (
        "no tokens",
        lambda: na(Q[:, :0], Q[:, :0], Q[:, :0]),
        NattenError,
        "query has extent 0 on axis 0: there must be at least 1 token.",
    ),
    (
        "scale of a wrong type",
        lambda: na(scale="1"),
        NattenTypeError,
        "scale must be a number, got '1'.",
    ),
    ("infinite scale", lambda: na(scale=float("inf")), NattenError, "scale must be finite"),
    ("scale past all floats", lambda: na(scale=10**400), NattenError, "scale must be finite"),
    (
        "scale past float32",
        lambda: na(scale=1e39),
        NattenError,
        "scale must be at most 2^127 in size where sums are float32, got 1e+39.",
    ),
    (
        "no tensor",
        lambda: na(k=None),
        NattenTypeError,
        "key must be a tensor, got NoneType.",
    ),
    (
        "bias in the place of scale",
        lambda: na(Q, Q, Q, 3, 1, False, 0.5),
        NattenTypeError,
        "rpb must be a tensor, got float.",
    ),
    (
        "sparse",
        lambda: na(Q.to_sparse(), Q, Q),
        NotImplementedError,
        "query is a torch.sparse_coo tensor, which this function does not take.",
    ),
    (
        "block that misses keys",
        lambda: na(Q, Q[:, :4], Q[:, :4], global_extent=(6, 8)),
        NattenError,
        "of axis 0, but the block of keys holds only 0 to 3.",
    ),
    (
        "block past the end",
        lambda: na(query_origin=(1, 0), global_extent=(6, 8)),
        NattenError,
        "The queries of axis 0 end at 7 (origin 1 + extent 6), past its global extent 6.",
    ),
    (
        "unknown keyword",
        lambda: na(window_size=3),
        TypeError,
        "na2d() got an unexpected keyword argument 'window_size'",
    ),
    (
        "module input",
        lambda: NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 5, 8)),
        NattenError,
        "NeighborhoodAttention2D expected a rank-4 input tensor; got x.dim()=3.",
    ),
    (
        "module channels",
        lambda: NeighborhoodAttention2D(8, 2, 3)(torch.zeros(1, 5, 5, 9)),
        NattenError,
        "NeighborhoodAttention2D expected 8 channels, got 9.",
    ),
    (
        "module input that is none",
        lambda: NeighborhoodAttention2D(8, 2, 3)(None),  # type: ignore[arg-type]
        NattenTypeError,
        "The input must be a tensor, got NoneType.",
    ),
    (
        "module dim of a wrong type",
        lambda: NeighborhoodAttention2D(8.0, 2, 3),  # type: ignore[arg-type]
        NattenTypeError,
        "dim must be an integer or a tuple of 1 integers, got 8.0 of type float.",
    ),
    (
        "module scale of a wrong type",
        lambda: NeighborhoodAttention2D(8, 2, 3, qk_scale="1"),  # type: ignore[arg-type]
        NattenTypeError,
        "scale must be a number, got '1'.",
    ),
    (
        "module heads",
        lambda: NeighborhoodAttention2D(9, 2, 3),
        NattenError,
        "dim must be a multiple of num_heads, got 9 and 2.",
    ),
    (
        "module without kernel_size",
        lambda: NeighborhoodAttention1D(8, 2),
        NattenTypeError,
        "NeighborhoodAttention1D needs dim, num_heads and kernel_size.",
    ),
    (
        "two names of one argument",
        lambda: NeighborhoodAttention1D(8, 2, 3, embed_dim=8),
        NattenTypeError,
        "dim and embed_dim are the same argument: pass one of them.",
    ),
    (
        "module bias with an even window",
        lambda: NeighborhoodAttention2D(8, 2, (3, 4), rel_pos_bias=True),
        NattenError,
        "A relative position bias needs an odd kernel_size, got (3, 4).",
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "text"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_error(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value)
    if kind is NattenError:
        assert isinstance(caught.value, ValueError) and isinstance(caught.value, RuntimeError)


FUNCTIONS = [row for row in TABLE if not row[0].startswith("module")]
TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "vmap": lambda f: vmap(f)(torch.zeros(3)),
    "vmap of vmap": lambda f: vmap(vmap(f))(torch.zeros(2, 3)),
    "grad": lambda f: grad(f)(torch.tensor(0.0)),
    "grad of vmap": lambda f: grad(vmap(f))(torch.zeros(3)),
    "vmap of grad": lambda f: vmap(grad(f))(torch.zeros(3)),
    "jvp": lambda f: jvp(f, (torch.tensor(0.0),), (torch.tensor(1.0),)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("call", "kind", "text"), [row[1:] for row in FUNCTIONS], ids=[row[0] for row in FUNCTIONS]
)
def test_error_under_a_transform(
    call: Callable[[], Any],
    kind: type[Exception],
    text: str,
    transform: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One exception, with the words and the numbers of a call without one."""
    if "sparse" in text and torch.__version__.startswith("2.5") and "vmap of vmap" not in transform:
        pytest.skip("torch 2.5 takes sparse tensors for strided ones here")
    with pytest.raises(kind) as caught:
        TRANSFORMS[transform](lambda x: monkeypatch.setitem(globals(), "zero", x) or call())
    error = caught.value
    assert text.split("tensor(")[0] in str(error)
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


@pytest.mark.parametrize("name", ("query", "key", "value"))
def test_backward_of_a_failed_call_never_starts(name: str) -> None:
    tensors = {n: Q.clone().requires_grad_(n == name) for n in ("query", "key", "value")}
    with pytest.raises(NattenError, match="kernel_size times dilation"):
        F.na2d(**tensors, kernel_size=7)
