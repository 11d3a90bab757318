# SPDX-License-Identifier: MIT
"""How programs that use neighborhood attention call it: the exact shapes and spellings of their
calls, each against the definition in dense.py."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import dense
import natten
from problems import assert_close

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def heads_first(*extents: int, channels: int = 8) -> list[Tensor]:
    """Views of one projection, permuted as models do: not contiguous."""
    qkv = torch.randn(2, *extents, 3, 2, channels, requires_grad=True)
    rank = len(extents)
    return list(qkv.permute(rank + 1, 0, rank + 2, *range(1, rank + 1), rank + 3).unbind(0))


def axes(extents: tuple[int, ...], size: int, dilation: int = 1) -> list[dense.Axis]:
    return [dense.Axis(extent, size, 1, dilation) for extent in extents]


def exact_scores(q: Tensor, k: Tensor, a: list[dense.Axis], rpb: Tensor | None = None) -> Tensor:
    """Heads first."""
    q, k = (t.double().movedim(1, -2) for t in (q, k))
    return dense.scores(q, k, a, rpb=None if rpb is None else rpb.double()).movedim(-2, 1)


def exact_sums(attn: Tensor, v: Tensor, a: list[dense.Axis]) -> Tensor:
    attn, v = (t.double().movedim(1, -2) for t in (attn, v))
    return dense.weighted(attn, v, a).movedim(-2, 1)


def close(ours: Tensor, true: Tensor) -> None:
    assert_close("result", ours, true, torch.float32)


def test_stylenat() -> None:
    """Heads split in two halves with windows of their own; settings under their old names."""
    from natten import disable_autotuner, enable_autotuner, enable_fused_na, use_fused_na
    from natten.functional import natten2dav, natten2dqkrpb

    enable_fused_na(), use_fused_na(True), enable_autotuner(), disable_autotuner()
    q, k, v = heads_first(14, 14)
    for head, dilation in enumerate((1, 2)):
        part = [t[:, head : head + 1] for t in (q, k, v)]
        rpb = torch.randn(1, 13, 13)
        attn = natten2dqkrpb(part[0], part[1], rpb, 7, dilation)
        a = axes((14, 14), 7, dilation)
        close(attn, exact_scores(part[0], part[1], a, rpb))
        attn = attn.softmax(dim=-1)
        close(natten2dav(attn, part[2], 7, dilation), exact_sums(attn, part[2], a))


def test_allin1() -> None:
    """(query, key, rpb, kernel_size, dilation), on one axis and on two."""
    from natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb

    q, k, v = heads_first(40)
    rpb = torch.randn(2, 9)
    attn = natten1dqkrpb(q, k, rpb, 5, 8)
    close(attn, exact_scores(q, k, axes((40,), 5, 8), rpb))
    close(natten1dav(attn, v, 5, 8), exact_sums(attn, v, axes((40,), 5, 8)))
    q, k, v = heads_first(4, 40)
    rpb = torch.randn(2, 5, 5)
    attn = natten2dqkrpb(q, k, rpb, 3, 1)
    close(attn, exact_scores(q, k, axes((4, 40), 3), rpb))
    close(natten2dav(attn, v, 3, 1), exact_sums(attn, v, axes((4, 40), 3)))


def test_agileformer() -> None:
    from natten.functional import na2d_av, na2d_qk_with_bias

    q, k, v = heads_first(9, 10)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    attn = na2d_qk_with_bias(q, k, rpb, 3, 1)
    close(attn, exact_scores(q, k, axes((9, 10), 3), rpb))
    out = na2d_av(attn.softmax(-1), v, 3, 1)
    out.sum().backward()
    assert rpb.grad is not None and rpb.grad.abs().max() > 0


def test_segman() -> None:
    from natten import use_fused_na
    from natten.functional import na2d_av, na2d_qk

    use_fused_na()
    q, k, v = heads_first(9, 10)
    rpb = torch.randn(2, 5, 5)
    attn = na2d_qk(q, k, kernel_size=(3, 3), dilation=(2, 2), rpb=rpb)
    close(attn, exact_scores(q, k, axes((9, 10), 3, 2), rpb))
    ours = na2d_av(attn, v, kernel_size=(3, 3), dilation=(2, 2))
    close(ours, exact_sums(attn, v, axes((9, 10), 3, 2)))


def test_overlock() -> None:
    """Weights that come from elsewhere: predicted, normalised kernels."""
    from natten.functional import na2d_av

    value = torch.randn(2, 2, 2, 9, 10, 6, requires_grad=True)
    weights = torch.randn(2, 2, 9, 10, 25, requires_grad=True).softmax(-1)
    ours = na2d_av(weights, value[0], kernel_size=5)
    close(ours, exact_sums(weights, value[0], axes((9, 10), 5)))
    ours.sum().backward()
    assert value.grad is not None and not value.grad[1].any() and value.grad[0].any()


def test_hdit() -> None:
    """k-diffusion: fused if has_fused_na, heads last, cosine-normalised, a scale of 1.0."""
    q, k, v = heads_first(9, 10)
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    a = axes((9, 10), 7)
    true = exact_sums(exact_scores(q, k, a).softmax(-1), v, a)
    last = [t.movedim(1, -2) for t in (q, k, v)]
    close(natten.functional.na2d(*last, 7, scale=1.0), true.movedim(1, -2))
    assert natten.has_fused_na() == natten.has_cuda()
    attn = natten.functional.na2d_qk(q, k, 7).softmax(dim=-1)
    close(natten.functional.na2d_av(attn, v, 7), true)
    attn = natten.functional.natten2dqk(q, k, 7, 1).softmax(dim=-1)
    close(natten.functional.natten2dav(attn, v, 7, 1), true)


def test_hdit_of_videos() -> None:
    q, k, v = heads_first(4, 5, 6)
    a = axes((4, 5, 6), 3)
    true = exact_sums(exact_scores(q, k, a).softmax(-1), v, a)
    last = [t.movedim(1, -2) for t in (q, k, v)]
    close(natten.functional.na3d(*last, (3, 3, 3), scale=1.0), true.movedim(1, -2))


PUBLIC = ("na1d", "na2d", "na3d", "na2d_qk", "na2d_av")


class Sharded(Tensor):
    """A subclass that computes these functions its own way, as PhysicsNeMo's ShardTensor does."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in [getattr(natten.functional, name) for name in PUBLIC]:
            plain = [t.as_subclass(Tensor) if isinstance(t, cls) else t for t in args]
            return (function.__name__, function(*plain, **(kwargs or {})))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", PUBLIC)
def test_physicsnemo(name: str) -> None:
    function = getattr(natten.functional, name)
    extents = (4, 5, 6)[: int(name[2])]
    tensors = heads_first(*extents)
    if name.endswith("_qk"):
        tensors = tensors[:2]
    elif name.endswith("_av"):
        tensors = [torch.randn(2, 2, *extents, 9), tensors[2]]
    else:
        tensors = [t.movedim(1, -2) for t in tensors]
    true = function(*tensors, 3, dilation=1, is_causal=False)
    ours = function(*(t.as_subclass(Sharded) for t in tensors), 3, dilation=1, is_causal=False)
    assert ours[0] == name and torch.equal(ours[1], true)
    # One tensor of the kind is enough, wherever it stands.
    mixed = function(*tensors[:-1], tensors[-1].as_subclass(Sharded), 3, dilation=1)
    assert mixed[0] == name and torch.equal(mixed[1], true)


@pytest.mark.parametrize(
    ("backend", "more"),
    (
        ("hopper-fna", {"run_persistent_kernel": True}),
        ("cutlass-fna", {"backward_use_pt_reduction": False}),
        ("blackwell-fna", {"run_persistent_kernel": True}),
    ),
)
def test_cosmos(backend: str, more: dict[str, Any]) -> None:
    from natten.functional import neighborhood_attention_generic

    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    q, k, v = (torch.randn(1, 6, 8, 10, 2, 128, requires_grad=True) for _ in range(3))
    window: dict[str, Any] = {"kernel_size": (4, 4, 5), "stride": (1, 2, 5), "dilation": 1}
    ours = neighborhood_attention_generic(
        query=q,
        key=k,
        value=v,
        **window,
        is_causal=False,
        backend=backend,
        q_tile_shape=(4, 4, 8),
        kv_tile_shape=(4, 4, 8),
        backward_q_tile_shape=(4, 4, 4),
        backward_kv_tile_shape=(4, 4, 8),
        **more,
    )
    a = [dense.Axis(n, s, t) for n, s, t in zip((6, 8, 10), (4, 4, 5), (1, 2, 5), strict=True)]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    true, _ = dense.attention(*exact, a, 128**-0.5)
    close(ours, true)
    d = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, (q, k, v), d)
    for mine, other in zip(grads, torch.autograd.grad(true, exact, d.double()), strict=True):
        close(mine, other)
    half = [t.detach().bfloat16() for t in (q, k, v)]
    ours = neighborhood_attention_generic(*half, **window, backend=backend)
    assert_close(
        "bfloat16",
        ours,
        dense.attention(*(t.double() for t in half), a, 128**-0.5)[0],
        torch.bfloat16,
    )


def test_version_switchers() -> None:
    """Versions before 0.20 take the unfused functions, which are here; metadata agree."""
    from packaging.version import parse

    assert parse("0.17") <= parse(natten.__version__) < parse("0.20")
    assert callable(natten.functional.na2d_qk) and callable(natten.functional.na2d_av)
    if "NATTEN_TEST_INSTALLED" in os.environ:
        assert importlib.metadata.version("natten") == natten.__version__


def test_nat_and_dinat() -> None:
    """The official models: all by keyword, a checkpoint with biases, FLOPs by fvcore."""
    from natten import NeighborhoodAttention2D
    from natten.flops import add_natten_handle

    def block(**bias: bool) -> torch.nn.Module:
        return NeighborhoodAttention2D(
            16, kernel_size=3, dilation=2, num_heads=2, qkv_bias=True, qk_scale=None,
            attn_drop=0.0, proj_drop=0.0, **bias,
        )  # fmt: skip

    old, x = block(bias=True), torch.randn(1, 8, 9, 16)
    new = block()
    with pytest.warns(UserWarning, match="rpb"):
        new.load_state_dict(old.state_dict())
    assert torch.equal(new(x), old(x))
    fvcore = pytest.importorskip("fvcore.nn")
    counter = add_natten_handle(fvcore.FlopCountAnalysis(new, x)).unsupported_ops_warnings(False)
    assert counter.total() == 8 * 9 * (16 * 16 * 4 + 2 * 9 * 16)


def test_modules_of_restoration_models() -> None:
    """DeblurDiNAT and others: fused or not by a switch of their own."""
    from natten import NeighborhoodAttention2D, use_fused_na

    x = torch.randn(1, 9, 12, 8)
    layer = NeighborhoodAttention2D(
        dim=8, num_heads=2, kernel_size=3, dilation=3, rel_pos_bias=True, qkv_bias=True
    )
    unfused = layer(x)
    use_fused_na(True)
    torch.testing.assert_close(layer(x), unfused)


def test_opencood() -> None:
    """Names of 0.14 from the package itself; the first of three axes has numbers of its own."""
    from natten import (
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
        natten2dav,
        natten2dqkrpb,
        natten3dav,
        natten3dqkrpb,
    )

    assert NeighborhoodAttention2D(8, 2, 3)(torch.randn(1, 5, 6, 8)).shape == (1, 5, 6, 8)
    module = NeighborhoodAttention3D(
        dim=8, kernel_size=3, kernel_size_d=5, dilation=2, dilation_d=1, num_heads=2, bias=True
    )
    assert module(torch.randn(1, 5, 6, 7, 8)).shape == (1, 5, 6, 7, 8)
    q, k, v = heads_first(6, 7)
    rpb = torch.randn(2, 5, 5)
    a = axes((6, 7), 3, 2)
    attn = natten2dqkrpb(q, k, rpb, 3, 2)
    close(attn, exact_scores(q, k, a, rpb))
    close(natten2dav(attn, v, 3, 2), exact_sums(attn, v, a))
    q, k, v = heads_first(5, 6, 7)
    rpb = torch.randn(2, 9, 5, 5)
    a = [dense.Axis(5, 5), *axes((6, 7), 3, 2)]
    attn = natten3dqkrpb(q, k, rpb, 5, 3, 1, 2)
    close(attn, exact_scores(q, k, a, rpb))
    close(natten3dav(attn, v, 5, 3, 1, 2), exact_sums(attn, v, a))


def test_forecast_mae() -> None:
    from natten import NeighborhoodAttention1D

    layer = NeighborhoodAttention1D(
        dim=8, kernel_size=3, num_heads=2, qkv_bias=True, qk_scale=None, attn_drop=0.2,
        proj_drop=0.2, dilation=1,
    )  # fmt: skip
    x = torch.randn(3, 20, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_keyword_forms() -> None:
    from natten.functional import natten2dav, natten2dqkrpb

    q, k, v = heads_first(6, 7)
    rpb = torch.randn(2, 5, 5)
    a = axes((6, 7), 3)
    attn = natten2dqkrpb(query=q, key=k, rpb=rpb, kernel_size=3, dilation=1)
    close(attn, exact_scores(q, k, a, rpb))
    close(natten2dav(attn=attn, value=v, kernel_size=3, dilation=1), exact_sums(attn, v, a))


def test_naf() -> None:
    """Upsamplers and segmentation: windows of 9, dilated, values wider than keys."""
    from natten.functional import na2d_av, na2d_qk

    q, k, _ = heads_first(18, 20)
    v = torch.randn(2, 2, 18, 20, 12, requires_grad=True)
    a = axes((18, 20), 9, 2)
    attn = na2d_qk(q, k, kernel_size=9, dilation=2).softmax(dim=-1)
    close(attn, exact_scores(q, k, a).softmax(-1))
    out = na2d_av(attn, v, kernel_size=9, dilation=2)
    close(out, exact_sums(attn, v, a))
    out.sum().backward()
    # If the unfused functions were not there, they would call this.
    last = [t.movedim(1, -2) for t in (q, k, v)]
    fused = natten.na2d(*last, kernel_size=(9, 9), dilation=(2, 2), stride=1, scale=1.0)
    close(fused, out.movedim(1, -2))


def test_video_models() -> None:
    from natten.functional import na3d, na3d_av, na3d_qk

    q, k, v = heads_first(4, 5, 6)
    a = axes((4, 5, 6), 3)
    attn = na3d_qk(q, k, kernel_size=(3, 3, 3), is_causal=False, dilation=1)
    close(attn, exact_scores(q, k, a))
    out = na3d_av(attn.softmax(-1), v, kernel_size=(3, 3, 3), is_causal=False, dilation=1)
    close(out, exact_sums(attn.softmax(-1), v, a))
    # StormCast
    last = [t.movedim(1, -2) for t in (q, k, v)]
    close(na3d(*last, kernel_size=[3, 3, 3], dilation=1, scale=1.0), out.movedim(1, -2))


def test_rope_vits() -> None:
    """timm's way of calling 0.20 and later, and its types."""
    from natten.functional import neighborhood_attention_generic
    from natten.types import CausalArg2DTypeOrDed, Dimension2DTypeOrDed

    kernel_size: Dimension2DTypeOrDed = (3, 5)
    is_causal: CausalArg2DTypeOrDed = (True, False)
    q, k, v = (t.movedim(1, -2) for t in heads_first(6, 11))
    ours = neighborhood_attention_generic(
        q, k, v, kernel_size=kernel_size, dilation=2, is_causal=is_causal, scale=0.25
    )
    a = [dense.Axis(6, 3, 1, 2, True), dense.Axis(11, 5, 1, 2)]
    true, _ = dense.attention(q.double(), k.double(), v.double(), a, 0.25)
    close(ours, true)


def test_null_key() -> None:
    """Stable Diffusion's VAE: windows of 17, and a key that takes what attends to nothing."""
    q, k, v = (t.movedim(1, -2) for t in heads_first(18, 19))
    null_k, null_v = torch.randn(2, 1, 2, 8), torch.zeros(2, 1, 2, 8)
    ours = natten.na2d(q, k, v, 17, additional_keys=null_k, additional_values=null_v)
    out, lse = natten.na2d(q, k, v, 17, return_lse=True)
    null = torch.einsum("bxyhd,bnhd->bxyh", q, null_k) * 8**-0.5
    torch.testing.assert_close(ours, out * (lse - null).sigmoid().unsqueeze(-1))


GUIDE: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((30,), {"kernel_size": 7, "dilation": 4, "is_casual": True}),
    ((28, 29), {"kernel_size": 7, "dilation": 4, "is_casual": False}),
    ((9, 10), {"kernel_size": (7, 3), "dilation": (1, 3), "is_casual": (True, False)}),
    (
        (8, 5, 6),
        {"kernel_size": (7, 3, 5), "dilation": (1, 1, 1), "is_casual": (True, False, False)},
    ),
]


@pytest.mark.parametrize(("extents", "window"), GUIDE)
def test_the_guide_of_017(extents: tuple[int, ...], window: dict[str, Any]) -> None:
    """As its examples spell the calls, unfused and fused, and its three ways to scale."""
    rank, channels = len(extents), 8
    fused, qk, av = (getattr(natten.functional, f"na{rank}d{x}") for x in ("", "_qk", "_av"))
    q, k, v = heads_first(*extents)

    def each(value: Any) -> Any:
        return value if isinstance(value, tuple) else (value,) * rank

    parts = (extents, *(each(value) for value in window.values()))
    a = [dense.Axis(n, size, 1, step, causal) for n, size, step, causal in zip(*parts, strict=True)]
    attn = qk(q, k, **window)
    close(attn, exact_scores(q, k, a))
    attn = (attn * channels**-0.5).softmax(dim=-1)
    unfused = av(attn, v, **window)
    last = [t.movedim(1, -2) for t in (q, k, v)]
    out = fused(*last, **window)
    exact, _ = dense.attention(*(t.double() for t in last), a, channels**-0.5)
    close(out, exact)
    close(unfused.movedim(1, -2), exact)
    q, k, v = last
    close(fused(q * channels**-0.5, k, v, **window, scale=1.0), exact)
    root = channels**-0.25
    close(fused(q * root, k * root, v, **window, scale=1.0), exact)
