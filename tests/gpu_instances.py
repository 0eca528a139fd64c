# SPDX-License-Identifier: Apache-2.0
"""A program that runs every GPU kernel that plan() can choose on this device and checks the results, for
test_gpu_code.py and for compute-sanitizer. Prints a line for each kernel that ran."""

from __future__ import annotations

from arrays import on, torch
from reference import Options, assert_attention

import flashcore

HEAD_DIMS = (8, 32, 40, 64, 96, 120, 128, 192, 256)
MASKS = (Options(), Options(causal=True, softcap=20.0), Options(window=(70, 3)), Options(scale=-0.1))

# Inputs are made and results judged on the CPU: with CUDA_FORCE_PTX_JIT PyTorch has no kernels of its own.
cpu = on("cpu")


def on_gpu(function, *tensors, **options):
    """What function gives for the tensors on the GPU, back on the CPU."""
    moved = [[t.cuda() for t in x] if isinstance(x, list) else x.cuda() for x in tensors]
    result = function(*moved, **options)
    return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()


def attention(seed: int = 0) -> set[str]:
    ran = set()
    for dtype in ("float16", "bfloat16"):
        for head_dim in HEAD_DIMS:
            for options in MASKS:
                seed += 3
                tensors = cpu.qkv(2, 150, 333, 6, 2, head_dim, dtype, seed, 2.0)
                out, lse = on_gpu(flashcore.attention, *tensors, return_lse=True, **options.keywords())
                assert_attention(cpu, out, lse, *tensors, options, f"{dtype} {head_dim} {options}")
                plan = flashcore.plan(*(t.cuda() for t in tensors), **options.keywords())
                ran.add(f"{plan.kernel} {dtype} head_dim {plan.head_dim} tile {plan.tile_q} x {plan.tile_k}")
    return ran


def varlen() -> None:
    lengths = [1, 0, 130, 64, 257]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    starts = cpu.int32(bounds)
    q, k, v = (cpu.random((bounds[-1] + 5, heads, 64), "float16", 5) for heads in (4, 2, 2))
    out = on_gpu(flashcore.attention_varlen, q, k, v, starts, starts, causal=True)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        alone = on_gpu(flashcore.attention, *(t[None, begin:end] for t in (q, k, v)), causal=True)
        assert torch.equal(out[begin:end], alone[0])
    assert not out[bounds[-1] :].any()  # rows behind the last sequence


def combine() -> set[str]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        parts = [torch.randn(2, 33, 3, 40).to(dtype) for _ in range(3)]
        lses = [torch.randn(2, 3, 33) for _ in range(3)]
        out, lse = on_gpu(flashcore.combine, parts, lses)
        weights = torch.softmax(torch.stack(lses).double(), 0).transpose(2, 3)[..., None]
        expected = (weights * torch.stack(parts).double()).sum(0)
        assert torch.allclose(out.double(), expected, atol=1e-5, rtol=torch.finfo(dtype).eps)
        assert torch.allclose(lse.double(), torch.logsumexp(torch.stack(lses).double(), 0), atol=1e-5)
    return {"combine"}


if __name__ == "__main__":
    varlen()
    print("\n".join(sorted(attention() | combine())))
