# SPDX-License-Identifier: MIT
"""How programs that use neighborhood attention call it: the exact shapes and spellings of their
calls, each against the definition in dense.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dense
import natten
from problems import assert_close

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
HERE = Path(__file__).resolve().parent


def heads_first(*extents: int, channels: int = 8) -> list[Tensor]:
    """Views of one projection, permuted as models do: not contiguous."""
    qkv = torch.randn(2, *extents, 3, 2, channels, requires_grad=True)
    rank = len(extents)
    return list(qkv.permute(rank + 1, 0, rank + 2, *range(1, rank + 1), rank + 3).unbind(0))


def axes(extents: tuple[int, ...], size: int, dilation: int = 1) -> list[dense.Axis]:
    return [dense.Axis(extent, size, 1, dilation) for extent in extents]


def exact_scores(q: Tensor, k: Tensor, a: list[dense.Axis], rpb: Tensor | None = None) -> Tensor:
    """Heads first."""
    q, k = (t.double().movedim(1, -2) for t in (q, k))
    return dense.scores(q, k, a, rpb=None if rpb is None else rpb.double()).movedim(-2, 1)


def exact_sums(attn: Tensor, v: Tensor, a: list[dense.Axis]) -> Tensor:
    attn, v = (t.double().movedim(1, -2) for t in (attn, v))
    return dense.weighted(attn, v, a).movedim(-2, 1)


def close(ours: Tensor, true: Tensor) -> None:
    assert_close("result", ours, true, torch.float32)


def test_stylenat() -> None:
    """Heads split in two halves with windows of their own; settings under their old names."""
    from natten import disable_autotuner, enable_autotuner, enable_fused_na, use_fused_na
    from natten.functional import natten2dav, natten2dqkrpb

    enable_fused_na(), use_fused_na(True), enable_autotuner(), disable_autotuner()
    q, k, v = heads_first(14, 14)
    for head, dilation in enumerate((1, 2)):
        part = [t[:, head : head + 1] for t in (q, k, v)]
        rpb = torch.randn(1, 13, 13)
        attn = natten2dqkrpb(part[0], part[1], rpb, 7, dilation)
        a = axes((14, 14), 7, dilation)
        close(attn, exact_scores(part[0], part[1], a, rpb))
        attn = attn.softmax(dim=-1)
        close(natten2dav(attn, part[2], 7, dilation), exact_sums(attn, part[2], a))


def test_allin1() -> None:
    """(query, key, rpb, kernel_size, dilation), on one axis and on two."""
    from natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb

    q, k, v = heads_first(40)
    rpb = torch.randn(2, 9)
    attn = natten1dqkrpb(q, k, rpb, 5, 8)
    close(attn, exact_scores(q, k, axes((40,), 5, 8), rpb))
    close(natten1dav(attn, v, 5, 8), exact_sums(attn, v, axes((40,), 5, 8)))
    q, k, v = heads_first(4, 40)
    rpb = torch.randn(2, 5, 5)
    attn = natten2dqkrpb(q, k, rpb, 3, 1)
    close(attn, exact_scores(q, k, axes((4, 40), 3), rpb))
    close(natten2dav(attn, v, 3, 1), exact_sums(attn, v, axes((4, 40), 3)))


def test_agileformer() -> None:
    from natten.functional import na2d_av, na2d_qk_with_bias

    q, k, v = heads_first(9, 10)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    attn = na2d_qk_with_bias(q, k, rpb, 3, 1)
    close(attn, exact_scores(q, k, axes((9, 10), 3), rpb))
    out = na2d_av(attn.softmax(-1), v, 3, 1)
    out.sum().backward()
    assert rpb.grad is not None and rpb.grad.abs().max() > 0


def test_segman() -> None:
    from natten import use_fused_na
    from natten.functional import na2d_av, na2d_qk

    use_fused_na()
    q, k, v = heads_first(9, 10)
    rpb = torch.randn(2, 5, 5)
    attn = na2d_qk(q, k, kernel_size=(3, 3), dilation=(2, 2), rpb=rpb)
    close(attn, exact_scores(q, k, axes((9, 10), 3, 2), rpb))
    ours = na2d_av(attn, v, kernel_size=(3, 3), dilation=(2, 2))
    close(ours, exact_sums(attn, v, axes((9, 10), 3, 2)))


def test_overlock() -> None:
    """Weights that come from elsewhere: predicted, normalised kernels."""
    from natten.functional import na2d_av

    value = torch.randn(2, 2, 2, 9, 10, 6, requires_grad=True)
    weights = torch.randn(2, 2, 9, 10, 25, requires_grad=True).softmax(-1)
    ours = na2d_av(weights, value[0], kernel_size=5)
    close(ours, exact_sums(weights, value[0], axes((9, 10), 5)))
    ours.sum().backward()
    assert value.grad is not None and not value.grad[1].any() and value.grad[0].any()


def test_hdit() -> None:
    """k-diffusion: fused if has_fused_na, heads last, cosine-normalised, a scale of 1.0."""
    q, k, v = heads_first(9, 10)
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    a = axes((9, 10), 7)
    true = exact_sums(exact_scores(q, k, a).softmax(-1), v, a)
    last = [t.movedim(1, -2) for t in (q, k, v)]
    close(natten.functional.na2d(*last, 7, scale=1.0), true.movedim(1, -2))
    assert natten.has_fused_na() == natten.has_cuda()
    attn = natten.functional.na2d_qk(q, k, 7).softmax(dim=-1)
    close(natten.functional.na2d_av(attn, v, 7), true)
    attn = natten.functional.natten2dqk(q, k, 7, 1).softmax(dim=-1)
    close(natten.functional.natten2dav(attn, v, 7, 1), true)


class Sharded(Tensor):
    """A subclass that computes na2d its own way, as PhysicsNeMo's ShardTensor does."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is natten.functional.na2d:
            plain = [t.as_subclass(Tensor) for t in args[:3]]
            return ("sharded", function(*plain, *args[3:], **(kwargs or {})))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_physicsnemo() -> None:
    q, k, v = (t.movedim(1, -2) for t in heads_first(9, 10))
    true = natten.functional.na2d(q, k, v, 3, dilation=2)
    ours = natten.functional.na2d(*(t.as_subclass(Sharded) for t in (q, k, v)), 3, dilation=2)
    assert ours[0] == "sharded" and torch.equal(ours[1], true)


def test_cosmos() -> None:
    from natten.functional import neighborhood_attention_generic

    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    q, k, v = torch.randn(3, 1, 6, 8, 10, 2, 16)
    window: dict[str, Any] = {"kernel_size": (4, 4, 5), "stride": (1, 2, 5), "dilation": 1}
    ours = neighborhood_attention_generic(
        query=q,
        key=k,
        value=v,
        **window,
        is_causal=False,
        backend="hopper-fna",
        q_tile_shape=(4, 4, 8),
        kv_tile_shape=(4, 4, 8),
        backward_q_tile_shape=(4, 4, 4),
        backward_kv_tile_shape=(4, 4, 8),
        run_persistent_kernel=True,
    )
    a = [dense.Axis(n, s, t) for n, s, t in zip((6, 8, 10), (4, 4, 5), (1, 2, 5), strict=True)]
    true, _ = dense.attention(q.double(), k.double(), v.double(), a, 16**-0.5)
    close(ours, true)


def test_version_switchers() -> None:
    """Versions before 0.20 take the unfused functions, which are here."""
    major, minor = natten.__version__.split(".")[:2]
    assert (0, 17) <= (int(major), int(minor)) < (0, 20)
    assert callable(natten.functional.na2d_qk) and callable(natten.functional.na2d_av)


# transformers' own Dinat; its attention replaced by a dense one for comparison.
DINAT = """
import sys, torch, natten
sys.path[:0] = {paths!r}
import dense
from transformers import DinatBackbone, DinatConfig, DinatModel
from transformers.models.dinat import modeling_dinat as source
torch.manual_seed({seed})
torch.set_num_threads(1)
config = DinatConfig(
    embed_dim=16, depths=[2, 2], num_heads=[2, 4], kernel_size=3, dilations=[[1, 4], [1, 2]],
    drop_path_rate=0.0,
)

def axes(x, size, dilation):
    return [dense.Axis(extent, size, 1, dilation) for extent in x.shape[2:4]]

def qk(q, k, rpb, size, dilation):
    q, k = (t.movedim(1, -2) for t in (q, k))
    return dense.scores(q, k, axes(q.movedim(-2, 1), size, dilation), rpb=rpb).movedim(-2, 1)

def av(attn, v, size, dilation):
    a = axes(v, size, dilation)
    return dense.weighted(attn.movedim(1, -2), v.movedim(1, -2), a).movedim(-2, 1)

model = DinatModel(config).double().eval()
for name, parameter in model.named_parameters():
    if "rpb" in name:
        torch.nn.init.normal_(parameter)
pixels = torch.randn(1, 3, 40, 36, dtype=torch.float64)
def run():
    model.zero_grad()
    out = model(pixels).last_hidden_state
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
ours = run()
source.natten2dqkrpb, source.natten2dav = qk, av
true = run()
assert len(ours) == len(true) > 30
worst = max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(ours, true))
assert worst < 1e-10, worst
assert ours[0].std() > 0.1
backbone = DinatBackbone(config)
assert backbone(torch.randn(1, 3, 40, 36)).feature_maps
print("equal", len(ours))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Gone after the test, not only after the next few: it holds 200 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_transformers(folder: Path) -> None:
    """The last release of transformers whose Dinat works, in a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
    got = subprocess.run([*command, "transformers==4.53.3"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"transformers 4.53.3 cannot be had: {got.stderr.strip()[-200:]}")
    # transformers asks for the metadata of an installed natten.
    metadata = folder / "natten-0.18.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: natten\nVersion: {natten.__version__}\n")
    seed = int(torch.randint(1 << 30, ()))
    code = DINAT.format(paths=[str(HERE)], seed=seed)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "equal" in ran.stdout, (seed, ran.stdout, ran.stderr[-3000:])
