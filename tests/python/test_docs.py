# SPDX-License-Identifier: MIT
"""Runs every Python block of README and docs, those of one document after each other."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = sorted(
    path
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    if "```python" in path.read_text()
)
FENCE = re.compile(r"^\s*(?:```|~~~)(.*)$", re.MULTILINE)
NEEDS = re.compile(r"^(?:from|import) (fvcore)\b", re.MULTILINE)


def test_no_block_is_missed() -> None:
    """Pages of the guide have blocks, and all that is fenced is Python or a text."""
    names = {path.stem for path in DOCUMENTS}
    assert names >= set(
        "README guide autotuner backends fused-and-unfused fused-quick-start kv-parallelism "
        "sequences".split()
    )
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        text = path.read_text()
        fences = FENCE.findall(text)
        assert set(fences[::2]) <= {"python", ""} and set(fences[1::2]) <= {""}, path
        assert len(BLOCK.findall(text)) == fences.count("python"), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_blocks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATTEN_CACHE_DIR", str(tmp_path))
    text = path.read_text()
    for package in set(NEEDS.findall(text)):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{path.name} needs {package}")
    names: dict[str, object] = {"__name__": "document"}
    for found in BLOCK.finditer(text):
        # Line numbers of tracebacks are then those of the document.
        above = text.count("\n", 0, found.start(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # fvcore's
            exec(compile("\n" * above + found.group(1), str(path), "exec"), names)
