# SPDX-License-Identifier: MIT
"""One call of the library from Python, for any framework: tensors in, problem checked, outputs'
sizes out, computed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from . import _lib
from ._errors import from_status

# kernel_size, stride, dilation, is_causal, block: all tuples of integers. A block is empty, or
# query_origin + key_origin + global_extent.
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Op:
    """An operation: its name, and the roles of its tensors in the order of its arguments."""

    name: str
    op: int
    order: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def chooses(self) -> bool:
        """Whether the caller says which outputs it wants: bit i for output i."""
        return self.op in (_lib.BACKWARD, _lib.QK_BACKWARD, _lib.AV_BACKWARD)


NA = Op(
    "na",
    _lib.FORWARD,
    _lib.HEADS_LAST,
    (
        _lib.QUERY,
        _lib.KEY,
        _lib.VALUE,
        _lib.RPB,
        _lib.ADDITIONAL_KEY,
        _lib.ADDITIONAL_VALUE,
    ),
    (_lib.OUT, _lib.LSE),
)
NA_BACKWARD = Op(
    "na_backward",
    _lib.BACKWARD,
    _lib.HEADS_LAST,
    (_lib.D_OUT, _lib.D_LSE, *NA.inputs, _lib.OUT, _lib.LSE),
    (
        _lib.D_QUERY,
        _lib.D_KEY,
        _lib.D_VALUE,
        _lib.D_RPB,
        _lib.D_ADDITIONAL_KEY,
        _lib.D_ADDITIONAL_VALUE,
    ),
)
QK = Op(
    "qk",
    _lib.QK,
    _lib.HEADS_FIRST,
    (_lib.QUERY, _lib.KEY, _lib.RPB, _lib.ADDITIONAL_KEY),
    (_lib.ATTN,),
)
QK_BACKWARD = Op(
    "qk_backward",
    _lib.QK_BACKWARD,
    _lib.HEADS_FIRST,
    (_lib.D_ATTN, _lib.QUERY, _lib.KEY, _lib.ADDITIONAL_KEY),
    (_lib.D_QUERY, _lib.D_KEY, _lib.D_RPB, _lib.D_ADDITIONAL_KEY),
)
AV = Op(
    "av",
    _lib.AV,
    _lib.HEADS_FIRST,
    (_lib.ATTN, _lib.VALUE, _lib.ADDITIONAL_VALUE),
    (_lib.OUT,),
)
AV_BACKWARD = Op(
    "av_backward",
    _lib.AV_BACKWARD,
    _lib.HEADS_FIRST,
    (_lib.D_OUT, _lib.ATTN, _lib.VALUE, _lib.ADDITIONAL_VALUE),
    (_lib.D_ATTN, _lib.D_VALUE, _lib.D_ADDITIONAL_VALUE),
)
OPS = (NA, NA_BACKWARD, QK, QK_BACKWARD, AV, AV_BACKWARD)

# Roles of inputs that may be left out.
OPTIONAL = frozenset((_lib.RPB, _lib.ADDITIONAL_KEY, _lib.ADDITIONAL_VALUE, _lib.D_LSE))


@dataclass
class View:
    """A tensor: address, sizes, strides in elements, codes of dtype and device (-1: any other)."""

    data: int
    shape: Sequence[int]
    strides: Sequence[int]
    dtype: int
    device: int
    device_index: int


class Call:
    """A call that was checked. Fill in the addresses of the outputs, then run it."""

    def __init__(
        self, op: Op, tensors: Sequence[View | None], window: Window, scale: float, wanted: int
    ) -> None:
        self.op = op
        self.struct = call = _lib.Call()
        call.op, call.order, call.scale = op.op, op.order, scale
        self._set_window(window)
        for i, role in enumerate(op.outputs):
            if not op.chooses or wanted >> i & 1:
                call.outputs |= 1 << role
        for role in range(_lib.ROLES):
            call.tensor[role].dims = -1
        self._addresses: dict[int, int] = {}
        for role, view in zip(op.inputs, tensors, strict=True):
            if view is not None and view.data:
                self._addresses[role] = view.data
            if view is not None:
                _fill(call.tensor[role], view)
        self._check(_lib.library.natten_call_bind(call))

    def _set_window(self, window: Window) -> None:
        call = self.struct
        kernel_size, stride, dilation, is_causal, block = window
        call.rank = rank = len(kernel_size)
        fits = len(stride) == len(dilation) == len(is_causal) == rank
        if not fits or len(block) not in (0, 3 * rank):
            raise from_status(
                1,
                "kernel_size, stride, dilation and is_causal must have as many entries each, and "
                "block none or three times as many.",
            )
        call.blocks = len(block) > 0
        places = [kernel_size, stride, dilation, is_causal]
        places += [block[i : i + rank] for i in range(0, len(block), rank)]
        arrays = (
            call.kernel_size,
            call.stride,
            call.dilation,
            call.is_causal,
            call.query_origin,
            call.key_origin,
            call.global_extent,
        )
        for array, values in zip(arrays, places, strict=False):
            array[: min(rank, 3)] = values[:3]

    def wants(self, role: int) -> bool:
        """Whether this output is to be computed."""
        return bool(self.struct.outputs >> role & 1)

    def shape(self, role: int) -> tuple[int, ...]:
        """The shape of an output."""
        tensor = self.struct.tensor[role]
        return tuple(tensor.size[: tensor.dims])

    def dtype(self, role: int) -> int:
        """The dtype code of an output."""
        return int(self.struct.tensor[role].dtype)

    def plan(self) -> int:
        """Finds the kernel, which checks all that was not checked yet; returns the bytes of device
        memory that it needs."""
        size = ctypes.c_size_t()
        self._check(_lib.library.natten_workspace(self.struct.problem, size), planned=True)
        return size.value

    def run(
        self, addresses: dict[int, int], threads: int = 0, workspace: int = 0, stream: int = 0
    ) -> None:
        """Computes. Addresses are by role; inputs that have none are where their views said. A call
        may be run again and again, and in several threads at once."""
        run = _lib.Run(threads=threads, workspace=workspace or None, stream=stream or None)
        data = run.data
        for role, address in self._addresses.items():
            data[role] = address
        for role, address in addresses.items():
            data[role] = address
        self._check(_lib.library.natten_compute(self.struct.problem, run), planned=True)

    def _check(self, status: int, planned: bool = False) -> None:
        if status:
            text = _lib.library.natten_last_error() if planned else self.struct.text
            raise from_status(status, text.decode())


def _fill(tensor: _lib.Tensor, view: View) -> None:
    tensor.data = view.data or None
    tensor.dims = dims = len(view.shape)
    tensor.size[: min(dims, 6)] = list(view.shape[:6])
    tensor.stride[: min(dims, 6)] = list(view.strides[:6])
    tensor.dtype = view.dtype
    tensor.device = view.device
    tensor.device_index = view.device_index


def must_copy(role: int, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the last axis must be consecutive in memory and is not."""
    scattered = bool(shape) and shape[-1] > 1 and strides[-1] != 1
    return scattered and role not in (_lib.LSE, _lib.D_LSE, _lib.RPB)
