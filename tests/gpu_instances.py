# SPDX-License-Identifier: Apache-2.0
"""A program that runs every GPU kernel that plan() can give on this device and checks the results, for
test_gpu_code.py and for compute-sanitizer. Prints a line for each kernel that ran.

    python tests/gpu_instances.py [PART ...]

A part is a backend's forward kernels, or "combine", "decode" (of the backends that are named, or all), "turned" (sm90's
other kernel for that) or "small" (with the stream kernel). Without parts: all that the GPU has. A part can also be a
dtype or a head dimension: then the forward kernels' and decode's others are left out (for compute-sanitizer, under
which all of them take minutes)."""

from __future__ import annotations

import itertools
import os
import sys

from arrays import SMALL_FORMS, STREAM, backends, on, small_form, torch
from kvcache import make as make_decoding
from reference import PLAIN, Options, assert_attention
from test_varlen import check, make

import flashcore

# Each kernel's own head dimensions, and for each one that is padded to it.
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
PADDED = (8, 40, 72, 120, 136, 200)
DTYPES = ("float16", "bfloat16")
MASKS = (PLAIN, Options(causal=True, softcap=20.0), Options(window=(70, 3)), Options(scale=-0.1))

# Batch, seqlen_q, seqlen_k, heads_q, heads_k: few tiles and many, one for a block or several, short queries of grouped
# heads. All kernels run on the first; on each other one those that it is the first to get.
SHAPES = (
    (1, 150, 333, 6, 2),
    (2, 3, 333, 8, 2),
    (1, 8, 150, 140, 140),
    (1, 64, 150, 396, 132),
    (1, 250, 150, 132, 132),
    (1, 300, 150, 132, 132),
)

# Inputs are made and results judged on the CPU: with CUDA_FORCE_PTX_JIT PyTorch has no kernels of its own.
cpu = on("cpu")


def on_gpu(function, *tensors, **options):
    """What function gives for the tensors on the GPU, back on the CPU."""
    moved = [[t.cuda() for t in x] if isinstance(x, list) else x.cuda() for x in tensors]
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    result = function(*moved, **options)
    return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()


def plan_of(shape, head_dim: int, dtype: str, backend: str, options: Options):
    batch, seqlen_q, seqlen_k, heads_q, heads_k = shape
    query, key = (batch, seqlen_q, heads_q, head_dim), (batch, seqlen_k, heads_k, head_dim)
    return flashcore.plan(query, key, key, dtype=dtype, device="cuda", backend=backend, **options.keywords())


def kernel(plan, dtype: str) -> str:
    packed = f" packed {plan.packed_heads}" if plan.packed_heads > 1 else ""
    return f"{plan.kernel} {dtype} head_dim {plan.head_dim} tile {plan.tile_q} x {plan.tile_k}{packed}"


def attention(backend: str, seed: int = 0) -> set[str]:
    ran = set()
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS + PADDED:
            done = set()
            for shape in SHAPES[:1] if head_dim in PADDED else SHAPES:
                tensors = None
                # Plain and general scores are kernels of their own.
                for options in MASKS if shape is SHAPES[0] and head_dim in HEAD_DIMS else MASKS[:2]:
                    plan = plan_of(shape, head_dim, dtype, backend, options)
                    name = kernel(plan, dtype)
                    what = name, plan.tiles > plan.blocks, options
                    if what in done:
                        continue
                    done.add(what)
                    ran.add(name)
                    seed += 3
                    tensors = cpu.qkv(*shape, head_dim, dtype, seed, 2.0)
                    out, lse = on_gpu(
                        flashcore.attention, *tensors, return_lse=True, backend=backend, **options.keywords()
                    )
                    assert_attention(cpu, out, lse, *tensors, options, f"{name} {shape} {options}")
                    if backend == "sm90":  # sums its rows in another way where no lse is asked for
                        out = on_gpu(flashcore.attention, *tensors, backend=backend, **options.keywords())
                        assert_attention(cpu, out, None, *tensors, options, f"{name} {shape} {options}, no lse")
                # Scores that rise so far that tiles are run again.
                if backend == "sm90" and head_dim in HEAD_DIMS and tensors is not None:
                    tensors[1][:, 5] *= 20
                    out = on_gpu(flashcore.attention, *tensors, backend=backend)
                    assert_attention(cpu, out, None, *tensors, PLAIN, f"{name} {shape}, again")
    return ran


# Batch, seqlen_q, seqlen_k, heads_q, heads_k for the small kernel: whole tiles, and tiles with heads side by side.
SMALL = ((2, 150, 300, 6, 2), (1, 5, 300, 8, 2))


def small(seed: int = 0) -> set[str]:
    """sm90's kernel for small problems in every form (rows of a tile, key groups, blocks of a cluster)."""
    ran = set()
    for dtype in DTYPES:
        for head_dim in (40, 64, 128):
            for form in SMALL_FORMS:
                os.environ["FLASHCORE_SM90_KERNEL"] = small_form(form)
                for shape in SMALL:
                    seed += 3
                    for options in (MASKS[0], MASKS[1 + seed % 3]):
                        plan = plan_of(shape, head_dim, dtype, "sm90", options)
                        assert plan.kernel == "sm90_small", plan
                        name = f"{kernel(plan, dtype)} threads {plan.threads}"
                        name += f" plain {options == PLAIN} splits {plan.splits}"
                        ran.add(name)
                        tensors = cpu.qkv(*shape, head_dim, dtype, seed, 2.0)
                        out, lse = on_gpu(
                            flashcore.attention, *tensors, return_lse=True, backend="sm90", **options.keywords()
                        )
                        assert_attention(cpu, out, lse, *tensors, options, f"{name} {shape} {options}")
                        if head_dim == 64 and shape == SMALL[0] and options == PLAIN:  # the instance without maxima
                            out = on_gpu(flashcore.attention, *tensors, backend="sm90")
                            assert_attention(cpu, out, None, *tensors, PLAIN, f"{name} {shape} without maxima")
    return ran | stream(seed)


# The same for the stream kernel: few tiles, and several for each block.
STREAM_SHAPES = ((2, 150, 300, 6, 6), (20, 300, 260, 6, 6))


def stream(seed: int) -> set[str]:
    """sm90's stream kernel."""
    ran = set()
    os.environ["FLASHCORE_SM90_KERNEL"] = small_form(STREAM)
    for dtype in DTYPES:
        for head_dim, shape in itertools.product((40, 64), STREAM_SHAPES):
            seed += 3
            plan = plan_of(shape, head_dim, dtype, "sm90", PLAIN)
            assert plan.kernel == "sm90_stream", plan
            name = kernel(plan, dtype)
            ran.add(name)
            tensors = cpu.qkv(*shape, head_dim, dtype, seed, 2.0)
            out, lse = on_gpu(flashcore.attention, *tensors, return_lse=True, backend="sm90")
            assert_attention(cpu, out, lse, *tensors, PLAIN, f"{name} {shape}")
            if head_dim == 64:  # the instance without maxima
                out = on_gpu(flashcore.attention, *tensors, backend="sm90")
                assert_attention(cpu, out, None, *tensors, PLAIN, f"{name} {shape} without maxima")
    return ran


def varlen(backend: str) -> None:
    """Sequences of all kinds of lengths, with NaN past the used keys and behind the last sequence: a few tiles, and so
    many (40 key heads) that blocks get several."""
    batch = [(1, 1), (0, 0), (130, 130), (64, 200), (257, 40), (0, 9), (20, 0)]
    used = [1, 0, 100, 200, 39, 5, 0]
    few = [*((d, 2, 2) for d in HEAD_DIMS), (64, 3, 2), (128, 4, 2)]
    for seed, (head_dim, group, heads_k) in enumerate([*few, *((d, 1, 40) for d in HEAD_DIMS)]):
        dtype, options = DTYPES[seed % len(DTYPES)], (PLAIN, Options(causal=True), Options(window=(40, 9)))[seed % 3]
        tensors, cu_q, cu_k = make(cpu, batch, heads_k * group, heads_k, head_dim, dtype, seed, tail_q=5, tail_k=70)
        for a in tensors[1:]:
            for begin, end, count in zip(cu_k, cu_k[1:], used, strict=False):
                a[begin + count : end] = float("nan")
        starts = cpu.int32(cu_q), cpu.int32(cu_k)
        out, lse = on_gpu(
            flashcore.attention_varlen,
            *tensors,
            *starts,
            seqused_k=cpu.int32(used),
            return_lse=True,
            backend=backend,
            **options.keywords(),
        )
        check(cpu, out, lse, tensors, cu_q, cu_k, options, used, f"{backend} varlen {head_dim} {group}")


# Tokens, heads_q, heads_k: one slice of rows, two, and several tiles of them; on Hopper parts and clusters.
DECODED = ((1, 4, 2), (3, 16, 2), (5, 22, 2), (1, 16, 8), (8, 32, 8))
# The kernel with turned products: tiles of 8, 16 and 32 rows, parts that a kernel merges, and clusters.
TURNED = ((1, 4, 2), (1, 16, 8), (4, 16, 4), (4, 32, 8), (3, 16, 2), (8, 32, 8))


# Of 1, 16, 8: so many short sequences that a block has several, one after the other.
MANY = [37 * i % 300 for i in range(70)]


def decode(machines) -> set[str]:
    """Sequences of all kinds of lengths and single ones, whole and divided among blocks, contiguous and in pages, with
    new tokens, on each machine's kernel."""
    os.environ["FLASHCORE_SM90_DECODE"] = "straight"
    ran = set()
    case = 0
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS + PADDED:
            for tokens, *heads in DECODED if head_dim in HEAD_DIMS else DECODED[:1]:
                for lengths in ([700, 0, 64, 2999, 1], [1700], *([MANY] if heads == [16, 8] else [])):
                    case += 1
                    for backend in machines:
                        ran.add(decode_once(dtype, head_dim, tokens, tuple(heads), lengths, case, backend))
    return ran


def turned() -> set[str]:
    """The same for sm90's kernel with turned products, which takes a single sequence, or a few, or few rows of many."""
    os.environ["FLASHCORE_SM90_DECODE"] = "turned"
    ran = set()
    case = 0
    for dtype in DTYPES:
        for head_dim in (d for d in HEAD_DIMS + PADDED if d <= 128):
            for tokens, *heads in TURNED if head_dim in (64, 128) else TURNED[:2]:
                walked = [MANY] if heads == [16, 8] else []
                for lengths in ([1700], [30]) if heads[1] < 8 else ([1700], [700, 64], *walked):
                    case += 1
                    ran.add(decode_once(dtype, head_dim, tokens, tuple(heads), lengths, case, "sm90"))
    return ran


def decode_once(
    dtype: str, head_dim: int, tokens: int, heads: tuple, lengths: list[int], case: int, backend: str
) -> str:
    options = (Options(causal=True), Options(causal=True, softcap=20.0), Options(window=(70, 3)))[case % 3]
    new, page_size = case % 3 * 2, (0, 16, 64, 256)[case // 2 % 4]
    decoding = make_decoding(cpu, lengths, tokens, heads, head_dim, dtype, new=new, page_size=page_size, seed=case)
    given = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in decoding.keywords().items()}
    arrays = [x.cuda() for x in (decoding.query, decoding.key_cache, decoding.value_cache, decoding.seqlens())]
    invariant = case % 5 == 0 and os.environ["FLASHCORE_SM90_DECODE"] != "turned"  # which is not for that
    given.update(options.keywords(), batch_invariant=invariant, backend=backend)
    out, lse = flashcore.attention_kvcache(*arrays, return_lse=True, **given)
    what = f"decode {backend} {dtype} {head_dim} {tokens} {heads} {lengths} {options}"
    decoding.check(out.cpu(), lse.cpu(), options, what)
    before = decoding.key_cache, decoding.value_cache
    decoding.key_cache, decoding.value_cache = arrays[1].cpu(), arrays[2].cpu()
    decoding.check_written(before)
    query, cache = (tuple(x.shape) for x in arrays[:2])
    table = given.get("page_table")
    plan = flashcore.plan(
        query,
        cache,
        cache,
        cache_seqlens=(len(lengths),),
        page_table=None if table is None else tuple(table.shape),
        dtype=dtype,
        device="cuda",
        backend=backend,
    )
    assert plan.backend == backend
    return f"{plan.kernel} {dtype} head_dim {plan.head_dim} tile {plan.tile_q} x {plan.tile_k}"


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
    machines = backends("cuda")
    parts = [part for part in sys.argv[1:] if part not in DTYPES and not part.isdigit()]
    DTYPES = tuple(part for part in sys.argv[1:] if part in DTYPES) or DTYPES
    if dims := [int(part) for part in sys.argv[1:] if part.isdigit()]:
        HEAD_DIMS, PADDED = (tuple(d for d in of if d in dims) for of in (HEAD_DIMS, PADDED))
    named = [part for part in parts if part in machines] or machines
    alone = {"combine": combine, "decode": lambda: decode(named)}
    if "sm90" in machines:
        alone.update(turned=turned, small=small)
    ran = set()
    for part in parts or [*alone, *machines]:
        if part in alone:
            ran |= alone[part]()
        else:
            os.environ["FLASHCORE_SM90_KERNEL"] = "large"  # also for what is small
            varlen(part)
            ran |= attention(part)
    print("\n".join(sorted(ran)))
