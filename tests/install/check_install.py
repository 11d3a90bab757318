# SPDX-License-Identifier: MIT
"""What a C user gets from `cmake --install`: each test is one promise, kept or not."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/smooth.c"


class Skip(Exception):
    """What the test needs is not on this computer."""


def run(*command: object, **variables: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def need(tool: str) -> None:
    if not shutil.which(tool):
        raise Skip(f"{tool} not found")


def library(prefix: Path) -> Path:
    return next(prefix.glob("lib*/**/libnatten.so"))


def test_installs(prefix: Path) -> None:
    run("cmake", "--install", ROOT / "build/release", "--prefix", prefix)
    names = {path.name for path in prefix.rglob("*") if not path.is_dir()}
    wanted = {"natten.h", "natten.pc", "natten-config.cmake", "libnatten.so", "libnatten.so.0"}
    assert wanted <= names, f"missing {wanted - names}"
    assert not [name for name in names if name.endswith((".a", ".py", ".o"))], names


def test_symbols(prefix: Path) -> None:
    need("nm")
    lines = run("nm", "-D", "--defined-only", library(prefix)).splitlines()
    names = {line.split()[-1] for line in lines}
    strange = {name for name in names if not name.startswith("natten_")}
    assert not strange, f"visible besides natten_*: {strange}"
    header = (ROOT / "include/natten.h").read_text()
    declared = set(re.findall(r"NATTEN_API [^;(]*?\b(natten_\w+)\(", header))
    assert declared <= names, f"declared, not there: {declared - names}"


def test_soname(prefix: Path) -> None:
    need("readelf")
    dynamic = run("readelf", "-d", library(prefix))
    assert re.search(r"SONAME.*\[libnatten\.so\.0\]", dynamic), dynamic
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    system = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    needed = {name for name in needed if not name.startswith("ld-linux")}
    assert needed <= system, f"needs more than libc: {needed - system}"


def test_pkg_config(prefix: Path) -> None:
    need("pkg-config")
    found = str(next(prefix.rglob("natten.pc")).parent)
    flags = run("pkg-config", "--cflags", "--libs", "natten", PKG_CONFIG_PATH=found).split()
    program = prefix / "smooth"
    run("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", EXAMPLE, *flags, "-o", program)
    folder = run("pkg-config", "--variable=libdir", "natten", PKG_CONFIG_PATH=found).strip()
    assert "after" in run(program, LD_LIBRARY_PATH=folder)
    run("cc", EXAMPLE, *flags, f"-Wl,-rpath,{folder}", "-o", program)
    assert "after" in run(program)


def test_moved(prefix: Path) -> None:
    """natten.pc finds its own prefix, wherever that was moved."""
    need("pkg-config")
    moved = prefix.parent / "elsewhere"
    shutil.copytree(prefix, moved, symlinks=True)
    found = str(next(moved.rglob("natten.pc")).parent)
    folder = run("pkg-config", "--variable=includedir", "natten", PKG_CONFIG_PATH=found).strip()
    assert (Path(folder) / "natten.h").exists(), folder
    assert "elsewhere" in folder, folder


def test_cmake_config(prefix: Path) -> None:
    build = prefix.parent / "consumer"
    run(
        "cmake",
        "-S",
        ROOT / "tests/install/consumer",
        "-B",
        build,
        f"-DCMAKE_PREFIX_PATH={prefix}",
        f"-DSMOOTH={EXAMPLE}",
    )
    run("cmake", "--build", build)
    assert "after" in run(build / "smooth")


def test_without_tests(prefix: Path) -> None:
    """-DBUILD_TESTING=OFF: a library is built that works when installed, and nothing else is. That
    is how check_package.py has just built the wheel's."""
    build, bare = ROOT / "build/wheel", prefix.parent / "installed"
    assert "BUILD_TESTING:BOOL=OFF" in (build / "CMakeCache.txt").read_text()
    assert not (build / "tests").exists()
    programs = [path for path in build.iterdir() if path.is_file() and os.access(path, os.X_OK)]
    assert {path.name.split(".so")[0] for path in programs} == {"libnatten"}, programs
    run("cmake", "--install", build, "--prefix", bare)
    folder = library(bare).parent
    program = prefix.parent / "smooth"
    run("cc", EXAMPLE, f"-I{bare / 'include'}", f"-L{folder}", "-lnatten", "-o", program)
    assert "after" in run(program, LD_LIBRARY_PATH=str(folder))


def main() -> int:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    with tempfile.TemporaryDirectory() as folder:
        for name, test in list(globals().items()):
            if not name.startswith("test_"):
                continue
            try:
                test(Path(folder) / "prefix")
                counts["passed"] += 1
            except Skip as reason:
                print(f"SKIP {name}: {reason}")
                counts["skipped"] += 1
            except (AssertionError, StopIteration) as reason:
                print(f"FAIL {name}: {reason}")
                counts["failed"] += 1
    print("install: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return counts["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
