# SPDX-License-Identifier: Apache-2.0
"""Checks built wheels: python .ci/check_wheels.py <wheel>...

Of each: at most 30 MiB, licences of everything that is compiled in, types, and for auditwheel a policy of
manylinux_2_34 or older with nothing to graft. Exits with 1 and says what is wrong.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

LICENCES = {"LICENSE", "CUDA.txt", "CUTLASS.txt", "DLPack.txt", "XLA.txt", "nanobind.txt", "robin_map.txt"}


def problems(wheel: Path):
    """Yields what is wrong with a wheel, one sentence each."""
    size = wheel.stat().st_size
    if size > 30 * 2**20:
        yield f"{size / 2**20:.1f} MiB, more than 30"
    names = zipfile.ZipFile(wheel).namelist()
    licences = {name.rsplit("/", 1)[1] for name in names if ".dist-info/licenses/" in name}
    if missing := LICENCES - licences:
        yield f"licences missing: {sorted(missing)}"
    yield from (f"{name} is missing" for name in ("flashcore/py.typed", "flashcore/_core.pyi") if name not in names)
    yield from (f"{name} does not belong in it" for name in names if not name.startswith("flashcore"))

    auditwheel = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    report = json.loads(subprocess.run(auditwheel, check=True, capture_output=True, text=True).stdout)
    tag, external = report["overall_tag"], report["external_libs"]
    print(f"{wheel.name}: {size / 2**20:.1f} MiB, {tag}, to graft: {external or 'nothing'}")
    policy = re.match(r"manylinux_2_(\d+)_", tag)
    if not policy or int(policy[1]) > 34:
        yield f"auditwheel says {tag}, which is not manylinux_2_34 or older"
    if external:
        yield f"auditwheel would graft {external}"


def main() -> int:
    found = [f"{Path(wheel).name}: {problem}" for wheel in sys.argv[1:] for problem in problems(Path(wheel))]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
