# SPDX-License-Identifier: MIT
"""The models of transformers that use neighborhood attention, Dinat and Nat, with random weights:
against themselves with a dense attention in its place. In a virtual environment of their own, with
the last release in which they work."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import natten

HERE = Path(__file__).resolve().parent
RELEASE = "4.53.3"

SCRIPT = """
import sys, torch, transformers, natten
sys.path.append({here!r})
import dense
from transformers import DinatBackbone, DinatConfig, DinatForImageClassification, DinatModel
from transformers.models.deprecated.nat import NatConfig, NatModel, modeling_nat
from transformers.models.dinat import modeling_dinat
from transformers.utils import is_natten_available

assert transformers.__version__ == {release!r} and is_natten_available()
torch.manual_seed({seed})
torch.set_num_threads(1)

def axes(x, size, dilation):
    return [dense.Axis(extent, size, 1, dilation) for extent in x.shape[2:4]]

def qk(q, k, rpb, size, dilation):
    a = axes(q, size, dilation)
    return dense.scores(q.movedim(1, -2), k.movedim(1, -2), a, rpb=rpb).movedim(-2, 1)

def av(attn, v, size, dilation):
    a = axes(v, size, dilation)
    return dense.weighted(attn.movedim(1, -2), v.movedim(1, -2), a).movedim(-2, 1)

def compare(source, model, pixels):
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        if "rpb" in name:
            torch.nn.init.normal_(parameter)
    def run():
        model.zero_grad()
        out = model(pixels)[0]
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        return [out.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
    ours, theirs = run(), (source.natten2dqkrpb, source.natten2dav)
    assert theirs == (natten.functional.natten2dqkrpb, natten.functional.natten2dav)
    source.natten2dqkrpb, source.natten2dav = qk, av
    true = run()
    source.natten2dqkrpb, source.natten2dav = theirs
    assert len(ours) == len(true) > 30 and ours[0].std() > 1e-3
    pairs = zip(ours, true, strict=True)
    worst = max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)
    assert worst < 1e-10, (type(model).__name__, worst)

small = dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4], kernel_size=3, drop_path_rate=0.0)
pixels = torch.randn(1, 3, 40, 36, dtype=torch.float64)
config = DinatConfig(**small, dilations=[[1, 4], [1, 2]])
compare(modeling_dinat, DinatModel(config), pixels)
compare(modeling_nat, NatModel(NatConfig(**small)), pixels)
# Windows, dilations and maps as they are by default: dilated windows as wide as the map.
usual = DinatConfig(embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8])
assert (usual.kernel_size, usual.dilations[0][:2]) == (7, [1, 8])
compare(modeling_dinat, DinatModel(usual), torch.randn(1, 3, 224, 224, dtype=torch.float64))
single = torch.randn(2, 3, 40, 36)
assert DinatBackbone(config)(single).feature_maps[0].shape == (2, 32, 5, 5)
model = DinatForImageClassification(config).train()
loss = model(single, labels=torch.tensor([0, 1])).loss
loss.backward()
assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
print("equal")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Gone after the test, not only after the next few: it holds 100 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def environment(folder: Path) -> Path:
    """A virtual environment that sees what this one has, torch above all; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": folder, "platbase": folder}))
    (site / "above.pth").write_text(sysconfig.get_path("purelib") + "\n")
    try:
        importlib.metadata.version("natten")
    except importlib.metadata.PackageNotFoundError:
        # Only the source tree is here, and transformers asks for metadata.
        metadata = site / f"natten-{natten.__version__}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: natten\nVersion: {natten.__version__}\n")
    return folder / "bin" / "python"


@pytest.mark.slow
def test_transformers(folder: Path) -> None:
    python = environment(folder)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    got = subprocess.run([*command, f"transformers=={RELEASE}"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"transformers {RELEASE} cannot be had: {got.stderr.strip()[-200:]}")
    seed = int(torch.randint(1 << 30, ()))
    code = SCRIPT.format(here=str(HERE), release=RELEASE, seed=seed)
    ran = subprocess.run(
        [str(python), "-W", "ignore", "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and "equal" in ran.stdout, (seed, ran.stdout, ran.stderr[-3000:])
