# SPDX-License-Identifier: MIT
"""torch.compile, export and tracing, with gradients; function transforms inside compiled code."""

from __future__ import annotations

import functools
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad

import natten
import natten.functional as F
from natten import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    _ops,
)
from test_process import python

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No compiled code of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def inputs(grad: bool = False) -> list[Tensor]:
    shapes = [(2, 5, 4, 2, 3), (2, 5, 4, 1, 3), (2, 5, 4, 1, 2), (2, 5, 5), (2, 2, 1, 3)]
    shapes.append((2, 2, 1, 2))
    return [torch.randn(s, dtype=torch.float64, requires_grad=grad) for s in shapes]


def fused(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
    return F.na2d(q, k, v, 3, 1, (False, True), rpb, 0.7, ak, av, return_lse=True)


def unfused(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, ak: Tensor, av: Tensor) -> Any:
    q, k, v, ak, av = (t.movedim(-2, 1) for t in (q, k, v, ak, av))
    attn = F.na2d_qk(q, k, 3, 1, ak, (False, True), rpb).softmax(-1)
    return (F.na2d_av(attn, v, 3, 1, av, (False, True)),)


def loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def total(*args: Tensor) -> Tensor:
        return torch.stack([out.square().sum() for out in function(*args)]).sum()

    return total


def assert_same(ours: Any, true: Any) -> None:
    for mine, other in zip(ours, true, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


BOTH = pytest.mark.parametrize("function", (fused, unfused))


@BOTH
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_gradients(function: Callable[..., Any], backend: str) -> None:
    args = inputs(True)
    assert_same(compiled(function, backend)(*args), function(*args))
    total = loss(function)
    wanted = torch.autograd.grad(total(*args), args)
    assert_same(torch.autograd.grad(compiled(total, backend)(*args), args), wanted)


@BOTH
def test_transforms_inside_compiled_code(function: Callable[..., Any]) -> None:
    args = inputs()
    tangents = tuple(torch.randn_like(a) for a in args)
    total = loss(function)

    def forward(*a: Tensor) -> Any:
        return torch.func.jvp(total, a, tangents)

    def gradient(*a: Tensor) -> Any:
        return torch.func.grad(total, argnums=tuple(range(len(a))))(*a)

    def mapped(*a: Tensor) -> Any:
        return torch.vmap(function)(*(torch.stack([x, x * 0.5]) for x in a))

    assert forward(*args)[1].abs() > 1e-3
    for transform in (forward, gradient, mapped):
        assert_same(compiled(transform)(*args), transform(*args))


def weave(x: Tensor) -> Tensor:
    """All that has a derivative, of one small tensor."""
    first = x.movedim(-2, 1)
    out, lse = F.na1d(x, x.sin(), x, 3, 1, True, x[0, :1, :, 0].expand(5, -1).T, return_lse=True)
    attn = F.na1d_qk(first, first, 3).softmax(-1)
    return (out.square().sum() + lse.square().sum()) * F.na1d_av(attn, first, 3).square().sum()


NESTED: dict[str, Callable[[Tensor], Any]] = {
    "hessian": torch.func.hessian(weave),
    "jacrev": torch.func.jacrev(lambda x: F.na1d(x, x, x, 3)),
    "jacfwd": torch.func.jacfwd(lambda x: F.na1d(x, x, x, 3)),
    "jacrev of jacrev": torch.func.jacrev(torch.func.jacrev(weave)),
    "jacrev of jacfwd": torch.func.jacrev(torch.func.jacfwd(weave)),
    "vmap of grad": lambda x: torch.vmap(torch.func.grad(weave))(torch.stack([x, 0.5 * x])),
    "vmap of vmap": lambda x: torch.vmap(torch.vmap(weave))(torch.stack([x, 0.5 * x])[None]),
    "vmap of jvp": lambda x: torch.vmap(lambda y: torch.func.jvp(weave, (y,), (x,)))(x[None]),
    "jvp of grad": lambda x: torch.func.jvp(torch.func.grad(weave), (x,), (x,)),
    "grad of jvp": torch.func.grad(lambda x: torch.func.jvp(weave, (x,), (x,))[1]),
    "vjp": lambda x: torch.func.vjp(weave, x)[1](torch.ones((), dtype=x.dtype)),
}


@functools.cache
def torch_compiles_jacfwd() -> bool:
    """Not in 2.5: there it raises, whatever the function."""
    try:
        compiled(torch.func.jacfwd(torch.sin))(torch.ones(2))
    except torch._dynamo.exc.TorchDynamoException:
        return False
    finally:
        # What was compiled once is compiled for all sizes the next time, and hessians are not.
        torch._dynamo.reset()
    return True


@pytest.mark.parametrize("name", NESTED)
def test_nested_transforms_inside_compiled_code(name: str) -> None:
    if ("jacfwd" in name or name == "hessian") and not torch_compiles_jacfwd():
        pytest.skip("this torch cannot compile jacfwd of its own functions")
    x = torch.randn(1, 5, 2, 3, dtype=torch.float64)
    wanted = torch.utils._pytree.tree_leaves(NESTED[name](x))
    ours = torch.utils._pytree.tree_leaves(compiled(NESTED[name])(x))
    assert all(true.abs().max() > 1e-3 for true in wanted)
    assert_same(ours, wanted)


def test_forward_mode_inside_compiled_code() -> None:
    args = inputs()
    tangents = [torch.randn_like(a) for a in args]

    def duals(*a: Tensor) -> Any:
        with forward_ad.dual_level():
            pairs = [forward_ad.make_dual(x, t) for x, t in zip(a, tangents, strict=True)]
            return [forward_ad.unpack_dual(out).tangent for out in fused(*pairs)]

    wanted = duals(*args)
    assert wanted[0].abs().max() > 1e-3
    assert_same(compiled(duals)(*args), wanted)


def test_forward_over_forward_is_refused_inside_compiled_code() -> None:
    def total(x: Tensor) -> Tensor:
        return F.na1d(x, x, x, 3).square().sum()

    def twice(x: Tensor) -> Tensor:
        def once(y: Tensor) -> Tensor:
            return torch.func.jvp(total, (y,), (torch.ones_like(y),))[1]

        return torch.func.jvp(once, (x,), (torch.ones_like(x),))[1]

    with pytest.raises(Exception, match="Forward mode over forward mode"):
        compiled(twice)(torch.randn(1, 5, 1, 2))


@pytest.mark.parametrize("use_fused", (False, True))
def test_modules(use_fused: bool) -> None:
    natten.use_fused_na(use_fused)
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True, dilation=2)
    x = torch.randn(2, 7, 6, 8, requires_grad=True)
    fast = compiled(module)
    torch.testing.assert_close(fast(x), module(x))
    leaves = [x, *module.parameters()]
    wanted = torch.autograd.grad(module(x).square().sum(), leaves)
    ours = torch.autograd.grad(fast(x).square().sum(), leaves)
    for mine, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("use_fused", (False, True))
@pytest.mark.parametrize("rank", (1, 2, 3))
def test_no_graph_breaks(rank: int, use_fused: bool) -> None:
    natten.use_fused_na(use_fused)
    options: dict[str, Any] = {"rel_pos_bias": True, "is_causal": (True, *[False] * (rank - 1))}
    module = MODULES[rank](8, 2, 3, stride=2, **options)
    x = torch.randn(2, 4, 5, 6, 8)[(slice(None),) + (0,) * (3 - rank)]
    explained = torch._dynamo.explain(module)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained


def both_2d(x: Tensor) -> Tensor:
    first = x.movedim(-2, 1)
    attn = F.na2d_qk(first, first, 3, is_causal=(True, False))
    return F.na2d(x, x, x, 3) + F.na2d_av(attn.softmax(-1), first, 3).movedim(1, -2)


def test_an_axis_recompiles_once() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    function = torch.compile(both_2d, fullgraph=True, backend=counter)
    shape = [2, 8, 9, 3, 5]
    compiled_once = 1
    for axis in range(5):
        for _ in range(3):
            x = torch.randn(shape, requires_grad=True)
            torch.testing.assert_close(function(x), both_2d(x))
            shape[axis] += 4 + axis
        compiled_once += 1
        assert counter.frame_count <= compiled_once, f"axis {axis}"


def test_marked_axes_never_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(both_2d, fullgraph=True, backend=counter)
    for shape in ((2, 8, 9, 3, 5), (4, 11, 7, 6, 13), (5, 6, 22, 10, 8)):
        x = torch.randn(shape, requires_grad=True)
        for axis in range(5):
            torch._dynamo.mark_dynamic(x, axis)
        d = torch.randn_like(x)
        ours, wanted = function(x), both_2d(x)
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, d) for y in (ours, wanted)))
    assert counter.frame_count == 1


class Both(torch.nn.Module):
    def forward(self, *args: Tensor) -> Any:
        return (*fused(*args), *unfused(*args))


def test_export() -> None:
    args = tuple(inputs())
    program = torch.export.export(Both(), args)
    assert_same(program.module()(*args), Both()(*args))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("natten" in target for target in targets)


def test_jit_trace() -> None:
    args = tuple(inputs())
    traced = torch.jit.trace(Both(), args)
    assert "natten::" in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    fresh = tuple(inputs())
    for module in (traced, torch.jit.load(file)):
        assert_same(module(*fresh), Both()(*fresh))


@pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor needs a C++ compiler")
@pytest.mark.skipif(
    not hasattr(torch._inductor, "aoti_load_package"), reason="torch has no AOTInductor packages"
)
def test_aot_inductor(tmp_path: Path) -> None:
    """Compiled ahead of time; run here, and by another process that only imports natten."""
    args = tuple(inputs())
    program = torch.export.export(Both(), args)
    package = str(tmp_path / "both.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    fresh = tuple(inputs())
    wanted = Both()(*fresh)
    assert_same(torch._inductor.aoti_load_package(package)(*fresh), wanted)
    torch.save((fresh, wanted), tmp_path / "data.pt")
    code = f"""
import torch, natten.functional
inputs, wanted = torch.load({str(tmp_path / "data.pt")!r})
for mine, true in zip(torch._inductor.aoti_load_package({package!r})(*inputs), wanted):
    torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)
print("same")
"""
    assert python(code) == "same"


def op_calls() -> list[tuple[str, Any, tuple[Any, ...]]]:
    q, k, v, rpb, ak, av = inputs()
    numbers = ([3, 3, 1, 1, 1, 1, 0, 1], 0.7)
    out, lse = _ops.na(q, k, v, rpb, ak, av, *numbers)
    first = [t.movedim(-2, 1) for t in (q, k, v, ak, av)]
    attn = _ops.qk(first[0], first[1], rpb, first[3], *numbers)
    attn = attn.softmax(-1)
    heads = torch.randn_like(first[0][..., :2])
    mask = torch.randn(k.shape[:-1], dtype=lse.dtype)
    return [
        ("na", _ops.na, (q, k, v, rpb, ak, av, *numbers)),
        ("na_masked", _ops.na_masked, (q, k, v, rpb, ak, av, mask, *numbers, 0.0, None)),
        (
            "na_masked_backward",
            _ops.na_masked_backward,
            (out, lse, q, k, v, rpb, ak, av, mask, out, lse, *numbers, 0.0, 0b1111111, None),
        ),
        ("na plain", _ops.na, (q, k, v, None, None, None, *numbers)),
        (
            "na_backward",
            _ops.na_backward,
            (out, lse, q, k, v, rpb, ak, av, out, lse, *numbers, 0b111111),
        ),
        (
            "na_backward, two results",
            _ops.na_backward,
            (out, None, q, k, v, rpb, ak, av, out, lse, *numbers, 0b001001),
        ),
        ("qk", _ops.qk, (first[0], first[1], rpb, first[3], *numbers)),
        ("qk_backward", _ops.qk_backward, (attn, first[0], first[1], first[3], *numbers, 15)),
        ("av", _ops.av, (attn, first[2], first[4], *numbers)),
        ("av_backward", _ops.av_backward, (heads, attn, first[2], first[4], *numbers, 7)),
    ]


@pytest.mark.parametrize(
    ("op", "args"), [c[1:] for c in op_calls()], ids=[c[0] for c in op_calls()]
)
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ("na", "qk", "av"))
def test_opcheck_with_gradients(name: str) -> None:
    args = next(call[2] for call in op_calls() if call[0] == name)
    args = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args)
    results = torch.library.opcheck(getattr(_ops, f"{name}_traced"), args)
    assert set(results.values()) == {"SUCCESS"}


def test_message_under_compile() -> None:
    with pytest.raises(Exception, match="got kernel_size 9, dilation 1 and extent 5 for axis 0"):
        compiled(lambda x: F.na1d(x, x, x, 9))(torch.randn(1, 5, 1, 2))
