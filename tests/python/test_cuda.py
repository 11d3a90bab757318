# SPDX-License-Identifier: MIT
"""What only a GPU shows: torch's CUDA tensors, streams, graphs, sizes. bench/gpu_check runs these
where there is no pytest, so they take no fixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import natten
import natten.functional as F

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype).cuda() for _ in range(count)]


def close(mine: Tensor, true: Tensor) -> None:
    assert mine.is_cuda
    error = (mine.double().cpu() - true.double().cpu()).abs().max().item()
    assert error <= TOLERANCE[mine.dtype] * max(1.0, true.abs().max().item()), error


def compare(shape: tuple[int, ...], dtype: torch.dtype, **window: Any) -> None:
    """Values and gradients of the fused operation against the CPU's in float64."""
    function = {4: F.na1d, 5: F.na2d, 6: F.na3d}[len(shape)]
    ours = [t.requires_grad_() for t in inputs(shape, dtype)]
    exact = [t.detach().double().cpu().requires_grad_() for t in ours]
    out, out_ = function(*ours, **window), function(*exact, **window)
    close(out, out_)
    d_out = torch.randn_like(out)
    mine = torch.autograd.grad(out, ours, d_out)
    true = torch.autograd.grad(out_, exact, d_out.double().cpu())
    for a, b in zip(mine, true, strict=True):
        close(a, b)


def test_fused_1d() -> None:
    for dtype in TOLERANCE:
        compare((2, 77, 3, 24), dtype, kernel_size=9, dilation=3, is_causal=True)


def test_fused_2d() -> None:
    for dtype in TOLERANCE:
        compare((1, 19, 20, 2, 64), dtype, kernel_size=(7, 5), stride=(2, 1))


def test_fused_3d() -> None:
    for dtype in TOLERANCE:
        compare((1, 6, 7, 9, 2, 128), dtype, kernel_size=3, is_causal=(True, False, False))


def test_unfused() -> None:
    for dtype in TOLERANCE:
        q, k, v = inputs((2, 3, 12, 13, 16), dtype)
        rpb = torch.randn(3, 9, 9, dtype=dtype).cuda()
        attn = F.na2d_qk(q, k, 5, rpb=rpb)
        close(attn, F.na2d_qk(*(t.double().cpu() for t in (q, k)), 5, rpb=rpb.double().cpu()))
        attn = attn.softmax(-1)
        close(F.na2d_av(attn, v, 5), F.na2d_av(attn.double().cpu(), v.double().cpu(), 5))


def test_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in inputs((1, 7, 2, 3), torch.float64))
    assert torch.autograd.gradcheck(lambda *a: F.na1d(*a, kernel_size=3), (q, k, v))


def test_same_bits() -> None:
    q, k, v = (t.requires_grad_() for t in inputs((1, 30, 31, 4, 64), torch.bfloat16))
    d_out = torch.randn_like(q)
    runs = []
    for _ in range(3):
        out = F.na2d(q, k, v, 7)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), d_out)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_deterministic() -> None:
    """With torch's switch: the same bits, and nothing that raises."""
    q, k, v = (t.requires_grad_() for t in inputs((1, 22, 23, 2, 32), torch.float16))
    d_out = torch.randn_like(q)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(F.na2d(q, k, v, 5), (q, k, v), d_out) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_lse() -> None:
    """Its gradient goes through the kernels as well."""
    q, k, v = (t.requires_grad_() for t in inputs((2, 14, 15, 2, 64), torch.bfloat16))
    exact = [t.detach().double().cpu().requires_grad_() for t in (q, k, v)]
    out, lse = F.na2d(q, k, v, 7, return_lse=True)
    out_, lse_ = F.na2d(*exact, 7, return_lse=True)
    assert lse.dtype == torch.float32
    close(lse, lse_)
    mine = torch.autograd.grad((out.float().sum() + lse.square().sum()), (q, k, v))
    true = torch.autograd.grad((out_.sum() + lse_.square().sum()), exact)
    for a, b in zip(mine, true, strict=True):
        close(a, b)


def test_rpb() -> None:
    """Values and gradients with a position bias and additional tokens."""
    q, k, v = (t.requires_grad_() for t in inputs((1, 12, 13, 2, 32), torch.float16))
    rpb = torch.randn(2, 9, 9, dtype=torch.float16).cuda().requires_grad_()
    more = [t.requires_grad_() for t in inputs((1, 3, 2, 32), torch.float16, 2)]
    exact = [t.detach().double().cpu().requires_grad_() for t in (q, k, v, rpb, *more)]
    names = {"additional_keys": more[0], "additional_values": more[1]}
    names_ = {"additional_keys": exact[4], "additional_values": exact[5]}
    out = F.na2d(q, k, v, 5, rpb=rpb, **names)
    out_ = F.na2d(*exact[:3], 5, rpb=exact[3], **names_)
    close(out, out_)
    mine = torch.autograd.grad(out.float().sum(), (q, k, v, rpb, *more))
    true = torch.autograd.grad(out_.sum(), exact)
    for a, b in zip(mine, true, strict=True):
        close(a, b)


def test_compile() -> None:
    """One graph, forward and backward, with what eager calls give."""
    q, k, v = (t.requires_grad_() for t in inputs((1, 16, 17, 2, 32), torch.bfloat16))

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.na2d(q, k, v, 7, is_causal=(True, False)) * 2

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    expected = step(q, k, v)
    assert torch.equal(out, expected)
    d_out = torch.randn_like(out)
    mine = torch.autograd.grad(out, (q, k, v), d_out)
    true = torch.autograd.grad(expected, (q, k, v), d_out)
    assert all(torch.equal(a, b) for a, b in zip(mine, true, strict=True))


def test_streams() -> None:
    """Work on a side stream waits for nothing but that stream."""
    q, k, v = inputs((1, 40, 40, 4, 32), torch.float32)
    expected = F.na2d(q, k, v, 7)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.full_like(q, float("nan"))
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        out = F.na2d(late, k, v, 7)
    stream.synchronize()
    assert torch.equal(out, expected)


def captured(warm: bool, dim: int) -> None:
    q, k, v = inputs((1, 20, 21, 2, dim), torch.float16)
    if warm:
        F.na2d(q, k, v, 5)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.na2d(q, k, v, 5)
    for _ in range(2):
        for t in (q, k, v):
            t.copy_(torch.randn_like(t))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, F.na2d(q, k, v, 5))


def test_graph() -> None:
    captured(warm=True, dim=32)


def test_graph_without_warming_up() -> None:
    captured(warm=False, dim=40)


def test_many_blocks() -> None:
    """More tokens than an axis of a grid other than the first may have blocks."""
    q, k, v = inputs((1, 1 << 20, 1, 4), torch.float32)
    out = F.na1d(q, k, v, 3)
    part = slice(1 << 19, (1 << 19) + 100)
    middle = F.na1d(*(t[:, part].cpu() for t in (q, k, v)), 3)
    close(out[:, part][:, 1:-1], middle[:, 1:-1])


def test_more_than_int_elements() -> None:
    """Element numbers past 2^31 in every tensor."""
    tokens, channels = (1 << 18) + 5, 1 << 13
    if torch.cuda.mem_get_info()[0] < 10 * tokens * channels:
        pytest.skip("not enough memory")
    q = torch.empty(1, tokens, 1, channels, dtype=torch.float16, device="cuda")
    for part in q.split(1 << 15, dim=1):
        part.normal_()
    out = F.na1d(q, q, q, 3, scale=0.01)
    end = q[:, -6:].float().cpu()
    close(out[:, -4:], F.na1d(end, end, end, 3, scale=0.01)[:, -4:])


def test_devices_must_agree() -> None:
    q, k, v = inputs((1, 9, 1, 8), torch.float32)
    with pytest.raises((ValueError, RuntimeError)):
        F.na1d(q, k.cpu(), v, 3)


def test_autocast() -> None:
    q, k, v = inputs((1, 9, 9, 1, 32), torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = F.na2d(q, k, v, 3)
    assert out.dtype == torch.bfloat16
    close(out, F.na2d(q.cpu(), k.cpu(), v.cpu(), 3))


def leaves(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [t.requires_grad_() for t in inputs(shape, dtype)]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_graph_of_a_step() -> None:
    """Forward and backward in one graph, replayed with other numbers in the same places."""
    qkv = leaves((1, 20, 21, 4, 64), torch.bfloat16)
    d_out = torch.randn_like(qkv[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch's autograd wants to have run once
        torch.autograd.grad(F.na2d(*qkv, 5), qkv, d_out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.na2d(*qkv, 5)
        grads = torch.autograd.grad(out, qkv, d_out)
    for _ in range(2):
        with torch.no_grad():
            for t in (*qkv, d_out):
                t.copy_(torch.randn_like(t))
        graph.replay()
        torch.cuda.synchronize()
        again = F.na2d(*qkv, 5)
        assert same((out, *grads), (again, *torch.autograd.grad(again, qkv, d_out)))


def test_backwards_on_two_streams() -> None:
    """Each has a workspace of its own."""
    problems = [leaves((1, 40, 41, 4, 64), torch.bfloat16) for _ in range(2)]
    outs = [F.na2d(*qkv, 7) for qkv in problems]
    d_outs = [torch.randn_like(out) for out in outs]

    def backward(i: int) -> Any:
        return torch.autograd.grad(outs[i], problems[i], d_outs[i], retain_graph=True)

    expected = [backward(i) for i in range(2)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found: list[Any] = [None, None]
    for _ in range(20):
        for i, stream in enumerate(streams):
            # The backward runs on the stream of its forward.
            with torch.cuda.stream(stream):
                out = F.na2d(*problems[i], 7)
                found[i] = torch.autograd.grad(out, problems[i], d_outs[i])
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_kv_parallelism() -> None:
    """Gradients of keys and values are the same bits every time; all are right; the workspace keeps
    to its bound."""
    qkv = leaves((2, 30, 31, 8, 64), torch.bfloat16)
    exact = [t.detach().double().cpu().requires_grad_() for t in qkv]
    d_out = torch.randn_like(qkv[0])
    true = torch.autograd.grad(F.na2d(*exact, 9), exact, d_out.double().cpu())
    natten.use_kv_parallelism_in_fused_na(True)
    try:
        for preference in ("strict", "default", "unrestricted"):
            natten.set_memory_usage_preference(preference)
            out = F.na2d(*qkv, 9)
            mine = torch.autograd.grad(out, qkv, d_out, retain_graph=True)
            again = torch.autograd.grad(out, qkv, d_out)
            assert same(mine[1:], again[1:])
            for a, b in zip(mine, true, strict=True):
                close(a, b)
    finally:
        natten.use_kv_parallelism_in_fused_na(False)
        natten.set_memory_usage_preference()


def test_checkpoint() -> None:
    """What is computed twice is the same bits."""
    qkv = leaves((1, 30, 31, 4, 64), torch.bfloat16)
    d_out = torch.randn_like(qkv[0])
    plain = torch.autograd.grad(F.na2d(*qkv, 7), qkv, d_out)
    out = checkpoint(lambda *t: F.na2d(*t, 7), *qkv, use_reentrant=False)
    assert same(torch.autograd.grad(out, qkv, d_out), plain)


def test_grad_scaler() -> None:
    """Gradients that float16 would round to zero survive scaled."""
    qkv = leaves((1, 20, 21, 2, 32), torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    optimizer = torch.optim.SGD(qkv, lr=1.0)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = F.na2d(*qkv, 5).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    exact = [t.detach().double().cpu().requires_grad_() for t in qkv]
    F.na2d(*exact, 5).square().mean().backward()
    for t, true in zip(qkv, exact, strict=True):
        assert t.grad is not None and true.grad is not None
        assert (t.grad.double().cpu() - true.grad).norm() <= 0.02 * true.grad.norm()
    before = [t.detach().clone() for t in qkv]
    scaler.step(optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, qkv, strict=True))
