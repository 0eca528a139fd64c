# SPDX-License-Identifier: Apache-2.0
"""With a driver older than CUDA 13 needs, FlashCore is imported, works on the CPU and says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import flashcore

# A libcuda that knows its version and nothing else: 12.4, that of driver R550.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* found) {
  *function = !strcmp(name, "cuInit")               ? (void*)cuInit
            : !strcmp(name, "cuDriverGetVersion")   ? (void*)cuDriverGetVersion
            : !strcmp(name, "cuGetProcAddress")     ? (void*)cuGetProcAddress_v2 : 0;
  if (found) *found = *function ? 0 : 1;
  return *function ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""

CHECK = """
import numpy as np
import flashcore

cuda = flashcore.info()["cuda"]
assert cuda["driver_version"] == 12040, cuda
assert "R580" in cuda["problem"] and "update the driver" in cuda["problem"], cuda
assert all(d["device"] == "cpu" for d in flashcore.info()["devices"])
a = np.ones((1, 2, 2, 8), np.float32)
assert (flashcore.attention(a, a, a) == 1).all()
try:
    flashcore.plan((1, 8, 1, 64), (1, 8, 1, 64), (1, 8, 1, 64), dtype="float16", device="cuda")
except RuntimeError as error:
    assert "R580" in str(error), error
else:
    raise AssertionError("planned for a device that cannot be used")
"""


def test_driver_too_old(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not flashcore.info()["cuda"]["built"] or not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs CUDA in the build, Linux and a C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
