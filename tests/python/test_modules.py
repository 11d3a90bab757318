# SPDX-License-Identifier: MIT
"""The layers: both of their roads, their state, and the callers of older versions."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch

import dense
import natten
from natten import (
    NattenTypeError,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from problems import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
SIZES = {1: (13,), 2: (7, 9), 3: (4, 6, 5)}


def exact(module: Any, x: torch.Tensor, axes: list[dense.Axis]) -> torch.Tensor:
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, module.head_dim))
    out, _ = dense.attention(*qkv.unbind(-3), axes, module.scale, module.rpb)
    return module.proj(out.flatten(-2))


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("rank", (1, 2, 3))
def test_values_and_gradients(rank: int, bias: bool, causal: bool, fused: bool) -> None:
    natten.use_fused_na(fused)
    dilation = (2, *[1] * (rank - 1))
    options: dict[str, Any] = {"dilation": dilation, "is_causal": (causal, *[False] * (rank - 1))}
    kernel_size = (2 + bias, *[3] * (rank - 1)) if rank < 3 else (1, 3, 3)
    module = MODULES[rank](12, 3, kernel_size, rel_pos_bias=bias, **options).double()
    x = torch.randn(2, *SIZES[rank], 12, dtype=torch.float64, requires_grad=True)
    axes = [
        dense.Axis(extent, size, 1, step, flag)
        for extent, size, step, flag in zip(
            SIZES[rank], kernel_size, dilation, options["is_causal"], strict=True
        )
    ]
    ours, true = module(x), exact(module, x, axes)
    assert_close("output", ours, true, torch.float64)
    leaves = [x, *module.parameters()]
    d = torch.randn_like(ours)
    pairs = zip(
        torch.autograd.grad(ours, leaves, d), torch.autograd.grad(true, leaves, d), strict=True
    )
    for mine, other in pairs:
        assert_close("gradient", mine, other, torch.float64)


def test_state() -> None:
    module = NeighborhoodAttention2D(8, 2, (3, 5), rel_pos_bias=True)
    state = module.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    assert shapes == {
        "rpb": (2, 5, 9),
        "qkv.weight": (24, 8),
        "qkv.bias": (24,),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
    }
    assert module.rpb is not None
    assert 0.01 < module.rpb.std() < 0.03
    plain = NeighborhoodAttention2D(8, 2, 3, qkv_bias=False)
    assert set(plain.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}
    assert plain.rpb is None
    x = torch.randn(1, 6, 6, 8)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    fresh = NeighborhoodAttention2D(8, 2, (3, 5), rel_pos_bias=True)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fused", (False, True))
def test_whole_modules_of_017(fused: bool) -> None:
    """Pickled: without what is new, and under the path of their class."""
    natten.use_fused_na(fused)
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 5, 6, 8)
    true = module(x)
    del module.stride, module.pad_small_inputs
    text = pickle.dumps(module, protocol=0)
    old = text.replace(b"cnatten.modules\n", b"cnatten.natten2d\n")
    assert old != text
    assert torch.equal(pickle.loads(old)(x), true)


def test_loading_a_bias_into_a_module_without_one() -> None:
    old = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).double()
    model = torch.nn.Sequential(NeighborhoodAttention2D(8, 2, 3)).double()
    state = {f"0.{name}": t for name, t in old.state_dict().items()}
    with pytest.warns(UserWarning, match="0.rpb"):
        model.load_state_dict(state)
    x = torch.randn(1, 5, 5, 8, dtype=torch.float64)
    assert torch.equal(model(x), old(x))
    assert any(name == "0.rpb" for name, _ in model.named_parameters())


def test_text() -> None:
    text = repr(NeighborhoodAttention2D(8, 2, 3, dilation=(1, 2), is_causal=(True, False)))
    assert (
        "head_dim=4, num_heads=2, kernel_size=(3, 3), dilation=(1, 2), "
        "is_causal=(True, False), has_bias=False"
    ) in text


def test_numbers_are_checked_before_there_is_a_map() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kernel_size": (3, 0)}, "kernel_size must be at least 1, got 0 for axis 1."),
        ({"dilation": -1}, "dilation must be at least 1, got -1 for axis 0."),
        ({"stride": 4}, "stride must be at most kernel_size, got stride 4 and kernel_size 3 for"),
        ({"dim": 0}, "dim must be a multiple of num_heads, got 0 and 2."),
    ]
    for changed, text in wrong:
        with pytest.raises(natten.NattenError, match=re.escape(text)):
            NeighborhoodAttention2D(**{"dim": 8, "num_heads": 2, "kernel_size": 3} | changed)
    for changed in ({"dim": 8.0}, {"num_heads": "2"}, {"num_heads": True}):
        with pytest.raises(NattenTypeError, match=f"{next(iter(changed))} must be an integer"):
            NeighborhoodAttention2D(**{"dim": 8, "num_heads": 2, "kernel_size": 3} | changed)


def test_names_of_other_versions() -> None:
    module = NeighborhoodAttention2D(embed_dim=8, num_heads=2, kernel_size=3, stride=2, bias=True)
    assert module.rpb is not None and module.stride == (2, 2)
    attributes = ("num_heads", "head_dim", "scale", "kernel_size", "dilation", "is_causal")
    attributes += ("qkv", "rpb", "attn_drop_rate", "attn_drop", "proj", "proj_drop")
    assert all(hasattr(module, name) for name in attributes)


def test_fifth_positional_argument() -> None:
    with pytest.warns(UserWarning, match="rel_pos_bias=True"):
        module = NeighborhoodAttention2D(8, 2, 3, 1, True)
    assert module.is_causal == (True, True) and module.rpb is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeighborhoodAttention2D(8, 2, 3, 1, False)
        NeighborhoodAttention2D(8, 2, 3, 1, is_causal=True)
    with pytest.raises(NattenTypeError, match="is_causal"):
        NeighborhoodAttention2D(8, 2, 3, 1, 1)


def test_small_inputs() -> None:
    module = NeighborhoodAttention2D(8, 2, 5, dilation=2, pad_small_inputs=True)
    x = torch.randn(1, 7, 12, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 3))
    assert module(x).shape == x.shape
    assert torch.equal(module(x), module(padded)[:, :7])
    strict = NeighborhoodAttention2D(8, 2, 5, dilation=2)
    with pytest.raises(natten.NattenError, match="kernel_size 5, dilation 2 and extent 7"):
        strict(x)


def test_masks_of_small_inputs() -> None:
    module = NeighborhoodAttention2D(8, 2, 5, dilation=2, pad_small_inputs=True)
    x = torch.randn(1, 7, 12, 8)
    mask = torch.rand(1, 7, 12) > 0.5
    out = module(x, mask)
    assert torch.equal(out, module(x, mask.unsqueeze(-1).expand(1, 7, 12, 2)))
    padded = (torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, 3)) for t in (x, mask))
    assert torch.equal(out, module(*padded)[:, :7])
    shape = re.escape("must be (1, 7, 12) as the input, or that with heads, got ")
    for wrong in (mask[:, :6], mask[..., :9], mask[0], mask[None, None]):
        with pytest.raises(natten.NattenError, match=shape + re.escape(str(tuple(wrong.shape)))):
            module(x, wrong)
    with pytest.raises(NattenTypeError, match="key_padding_mask must be a tensor, got list"):
        module(x, [False])


@pytest.mark.parametrize("fused", (False, True))
def test_dropout(fused: bool) -> None:
    natten.use_fused_na(fused)
    module = NeighborhoodAttention1D(8, 2, 3, attn_drop=0.5)
    x = torch.randn(2, 9, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("checkpointed", (False, True))
def test_training_lowers_the_loss(fused: bool, checkpointed: bool) -> None:
    natten.use_fused_na(fused)
    model = torch.nn.Sequential(
        NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True),
        NeighborhoodAttention2D(8, 2, 3, dilation=2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(2, 8, 8, 8)
    target = torch.nn.functional.avg_pool2d(x.movedim(-1, 1), 3, 1, 1).movedim(1, -1)
    losses = []
    for _ in range(30):
        out = (
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            if checkpointed
            else model(x)
        )
        loss = torch.nn.functional.mse_loss(out, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
