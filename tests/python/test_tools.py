# SPDX-License-Identifier: MIT
"""Permuted tokens, lists of settings, and the profiler: what stands around the operations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import natten
from natten import NattenError, NattenTypeError, profiler
from natten.token_permute import token_permute_operation, token_unpermute_operation

SHAPES = [
    ((10,), (3,), (2,)),
    ((5, 7), (2, 3), (1, 2)),
    ((4, 6), (2, 3), (1, 1)),
    ((3, 5, 4), (2, 2, 3), (2, 1, 1)),
]


def permuted(tensor: Tensor, tile: Any, dilation: Any, flip: bool) -> Tensor:
    """Token by token."""
    rank = len(tile)
    layout = tensor.shape[1 : 1 + rank]
    rests = [-(-n // (t * d)) for n, t, d in zip(layout, tile, dilation, strict=True)]

    def places(sizes: Any) -> Any:
        if not flip:
            return list(itertools.product(*map(range, sizes)))
        backwards = itertools.product(*map(range, reversed(sizes)))
        return [tuple(reversed(place)) for place in backwards]

    rows = []
    for item in tensor:
        for group in places(dilation):
            tokens = []
            for rest in places(rests):
                for inside in places(tile):
                    at = tuple(
                        (r * t + i) * d + g
                        for r, t, i, d, g in zip(rest, tile, inside, dilation, group, strict=True)
                    )
                    known = all(a < n for a, n in zip(at, layout, strict=True))
                    tokens.append(item[at] if known else torch.zeros_like(item[(0,) * rank]))
            rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("layout", "tile", "dilation"), SHAPES)
def test_token_permute(layout: Any, tile: Any, dilation: Any, flip: bool) -> None:
    x = torch.randn(2, *layout, 3, 4)
    ours, same, group = token_permute_operation(x, tile, dilation, flip)
    assert torch.equal(ours, permuted(x, tile, dilation, flip))
    assert ours.is_contiguous()
    assert same == layout
    assert ours.shape[1] == torch.Size(group).numel()
    back = token_unpermute_operation(ours, layout, tile, dilation, flip)
    assert torch.equal(back, x)


def test_token_permute_gradient() -> None:
    x = torch.randn(1, 3, 5, 1, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: token_permute_operation(x, (2, 2))[0], x)
    y = token_permute_operation(x, 2)[0].detach().requires_grad_()
    torch.autograd.gradcheck(lambda y: token_unpermute_operation(y, (3, 5), 2), y)


def test_token_permute_errors() -> None:
    x = torch.zeros(1, 4, 4, 1, 2)
    with pytest.raises(NattenTypeError, match="tensor must be a tensor, got tuple"):
        token_permute_operation((1, 4, 4), (2, 2))  # type: ignore[arg-type]
    with pytest.raises(NattenTypeError, match="token_layout_shape must be a tuple, got 4"):
        token_unpermute_operation(x[0], 4, (2, 2))  # type: ignore[arg-type]
    with pytest.raises(NattenError, match="tile_shape must be an integer or have 2 of them"):
        token_permute_operation(x, (2,))
    with pytest.raises(NattenError, match="dilation must be at least 1, got 0 on axis 1."):
        token_permute_operation(x, (2, 2), (1, 0))
    with pytest.raises(NattenTypeError, match="tensor must be a tensor, got list."):
        token_permute_operation([1.0], (2,))
    with pytest.raises(NattenError, match="1, 2 or 3 axes in the map, got 3 dimensions."):
        token_permute_operation(x[0, 0], (2,))
    with pytest.raises(NattenError, match="a multiple of the 2 groups and 16 tokens, got 1 and 15"):
        token_unpermute_operation(torch.zeros(1, 15, 1, 2), (4, 8), (2, 2), (2, 1))


def test_configs() -> None:
    x = torch.zeros(1, 4, 4, 1, 2)
    getters = [name for name in natten.__all__ if "configs_for" in name]
    assert len(getters) == 14
    for name in getters:
        getter = getattr(natten, name)
        assert getter.__name__ == name
        if name.endswith("fmha"):
            assert getter(x[0], x[0], x[0]) == []
            with pytest.raises(NattenError, match="query must have 4 dimensions, got 5."):
                getter(x, x, x)
        else:
            assert getter(x, x, x) == []
        with pytest.raises(NattenTypeError, match="query must be a tensor, got int."):
            getter(1, x, x)


def test_flex_settings() -> None:
    natten.allow_flex_compile(True, True)
    assert natten.is_flex_compile_allowed()
    assert natten.is_flex_compile_backprop_allowed()
    natten.disable_flex_compile_backprop()
    assert natten.is_flex_compile_allowed()
    assert not natten.is_flex_compile_backprop_allowed()
    natten.allow_flex_compile_backprop()
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed()
    assert not natten.is_flex_compile_backprop_allowed()


@pytest.mark.parametrize(
    ("text", "value"), [("False", False), ("no", False), ("0", False), ("True", True), ("1", True)]
)
def test_bools_of_the_profiler(text: str, value: bool) -> None:
    given = profiler._parser().parse_args(["-i", "8", "-c", text])
    assert given.causal == [value]


RUN = ["-w", "3", "--device", "cpu", "--warmup-steps", "1", "--steps", "2", "--backprop"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-i", "9", "-n", "4", "--heads-kv", "2", "-d", "8", "--dim-value", "5", "-c", "True"],
        ["-i", "6", "7", "--stride", "1", "2", "--add-kv", "2", "--dtype", "bf16"],
        ["-i", "6", "7", "--q-tile", "8", "8", "--kv-tile", "8", "8", "--backend", "cutlass-fna"],
    ],
)
def test_profiler(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert profiler.main([*arguments, *RUN]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["forward", "backward"]
    assert all(float(x) > 0 for line in lines[2:] for x in line.split()[1:3])
    assert profiler.main([*arguments, *RUN, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(": taken") == 2


def test_profiler_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert profiler.main(["-i", "9", "-w", "10", "--device", "cpu"]) == 1
    assert "got kernel_size 10" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        profiler.main(["-i", "9", "-c", "perhaps"])
    assert "'perhaps' is neither true nor false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-i", "-3", "-w", "7"], "argument -i/--input-size: -3 is less than 1"),
        (["-i", "9", "-w", "0"], "argument -w/--window-size: 0 is less than 1"),
        (["-i", "9", "-d", "0"], "argument -d/--dim: 0 is less than 1"),
        (["-i", "9", "--add-kv", "-1"], "argument --add-kv: -1 is less than 0"),
        (["-i", "9", "--steps", "0"], "argument --steps: 0 is less than 1"),
        (["-i", "nine"], "argument -i/--input-size: invalid integer value: 'nine'"),
    ],
)
def test_sizes_of_the_profiler(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        profiler.main(arguments)
    assert text in capsys.readouterr().err
