# SPDX-License-Identifier: MIT
"""sdist, the wheel built from it, and the wheel in the virtual environment, where the Python tests
then find it. check_install.py installs from the wheel's build as well."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "build/dist"
BUILD = ROOT / "build/wheel"


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT)


def only(pattern: str) -> Path:
    (found,) = DIST.glob(pattern)
    return found


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in ("CMakeLists.txt", "LICENSE", "include/natten.h", "tests/check.c", "Makefile"):
        assert name in names, f"the sdist lacks {name}"
    strange = [name for name in names if re.match(r"build|\.venv|.*\.(so|o|pyc)$", name)]
    assert not strange, f"the sdist has {strange}"


def check_wheel(path: Path) -> None:
    assert re.fullmatch(r"natten-[\d.]+-py3-none-\w+\.whl", path.name), path.name
    names = zipfile.ZipFile(path).namelist()
    libraries = [name for name in names if ".so" in name]
    assert libraries == ["natten/lib/libnatten.so"], libraries
    outside = [name for name in names if not re.match(r"natten(-[\d.]+\.dist-info)?/", name)]
    assert not outside, outside
    for name in ("natten/__init__.py", "natten/py.typed"):
        assert name in names, f"the wheel lacks {name}"


def main() -> int:
    for old in (DIST, BUILD):
        shutil.rmtree(old, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ".")
    check_sdist(only("*.tar.gz"))
    shutil.unpack_archive(only("*.tar.gz"), DIST)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"),
        *(
            "--wheel-dir",
            DIST,
            f"--config-settings=build-dir={BUILD}",
            only("*/pyproject.toml").parent,
        ),
    )
    check_wheel(only("*.whl"))
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps"),
        only("*.whl"),
    )
    print(f"package: {only('*.whl').name} built from the sdist and installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
