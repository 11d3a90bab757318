# SPDX-License-Identifier: MIT
"""The same neighborhood attention by each means there is on a CPU, for bench/cpu.py."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from natten.functional import na1d, na2d, na3d

HERE = Path(__file__).parent
SDPA = ("sdpa", "sdpa, boolean")  # its mask as what is added to scores, and as a boolean
MEMORY_LIMIT = 3e9  # bytes an alternative may need for its largest tensors


@dataclass
class Problem:
    """The part of a problem string (tests/problem_string.h) that all contenders can do."""

    text: str
    batch: int
    heads: int
    dim: int
    extents: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @classmethod
    def parse(cls, text: str) -> Problem:
        number = r"\d+(?:x\d+)*"
        form = rf"b(\d+)h(\d+)d(\d+)_({number})_w({number})(?:_d({number}))?(?:_c([01]+))?(?:_f32)?"
        found = re.fullmatch(form, text)
        if not found:
            raise SystemExit(f"cannot read the problem {text}: here only window, d, c and f32")
        batch, heads, dim, extents, window, dilation, causal = found.groups()
        rank = extents.count("x") + 1
        numbers = [tuple(map(int, s.split("x"))) for s in (extents, window)]
        steps = tuple(map(int, dilation.split("x"))) if dilation else (1,) * rank
        bits = tuple(c == "1" for c in causal or "0" * rank)
        return cls(text, int(batch), int(heads), int(dim), numbers[0], numbers[1], steps, bits)

    @property
    def tokens(self) -> int:
        return math.prod(self.extents)

    @property
    def slots(self) -> int:
        return math.prod(self.window)

    @property
    def scale(self) -> float:
        return self.dim**-0.5


class Axis(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("extent", "window", "stride", "dilation", "causal")]


class Map(ctypes.Structure):
    _fields_ = [
        ("axis", Axis * 2),
        ("heads", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


def compile_plain(flags: list[str], folder: str) -> ctypes.CDLL:
    path = Path(folder, f"plain{len(flags)}.so")
    source = ["-shared", "-fPIC", f"-I{HERE.parent / 'src'}", "-o", path, HERE / "plain.c", "-lm"]
    subprocess.run(["cc", *flags, *source], check=True)
    library = ctypes.CDLL(str(path))
    library.plain_forward.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2
    library.plain_share.argtypes = [ctypes.c_double]
    library.plain_share.restype = ctypes.c_double
    return library


def on_threads(count: int, work) -> list:
    """Calls work(0), work(1), ... at the same time."""
    results = [None] * count

    def one(i: int) -> None:
        results[i] = work(i)

    helpers = [threading.Thread(target=one, args=(i,)) for i in range(1, count)]
    for helper in helpers:
        helper.start()
    one(0)
    for helper in helpers:
        helper.join()
    return results


def axes_of(p: Problem) -> list[Axis]:
    sizes = zip(p.extents, p.window, p.dilation, p.causal, strict=True)
    return [Axis(extent, window, 1, dilation, causal) for extent, window, dilation, causal in sizes]


def windows_along(axis: Axis, rule: ctypes.CDLL) -> tuple[torch.Tensor, torch.Tensor]:
    """For each place of an axis the first key of its window, and how many keys it has."""
    found = []
    for query in range(axis.extent):
        window = (ctypes.c_int * 2)()
        rule.plain_window(ctypes.byref(axis), query, window)
        found.append(tuple(window))
    first, count = torch.tensor(found).unbind(1)
    return first, count


def index_table(p: Problem, rule: ctypes.CDLL) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token the tokens of its window, [tokens, slots], and which of them are allowed."""
    index = torch.zeros((1, 1), dtype=torch.int64)
    allowed = torch.ones((1, 1), dtype=torch.bool)
    for axis, extent in zip(axes_of(p), p.extents, strict=True):
        step = torch.arange(axis.window)
        first, count = windows_along(axis, rule)
        keys = first[:, None] + step * axis.dilation
        inside = step < count[:, None]
        keys = keys.where(inside, first[:, None])
        joined = index[:, None, :, None] * extent + keys[None, :, None, :]
        index = joined.reshape(index.shape[0] * extent, -1)
        allowed = (allowed[:, None, :, None] & inside[None, :, None, :]).reshape(index.shape)
    return index, allowed


class Contenders:
    """The same attention by each means: forward(name) on [B, ..., H, D] tensors."""

    def __init__(self, p: Problem, plain: dict[str, ctypes.CDLL], threads: int):
        self.p, self.plain, self.threads = p, plain, threads
        torch.manual_seed(0)
        shape = (p.batch, *p.extents, p.heads, p.dim)
        self.inputs = [torch.randn(shape) for _ in range(3)]
        self.grad = torch.randn(shape)
        self.too_large: dict[str, float] = {}
        index, allowed = index_table(p, next(iter(plain.values())))
        self.index, self.allowed = index, None if allowed.all() else allowed
        self.names = ["natten"]
        if len(p.extents) < 3:
            self.names += list(plain)
        # What each builds at least: scores (or a mask), gathered keys and values.
        gathered = 8.0 * p.batch * p.tokens * p.slots * p.heads * p.dim
        needs = {
            "sdpa": 4.0 * p.tokens**2,
            "sdpa, boolean": 4.0 * p.tokens**2,  # which it turns into the other at each call
            "flex": 1.0 * p.tokens**2,
            "gather": gathered,
            "gather, compiled": gathered,
        }
        for name, size in needs.items():
            if size > MEMORY_LIMIT:
                self.too_large[name] = size
            else:
                self.names.append(name)
        if "sdpa" in self.names:
            seen = torch.zeros((p.tokens, p.tokens), dtype=torch.bool)
            seen.scatter_(1, index, True)
            added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            self.masks = dict(zip(SDPA, (added, seen), strict=True))
        # Heads first, as SDPA and FlexAttention want them; not timed.
        self.heads_first = [t.flatten(1, -3).transpose(1, 2).contiguous() for t in self.inputs]
        # Or the compiler stops after some problems and leaves the rest as it is.
        torch._dynamo.reset()
        self.compiled = torch.compile(self.gather, dynamic=False)
        if "flex" in self.names:
            self.make_flex(index)

    def make_flex(self, index: torch.Tensor) -> None:
        """FlexAttention, compiled, with the windows as a mask of blocks and a table of bits."""
        tokens = self.p.tokens
        seen = torch.zeros((tokens, tokens), dtype=torch.bool).scatter_(1, index, True)
        block = create_block_mask(lambda b, h, q, k: seen[q, k], None, None, tokens, tokens, "cpu")
        compiled = torch.compile(flex_attention, dynamic=False)
        self.flex = lambda q, k, v: compiled(q, k, v, block_mask=block)

    def trainable(self) -> list[str]:
        """Those with a backward; FlexAttention has none on a CPU."""
        return [name for name in self.names if name not in self.plain and name != "flex"]

    def gather(self, *inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.flatten(1, -3) for t in inputs)
        scores = torch.einsum("bqhd,bqwhd->bqhw", q * self.p.scale, k[:, self.index])
        if self.allowed is not None:
            scores = scores.masked_fill(~self.allowed[:, None], -torch.inf)
        out = torch.einsum("bqhw,bqwhd->bqhd", scores.softmax(-1), v[:, self.index])
        return out.view(inputs[0].shape)

    def call(self, name: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        p = self.p
        if name == "natten":
            function = (na1d, na2d, na3d)[len(p.extents) - 1]
            return function(*inputs, p.window, dilation=p.dilation, is_causal=p.causal)
        if name in SDPA:
            return F.scaled_dot_product_attention(*inputs, attn_mask=self.masks[name])
        if name == "flex":
            return self.flex(*inputs)
        if name == "gather":
            return self.gather(*inputs)
        if name == "gather, compiled":
            return self.compiled(*inputs)
        return self.call_plain(self.plain[name], inputs)

    def call_plain(self, library: ctypes.CDLL, inputs: list[torch.Tensor]) -> torch.Tensor:
        p = self.p
        axes = [Axis(1, 1, 1, 1, 0)] * (2 - len(p.extents)) + axes_of(p)
        job = Map((Axis * 2)(*axes), p.heads, p.dim, p.scale)
        out = torch.empty_like(inputs[0])
        data = [t.data_ptr() for t in (*inputs, out)]
        lines = p.batch * axes[0].extent
        if lines == 1:
            library.plain_forward(ctypes.byref(job), *data, 0, 1)
            return out

        def part(i: int) -> None:
            begin, end = i * lines // self.threads, (i + 1) * lines // self.threads
            library.plain_forward(ctypes.byref(job), *data, begin, end)

        on_threads(self.threads, part)
        return out

    def inputs_of(self, name: str) -> list[torch.Tensor]:
        return self.heads_first if name in (*SDPA, "flex") else self.inputs

    def forward(self, name: str) -> torch.Tensor:
        with torch.no_grad():
            return self.call(name, self.inputs_of(name))

    def both(self, name: str) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in self.inputs_of(name)]
        out = self.call(name, inputs)
        grad = self.grad
        if name in SDPA:
            grad = grad.flatten(1, -3).transpose(1, 2)
        return list(torch.autograd.grad(out, inputs, grad))

    def check(self) -> None:
        """All compute the same thing, or there is nothing to compare."""
        expected = self.forward("natten")
        gradients = self.both("natten")
        for name in self.names[1:]:
            out = self.forward(name)
            if name in (*SDPA, "flex"):
                out = out.transpose(1, 2).view(expected.shape)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            if name not in self.trainable():
                continue
            for mine, theirs in zip(gradients, self.both(name), strict=True):
                if name in SDPA:
                    theirs = theirs.transpose(1, 2).view(mine.shape)
                torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)
