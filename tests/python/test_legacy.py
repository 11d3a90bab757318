# SPDX-License-Identifier: MIT
"""Names of 0.14 to 0.17.4: that they are where clients look for them, say that they are old, and do
what their successors do."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import natten
from natten import NattenTypeError, functional
from natten.functional import na1d, na1d_av, na1d_qk, na2d, na2d_av, na2d_qk, na3d, na3d_av, na3d_qk

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def deprecated(count: int = 1) -> Iterator[None]:
    """So many warnings, all in the name of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [w.category for w in caught] == [DeprecationWarning] * count, caught
    assert all(w.filename == __file__ for w in caught)


def tensors(*extents: int, channels: int = 4, count: int = 3) -> list[Tensor]:
    """Heads first, not contiguous, as models that permute have them."""
    rank = len(extents)
    made = torch.randn(count, 2, *extents, 3, channels, dtype=torch.float64)
    return [t.movedim(rank + 1, 1).requires_grad_() for t in made]


def bias(*sizes: int) -> Tensor:
    shape = [2 * size - 1 for size in sizes]
    return torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)


def same(ours: Tensor, true: Tensor, leaves: list[Tensor]) -> None:
    assert torch.equal(ours, true)
    d = torch.randn_like(ours)
    mine, other = (torch.autograd.grad(x, leaves, d, retain_graph=True) for x in (ours, true))
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a, b)


def test_1d() -> None:
    q, k, v = tensors(11)
    rpb = bias(5)
    true = na1d_qk(q, k, 5, 2, rpb=rpb)
    with deprecated(2):
        same(functional.natten1dqkrpb(q, k, rpb, 5, 2), true, [q, k, rpb])
        ours = functional.natten1dqkrpb(query=q, key=k, rpb=None, kernel_size=5, dilation=2)
    same(ours, na1d_qk(q, k, 5, 2), [q, k])
    with deprecated(3):
        same(functional.natten1dqk(q, k, 5, 2), ours, [q, k])
        same(functional.natten1dav(ours, v, 5, 2), na1d_av(ours, v, 5, 2), [q, v])
        functional.natten1dav(attn=ours, value=v, kernel_size=5, dilation=2)


def test_2d() -> None:
    q, k, v = tensors(7, 8)
    rpb = bias(3, 3)
    true = na2d_qk(q, k, 3, 2, rpb=rpb)
    with deprecated(2):
        same(functional.natten2dqkrpb(q, k, rpb, 3, 2), true, [q, k, rpb])
        ours = functional.natten2dqkrpb(query=q, key=k, rpb=rpb, kernel_size=3, dilation=2)
    same(ours, true, [q, k, rpb])
    with deprecated(3):
        same(functional.natten2dqk(q, k, 3, 1), na2d_qk(q, k, 3), [q, k])
        same(functional.natten2dav(true, v, 3, 2), na2d_av(true, v, 3, 2), [q, v])
        functional.natten2dav(attn=true, value=v, kernel_size=3, dilation=2)


def test_3d() -> None:
    q, k, v = tensors(5, 6, 7)
    sizes, steps, rpb = (5, 3, 3), (1, 2, 2), bias(5, 3, 3)
    true = na3d_qk(q, k, sizes, steps, rpb=rpb)
    with deprecated(3):
        same(functional.natten3dqkrpb(q, k, rpb, 5, 3, 1, 2), true, [q, k, rpb])
        same(functional.natten3dqk(q, k, 5, 3, 1, 2), na3d_qk(q, k, sizes, steps), [q, k])
        same(functional.natten3dav(true, v, 5, 3, 1, 2), na3d_av(true, v, sizes, steps), [q, v])


def test_with_bias() -> None:
    more = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    q, k, _ = tensors(9)
    rpb = bias(3)
    with deprecated(2):
        same(functional.na1d_qk_with_bias(q, k, rpb, 3, 2), na1d_qk(q, k, 3, 2, rpb=rpb), [rpb])
        ours = functional.na1d_qk_with_bias(q, k, None, 3, 2, additional_keys=more)
    same(ours, na1d_qk(q, k, 3, 2, more), [q, k])
    q, k, _ = tensors(6, 7)
    rpb = bias(3, 3)
    with deprecated():
        ours = functional.na2d_qk_with_bias(q, k, rpb, 3, 2, more)
    same(ours, na2d_qk(q, k, 3, 2, more, rpb=rpb), [q, k, rpb])
    q, k, _ = tensors(5, 6, 7)
    rpb = bias(5, 3, 3)
    with deprecated():
        ours = functional.na3d_qk_with_bias(q, k, rpb, 5, 3, 1, 2, more)
    same(ours, na3d_qk(q, k, (5, 3, 3), (1, 2, 2), more, rpb=rpb), [q, k, rpb])


def test_every_name() -> None:
    names = [f"natten{n}d{what}" for n in (1, 2, 3) for what in ("qk", "qkrpb", "av")]
    for name in [*names, "enable_autotuner"]:
        assert getattr(natten, name) is getattr(functional, name)
    for module in (natten, functional):
        with pytest.raises(AttributeError, match="natten4dqk"):
            getattr(module, "natten4dqk")  # noqa: B009
        assert not hasattr(module, "na4d_qk_with_bias")


def test_classes() -> None:
    q, k, v = tensors(6, 7)
    rpb, more = bias(3, 3), torch.randn(2, 3, 2, 4, dtype=torch.float64)
    attn = na2d_qk(q, k, 3, 2, more, (True, False))
    last = [t.movedim(1, -2) for t in (q, k, v)]
    with deprecated(5):
        ours = functional.NeighborhoodAttention2DQKAutogradFunction.apply(
            q, k, None, more, (3, 3), (2, 2), (True, False)
        )
        same(ours, attn, [q, k])
        ours = functional.NeighborhoodAttention2DAVAutogradFunction.apply(
            attn, v, more, (3, 3), (2, 2), (True, False)
        )
        same(ours, na2d_av(attn, v, 3, 2, more, (True, False)), [q, v])
        tiles = (((8, 8), (8, 8)), ((8, 8), (8, 8), (1, 1), False))
        ours = functional.FusedNeighborhoodAttention2D.apply(
            *last, rpb, (3, 3), (2, 2), (False, False), 0.5, *tiles
        )
        same(ours, na2d(*last, 3, 2, rpb=rpb, scale=0.5), [q, k, v, rpb])
        ours = functional.NATTEN2DQKRPBFunction.apply(q, k, rpb, 3, 2)
        same(ours, na2d_qk(q, k, 3, 2, rpb=rpb), [q, k, rpb])
        functional.NATTEN2DAVFunction.apply(ours, v, 3, 2)


def test_classes_of_0_15_0() -> None:
    """Without additional tokens, and derived from."""
    q, k, v = tensors(6, 7)
    rpb = bias(3, 3)

    class OwnQK(functional.NeighborhoodAttention2DQKAutogradFunction):  # type: ignore[misc]
        pass

    class OwnAV(functional.NeighborhoodAttention2DAVAutogradFunction):  # type: ignore[misc]
        pass

    with deprecated(2):
        attn = OwnQK.apply(q, k, rpb, 3, 2)
        out = OwnAV.apply(attn, v, 3, 2)
    same(attn, na2d_qk(q, k, 3, 2, rpb=rpb), [q, k, rpb])
    same(out, na2d_av(attn, v, 3, 2), [q, k, v])


def test_autotuner() -> None:
    with deprecated(2):
        functional.enable_autotuner()
        assert natten.is_autotuner_enabled_for_forward()
        assert natten.is_autotuner_enabled_for_backward()
        natten.enable_autotuner(forward_pass=True, backward_pass=False, steps_forward=3)
    assert not natten.is_autotuner_enabled_for_backward()


def test_autotune_fna() -> None:
    """Its tilings fit the class they were made for."""
    q, k, v = (t.movedim(1, -2) for t in tensors(6, 7))
    with deprecated(2):
        forward, backward = natten.autotuner.autotune_fna(2, q, (3, 3), (2, 2), (False, False))
        ours = functional.FusedNeighborhoodAttention2D.apply(
            q, k, v, None, (3, 3), (2, 2), (False, False), 0.5, forward, backward
        )
    assert natten.utils.check_tiling_config(2, forward) == forward
    assert natten.utils.check_backward_tiling_config(2, backward) == backward
    assert torch.equal(ours, na2d(q, k, v, 3, 2, scale=0.5))
    with pytest.raises(AttributeError, match="autotune_fma"):
        natten.autotuner.autotune_fma  # noqa: B018


OLD_MODULES = ("natten1d", "natten2d", "natten3d", "experimental", "ops")


@pytest.mark.parametrize("name", OLD_MODULES)
def test_modules_warn_once(name: str) -> None:
    """In the name of whoever imports them first, however that is done."""
    ways: list[Callable[[], Any]] = [
        lambda: importlib.import_module(f"natten.{name}"),
        lambda: getattr(natten, name),
        lambda: exec(f"from natten import {name}", {"__name__": "here"}),
    ]
    for way, file in zip(ways, (__file__, __file__, "<string>"), strict=True):
        sys.modules.pop(f"natten.{name}", None)
        vars(natten).pop(name, None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            way()
            way()
        assert [(w.category, w.filename) for w in caught] == [(DeprecationWarning, file)]
        assert str(caught[0].message).startswith(f"natten.{name} is a name of older versions")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rank", (1, 2, 3))
def test_modules_paths(rank: int) -> None:
    module = importlib.import_module(f"natten.natten{rank}d")
    name = f"NeighborhoodAttention{rank}D"
    assert module.__all__ == [name] and getattr(module, name) is getattr(natten, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_experimental() -> None:
    module = importlib.import_module("natten.experimental")
    assert (module.na1d, module.na2d, module.na3d) == (na1d, na2d, na3d)


def test_nested() -> None:
    from natten import nested

    items = [tensors(*extents) for extents in ((6, 7), (8, 5))]
    q, k, v = (torch.nested.nested_tensor([item[i].detach() for item in items]) for i in range(3))
    with deprecated(2):
        attn = nested.na2d_qk_nested(q, k, None, 3, 1)
        out = nested.na2d_av_nested(attn, v, 3, 1)
    assert attn.is_nested and len(attn.unbind()) == 2
    for ours, item in zip(out.unbind(), items, strict=True):
        q, k, v = (t.detach() for t in item)
        assert torch.equal(ours, na2d_av(na2d_qk(q, k, 3), v, 3))
    assert len(nested.__all__) == 6 and all(hasattr(nested, name) for name in nested.__all__)


def test_library_switches() -> None:
    library = natten.libnatten
    assert natten._C is library and library.has_cuda() == natten.has_cuda()
    for name in ("gemm_na", "tiled_na", "gemm_tf32"):
        before = getattr(library, f"get_{name}")()
        getattr(library, f"set_{name}")(not before)
        assert getattr(library, f"get_{name}")() is not before
    assert library.has_gemm() == natten.has_gemm() and natten.HAS_LIBNATTEN is True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ops() -> None:
    from natten import ops

    q, k, v = tensors(5, 6)
    more_k, more_v = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).unbind()
    more_k.requires_grad_(), more_v.requires_grad_()
    scores = torch.full((2, 3, 5, 6, 13), torch.nan, dtype=torch.float64)
    scores[..., :9] = na2d_qk(q, k, 3).detach()
    ops.qk_cross_forward(q.detach(), more_k.detach(), scores[..., 9:])
    true = na2d_qk(q, k, 3, 1, more_k)
    torch.testing.assert_close(scores, true.detach())
    attn = true.detach()[..., 9:].clone().requires_grad_()
    out = torch.empty(2, 3, 5, 6, 4, dtype=torch.float64)
    ops.av_cross_forward(attn.detach(), more_v.detach(), out)
    true_out = torch.einsum("bhxyn,bhnd->bhxyd", attn, more_v)
    torch.testing.assert_close(out, true_out.detach())
    d = torch.randn_like(out)
    results = [torch.empty_like(attn), torch.empty_like(more_v)]
    ops.av_cross_backward(d, more_v.detach(), attn.detach(), *results)
    expected = torch.autograd.grad(true_out, (attn, more_v), d)
    torch.testing.assert_close(tuple(results), expected)
    d = torch.randn_like(attn)
    results = [torch.empty_like(q), torch.empty_like(more_k)]
    ops.qk_cross_backward(q.detach(), d, more_k.detach(), *results)
    product = torch.einsum("bhxyd,bhnd->bhxyn", q, more_k)
    torch.testing.assert_close(tuple(results), torch.autograd.grad(product, (q, more_k), d))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ops_merge() -> None:
    from natten import ops

    q, k, v = (t.detach().movedim(1, -2) for t in tensors(5, 6))
    more_k, more_v = torch.randn(2, 2, 4, 3, 4, dtype=torch.float64).unbind()
    true = na2d(q, k, v, 3, additional_keys=more_k, additional_values=more_v)
    out, lse = na2d(q, k, v, 3, return_lse=True)
    other, sums = ops.additional_sdpa(q.flatten(1, 2), more_k, more_v)
    assert sums.shape == (2, 3, 30)
    other, sums = other.view(out.shape), sums.transpose(1, 2).reshape(lse.shape)
    torch.testing.assert_close(ops.merge_attentions(out, other, lse, sums), true)
    assert callable(ops.maybe_torch_compile)


def test_transformers_trap() -> None:
    """Dinat of transformers 4.54 and later: [batch, width, height, heads, head_dim]."""
    q, k, _ = (t.movedim(1, -2) for t in tensors(6, 7))
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match=r"transformers < 4\.54"):
        natten.natten2dqkrpb(q, k, bias(3, 3), 3, 1)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError) as caught:
        natten.natten2dqkrpb(q.movedim(-2, 1), k.movedim(-2, 1), bias(3, 3)[:2], 3, 1)
    assert "transformers" not in str(caught.value)


def test_positional_order_of_later_versions() -> None:
    """From 0.20 on: kernel_size, stride, dilation, is_causal, scale."""
    q, k, v = (t.movedim(1, -2) for t in tensors(6, 7))
    both = (True, False)
    calls: list[Any] = [
        lambda: na2d(q, k, v, 3, 2, 1),
        lambda: na2d(q, k, v, (3, 3), (2, 2), (1, 1)),
        lambda: na2d(q, k, v, 3, 2, 1, True),
        lambda: na2d(q, k, v, (3, 3), (1, 2), (2, 1), both, 0.5),
        lambda: na2d(q, k, v, 3, 2, 0, False, None, None, None),
        lambda: natten.NeighborhoodAttention2D(8, 2, 3, 2, 1),
        lambda: natten.NeighborhoodAttention2D(8, 2, 3, 2, (1, 1)),
        lambda: natten.NeighborhoodAttention2D(8, 2, 3, 2, 1.0),
        lambda: natten.NeighborhoodAttention2D(8, 2, 3, 2, 1, False),
    ]
    for call in calls:
        with pytest.raises(NattenTypeError, match="stride, dilation and is_causal by keyword"):
            call()


def test_positional_order_of_unfused_functions() -> None:
    """0.15 had two numbers each for three axes; is_causal never came fourth."""
    q, _, _ = tensors(6, 7, 8)
    with pytest.raises(NattenTypeError, match="is_causal must be .* by keyword"):
        na3d_qk(q, q, 5, 3, 1, 1)
    order = "query, key, kernel_size, dilation, additional_keys, is_causal, rpb; pass the rest"
    with pytest.raises(NattenTypeError, match=f"additional_keys must be .* got bool. .*{order}"):
        na3d_qk(q, q, 3, 1, True)
    with pytest.raises(NattenTypeError, match="additional_values must be a tensor, got int"):
        na3d_av(torch.zeros(2, 3, 6, 7, 8, 27), q, 3, 1, 1)
    with pytest.raises(TypeError, match="positional arguments but"):
        na3d_qk(q, q, 3, 1, None, False, None, 1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'kernel_size'"):
        na3d_qk(q, q)


@pytest.mark.parametrize("name", ("na1d", "na2d", "na3d", "flex"))
def test_modules_that_are_none(name: str) -> None:
    with pytest.raises(ImportError):
        importlib.import_module(f"natten.{name}")
    assert not hasattr(natten.libnatten, "na2d_forward")
    assert not hasattr(natten.flops, "qk_2d_rpb_flop")


def test_modules_of_0_14() -> None:
    module = natten.NeighborhoodAttention3D(
        dim=8, num_heads=2, kernel_size=3, kernel_size_d=5, dilation=2, dilation_d=1, bias=True
    )
    assert module.kernel_size == (5, 3, 3) and module.dilation == (1, 2, 2)
    assert module.rpb is not None and module.rpb.shape == (2, 9, 5, 5)
    with pytest.raises(TypeError, match="kernel_size_d is for three axes"):
        natten.NeighborhoodAttention2D(8, 2, 3, kernel_size_d=5)
    with pytest.raises(TypeError, match="dilation_d .* goes with an integer dilation"):
        natten.NeighborhoodAttention3D(8, 2, 3, dilation=(1, 1, 1), dilation_d=5)


def test_misspelt() -> None:
    q, k, v = tensors(7)
    for call in (
        lambda: na1d_qk(q, k, kernel_size=3, is_casual=True),
        lambda: na1d_av(na1d_qk(q, k, 3), v, kernel_size=3, is_casual=True),
        lambda: na1d(*(t.movedim(1, -2) for t in (q, k, v)), kernel_size=3, is_casual=(True,)),
        lambda: functional.neighborhood_attention_generic(q, k, v, 3, is_casual=True),
    ):
        with pytest.warns(DeprecationWarning, match="is_causal") as caught:
            ours = call()
        assert caught[0].filename == __file__
        assert ours.shape[0] == 2
    with pytest.warns(DeprecationWarning, match="is_causal"):
        exec("na1d_qk(q, k, 3, is_casual=True)", {"na1d_qk": na1d_qk, "q": q, "k": k})
    true = na1d_qk(q, k, 3, is_causal=True)
    with pytest.warns(DeprecationWarning):
        assert torch.equal(na1d_qk(q, k, 3, is_casual=True), true)


@pytest.mark.slow
def test_compiled_code_does_not_warn() -> None:
    q, k, v = (t.detach().float() for t in tensors(6, 7))
    rpb = bias(3, 3).detach().float()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = functional.natten2dqkrpb(q, k, rpb, 3, 1).softmax(-1)
        return functional.natten2dav(attn, v, 3, 1)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        ours = compiled(q, k, v)
    torch.testing.assert_close(ours, na2d_av(na2d_qk(q, k, 3, rpb=rpb).softmax(-1), v, 3))
