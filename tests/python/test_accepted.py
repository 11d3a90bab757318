# SPDX-License-Identifier: MIT
"""What looks unusual and is no error."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import natten.functional as F

FIRST = torch.zeros(2, 4, 6, 8, 16, device="meta")
ATTN = torch.zeros(2, 4, 6, 8, 9, device="meta")
META = torch.zeros(2, 6, 8, 4, 16, device="meta")


def test_meta_tensors_have_the_right_shapes() -> None:
    out, lse = F.na2d(META, META, META[..., :8], 3, return_lse=True)
    assert out.is_meta and out.shape == (2, 6, 8, 4, 8) and lse.shape == (2, 6, 8, 4)
    attn = F.na2d_qk(FIRST, FIRST, 3, additional_keys=torch.zeros(2, 4, 5, 16, device="meta"))
    assert attn.is_meta and attn.shape == (2, 4, 6, 8, 14)
    assert F.na2d_av(attn[..., :9], FIRST, 3).shape == FIRST.shape


def test_old_spelling() -> None:
    x = torch.randn(1, 7, 2, 4)
    with pytest.warns(DeprecationWarning, match="is_causal"):
        out = F.na1d(x, x, x, 3, is_casual=True)
    assert torch.equal(out, F.na1d(x, x, x, 3, is_causal=True))


def test_settings_of_other_kernels_are_accepted() -> None:
    x = torch.randn(1, 7, 7, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = F.na2d(x, x, x, 3, backend="cutlass-fna", q_tile_shape=(8, 8), kv_tile_shape=(8, 8))
    assert torch.equal(out, F.na2d(x, x, x, 3))


def test_numbers_of_numpy() -> None:
    x = torch.randn(1, 7, 7, 2, 4)
    three, half = np.int64(3), np.float32(0.5)
    ours = F.na2d(x, x, x, (three, np.int32(5)), three // 3, scale=half, dropout_p=np.float32(0))
    assert torch.equal(ours, F.na2d(x, x, x, (3, 5), 1, scale=0.5))
    assert torch.equal(F.na2d(x, x, x, torch.tensor(3)), F.na2d(x, x, x, 3))


def test_meta_tensors_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert F.na2d(META, META, META, 3).dtype == torch.float32
        bias = torch.zeros(4, 5, 5, device="meta")
        assert F.add_rpb(ATTN, bias, 3).shape == ATTN.shape
