# SPDX-License-Identifier: MIT
"""CUDA kernels compiled before they are needed, and the folders that keep them.

    python -m natten.cache list
    python -m natten.cache verify
    python -m natten.cache clear
    python -m natten.cache warm --shape 1,56,56,4,32 --kernel-size 7 --dtype bfloat16 [--arch sm_90]

``warm`` with ``--arch`` needs no GPU: with NATTEN_CACHE_DIR naming an empty folder it makes a pack
of kernels that can be shipped, and is read where NATTEN_CACHE_DIR lists that folder.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import _lib
from ._errors import NattenError, from_status

__all__ = ["clear", "describe", "files", "folders", "warmup"]

_DTYPES = {
    "float32": _lib.F32,
    "float64": _lib.F64,
    "float16": _lib.F16,
    "bfloat16": _lib.BF16,
}


def folders() -> list[Path]:
    """Where compiled kernels are looked for, in that order; new ones go to the last."""
    found: list[Path] = []
    text = ctypes.create_string_buffer(4096)
    while _lib.library.natten_cache_folder(len(found), text, len(text)):
        found.append(Path(text.value.decode()))
    return found


def files() -> Iterator[Path]:
    """The files of compiled kernels, and of choices that the autotuner made."""
    for folder in folders():
        if folder.is_dir():
            yield from sorted([*folder.glob("*.kernel"), *folder.glob("*.tuned")])


def describe(path: Path) -> str | None:
    """What a file was compiled from; None if it is damaged."""
    text = ctypes.create_string_buffer(4096)
    if not _lib.library.natten_cache_describe(str(path).encode(), text, len(text)):
        return None
    return text.value.decode()


def clear() -> int:
    """Deletes what the user's folder keeps, unfinished files too; returns how many."""
    count = 0
    for path in folders()[-1:]:
        for kind in ("kernel", "tuned"):
            for file in [*path.glob(f"*.{kind}"), *path.glob(f".*.{kind}.*")]:
                file.unlink(missing_ok=True)
                count += 1
    return count


def _per_axis(value: Any, rank: int, name: str) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise NattenError(f"{name} must be a number or {rank} of them, got {value!r}.")
    return tuple(int(v) for v in values)


def _problem(op: int, shape: Sequence[int], dtype: int, axes: Sequence[Sequence[int]]) -> Any:
    batch, *extents, heads, head_dim = shape
    problem = _lib.Problem()
    _lib.library.natten_problem_init(ctypes.byref(problem), op, dtype, len(extents))
    problem.device = _lib.CUDA
    problem.batch, problem.heads, problem.head_dim = batch, heads, head_dim
    problem.scale = head_dim**-0.5
    problem.roles |= 1 << _lib.LSE if op == _lib.FORWARD else 0
    for i, axis in enumerate(zip(extents, *axes, strict=True)):
        problem.axis[i].query_extent, problem.axis[i].window = axis[0], axis[1]
        problem.axis[i].dilation, problem.axis[i].stride, problem.axis[i].causal = axis[2:]
    fused = op in (_lib.FORWARD, _lib.BACKWARD)
    order = _lib.HEADS_LAST if fused else _lib.HEADS_FIRST
    _lib.library.natten_problem_pack(ctypes.byref(problem), order)
    return problem


def _compile(problem: Any, arch: str | None) -> None:
    if arch is not None:
        status = _lib.library.natten_compile(ctypes.byref(problem), arch.encode())
    else:
        plan = ctypes.c_void_p()
        status = _lib.library.natten_plan_create(ctypes.byref(problem), None, ctypes.byref(plan))
        _lib.library.natten_plan_destroy(plan)
    if status:
        raise from_status(status, _lib.library.natten_last_error().decode())


def warmup(
    shape: Sequence[int],
    kernel_size: Any,
    *,
    dilation: Any = 1,
    stride: Any = 1,
    is_causal: Any = False,
    dtype: Any = "float32",
    arch: str | None = None,
    backward: bool = True,
    unfused: bool = False,
    device_index: int = 0,
) -> None:
    """Compiles the kernels that attention over a tensor of this shape (``[batch, *map, heads,
    head_dim]``) needs, so that its first call does not wait for them; of the fused backward also
    those with KV parallelism. Batch, heads and map may differ later. ``arch`` ("sm_90") compiles
    for a GPU that need not be here."""
    rank = len(shape) - 3
    if not 1 <= rank <= 3:
        raise NattenError(f"shape must be [batch, *map, heads, head_dim], got {tuple(shape)}.")
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise NattenError(f"dtype must be one of {', '.join(_DTYPES)}, got {name}.")
    window = (kernel_size, dilation, stride, is_causal)
    names = ("kernel_size", "dilation", "stride", "is_causal")
    axes = [_per_axis(value, rank, name) for value, name in zip(window, names, strict=True)]
    ops = [_lib.FORWARD] if not unfused else [_lib.QK, _lib.AV]
    if backward:
        ops += [_lib.BACKWARD] if not unfused else [_lib.QK_BACKWARD, _lib.AV_BACKWARD]
    problems = [_problem(op, shape, _DTYPES[name], axes) for op in ops]
    if _lib.BACKWARD in ops:
        problems.append(_problem(_lib.BACKWARD, shape, _DTYPES[name], axes))
        problems[-1].preferences |= _lib.PREFER_KV_PARALLEL
    for problem in problems:
        problem.device_index = device_index
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda problem: _compile(problem, arch), problems))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m natten.cache", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the folders, and what is in them")
    commands.add_parser("verify", help="looks for damaged files")
    commands.add_parser("clear", help="empties the user's folder")
    warm = commands.add_parser("warm", help="compiles ahead of time")
    warm.add_argument("--shape", type=_numbers, required=True, help="batch,map...,heads,head_dim")
    warm.add_argument("--kernel-size", type=_numbers, required=True)
    for option in ("--dilation", "--stride", "--is-causal"):
        warm.add_argument(option, type=_numbers)
    warm.add_argument("--dtype", action="append", choices=list(_DTYPES))
    warm.add_argument("--arch", action="append", help="sm_75 to sm_121; default: this GPU")
    warm.add_argument("--unfused", action="store_true", help="QK and AV instead of the fused ops")
    warm.add_argument("--forward-only", action="store_true")
    return parser


def _warm(given: argparse.Namespace) -> None:
    def each(values: tuple[int, ...] | None, default: int) -> Any:
        return default if not values else values[0] if len(values) == 1 else values

    for arch in given.arch or [None]:
        for dtype in given.dtype or ["float32"]:
            warmup(
                given.shape,
                each(given.kernel_size, 1),
                dilation=each(given.dilation, 1),
                stride=each(given.stride, 1),
                is_causal=each(given.is_causal, 0),
                dtype=dtype,
                arch=arch,
                backward=not given.forward_only,
                unfused=given.unfused,
            )


def _list() -> None:
    for folder in folders():
        print(folder)
    for path in files():
        lines = (describe(path) or "damaged").splitlines()
        made = f" ({lines[1]}, {path.stat().st_size} bytes)" if len(lines) > 1 else ""
        print(f"{path.name}: {lines[-1]}{made}")


def _verify() -> int:
    paths = list(files())
    damaged = [path for path in paths if describe(path) is None]
    for path in damaged:
        print(f"{path}: damaged")
    print(f"{len(paths)} files, {len(damaged)} damaged")
    return len(damaged) > 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.command == "verify":
        return _verify()
    if given.command == "clear":
        print(f"{clear()} files deleted")
    elif given.command == "list":
        _list()
    else:
        try:
            _warm(given)
        except (NattenError, NotImplementedError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
