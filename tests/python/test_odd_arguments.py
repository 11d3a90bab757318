# SPDX-License-Identifier: MIT
"""Whatever stands in place of an argument, a call works or says what is wrong in an exception of
this package, or Python's own about the arguments themselves: nothing fails inside."""

from __future__ import annotations

import decimal
import fractions
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import natten
import natten.functional as F

pytestmark = pytest.mark.usefixtures("one_thread")


class Odd:
    def __index__(self) -> int:
        raise TypeError("not a number after all")


def last(rank: int, heads: int = 2, dim: int = 4) -> Tensor:
    return torch.randn(1, *[5] * rank, heads, dim)


def first(rank: int) -> Tensor:
    return torch.randn(1, 2, *[5] * rank, 4)


TENSORS: list[Callable[[], Any]] = [
    *(lambda r=r: last(r) for r in (1, 2, 3)),
    *(lambda r=r: first(r) for r in (1, 2, 3)),
    lambda: last(2, 3),
    lambda: last(1, 0),
    lambda: last(2, 2, 3),
    lambda: last(2)[:0],
    lambda: last(1).mT,
    lambda: torch.randn(0),
    lambda: torch.tensor(1.0),
    *(
        lambda dtype=dtype: last(2).to(dtype)
        for dtype in (torch.float64, torch.half, torch.int, torch.bool, torch.complex64)
    ),
    lambda: last(1).to("meta"),
    lambda: last(2).to_sparse(),
    lambda: torch.quantize_per_tensor(last(1), 0.1, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.randn(5, 2, 4)]),
    lambda: torch.nested.nested_tensor([torch.randn(n, 2, 4) for n in (5, 6)], layout=torch.jagged),
]
JUNK: list[Any] = [
    *(
        None,
        0,
        1,
        -1,
        3,
        5,
        10**30,
        -(10**30),
        10**400,
        (1 << 64) + 3,
        (1 << 62,) * 2,
        (-1 << 63,) * 2,
        True,
        False,
    ),
    *(1.5, float("nan"), float("inf"), 1j, "3", b"x", fractions.Fraction(1, 2), decimal.Decimal(1)),
    *((), [], (3,), (3, 3), [3, 3], (3, 3, 3), (3.0, 3.0), (True, False), [True], ("a", "b")),
    *((None, None), ((3, 3), (3, 3)), {}, set(), range(3), torch.Size([3, 3]), object(), Odd()),
    *(np.int64(3), np.float32(0.5), np.bool_(True), np.array(3), np.array([3, 3]), np.zeros(0)),
    *(torch.tensor(3), torch.tensor([3, 3]), torch.tensor(0.5), torch.float32, torch.Generator()),
    *(int, len, ...),
]
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "attention": lambda: dict(zip(("query", "key", "value"), [last(1)] * 3, strict=True)),
    "merge_attentions": lambda: {
        "outputs": [last(1), last(1)],
        "lse_tensors": [last(1)[..., 0], last(1)[..., 0]],
    },
    "add_rpb": lambda: {
        "attn": torch.randn(1, 2, 5, 5, 9),
        "rpb": torch.randn(2, 5, 5),
        "kernel_size": 3,
    },
    "neighborhood_attention_varlen": lambda: {
        **dict(zip(("query", "key", "value"), [last(1)] * 3, strict=True)),
        "token_layouts": [2, 3],
        "kernel_size": 2,
    },
    "natten2dqkrpb": lambda: {
        "query": first(2),
        "key": first(2),
        "rpb": None,
        "kernel_size": 3,
        "dilation": 1,
    },
    "neighborhood_attention_generic": lambda: {
        **dict(zip(("query", "key", "value"), [last(2)] * 3, strict=True)),
        "kernel_size": 3,
    },
}
for rank in (1, 2, 3):
    CALLS[f"na{rank}d"] = lambda r=rank: {
        **dict(zip(("query", "key", "value"), [last(r)] * 3, strict=True)),
        "kernel_size": 3,
    }
    CALLS[f"na{rank}d_qk"] = lambda r=rank: {"query": first(r), "key": first(r), "kernel_size": 3}
    CALLS[f"na{rank}d_av"] = lambda r=rank: {
        "attn": torch.randn(*first(r).shape[:-1], 3**r),
        "value": first(r),
        "kernel_size": 3,
    }
HINTS = ("backend", "q_tile_shape", "backward_kv_splits", "kernel_schedule", "is_casual")


def arguments_of(name: str) -> list[str]:
    parameters = inspect.signature(getattr(F, name)).parameters
    named = [n for n, p in parameters.items() if p.kind != inspect.Parameter.VAR_KEYWORD]
    return named if len(named) == len(parameters) else [*named, *HINTS]


@settings(max_examples=400)
@given(st.data())
def test_odd_arguments(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CALLS)))
    call = CALLS[name]()
    for argument in data.draw(
        st.lists(st.sampled_from(arguments_of(name)), min_size=1, max_size=3, unique=True)
    ):
        which = data.draw(st.integers(-len(TENSORS), len(JUNK) - 1))
        call[argument] = JUNK[which] if which >= 0 else TENSORS[which]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            getattr(F, name)(**call)
        except (natten.NattenError, NotImplementedError) as error:
            assert str(error)
        except TypeError as error:
            assert "argument" in str(error)  # noqa: PT017
