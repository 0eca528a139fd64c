# SPDX-License-Identifier: Apache-2.0
"""A program that runs every GPU kernel that plan() can choose on this device and checks the results, for
test_gpu_code.py and for compute-sanitizer. Prints a line for each kernel that ran."""

from __future__ import annotations

import sys

from arrays import on, torch
from reference import Options, assert_attention

import flashcore

HEAD_DIMS = (8, 32, 40, 64, 96, 120, 128, 192, 256)
MASKS = (Options(), Options(causal=True, softcap=20.0), Options(window=(70, 3)), Options(scale=-0.1))


def attention(arrays, seed: int = 0) -> set[str]:
    ran = set()
    for dtype in ("float16", "bfloat16"):
        for head_dim in HEAD_DIMS:
            for options in MASKS:
                seed += 3
                tensors = arrays.qkv(2, 150, 333, 6, 2, head_dim, dtype, seed, 2.0)
                out, lse = flashcore.attention(*tensors, return_lse=True, **options.keywords())
                assert_attention(arrays, out, lse, *tensors, options, f"{dtype} {head_dim} {options}")
                plan = flashcore.plan(*tensors, **options.keywords())
                ran.add(f"{plan.kernel} {dtype} head_dim {plan.head_dim} tile {plan.tile_q} x {plan.tile_k}")
    return ran


def varlen(arrays) -> None:
    lengths = [1, 0, 130, 64, 257]
    starts = arrays.int32([sum(lengths[:i]) for i in range(len(lengths) + 1)])
    total = sum(lengths) + 5  # rows behind the last sequence
    q, k, v = (arrays.random((total, heads, 64), "float16", 5) for heads in (4, 2, 2))
    out = flashcore.attention_varlen(q, k, v, starts, starts, causal=True)
    for begin, length in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths, strict=True):
        rows = slice(begin, begin + length)
        alone = flashcore.attention(q[None, rows], k[None, rows], v[None, rows], causal=True)
        assert torch.equal(out[rows], alone[0])
    assert not out[sum(lengths) :].any()


def combine(arrays) -> set[str]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        parts = [torch.randn(2, 33, 3, 40, device="cuda").to(dtype) for _ in range(3)]
        lses = [torch.randn(2, 3, 33, device="cuda") for _ in range(3)]
        out, lse = flashcore.combine(parts, lses)
        weights = torch.softmax(torch.stack(lses).double(), 0).transpose(2, 3)[..., None]
        expected = (weights * torch.stack(parts).double()).sum(0)
        assert torch.allclose(out.double(), expected, atol=1e-5, rtol=torch.finfo(dtype).eps)
        assert torch.allclose(lse.double(), torch.logsumexp(torch.stack(lses).double(), 0), atol=1e-5)
    return {"combine"}


if __name__ == "__main__":
    gpu = on("cuda")
    varlen(gpu)
    print("\n".join(sorted(attention(gpu) | combine(gpu))))
    sys.exit(0)
