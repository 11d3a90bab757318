# SPDX-License-Identifier: MIT
"""One call of the library from Python, for any framework: tensors in, problem checked, outputs'
sizes out, computed."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from . import _lib
from ._errors import NattenError, from_status

_NAMES = (
    "kernel_size",
    "stride",
    "dilation",
    "is_causal",
    "query_origin",
    "key_origin",
    "global_extent",
)
# These, each with an entry for each axis; the last three only of a block.
Window = tuple[int, ...]
# The library counts in 64 bits; this leaves room for sums.
MOST = 1 << 62
_PARTS = 4
_PARTS_OF_BLOCK = 7

_T = TypeVar("_T")


def rank_of(window: Window) -> int:
    """How many axes the map has."""
    return len(window) // (_PARTS_OF_BLOCK if is_block(window) else _PARTS)


def is_block(window: Window) -> bool:
    """Whether the tensors are blocks of a larger map."""
    return len(window) % _PARTS_OF_BLOCK == 0


def parts(window: Window) -> list[Window]:
    """The window's parts, an entry for each axis in each."""
    rank = rank_of(window)
    return [window[i : i + rank] for i in range(0, len(window), rank)]


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

    @property
    def masks(self) -> bool:
        """Whether it takes a bias of keys, and dropout: a probability and a seed."""
        return _lib.KEY_BIAS in self.inputs


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
NA_MASKED = Op("na_masked", NA.op, NA.order, (*NA.inputs, _lib.KEY_BIAS), NA.outputs)
NA_MASKED_BACKWARD = Op(
    "na_masked_backward",
    NA_BACKWARD.op,
    NA_BACKWARD.order,
    (_lib.D_OUT, _lib.D_LSE, *NA_MASKED.inputs, _lib.OUT, _lib.LSE),
    (*NA_BACKWARD.outputs, _lib.D_KEY_BIAS),
)
OPS = (NA, NA_BACKWARD, QK, QK_BACKWARD, AV, AV_BACKWARD)

MASKED_OPS = (NA_MASKED, NA_MASKED_BACKWARD)

#: What Python calls the inputs.
ARGUMENTS = {
    _lib.QUERY: "query",
    _lib.KEY: "key",
    _lib.VALUE: "value",
    _lib.OUT: "out",
    _lib.LSE: "lse",
    _lib.ATTN: "attn",
    _lib.RPB: "rpb",
    _lib.ADDITIONAL_KEY: "additional_keys",
    _lib.ADDITIONAL_VALUE: "additional_values",
    _lib.KEY_BIAS: "key_bias",
    _lib.D_OUT: "d_out",
    _lib.D_LSE: "d_lse",
    _lib.D_ATTN: "d_attn",
}

# Roles of inputs that may be left out.
OPTIONAL = frozenset(
    (_lib.RPB, _lib.ADDITIONAL_KEY, _lib.ADDITIONAL_VALUE, _lib.KEY_BIAS, _lib.D_LSE)
)


@dataclass
class View:
    """A tensor: sizes, strides in elements, codes of dtype and device (-1: any other)."""

    shape: Sequence[int]
    strides: Sequence[int]
    dtype: int
    device: int
    device_index: int


class Call:
    """A call that was checked, for any tensors that look like these. It may be run again and again,
    and in several threads at once."""

    def __init__(
        self,
        op: Op,
        tensors: Sequence[View | None],
        window: Window,
        scale: float | None,
        wanted: int,
        preferences: int = _lib.PREFER_USUAL,
        dropout: float = 0.0,
    ) -> None:
        _check_fits(window)
        self.struct = call = _lib.Call()
        call.dropout = dropout
        call.op, call.order = op.op, op.order
        call.scale, call.default_scale = scale or 0, scale is None
        call.preferences = preferences
        call.entries = len(window)
        usable = window[: _lib.WINDOW_ENTRIES]
        call.window[: len(usable)] = usable
        for i, role in enumerate(op.outputs):
            if not op.chooses or wanted >> i & 1:
                call.outputs |= 1 << role
        for role in range(_lib.ROLES):
            call.tensor[role].dims = -1
        for role, view in zip(op.inputs, tensors, strict=True):
            if view is not None:
                _fill(call.tensor[role], view)
        status = _lib.library.natten_call_bind(call)
        if status:
            raise from_status(status, call.text.decode())
        roles = (*op.inputs, *op.outputs)
        present = [i for i, role in enumerate(roles) if call.problem.roles >> role & 1]
        #: Which of the op's inputs and outputs there are, in the order that run wants.
        self.order = sorted(present, key=roles.__getitem__)
        self._pack = struct.Struct(f"qPPQ{len(present)}P").pack
        self._place = ctypes.addressof(call)

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

    def make(self, makers: Sequence[Callable[[], _T]], roles: Sequence[int]) -> tuple[_T, ...]:
        """Outputs, or contiguous copies of inputs, in these roles."""
        made: list[_T] = []
        try:
            for maker in makers:
                made.append(maker())
        except (MemoryError, RuntimeError) as error:
            call = _lib.Call.from_buffer_copy(self.struct)  # other threads may be using this one
            status = _lib.library.natten_call_no_memory(call, roles[len(made)])
            raise from_status(status, call.text.decode()) from error
        return tuple(made)

    def plan(self) -> int:
        """Finds the kernel, which checks all that was not checked yet; returns the bytes of device
        memory that it needs."""
        size = ctypes.c_size_t()
        _check(_lib.library.natten_workspace(self.struct.problem, size))
        return size.value

    def explain(self) -> str:
        """Which kernel was found and why others were not: a line each, and one for each preference
        that has a bearing."""
        text = ctypes.create_string_buffer(1 << 14)
        _check(_lib.library.natten_explain(self.struct.problem, text, len(text)))
        return text.value.decode().rstrip()

    def run(
        self,
        addresses: Sequence[int],
        threads: int = 0,
        workspace: int = 0,
        stream: int = 0,
        seed: int = 0,
    ) -> None:
        """Computes, with the addresses of the tensors that `order` lists."""
        status = _repeat(self._place, self._pack(threads, workspace, stream, seed, *addresses))
        if status:
            _check(status)


_repeat = _lib.library.natten_call_repeat


def _check(status: int) -> None:
    if status:
        raise from_status(status, _lib.library.natten_last_error().decode())


def _check_fits(window: Window) -> None:
    """Raises if an entry is more than the library's integers hold: ctypes would cut it off."""
    for name, numbers in zip(_NAMES, parts(window), strict=False):
        for axis, number in enumerate(numbers):
            if abs(number) >= MOST:
                raise NattenError(f"{name} must be less than 2^62, got {number} for axis {axis}.")


def _fill(tensor: _lib.Tensor, view: View) -> None:
    tensor.dims = dims = len(view.shape)
    tensor.size[: min(dims, 6)] = list(view.shape[:6])
    tensor.stride[: min(dims, 6)] = list(view.strides[:6])
    tensor.dtype = view.dtype
    tensor.device = view.device
    tensor.device_index = view.device_index


def must_copy(role: int, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the last axis must be consecutive in memory and is not."""
    scattered = bool(shape) and shape[-1] > 1 and strides[-1] != 1
    return scattered and role not in (_lib.LSE, _lib.D_LSE, _lib.RPB, _lib.KEY_BIAS)
