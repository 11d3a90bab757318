# SPDX-License-Identifier: MIT
"""The natten:: ops of torch's dispatcher.

Their kernels come from the library itself where torch has a stable C interface (2.10 and later);
elsewhere, or if NATTEN_DISABLE holds "native", Python kernels of the same ops call the library.
``na_traced``, ``qk_traced`` and ``av_traced`` are the same operations with a registered
derivative: what torch.compile, torch.export and torch.jit.trace are to see.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _call, _lib, _log, _preferences
from ._call import Call, Op, View, Window
from ._environment import variable
from ._errors import NattenError, from_status

_DTYPES = {
    torch.float32: _lib.F32,
    torch.float64: _lib.F64,
    torch.float16: _lib.F16,
    torch.bfloat16: _lib.BF16,
}
_TORCH_DTYPES = {code: dtype for dtype, code in _DTYPES.items()}
_DEVICES = {"cpu": _lib.CPU, "cuda": _lib.CUDA, "meta": _lib.CPU}


def _schema(op: Op, name: str) -> str:
    tensors = ", ".join(
        f"Tensor{'?' if role in _call.OPTIONAL else ''} {_call.ARGUMENTS[role]}"
        for role in op.inputs
    )
    numbers = "int[] window, float? scale" + (", float dropout" if op.masks else "")
    numbers += (", int wanted" if op.chooses else "") + (", Tensor? seed" if op.masks else "")
    results = ", ".join(["Tensor"] * len(op.outputs))
    results = f"({results})" if len(op.outputs) > 1 else results
    return f"{name}({tensors}, {numbers}) -> {results}"


Optional = Tensor | None
_Key = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


def _prepare(
    op: Op,
    keys: tuple[_Key | None, ...],
    preferences: int,
    window: Window,
    scale: float | None,
    *more: Any,
) -> tuple[Call, list[Callable[[], Tensor]], list[bool]]:
    """For tensors like these: a checked call, what makes its outputs, and which of the tensors must
    be copied first."""
    views: list[View | None] = []
    copies = [False] * len(keys)
    for i, key in enumerate(keys):
        if key is None:
            views.append(None)
            continue
        shape, strides, dtype, device = key
        copies[i] = _call.must_copy(op.inputs[i], shape, strides)
        usual: Sequence[int] = _contiguous(shape) if copies[i] else strides
        place = _DEVICES.get(device.type, -1), device.index or 0
        views.append(View(shape, usual, _DTYPES.get(dtype, -1), *place))
    dropout, wanted = _dropout_and_wanted(op, more)
    call = Call(op, views, window, scale, wanted, preferences, dropout)
    assert keys[0] is not None
    _, _, like, device = keys[0]
    makers: list[Callable[[], Tensor]] = []
    for role in op.outputs:
        size = call.shape(role) if call.wants(role) else (0,)
        dtype = _TORCH_DTYPES[call.dtype(role)] if call.wants(role) else like
        # Naming dtype and device in each call would cost more.
        empty = torch.empty(0, dtype=dtype, device=device)
        makers.append(functools.partial(empty.new_empty, *size))
    return call, makers, copies if any(copies) else []


def _keys(tensors: Sequence[Tensor | None]) -> tuple[_Key | None, ...]:
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def explain(op: Op, arguments: Sequence[Any]) -> str:
    """Which kernel takes a call of the op, and why others refuse."""
    tensors, numbers = arguments[: len(op.inputs)], arguments[len(op.inputs) :]
    window = tuple(numbers[0])
    more = numbers[1:-1] if op.masks else numbers[1:]
    call, _, _ = _prepare(op, _keys(tensors), _preferences.current, window, *more)
    return call.explain()


def _dropout_and_wanted(op: Op, more: Any) -> tuple[float, int]:
    """The numbers after the scale."""
    return (more[0] if op.masks else 0.0), (more[-1] if op.chooses else 0)


def draw_seed(generator: Any = None) -> Tensor:
    """A seed of dropout, from torch's generator for CPUs unless another is given."""
    size, top = (2,), 1 << 31
    return torch.randint(top, size, generator=generator, device="cpu", dtype=torch.int64)


def _seed_of(seed: Optional) -> int:
    if seed is None:
        return 0
    low, high = seed.tolist()
    return int(low | high << 32)


def _same(tensor: Optional) -> Optional:
    return tensor


def _computing(op: Op) -> Callable[..., Any]:
    """The op in Python: of its tensors, their keys, the numbers after them, and the seed."""
    prepared = functools.lru_cache(maxsize=256)(functools.partial(_prepare, op))
    threads, several = torch.get_num_threads, len(op.outputs) > 1

    def compute(
        tensors: tuple[Any, ...], keys: tuple[_Key | None, ...], numbers: Any, seed: int
    ) -> Any:
        call, makers, copies = prepared(keys, _preferences.current, *numbers)
        if copies:
            pairs = zip(tensors, copies, strict=True)
            usual = [t.contiguous if copy else functools.partial(_same, t) for t, copy in pairs]
            tensors = call.make(usual, op.inputs)
        outputs = call.make(makers, op.outputs)
        everything = tensors + outputs
        addresses = [everything[i].data_ptr() for i in call.order]
        workspace = stream = 0
        if outputs[0].is_cuda:
            memory = outputs[0].new_empty(call.plan(), dtype=torch.uint8)
            workspace = memory.data_ptr()
            stream = torch.cuda.current_stream(memory.device).cuda_stream
        call.run(addresses, threads(), workspace, stream, seed)
        return outputs if several else outputs[0]

    return compute


def _python_kernel(op: Op) -> Callable[..., Any]:
    count = len(op.inputs)
    compute = _computing(op)

    def kernel(*arguments: Any) -> Any:
        tensors, window = arguments[:count], tuple(arguments[count])
        more = arguments[count + 1 : -1] if op.masks else arguments[count + 1 :]
        seed = _seed_of(arguments[-1]) if op.masks else 0
        return compute(tensors, _keys(tensors), (window, *more), seed)

    return kernel


def _contiguous(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return strides


def _output_shape(role: int, shape: dict[int, Any], op: Op, window: Window) -> Any:
    """The shape of an output, from those of the inputs, without looking at the numbers: they may be
    symbols."""
    kernel_size = window[: _call.rank_of(window)]
    if role == _lib.OUT:
        if op is _call.AV:
            return (*shape[_lib.ATTN][:-1], shape[_lib.VALUE][-1])
        return (*shape[_lib.QUERY][:-1], shape[_lib.VALUE][-1])
    if role == _lib.LSE:
        return shape[_lib.QUERY][:-1]
    if role == _lib.ATTN:
        slots = 1
        for size in kernel_size:
            slots *= size
        if _lib.ADDITIONAL_KEY in shape:
            slots = slots + shape[_lib.ADDITIONAL_KEY][2]
        return (*shape[_lib.QUERY][:-1], slots)
    if role == _lib.D_RPB:
        heads = shape[_lib.QUERY][-2 if op.order == _lib.HEADS_LAST else 1]
        return (heads, *(2 * size - 1 for size in kernel_size))
    return shape[role - _lib.D_QUERY]


def _fake_kernel(op: Op) -> Callable[..., Any]:
    count = len(op.inputs)

    def kernel(*arguments: Any) -> Any:
        _preferences.refresh()  # a graph is being made: its calls will not
        tensors = arguments[:count]
        window, scale = tuple(arguments[count]), arguments[count + 1]
        more = arguments[count + 2 : -1] if op.masks else arguments[count + 2 :]
        dropout, wanted = _dropout_and_wanted(op, more)
        wanted = wanted if op.chooses else (1 << len(op.outputs)) - 1
        given = {r: t for r, t in zip(op.inputs, tensors, strict=True) if t is not None}
        _check_fake(op, tensors, window, scale, wanted, dropout)
        shape = {role: tensor.shape for role, tensor in given.items()}
        like = tensors[0]
        outputs = []
        for i, role in enumerate(op.outputs):
            if not wanted >> i & 1:
                outputs.append(like.new_empty(0))
                continue
            summed = role in (_lib.LSE, _lib.D_KEY_BIAS) and like.dtype != torch.float64
            dtype = torch.float32 if summed else like.dtype
            outputs.append(like.new_empty(_output_shape(role, shape, op, window), dtype=dtype))
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    return kernel


def _check_fake(
    op: Op, tensors: Any, window: Window, scale: float | None, wanted: int, dropout: float
) -> None:
    """The library's checks, where all sizes are known numbers."""
    views: list[View | None] = []
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise NattenError(f"All tensors must be on one device, got {sorted(map(str, devices))}.")
    for tensor in tensors:
        if tensor is None:
            views.append(None)
            continue
        shape = tuple(tensor.shape)
        if not all(type(size) is int for size in shape):
            return
        dtype = _DTYPES.get(tensor.dtype, -1)
        views.append(View(shape, _contiguous(shape), dtype, _lib.CPU, 0))
    if all(type(number) is int for number in window):
        Call(op, views, window, scale, wanted, dropout=dropout).plan()


def classed(error: Exception) -> Exception:
    """The exception that an op's error stands for: where its kernel is the library's own, torch
    makes a RuntimeError of each."""
    status = _lib.library.natten_torch_failure()
    return from_status(status, str(error)) if status else error


def _tags() -> tuple[torch.Tag, ...]:
    names = ("pt2_compliant_tag", "flexible_layout")
    return tuple(getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name))


TRACED = {op.name: f"{op.name}_traced" for op in (_call.NA, _call.QK, _call.AV, _call.NA_MASKED)}

# Alive as long as the ops are to be.
_definitions = torch.library.Library("natten", "FRAGMENT")


def _define() -> dict[str, Op]:
    ops: dict[str, Op] = {}
    for op in (*_call.OPS, *_call.MASKED_OPS):
        for name in (op.name, TRACED.get(op.name)):
            if name:
                _definitions.define(_schema(op, name), tags=_tags())
                ops[name] = op
    return ops


def _register_native() -> str:
    """Empty, or why the library's own kernels cannot be used."""
    disabled = variable("NATTEN_DISABLE").replace(",", " ").split()
    if "native" in disabled:
        return 'NATTEN_DISABLE holds "native"'
    reason = ctypes.create_string_buffer(256)
    path = os.fsencode(torch._C.__file__)
    if _lib.library.natten_torch_register(path, reason, len(reason)):
        return reason.value.decode()
    return ""


def _register() -> str:
    ops = _define()
    reason = _register_native()
    for name, op in ops.items():
        if reason or op.masks:
            kernel = _python_kernel(op)
            for key in ("CPU", "CUDA"):
                _definitions.impl(name, kernel, key)
        torch.library.register_fake(f"natten::{name}", _fake_kernel(op), lib=_definitions)
    return reason


#: Why the Python kernels are in use; empty if the library's own are.
WHY_PYTHON = _register()
_log.listen()

na = torch.ops.natten.na.default
na_backward = torch.ops.natten.na_backward.default
qk = torch.ops.natten.qk.default
qk_backward = torch.ops.natten.qk_backward.default
av = torch.ops.natten.av.default
av_backward = torch.ops.natten.av_backward.default
na_traced = torch.ops.natten.na_traced.default
qk_traced = torch.ops.natten.qk_traced.default
av_traced = torch.ops.natten.av_traced.default
na_masked = torch.ops.natten.na_masked.default
na_masked_backward = torch.ops.natten.na_masked_backward.default
na_masked_traced = torch.ops.natten.na_masked_traced.default

_dispatch_keys = torch._C._dispatch_keys
_modes = torch._C._len_torch_dispatch_stack
_profiling = torch._C._autograd._profiler_enabled
_CPU = torch.device("cpu")
# As a number: sets of keys are not compared by what is in them in torch 2.5.
_PLAIN = _dispatch_keys(torch.empty(0, device=_CPU)).raw_repr()


def _plain_keys(tensors: Sequence[Tensor | None]) -> tuple[_Key | None, ...] | None:
    """The keys of CPU tensors that are nothing else; None if one is."""
    keys: list[_Key | None] = []
    for tensor in tensors:
        if tensor is None:
            keys.append(None)
        elif _dispatch_keys(tensor).raw_repr() == _PLAIN:
            keys.append((tensor.shape, tensor.stride(), tensor.dtype, _CPU))
        else:
            return None
    return tuple(keys)


def _eagerly(op: Op) -> Callable[..., Any]:
    """What plain calls use: the op without torch's Python around it. A kernel that is Python itself
    is called without the dispatcher where nobody who listens to that could tell: for CPU tensors
    that are nothing else, outside of modes and profilers."""
    through: Callable[..., Any] = getattr(torch.ops.natten, op.name).default
    through = getattr(through, "_op", through)
    if not WHY_PYTHON:
        return through
    count = len(op.inputs)
    compute = _computing(op)

    def call(*arguments: Any) -> Any:
        tensors = arguments[:count]
        keys = None if _modes() or _profiling() else _plain_keys(tensors)
        if keys is None:
            return through(*arguments)
        return compute(tensors, keys, arguments[count:], 0)

    return call


na_eagerly, qk_eagerly, av_eagerly = map(_eagerly, (_call.NA, _call.QK, _call.AV))
