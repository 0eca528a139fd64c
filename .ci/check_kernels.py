# SPDX-License-Identifier: Apache-2.0
"""Checks the machine code in a built module: no GPU kernel spills registers or uses local memory.

python .ci/check_kernels.py <cuobjdump> <module>. Prints how many registers the kernels use; exits with 1 and names the
kernels where one has a stack (spilled registers, arrays that the compiler could not keep in registers) or local memory,
or where the module holds no kernel at all.
"""

import re
import subprocess
import sys


def kernels(dump: str):
    """Yields (architecture, mangled name, {resource: amount}) from `cuobjdump --dump-resource-usage`."""
    arch = name = ""
    for line in dump.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            yield arch, name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            name = ""


def main() -> int:
    cuobjdump, module = sys.argv[1:]
    dump = subprocess.run([cuobjdump, "--dump-resource-usage", module], check=True, capture_output=True, text=True)
    found = list(kernels(dump.stdout))
    spilling = [(arch, name, use) for arch, name, use in found if use["STACK"] or use["LOCAL"]]
    for arch in sorted({arch for arch, _, _ in found}):
        registers = [use["REG"] for other, _, use in found if other == arch]
        print(f"{arch}: {len(registers)} kernels, {min(registers)} to {max(registers)} registers")
    for arch, name, use in spilling:
        print(f"{arch} {name}: {use['STACK']} bytes of stack, {use['LOCAL']} of local memory")
    if not found:
        print(f"{module} holds no kernel")
    return 1 if spilling or not found else 0


if __name__ == "__main__":
    sys.exit(main())
