# SPDX-License-Identifier: MIT
"""How long a problem takes, and which kernels it gets.

    python -m natten.profiler -i 56 56 -w 7 7 -n 4 -d 32 --backprop
    python -m natten.profiler -i 16 32 32 -w 8 16 16 -c True False False --dry-run

On a GPU if there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError:
    raise ModuleNotFoundError("natten.profiler needs torch.", name="torch") from None

from . import _call, _ops, _preferences, context
from ._knobs import FMHA_BACKENDS, FNA_BACKENDS, SCHEDULES
from ._window import window
from .functional import neighborhood_attention_generic

_DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_bool(text: str) -> bool:
    """What a person means by true, no, 1..."""
    if text.lower() in _YES + _NO:
        return text.lower() in _YES
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _at_least(least: int) -> Callable[[str], int]:
    """What a size or a number of something must be."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    parse.__name__ = "integer"  # as argparse calls it, where the text is none
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m natten.profiler", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, some, any_number = parser.add_argument, _at_least(1), _at_least(0)
    add("-i", "--input-size", type=some, nargs="+", required=True, help="extents of the map")
    add("-b", "--batch-size", type=some, default=1)
    add("-n", "--heads", type=some, default=1)
    add("--heads-kv", type=some, help="heads of keys and values (as --heads)")
    add("-d", "--dim", type=some, default=64, help="channels of a head")
    add("--dim-value", type=some, help="channels of a value (as --dim)")
    add("-w", "--window-size", type=some, nargs="+", help="kernel_size (the whole map)")
    add("-s", "--stride", type=some, nargs="+", default=[1])
    add("--dilation", type=some, nargs="+", default=[1])
    add("-c", "--causal", type=parse_bool, nargs="+", default=[False])
    add("--dtype", choices=_DTYPES, help="fp16 on a GPU, fp32 on a CPU unless given")
    add("--device", choices=("cpu", "cuda"), help="a GPU if there is one")
    add("--backprop", action="store_true", help="gradients too")
    add("--add-kv", type=any_number, default=0, help="additional tokens")
    add("--warmup-steps", type=any_number, default=10)
    add("--steps", type=some, default=10, help="timed runs")
    add("--dry-run", action="store_true", help="which kernels, and why not others; no runs")
    add("--optimize", action="store_true", help="let the autotuner choose first")
    add("--optimize-warmup-steps", type=any_number, default=5)
    add("--compile", action="store_true", help="the call through torch.compile")
    hints = parser.add_argument_group("hints without effect, as in natten.functional.na2d")
    hint = hints.add_argument
    hint("--backend", choices=FNA_BACKENDS)
    hint("--fmha-backend", choices=FMHA_BACKENDS)
    for name in ("q", "kv", "backward-q", "backward-kv"):
        hint(f"--{name}-tile", type=some, nargs="+")
    hint("--schedule", choices=SCHEDULES)
    hint("--persistent", type=parse_bool, default=True)
    hint("--max-configs", type=some, default=10)
    return parser


def _per_axis(values: list[Any], rank: int) -> tuple[Any, ...]:
    return tuple(values * rank if len(values) == 1 else values)


def _arguments(given: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the other keyword arguments."""
    gpu = given.device == "cuda" or (given.device is None and torch.cuda.is_available())
    dtype = _DTYPES[given.dtype or ("fp16" if gpu else "fp32")]
    rank, kv_heads = len(given.input_size), given.heads_kv or given.heads
    value_dim = given.dim_value or given.dim

    def make(tokens: list[int], heads: int, channels: int) -> Tensor:
        shape = (given.batch_size, *tokens, heads, channels)
        tensor = torch.randn(shape, dtype=dtype, device="cuda" if gpu else "cpu")
        return tensor.requires_grad_(given.backprop)

    tensors = {
        "query": make(given.input_size, given.heads, given.dim),
        "key": make(given.input_size, kv_heads, given.dim),
        "value": make(given.input_size, kv_heads, value_dim),
    }
    if given.add_kv:
        tensors["additional_keys"] = make([given.add_kv], kv_heads, given.dim)
        tensors["additional_values"] = make([given.add_kv], kv_heads, value_dim)
    numbers = {
        "kernel_size": _per_axis(given.window_size or given.input_size, rank),
        "stride": _per_axis(given.stride, rank),
        "dilation": _per_axis(given.dilation, rank),
        "is_causal": _per_axis(given.causal, rank),
    }
    return tensors, numbers


def _hints(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "backend": given.backend,
        "q_tile_shape": given.q_tile,
        "kv_tile_shape": given.kv_tile,
        "backward_q_tile_shape": given.backward_q_tile,
        "backward_kv_tile_shape": given.backward_kv_tile,
        "run_persistent_kernel": given.persistent,
        "kernel_schedule": given.schedule,
        "attention_kwargs": {"backend": given.fmha_backend} if given.fmha_backend else None,
    }


def explain(tensors: dict[str, Tensor], numbers: dict[str, Any], *, backward: bool) -> str:
    """Which kernel takes the forward (or backward) pass, and why those before it did not."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    sums = query.dtype if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:-1], dtype=sums)
    given = {
        "query": query,
        "key": key,
        "value": value,
        "additional_keys": tensors.get("additional_keys"),
        "additional_values": tensors.get("additional_values"),
        "out": out,
        "lse": lse,
        "d_out": out,
    }
    op = _call.NA_BACKWARD if backward else _call.NA
    views: list[_call.View | None] = []
    for role in op.inputs:
        tensor = given.get(_call.ARGUMENTS[role])
        views.append(None if tensor is None else _view(tensor))
    rank = query.dim() - 3
    shape = window(rank, *(numbers[n] for n in ("kernel_size", "stride", "dilation", "is_causal")))
    wanted = 0b110111 if "additional_keys" in tensors else 0b111
    call = _call.Call(op, views, shape, query.shape[-1] ** -0.5, wanted, _preferences.current)
    return call.explain()


def _view(tensor: Tensor) -> _call.View:
    place = _ops._DEVICES[tensor.device.type], tensor.device.index or 0
    return _call.View(tensor.shape, tensor.stride(), _ops._DTYPES[tensor.dtype], *place)


def _time(
    function: Callable[[], Any], warmup: int, steps: int, device: torch.device
) -> list[float]:
    """Milliseconds of each run."""
    times = []
    for step in range(warmup + steps):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step >= warmup:
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def _row(name: str, times: list[float], flops: float) -> str:
    best = min(times)
    speed = flops / best / 1e6
    return f"{name:<10} {best:>10.3f} {statistics.median(times):>10.3f} {speed:>10.1f}"


def _profile(given: argparse.Namespace) -> None:
    tensors, numbers = _arguments(given)
    function: Any = neighborhood_attention_generic
    if given.optimize:
        context.use_autotuner(
            True,
            given.backprop,
            warmup_steps_forward=given.optimize_warmup_steps,
            warmup_steps_backward=given.optimize_warmup_steps,
        )
    if given.compile:
        function = torch.compile(function)
    hints = _hints(given)
    query, value = tensors["query"], tensors["value"]
    pairs = query[..., 0].numel() * (math.prod(numbers["kernel_size"]) + given.add_kv)
    products = 2.0 * pairs * query.shape[-1], 2.0 * pairs * value.shape[-1]
    out = function(**tensors, **numbers, **hints)
    print(f"{query.device}, {query.dtype}; milliseconds, and 10^9 operations a second at best")
    print(f"{'':<10} {'best':>10} {'median':>10} {'speed':>10}")

    def forward() -> Any:
        with torch.no_grad():
            function(**tensors, **numbers, **hints)

    timing = (given.warmup_steps, given.steps, query.device)
    print(_row("forward", _time(forward, *timing), sum(products)))
    if given.backprop:
        d_out = torch.randn_like(out)
        inputs = list(tensors.values())

        def backward() -> Any:
            torch.autograd.grad(out, inputs, d_out, retain_graph=True)

        print(_row("backward", _time(backward, *timing), 3 * products[0] + 2 * products[1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given = _parser().parse_args(arguments)
    try:
        if not given.dry_run:
            _profile(given)
        else:
            tensors, numbers = _arguments(given)
            for backward in (False, True)[: 1 + given.backprop]:
                print("backward" if backward else "forward")
                print(explain(tensors, numbers, backward=backward))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
