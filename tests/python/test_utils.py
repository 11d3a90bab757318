# SPDX-License-Identifier: MIT
"""natten.utils and natten.types: what clients import from there."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import natten
from natten import types, utils
from natten.utils import testing

NAMES = """
    check_additional_keys check_additional_values check_all_args check_causal_arg check_dilation_arg
    check_kernel_size_arg check_tiling_config check_backward_tiling_config get_num_na_weights
    get_device_cc make_attn_tensor_from_input check_input_size_arg log checks misc tensor
"""
TYPES = """
    NoneType Dimension1DType Dimension2DType Dimension3DType CausalArg1DType CausalArg2DType
    CausalArg3DType Dimension1DTypeOrDed Dimension2DTypeOrDed Dimension3DTypeOrDed
    CausalArg1DTypeOrDed CausalArg2DTypeOrDed CausalArg3DTypeOrDed DimensionType CausalArgType
    DimensionTypeOrDed CausalArgTypeOrDed FnaTileShapeType FnaForwardConfigType
    FnaBackwardConfigType ListOrNestedTensor create_dim_from_int create_causal_arg_from_bool
    KernelSchedule
"""


def test_names() -> None:
    for name in NAMES.split():
        assert hasattr(utils, name)
    for name in TYPES.split():
        assert hasattr(types, name)
    assert types.NoneType is type(None)
    assert natten.utils is utils and natten.types is types


def test_all_args() -> None:
    check = utils.check_all_args
    assert check(2, 3, None, None) == ((3, 3), (1, 1), (False, False))
    assert check(2, (3, 5), 2, (True, False)) == ((3, 5), (2, 2), (True, False))
    assert check(2, (3, 5), dilation=2, is_causal=True) == ((3, 5), (2, 2), (True, True))
    assert check(3, 3, 2, 1, False) == ((3,) * 3, (2,) * 3, (1,) * 3, (False,) * 3)
    assert check(1, 3, stride=2, dilation=4, is_causal=False) == ((3,), (2,), (4,), (False,))
    assert check(1, 3, 2, dilation=4, is_causal=False) == ((3,), (2,), (4,), (False,))
    with pytest.raises(ValueError, match="got 4 and 3 on axis 0"):
        check(1, 3, 4, 1, False)
    for arguments in ((3,), (3, 1), (3, 1, 1, False, 1)):
        with pytest.raises(TypeError, match="is_causal"):
            check(1, *arguments)
    with pytest.raises(TypeError, match="strides"):
        check(1, 3, 1, False, strides=2)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "text"),
    (
        (utils.check_kernel_size_arg, (2, 0), ValueError, "at least 1, got 0 on axis 0"),
        (utils.check_kernel_size_arg, (2, "3"), TypeError, "kernel_size must be an integer"),
        (utils.check_dilation_arg, (2, (1, -1)), ValueError, "got -1 on axis 1"),
        (utils.check_dilation_arg, (3, (1, 2)), ValueError, "3 of them"),
        (utils.check_causal_arg, (1, 1), TypeError, "is_causal must be a bool"),
        (utils.check_input_size_arg, (2, (4, 0)), ValueError, "input_size"),
        (utils.check_kernel_size_arg, (4, 3), ValueError, "na_dim must be 1, 2 or 3, got 4"),
        (utils.check_kernel_size_arg, (2.0, 3), ValueError, "na_dim must be 1, 2 or 3, got 2.0"),
        (utils.check_tiling_config, (1, (64,)), TypeError, "pair"),
        (utils.check_tiling_config, (2, ((8, 8), (8, 0))), ValueError, "key tile"),
        (utils.check_backward_tiling_config, (1, ((64,), (64,), (1,), 1)), TypeError, "a bool"),
        (utils.check_backward_tiling_config, (1, ((64,), (64,))), TypeError, "three tuples"),
        (utils.get_num_na_weights, ([3, 3],), ValueError, "tuple"),
        (utils.get_num_na_weights, (("3", 3),), ValueError, "tuple of integers"),
        (
            utils.check_additional_keys,
            ([3], torch.ones(1, 2, 3, 4)),
            TypeError,
            "input_tensor must",
        ),
        (utils.check_additional_keys, (torch.ones(2), [3]), TypeError, "additional_keys must be a"),
        (utils.check_additional_values, (3, None, 4, 9), TypeError, "attn must be a tensor"),
        (utils.make_attn_tensor_from_input, (torch.ones(2), "9"), TypeError, "attention_dim must"),
        (types.create_dim_from_int, (0, 3), ValueError, "na_dim must be 1, 2 or 3, got 0"),
        (types.create_causal_arg_from_bool, ("2", True), ValueError, "na_dim must be 1, 2 or 3"),
    ),
)
def test_checks_refuse(
    function: Any, arguments: tuple[Any, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        function(*arguments)


def test_checks() -> None:
    assert utils.check_kernel_size_arg(2, (3, 4)) == (3, 4)
    assert utils.check_causal_arg(2, None) == (False, False)
    assert utils.check_tiling_config(2, ((8, 8), (4, 16))) == ((8, 8), (4, 16))
    config = ((64,), (32,), (2,), True)
    assert utils.check_backward_tiling_config(1, config) == config
    assert utils.get_num_na_weights((3, 5, 7)) == 105
    assert types.create_dim_from_int(3, 2) == (2, 2, 2)
    assert types.create_causal_arg_from_bool(2, True) == (True, True)


def test_additional_tokens() -> None:
    query, extra = torch.randn(2, 3, 5, 5, 8), torch.randn(2, 3, 4, 8)
    assert utils.check_additional_keys(query, None) == 0
    assert utils.check_additional_keys(query, extra) == 4
    with pytest.raises(ValueError, match="rank 4, got 3"):
        utils.check_additional_keys(query, extra[0])
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), but query has \(2, 3, 8\)"):
        utils.check_additional_keys(query, extra[..., :4])
    attn = utils.make_attn_tensor_from_input(query, 9 + 4)
    assert attn.shape == (2, 3, 5, 5, 13) and attn.dtype == query.dtype
    assert utils.check_additional_values(attn, extra, query, 9) == 4
    assert utils.check_additional_values(attn, None, query, 13) == 0
    with pytest.raises(ValueError, match=r"Expected 9 .*attn.shape\[-1\]=13"):
        utils.check_additional_values(attn, None, query, 9)


def test_device() -> None:
    if not torch.cuda.is_available():
        assert utils.get_device_cc() == 0 and utils.get_device_cc(0) == 0
    else:
        major, minor = torch.cuda.get_device_capability()
        assert utils.get_device_cc() in (0, 10 * major + minor)


def test_skipping() -> None:
    factories = [name for name in testing.__all__ if name.startswith("skip_if")]
    assert len(factories) == 10
    for name in factories:

        @getattr(testing, name)()
        def test() -> int:
            return 1

        assert callable(test)
    assert testing.fna_supports_additional_kv(32)
    flags = """
        _SUPPORTS_NESTED _IS_CUDA_AVAILABLE _HAS_GEMM_KERNELS _GEMM_WITH_DOUBLE_PRECISION
        _HAS_FNA_KERNELS _PYTHON_SUPPORTS_DYNAMO _IS_TORCH_COMPILE_SUPPORTED
        _IS_TORCH_FLOP_COUNT_SUPPORTED _IS_TRITON_SUPPORTED _SUPPORTS_EXPERIMENTAL_OPS
        _IS_FVCORE_AVAILABLE _HAS_XFORMERS_PARTIAL_ATTENTION
    """
    for name in flags.split():
        assert isinstance(getattr(testing, name), bool)


LOG = """
import natten.utils.log as log, logging
{before}
log.get_logger("natten.part").warning("a warning")
log.get_logger("other").info("some news")
log.get_logger("other").debug("details")
"""


@pytest.mark.parametrize(
    ("level", "before", "lines"),
    (
        ("", "", ["[[ natten.part ]] [ WARNING ]: a warning", "[[ natten.other ]] [ INFO ]: some"]),
        ("error", "", []),
        ("debug", "", ["a warning", "some news", "details"]),
        ("warning", "logging.basicConfig(format='ours %(message)s')", ["ours a warning"]),
    ),
)
def test_log(level: str, before: str, lines: list[str]) -> None:
    """A logger of its own, unless the program has set one up."""

    env = {**os.environ, "NATTEN_LOG_LEVEL": level}
    code = [sys.executable, "-c", LOG.format(before=before)]
    said = subprocess.run(code, env=env, capture_output=True, text=True, check=True).stderr
    assert len(said.splitlines()) == len(lines), said
    for line, part in zip(said.splitlines(), lines, strict=True):
        assert part in line
    assert logging.getLogger("natten").handlers
