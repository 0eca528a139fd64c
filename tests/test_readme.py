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
LIBRARIES = ("torch", "jax", "numpy")


def example(library: str) -> str:
    found = [text for text in EXAMPLES if re.match(rf"import {library}\b", text)]
    assert len(found) == 1, f"README has {len(found)} examples of {library}"
    return found[0]


def test_there_is_an_example_of_each_library():
    assert len(EXAMPLES) == len(LIBRARIES)


@pytest.mark.parametrize("library", LIBRARIES)
def test_example_runs(library):
    pytest.importorskip(library)
    names: dict = {}
    exec(compile(example(library), "README.md", "exec"), names)
    out, q = names["out"], names["q"]
    assert isinstance(out, type(q)) and out.dtype == q.dtype
    assert out.shape == (q.shape[1:] if library == "numpy" else q.shape)  # NumPy's ends with attention_varlen


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
