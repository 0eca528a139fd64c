# SPDX-License-Identifier: Apache-2.0
"""Checks the machine code in a built module: no GPU kernel spills registers or uses local memory, and the Hopper
kernels consist of what they were written for.

python .ci/check_kernels.py <cuobjdump> <module>, with nvdisasm beside cuobjdump. Prints how many registers the kernels
use and how many of Hopper's instructions there are; exits with 1 and names the kernels where one has a stack (spilled
registers, arrays that the compiler could not keep in registers) or local memory, where a forward kernel for sm_90a,
or one for small problems or streams of them, or the one for decoding with turned products, has no wgmma (HGMMA) or no
TMA load (UTMALDG), or the other one for decoding no TMA load, or where the module holds no kernel, or none for sm_90a,
at all.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

NEEDED = {
    "forward_kernel": ("HGMMA", "UTMALDG"),
    "small_kernel": ("HGMMA", "UTMALDG"),
    "stream_kernel": ("HGMMA", "UTMALDG"),
    "decode_kernel": ("UTMALDG",),
    "decode_turned_kernel": ("HGMMA", "UTMALDG"),
}
HOPPER = ("HGMMA", "UTMALDG")
FORBIDDEN = ("LDL", "STL")  # local memory: what the resource usage calls a stack
INSTRUCTION = re.compile(rf"/\*[0-9a-f]{{4,}}\*/.*?\b({'|'.join(HOPPER + FORBIDDEN)})\b")


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


def instructions(cuobjdump: str, module: str) -> dict[str, Counter]:
    """How often each of the sm90 kernels has the instructions above, by mangled name."""
    found: dict[str, Counter] = {}
    counts = None
    command = [cuobjdump, "--gpu-architecture", "sm_90a", "--dump-sass", module]
    path = f"{Path(cuobjdump).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # for nvdisasm
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}) as process:
        for line in process.stdout:
            if match := re.match(r"\s*Function : (\S+)", line):
                ours = "sm90" in match[1] and any(kernel in match[1] for kernel in NEEDED)
                counts = found.setdefault(match[1], Counter()) if ours else None
            elif counts is not None and (match := INSTRUCTION.search(line)):
                counts[match[1]] += 1
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return found


def main() -> int:
    cuobjdump, module = sys.argv[1:]
    dump = subprocess.run([cuobjdump, "--dump-resource-usage", module], check=True, capture_output=True, text=True)
    found = list(kernels(dump.stdout))
    errors = [
        f"{arch} {name}: {use['STACK']} bytes of stack, {use['LOCAL']} of local memory"
        for arch, name, use in found
        if use["STACK"] or use["LOCAL"]
    ]
    for arch in sorted({arch for arch, _, _ in found}):
        registers = [use["REG"] for other, _, use in found if other == arch]
        print(f"{arch}: {len(registers)} kernels, {min(registers)} to {max(registers)} registers")
    if not found:
        errors.append(f"{module} holds no kernel")

    hopper = instructions(cuobjdump, module)
    needed = {name: next(NEEDED[kernel] for kernel in NEEDED if kernel in name) for name in hopper}
    for opcode in HOPPER:
        counts = [counts[opcode] for name, counts in hopper.items() if opcode in needed[name]]
        if counts:
            print(f"sm_90a: {min(counts)} to {max(counts)} {opcode} in each of {len(counts)} kernels")
    for name, counts in hopper.items():
        errors += [f"sm_90a {name}: no {opcode}" for opcode in needed[name] if not counts[opcode]]
        errors += [f"sm_90a {name}: {counts[opcode]} {opcode}" for opcode in FORBIDDEN if counts[opcode]]
    if not hopper:
        errors.append(f"{module} holds no forward kernel for sm_90a")
    print(*errors, sep="\n", end="\n" if errors else "")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
