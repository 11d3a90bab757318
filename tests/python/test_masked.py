# SPDX-License-Identifier: MIT
"""Biases and masks of keys, dropout, and position biases added to scores from elsewhere."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import dense
import natten
import natten.functional as F
from dense import Axis
from natten import NeighborhoodAttention1D, NeighborhoodAttention2D

FUSED = {1: F.na1d, 2: F.na2d, 3: F.na3d}
QK = {1: F.na1d_qk, 2: F.na2d_qk, 3: F.na3d_qk}
TINY = 1e-300


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: list[Axis],
    bias: Tensor,
    kept: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Heads-last attention with a bias of keys [batch, map, heads], weights times `kept`."""
    slots = dense.slots(axes)
    rank = len(axes)
    flat = [t.flatten(1, rank) for t in (query, key, value, bias)]
    q, k, v, b = (t.repeat_interleave(query.shape[-2] // t.shape[2], 2) for t in flat)
    scores = torch.einsum("bqhd,bqwhd->bqhw", q, k[:, slots.key]) * 0.5
    scores = scores + b[:, slots.key].movedim(-1, 2)
    scores = scores.masked_fill(~slots.allowed[:, None], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp_min(-1e300)
    powers = (scores - top).exp()
    total = powers.sum(-1, keepdim=True)
    weights = powers / total.clamp_min(TINY) * kept
    out = torch.einsum("bqhw,bqwhd->bqhd", weights, v[:, slots.key])
    lse = (top + total.log()).squeeze(-1)
    return out.unflatten(1, slots.queries), lse.unflatten(1, slots.queries)


def tensors(rank: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> Any:
    extents = {1: (11,), 2: (6, 7), 3: (4, 5, 6)}[rank]
    made = [
        torch.randn(2, *extents, h, 4, dtype=dtype, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    return extents, *made


def philox(key: list[int], counter: list[int]) -> list[int]:
    """Philox4x32 with 7 rounds."""
    a, b, c, d = counter
    k, j = key
    for _ in range(7):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = y >> 32 ^ b ^ k, y & 0xFFFFFFFF, x >> 32 ^ d ^ j, x & 0xFFFFFFFF
        k, j = (k + 0x9E3779B9) & 0xFFFFFFFF, (j + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def factors(seed: list[int], p: float, batch: int, place: Any, heads: int, slots: int) -> Tensor:
    """What the weights of docs/spec.md's dropout are multiplied by: [batch, query, head, slot]."""
    threshold = round(p * 65536)
    kept = torch.zeros(batch, len(place), heads, slots, dtype=torch.float64)
    for b in range(batch):
        for i, (z, y, x) in enumerate(place):
            for h in range(heads):
                first = philox(seed, [0, 0, b, h])
                row = philox(first[:2], [z, y, *first[2:]])
                for w in range(slots):
                    words = philox(row[:2], [w // 8, x, *row[2:]])
                    number = words[w // 2 % 4] >> w % 2 * 16 & 0xFFFF
                    kept[b, i, h, w] = number >= threshold
    return kept * 65536 / (65536 - threshold)


def drawn(generator_seed: int) -> list[int]:
    """The seed that a call draws from a fresh generator."""
    words: list[int] = natten._ops.draw_seed(torch.Generator().manual_seed(generator_seed)).tolist()
    return words


@pytest.mark.parametrize("rank,kv_heads", ((1, 2), (2, 1), (3, 2)))
@pytest.mark.parametrize("p", (0.0, 0.4))
def test_against_dense(rank: int, kv_heads: int, p: float) -> None:
    extents, q, k, v = tensors(rank, 2, kv_heads)
    causal = (True,) + (False,) * (rank - 1)
    axes = [Axis(n, 3, 1, 1, c) for n, c in zip(extents, causal, strict=True)]
    bias = torch.randn(2, *extents, kv_heads, dtype=torch.float64)
    bias[torch.rand(bias.shape) < 0.3] = -torch.inf
    bias[0, ..., 3:, :] = -torch.inf  # queries without keys
    bias.requires_grad_()
    numbers = {"scale": 0.5, "return_lse": True, "is_causal": causal}
    generator = torch.Generator().manual_seed(5)
    out, lse = FUSED[rank](
        q, k, v, 3, key_padding_mask=bias, dropout_p=p, generator=generator, **numbers
    )
    places = torch.cartesian_prod(*(torch.arange(n) for n in extents)).view(-1, rank)
    place = torch.nn.functional.pad(places, (3 - rank, 0)).tolist()
    kept = factors(drawn(5), p, 2, place, 2, 3**rank)
    expected, lse_ = reference(q, k, v, axes, bias, kept)
    assert bool((lse_ == -torch.inf).any())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, lse_)
    finite = lse_ != -torch.inf
    grads = (torch.randn_like(out), torch.randn_like(lse)[finite])
    inputs = (q, k, v, bias)
    mine = torch.autograd.grad((out, lse[finite]), inputs, grads)
    theirs = torch.autograd.grad((expected, lse_[finite]), inputs, grads)
    for ours, exact in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, exact.nan_to_num(0.0))


def test_bool_mask_and_shapes() -> None:
    extents, q, k, v = tensors(2, 4, 2, torch.float32)
    mask = torch.rand(2, *extents) < 0.4
    by_bool = F.na2d(q, k, v, 3, key_padding_mask=mask)
    bias = torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
    assert torch.equal(by_bool, F.na2d(q, k, v, 3, key_padding_mask=bias))
    each = bias.unsqueeze(-1).expand(*bias.shape, 2).contiguous()
    assert torch.equal(by_bool, F.na2d(q, k, v, 3, key_padding_mask=each))
    assert torch.equal(by_bool, F.na2d(q, k, v, 3, key_padding_mask=bias.double()))
    assert F.na2d(*(t.bfloat16() for t in (q, k, v)), 3, key_padding_mask=mask).dtype is (
        torch.bfloat16
    )
    none = torch.ones(2, *extents, dtype=torch.bool)
    out = F.na2d(q, k, v, 3, key_padding_mask=none)
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not grad.any()
    more = torch.randn(2, 3, 2, 4)
    out = F.na2d(q, k, v, 3, key_padding_mask=none, additional_keys=more, additional_values=more)
    assert out.any()


@pytest.mark.parametrize("p", (0.0, 0.3))
def test_gradcheck(p: float) -> None:
    _, q, k, v = tensors(1, 2, 1)
    q, k, v = (t[:1, :7] for t in (q, k, v))
    bias = torch.randn(1, 7, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    more = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)

    def function(*tensors: Tensor) -> Any:
        q, k, v, bias, rpb, more = tensors
        generator = torch.Generator().manual_seed(3)
        mask = torch.cat([bias, torch.full((1, 2), -torch.inf, dtype=torch.float64)], 1)[:, :7]
        return F.na1d(
            *(q, k, v, 3),
            rpb=rpb,
            additional_keys=more,
            additional_values=more,
            key_padding_mask=mask,
            dropout_p=p,
            generator=generator,
            return_lse=True,
        )

    inputs = (q, k, v, bias, rpb, more)
    assert gradcheck(function, inputs, check_forward_ad=p == 0, fast_mode=True)
    if p == 0:
        assert gradgradcheck(function, inputs, fast_mode=True)
        return
    (first,) = torch.autograd.grad(function(*inputs)[0].sum(), q, create_graph=True)
    assert torch.equal(first, torch.autograd.grad(function(*inputs)[0].sum(), q)[0])
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        torch.autograd.grad(first.sum(), q)


def test_second_derivatives_of_masked_keys() -> None:
    _, q, k, v = tensors(1, 1, 1)
    q, k, v = (t[:1, :6] for t in (q, k, v))
    mask = torch.tensor([[False, True, False, True, True, True]])

    def function(*tensors: Tensor) -> Any:
        return F.na1d(*tensors, 3, key_padding_mask=mask)

    assert gradgradcheck(function, (q, k, v), fast_mode=True)


def test_dropout_is_the_same_everywhere() -> None:
    q, k, v = (torch.randn(2, 24, 25, 2, 16, requires_grad=True) for _ in range(3))

    def run(**more: Any) -> Any:
        torch.manual_seed(7)
        out = F.na2d(q, k, v, 5, dropout_p=0.25, **more)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    first = run()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    for ours, theirs in zip(first, run(), strict=True):
        assert torch.equal(ours, theirs)
    torch.set_num_threads(before)
    assert not torch.equal(first[0], F.na2d(q, k, v, 5, dropout_p=0.25))
    torch.manual_seed(7)
    block = F.na2d(
        *(q[:, 8:16], k[:, 4:20], v[:, 4:20], 5),
        dropout_p=0.25,
        query_origin=(8, 0),
        key_origin=(4, 0),
        global_extent=(24, 25),
    )
    torch.testing.assert_close(block, first[0][:, 8:16])


def test_the_mean_stays() -> None:
    q, k = torch.randn(2, 4, 4000, 8, 8)
    out = F.na1d(q, k, torch.ones_like(q), 9, dropout_p=0.3)
    deviation = out.std().item() / out[..., 0].numel() ** 0.5
    assert abs(out.mean().item() - 1) < 6 * deviation
    assert not F.na1d(q, k, k, 9, dropout_p=1.0).any()
    assert torch.equal(F.na1d(q, k, k, 9, dropout_p=0.0), F.na1d(q, k, k, 9))


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoints_drop_the_same(reentrant: bool) -> None:
    _, q, k, v = tensors(2, 2, 2)

    def function(*tensors: Tensor) -> Tensor:
        return F.na2d(*tensors, 3, dropout_p=0.5).square().sum()

    results = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        loss = (
            checkpoint(function, q, k, v, use_reentrant=reentrant) if wrapped else function(q, k, v)
        )
        for t in (q, k, v):
            t.grad = None
        loss.backward()
        results.append((loss.detach(), q.grad, k.grad, v.grad))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_selective_checkpoints_drop_the_same() -> None:
    tools = pytest.importorskip("torch.utils.checkpoint")
    if not hasattr(tools, "create_selective_checkpoint_contexts"):
        pytest.skip("this torch has no selective checkpoints")
    _, q, k, v = tensors(2, 2, 2)
    kept = [torch.ops.natten.na_masked.default]

    def function(*tensors: Tensor) -> Tensor:
        return F.na2d(*tensors, 3, dropout_p=0.5).square().sum()

    def contexts() -> Any:
        return tools.create_selective_checkpoint_contexts(kept)

    results = []
    for more in (None, {"context_fn": contexts}):
        torch.manual_seed(1)
        loss = (
            function(q, k, v)
            if more is None
            else checkpoint(function, q, k, v, use_reentrant=False, **more)
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, (q, k, v))))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.slow
def test_compiled() -> None:
    _, q, k, v = tensors(2, 2, 2, torch.float32)
    mask = torch.rand(2, 6, 7) < 0.3

    def masked(*tensors: Tensor) -> Tensor:
        return F.na2d(*tensors, 3, key_padding_mask=mask).square().sum()

    def dropped(*tensors: Tensor) -> Tensor:
        return F.na2d(*tensors, 3, dropout_p=0.5).square().sum()

    compiled = torch.compile(masked, fullgraph=True)
    mine = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for ours, exact in zip(mine, torch.autograd.grad(masked(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, exact)
    compiled = torch.compile(dropped, fullgraph=True)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss = compiled(q, k, v)
        losses.append((loss.item(), torch.autograd.grad(loss, q)[0]))
    assert losses[0][0] == losses[1][0] != losses[2][0]
    assert torch.equal(losses[0][1], losses[1][1])


def test_vmap() -> None:
    _, q, k, v = tensors(1, 2, 2)
    bias = torch.randn(3, 2, 11, dtype=torch.float64)

    def function(bias: Tensor) -> Tensor:
        out: Tensor = F.na1d(q, k, v, 3, key_padding_mask=bias)
        return out

    expected = torch.stack([function(b) for b in bias])
    torch.testing.assert_close(torch.func.vmap(function)(bias), expected)


def seeded(function: Any, *arguments: Any) -> Any:
    torch.manual_seed(7)
    return function(*arguments)


def dropped_squares(x: Tensor) -> Tensor:
    return F.na1d(x, x, x, 3, dropout_p=0.5).square().sum()


def test_transforms_of_dropout() -> None:
    x = torch.randn(3, 2, 11, 2, 4, dtype=torch.float64)
    vmap, grad = functools.partial(torch.func.vmap, randomness="same"), torch.func.grad
    leaves = [part.clone().requires_grad_() for part in x]
    losses = [seeded(dropped_squares, leaf) for leaf in leaves]
    assert torch.equal(seeded(vmap(dropped_squares), x), torch.stack(losses))
    wanted = torch.stack(torch.autograd.grad(losses, leaves))
    assert torch.equal(seeded(grad(dropped_squares), x[0]), wanted[0])
    assert torch.equal(seeded(vmap(grad(dropped_squares)), x), wanted)
    together = seeded(grad(lambda x: vmap(dropped_squares)(x).sum()), x)
    torch.testing.assert_close(together, wanted)
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        grad(lambda x: grad(dropped_squares)(x).sum())(x[0])
    with pytest.raises(NotImplementedError, match="only first derivatives"):
        torch.func.jvp(grad(dropped_squares), (x[0],), (x[0],))


def test_vmap_of_different_dropout() -> None:
    query, value = torch.randn(2, 1, 11, 2, 4, dtype=torch.float64)

    def function(value: Tensor, weights: Tensor) -> Any:
        out, vjp = torch.func.vjp(lambda v: F.na1d(query, query, v, 3, dropout_p=0.5), value)
        return out, vjp(weights)[0]

    weights = torch.randn(3, 1, 11, 2, 4, dtype=torch.float64)
    mapped = torch.func.vmap(function, in_dims=(None, 0), randomness="different")
    out, grads = mapped(value, weights)
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])
    for mine, given, d_value in zip(out, weights, grads, strict=True):  # linear in the values
        torch.testing.assert_close((mine * given).sum(), (value * d_value).sum())
    assert mapped(value, weights[:0])[1].shape == weights[:0].shape


def test_scores_with_masks() -> None:
    _, q, k, v = tensors(2, 2, 1)
    q, k, v = (t.movedim(-2, 1) for t in (q, k, v))
    bias = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    more = torch.randn(2, 1, 2, 4, dtype=torch.float64)
    attn = F.na2d_qk(q, k, 3, additional_keys=more, key_padding_mask=bias)
    out = F.na2d_av(attn.softmax(-1), v, 3, additional_values=more)
    fused = F.na2d(
        *(t.movedim(1, -2) for t in (q, k, v)),
        3,
        scale=1.0,
        additional_keys=more.movedim(1, -2),
        additional_values=more.movedim(1, -2),
        key_padding_mask=bias,
    )
    torch.testing.assert_close(out.movedim(1, -2), fused)
    weights = torch.randn_like(out)
    mine = torch.autograd.grad(out, bias, weights)
    theirs = torch.autograd.grad(fused, bias, weights.movedim(1, -2))
    torch.testing.assert_close(mine, theirs)
    masked = F.na2d_qk(q, k, 3, key_padding_mask=torch.ones(2, 6, 7, dtype=torch.bool))
    assert bool((masked == -torch.inf).all())


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_add_rpb(rank: int) -> None:
    extents, q, k, _ = tensors(rank, 2, 2)
    q, k = (t.movedim(-2, 1) for t in (q, k))
    rpb = torch.randn(2, *(5,) * rank, dtype=torch.float64, requires_grad=True)
    more = torch.randn(2, 2, 2, 4, dtype=torch.float64)
    numbers = {"is_causal": (True,) * rank, "additional_keys": more}
    whole = QK[rank](q, k, 3, rpb=rpb, **numbers)
    attn = QK[rank](q, k, 3, **numbers)
    added = F.add_rpb(attn, rpb, 3, is_causal=(True,) * rank)
    assert torch.equal(added, whole)
    weights = torch.randn_like(whole).masked_fill(whole == -torch.inf, 0)
    mine = torch.autograd.grad(added, (attn, rpb), weights, retain_graph=True)
    assert torch.equal(mine[0], weights)
    torch.testing.assert_close(mine[1], torch.autograd.grad(whole, rpb, weights)[0])
    other = torch.randn(2, 2, *extents, 3**rank, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a, r: F.add_rpb(a, r, 3, dilation=1), (other, rpb), fast_mode=True)


def test_nested() -> None:
    items = [torch.randn(n, 2, 4) for n in (7, 9)]
    masks = [torch.rand(n) < 0.4 for n in (7, 9)]
    x = torch.nested.as_nested_tensor(items, layout=torch.jagged)
    mask = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
    out = F.na1d(x, x, x, 3, key_padding_mask=mask)
    for mine, item, m in zip(out.unbind(), items, masks, strict=True):
        one, m = item.unsqueeze(0), m.unsqueeze(0)
        assert torch.equal(mine, F.na1d(one, one, one, 3, key_padding_mask=m)[0])


def test_modules() -> None:
    natten.use_fused_na(True)
    module = NeighborhoodAttention1D(8, 2, 3, attn_drop=0.5)
    x = torch.randn(2, 9, 8, requires_grad=True)
    torch.manual_seed(2)
    first = module(x)
    assert not torch.equal(first, module(x))
    torch.manual_seed(2)
    assert torch.equal(first, module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    padded = NeighborhoodAttention2D(8, 2, 3)
    x = torch.randn(1, 6, 7, 8)
    mask = torch.zeros(1, 6, 7, dtype=torch.bool)
    mask[:, :, 5:] = True
    junk = x.masked_fill(mask.unsqueeze(-1), 99.0)
    torch.testing.assert_close(
        padded(x, key_padding_mask=mask)[:, :, :5], padded(junk, key_padding_mask=mask)[:, :, :5]
    )


def test_errors() -> None:
    extents, q, k, v = tensors(2, 4, 2, torch.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
        ({"dropout_p": -0.1}, "dropout_p must be between 0 and 1"),
        ({"dropout_p": "x"}, "dropout_p must be a number, got 'x'"),
        ({"dropout_p": 0.5, "generator": 3}, "generator must be a torch.Generator, got 3"),
        ({"key_padding_mask": 3}, "key_padding_mask must be a tensor, got int"),
        ({"key_padding_mask": torch.zeros(2, 6)}, "must have 3 dimensions, or 4 with heads"),
        ({"key_padding_mask": torch.zeros(2, 6, 7, dtype=torch.long)}, "must be bool"),
        ({"key_padding_mask": torch.zeros(2, 6, 8)}, "key_padding_mask has extent 8 on axis 1"),
        ({"key_padding_mask": torch.zeros(3, 6, 7)}, "key_padding_mask has batch 3"),
        ({"key_padding_mask": torch.zeros(2, 6, 7, 4)}, "key_padding_mask has heads 4"),
    ]
    for arguments, words in cases:
        with pytest.raises(natten.NattenError, match=words):
            F.na2d(q, k, v, 3, **arguments)
    first = [t.movedim(-2, 1) for t in (q, k)]
    with pytest.raises(natten.NattenError, match="key_padding_mask is for keys of"):
        F.na2d_qk(*first, 3, key_padding_mask=torch.zeros(2, 6, 8))
    with pytest.raises(natten.NattenError, match="attn must have 5 dimensions"):
        F.add_rpb(torch.zeros(1, 2, 3, 9), torch.zeros(2, 5, 5), 3)
    with pytest.raises(natten.NattenError, match="attn has 8 slots"):
        F.add_rpb(torch.zeros(1, 2, 3, 4, 8), torch.zeros(2, 5, 5), 3)
