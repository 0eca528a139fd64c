# SPDX-License-Identifier: Apache-2.0
"""README: its examples run as they stand there, and its figures are those of the result files."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of a GPU's memory at once
ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LIBRARIES = ("torch", "jax", "cupy", "numpy")
INTERFACES = ("torch", "flash_attn", "transformers", "jax")  # flashcore.<name>: what FlashCore is behind


def example(module: str) -> str:
    found = [text for text in EXAMPLES if re.match(rf"import {module}\s", text)]
    assert len(found) == 1, f"README has {len(found)} examples of {module}"
    return found[0]


def test_there_is_an_example_of_each_library_and_interface():
    assert len(EXAMPLES) == len(LIBRARIES) + len(INTERFACES)
    for name in INTERFACES:
        assert example(f"flashcore.{name}")


@pytest.mark.parametrize("library", LIBRARIES)
def test_example_runs(library):
    pytest.importorskip(library)
    names: dict = {}
    exec(compile(example(library), "README.md", "exec"), names)
    out, q = names["out"], names["q"]
    assert isinstance(out, type(q)) and out.dtype == q.dtype
    assert out.shape == (q.shape[1:] if library == "numpy" else q.shape)  # NumPy's ends with attention_varlen


@pytest.mark.filterwarnings("ignore")  # of the frameworks
@pytest.mark.parametrize("interface", INTERFACES)
def test_example_behind_an_interface_runs(interface):
    """Each names beside its `out` another way to the same result, `expected`."""
    pytest.importorskip(interface if interface in ("transformers", "jax") else "torch")
    names: dict = {}
    exec(compile(example(f"flashcore.{interface}"), "README.md", "exec"), names)
    out, expected = names["out"], names["expected"]
    assert type(out) is type(expected) and out.shape == expected.shape and out.dtype == expected.dtype
    assert float(abs(out - expected).max()) <= 2e-2


def test_cpp_example_compiles(tmp_path):
    compiler = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    (source,) = re.findall(r"^```cpp\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    path = tmp_path / "example.cc"
    path.write_text(source)
    line = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror", "-fsyntax-only"]
    done = subprocess.run([*line, f"-I{ROOT / 'cpp/include'}", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_are_there():
    assert "\n    pip install . && flashcore verify\n" in README
    assert "\n    pip install '.[test]' && pytest\n" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_figures_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, str(ROOT / "bench/report.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
