# SPDX-License-Identifier: MIT
"""natten.h and src/torch/bind.h in ctypes: the structures field for field, and the library."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint64, c_void_p
from importlib import resources
from pathlib import Path

# natten_op
FORWARD, BACKWARD, QK, QK_BACKWARD, AV, AV_BACKWARD = range(6)

# natten_dtype
F32, F64, F16, BF16 = range(4)

# natten_device
CPU, CUDA = range(2)

# natten_preference
PREFER_GEMM, PREFER_TILED, PREFER_TF32, PREFER_KV_PARALLEL = 1, 2, 4, 8
PREFER_LITTLE_MEMORY, PREFER_MUCH_MEMORY, PREFER_USUAL, PREFERENCES = 16, 32, 3, 63

# natten_order
HEADS_LAST, HEADS_FIRST = range(2)

# natten_role
(
    QUERY,
    KEY,
    VALUE,
    OUT,
    LSE,
    ATTN,
    RPB,
    ADDITIONAL_KEY,
    ADDITIONAL_VALUE,
    KEY_BIAS,
    D_QUERY,
    D_KEY,
    D_VALUE,
    D_OUT,
    D_LSE,
    D_ATTN,
    D_RPB,
    D_ADDITIONAL_KEY,
    D_ADDITIONAL_VALUE,
    D_KEY_BIAS,
    ROLES,
) = range(21)


# natten_call
WINDOW_ENTRIES = 21


class Axis(ctypes.Structure):
    """natten_axis"""

    _fields_ = [
        ("query_extent", c_int64),
        ("key_extent", c_int64),
        ("global_extent", c_int64),
        ("query_origin", c_int64),
        ("key_origin", c_int64),
        ("window", c_int64),
        ("stride", c_int64),
        ("dilation", c_int64),
        ("causal", c_int64),
    ]


class Layout(ctypes.Structure):
    """natten_layout"""

    _fields_ = [("batch", c_int64), ("axis", c_int64 * 3), ("head", c_int64)]


class Problem(ctypes.Structure):
    """natten_problem"""

    _fields_ = [
        ("size", c_uint64),
        ("op", c_int64),
        ("dtype", c_int64),
        ("device", c_int64),
        ("device_index", c_int64),
        ("preferences", c_uint64),
        ("choice", c_int64),
        ("rank", c_int64),
        ("axis", Axis * 3),
        ("batch", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("value_dim", c_int64),
        ("additional_tokens", c_int64),
        ("scale", c_double),
        ("dropout", c_double),
        ("roles", c_uint64),
        ("layout", Layout * ROLES),
    ]


class Run(ctypes.Structure):
    """natten_run"""

    _fields_ = [
        ("data", c_void_p * ROLES),
        ("workspace", c_void_p),
        ("stream", c_void_p),
        ("threads", c_int64),
        ("parallel", c_void_p),
        ("pool", c_void_p),
        ("seed", c_uint64),
        ("offset", c_uint64),
    ]


class Tuning(ctypes.Structure):
    """natten_tuning"""

    _fields_ = [("warmups", c_int64), ("rounds", c_int64), ("thorough", c_int64)]


class Tuned(ctypes.Structure):
    """natten_tuned"""

    _fields_ = [
        ("choice", c_int64),
        ("choices", c_int64),
        ("seconds", c_double),
        ("default_seconds", c_double),
    ]


#: natten_log
Log = ctypes.CFUNCTYPE(None, c_int64, c_char_p)


class Tensor(ctypes.Structure):
    """natten_tensor"""

    _fields_ = [
        ("data", c_void_p),
        ("dims", c_int64),
        ("size", c_int64 * 6),
        ("stride", c_int64 * 6),
        ("dtype", c_int64),
        ("device", c_int64),
        ("device_index", c_int64),
    ]


class Call(ctypes.Structure):
    """natten_call"""

    _fields_ = [
        ("op", c_int64),
        ("order", c_int64),
        ("window", c_int64 * WINDOW_ENTRIES),
        ("entries", c_int64),
        ("scale", c_double),
        ("default_scale", c_int64),
        ("dropout", c_double),
        ("preferences", c_uint64),
        ("outputs", c_uint64),
        ("tensor", Tensor * ROLES),
        ("rank", c_int64),
        ("problem", Problem),
        ("text", c_char * 1024),
    ]


class ItemAxis(ctypes.Structure):
    """natten_item_axis"""

    _fields_ = [
        ("query_extent", c_int64),
        ("key_extent", c_int64),
        ("kernel_size", c_int64),
        ("stride", c_int64),
        ("dilation", c_int64),
        ("is_causal", c_int64),
    ]


def _path() -> Path:
    """The library in the installed package, or that of a build beside a source tree: in `build` or,
    as make has it, `build/release`. (In a folder of its own: beside the modules it would be what
    `import natten.libnatten` finds.)"""
    name = "libnatten.so"
    installed = Path(str(resources.files("natten").joinpath("lib", name)))
    build = Path(__file__).resolve().parents[2] / "build"
    for path in (installed, build / name, build / "release" / name):
        if path.exists():
            return path
    raise ImportError(f"{name} is neither at {installed} nor in {build}: is natten installed?")


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_path()))
    pointer = ctypes.POINTER
    size = pointer(c_size_t)
    signatures: dict[str, tuple[object, list[object]]] = {
        "natten_version": (c_char_p, []),
        "natten_last_error": (c_char_p, []),
        "natten_problem_init": (None, [pointer(Problem), c_int, c_int, c_int]),
        "natten_problem_pack": (None, [pointer(Problem), c_int]),
        "natten_axis_window": (
            c_int,
            [pointer(Axis), c_int64, pointer(c_int64), pointer(c_int64)],
        ),
        "natten_pairs": (c_int, [pointer(Problem), pointer(c_int64)]),
        "natten_plan_create": (c_int, [pointer(Problem), c_char_p, pointer(c_void_p)]),
        "natten_plan_destroy": (None, [c_void_p]),
        "natten_plan_explain": (c_size_t, [c_void_p, c_char_p, c_size_t]),
        "natten_plan_kernel": (c_char_p, [c_void_p]),
        "natten_plan_workspace": (c_size_t, [c_void_p]),
        "natten_plan_choices": (c_int64, [c_void_p]),
        "natten_plan_choice": (c_char_p, [c_void_p]),
        "natten_tune": (c_int, [pointer(Problem), pointer(Run), pointer(Tuning), pointer(Tuned)]),
        "natten_autotune": (c_int, [c_int, pointer(Tuning)]),
        "natten_log_set": (None, [Log]),
        "natten_tuned_export": (c_size_t, [c_char_p, c_size_t]),
        "natten_tuned_import": (c_int, [c_char_p]),
        "natten_tuned_clear": (None, []),
        "natten_kernel_name": (c_char_p, [c_size_t]),
        "natten_plan_run": (c_int, [c_void_p, pointer(Run)]),
        "natten_compute": (c_int, [pointer(Problem), pointer(Run)]),
        "natten_workspace": (c_int, [pointer(Problem), pointer(c_size_t)]),
        "natten_explain": (c_int, [pointer(Problem), c_char_p, c_size_t]),
        "natten_cuda_capability": (c_int64, [c_int64]),
        "natten_compile": (c_int, [pointer(Problem), c_char_p]),
        "natten_cache_folder": (c_size_t, [c_size_t, c_char_p, c_size_t]),
        "natten_cache_describe": (c_size_t, [c_char_p, c_char_p, c_size_t]),
        "natten_threads": (c_int64, []),
        "natten_threads_set": (c_int, [c_int64]),
        "natten_call_bind": (c_int, [pointer(Call)]),
        # As a number and bytes: a pointer object would cost a call more than its arguments do.
        "natten_call_repeat": (c_int, [c_void_p, c_char_p]),
        "natten_compute_all": (c_int, [pointer(Problem), pointer(Run), c_size_t, size]),
        "natten_call_items": (
            c_int,
            [pointer(Call), c_void_p, c_int64, c_int64, pointer(Run), size],
        ),
        "natten_call_no_memory": (c_int, [pointer(Call), c_int64]),
        "natten_call_must_copy": (c_int, [pointer(Tensor), c_int64]),
        "natten_torch_register": (c_int, [c_char_p, c_char_p, c_size_t]),
        "natten_torch_failure": (c_int, []),
        "natten_torch_prefer": (None, [c_uint64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


library = _load()
