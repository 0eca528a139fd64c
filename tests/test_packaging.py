# SPDX-License-Identifier: Apache-2.0
"""What is installed: the module's needed libraries, import without a driver, types, licences, and the C++ package."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import flashcore
import flashcore._core

ROOT = Path(__file__).parents[1]
MODULE = Path(flashcore._core.__file__)
LICENCES = {"LICENSE", "CUDA.txt", "CUTLASS.txt", "DLPack.txt", "XLA.txt", "nanobind.txt", "robin_map.txt"}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="ELF files are Linux's")


def program(name: str) -> str:
    """The path of a program of this Python's environment or of the machine; skips the test where there is none."""
    path = shutil.which(name, path=sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"])
    return path or pytest.skip(f"no {name} here")


def run(*command, **options) -> str:
    """Standard output of a command. Where it fails, so does the test, with everything that it printed."""
    result = subprocess.run([str(part) for part in command], text=True, capture_output=True, **options)
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture
def distribution():
    """The installed distribution that the imported module belongs to."""
    try:
        found = importlib.metadata.distribution("flashcore")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flashcore is imported from a build folder, not installed")
    if not MODULE.is_relative_to(Path(found.locate_file("")).resolve()):
        pytest.skip("flashcore is imported from a build folder, not installed")
    return found


@linux_only
def test_needed_libraries():
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", run(program("readelf"), "-d", MODULE)))
    system = {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
    }
    sanitizers = {name for name in needed if re.match(r"lib(asan|ubsan)\.so", name)}
    assert "libc.so.6" in needed
    assert {name for name in needed if not name.startswith("ld-linux")} <= system | sanitizers


@linux_only
def test_glibc_2_34_is_enough():
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", run(program("readelf"), "-V", MODULE))
    assert versions
    assert max((int(major), int(minor)) for major, minor in versions) <= (2, 34)


@linux_only
def test_exports_its_entry_alone():
    # An exported symbol of ours, of the static CUDA runtime or of libstdc++ could take the place of another library's.
    if "libasan" in run(program("readelf"), "-d", MODULE):
        pytest.skip("a build with sanitizers exports what they need")
    defined = run(program("nm"), "-D", "--defined-only", MODULE).splitlines()
    assert [line.split()[-1] for line in defined] == ["PyInit__core"]


def test_module_is_at_most_30_mib():
    assert MODULE.stat().st_size <= 30 * 2**20


def test_imports_no_framework():
    code = "import sys, flashcore; print(*(set(sys.modules) & {'torch', 'jax', 'cupy', 'transformers', 'rich'}))"
    assert run(sys.executable, "-c", code).split() == []


@linux_only
def test_works_without_a_driver(tmp_path):
    # A libcuda that cannot be loaded stands before any that is installed.
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    code = """
import numpy, flashcore
info = flashcore.info()
x = numpy.ones((1, 3, 2, 8), numpy.float32)
assert (flashcore.attention(x, x, x) == 1).all()
print([device["device"] for device in info["devices"] if device["device"] != "cpu"], info["cuda"]["driver_version"])
"""
    environment = os.environ | {"LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    assert run(sys.executable, "-c", code, env=environment).split()[0] == "[]"


def test_ships_types(distribution):
    names = {str(path) for path in distribution.files}
    assert "flashcore/py.typed" in names
    stub = ast.parse(distribution.read_text("../flashcore/_core.pyi"))
    described = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {"attention", "attention_varlen", "attention_kvcache", "combine", "plan", "info", "Plan"} <= described
    functions = [node for node in stub.body if isinstance(node, ast.FunctionDef)]
    documented = {node.name for node in functions if ast.get_docstring(node)}  # of an overloaded one, the last
    assert {node.name for node in functions} == documented


def test_ships_licences(distribution):
    texts = {path.name: path.read_text() for path in distribution.files if ".dist-info/licenses/" in path.as_posix()}
    assert set(texts) == LICENCES
    assert "Apache License" in texts["LICENSE"]
    assert "NVIDIA CORPORATION" in texts["CUTLASS.txt"]


def test_command_is_installed(distribution):
    (script,) = (entry for entry in distribution.entry_points if entry.group == "console_scripts")
    assert (script.name, script.value) == ("flashcore", "flashcore.cli:main")


def test_cmake_package(cpu_build, tmp_path):
    cmake = program("cmake")
    prefix, programs = tmp_path / "installed", tmp_path / "programs"
    ninja = shutil.which("ninja", path=sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"])
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run(cmake, "--install", cpu_build, "--prefix", prefix, "--component", "development", env=environment)
    run(
        cmake,
        "-S",
        ROOT / "tests/cpp_package",
        "-B",
        programs,
        f"-DCMAKE_PREFIX_PATH={prefix}",
        *generator,
        env=environment,
    )
    run(cmake, "--build", programs, env=environment)
    assert run(programs / "ten_lines") == "2\n"
    assert "instruction set: " in run(programs / "smoke")
    for isa in flashcore.info()["cpu"]["isas"]:
        if isa == "baseline" or isa == flashcore.info()["cpu"]["isa"]:
            assert f"instruction set: {isa}\n" in run(programs / "smoke", env=environment | {"FLASHCORE_CPU_ISA": isa})
