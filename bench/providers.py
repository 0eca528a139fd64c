# SPDX-License-Identifier: Apache-2.0
"""What bench/compare.py measures: FlashCore and its peers, as functions of (cell, q, k, v, out).

Inputs are contiguous bshd; of a varlen cell (1, total, heads, head_dim). PyTorch's get transposed views of them: so
does bshd code call SDPA, and their kernels read them as they are. A provider that cannot write into `out` returns its
own output, of the same shape.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from suites import Cell
from timers import JaxTimer
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore


@functools.lru_cache(maxsize=4)
def cu_seqlens(cell: Cell, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the queries and the keys of each sequence begin. Made at a cell's first call: no graph holds the copy."""
    counts = torch.tensor([(0, 0), *cell.sequences]).cumsum(0, dtype=torch.int32)
    return counts[:, 0].contiguous().to(device), counts[:, 1].contiguous().to(device)


@functools.lru_cache(maxsize=4)
def cache_of(cell: Cell, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The lengths of a decoding cell's sequences, and its page table. Each sequence's pages stand in random order but
    for the last one: its keys are the peers', in another order, which changes nothing where all are seen."""
    generator = torch.Generator().manual_seed(3)
    rows, first = [], 0
    for _, keys in cell.sequences if cell.page_size else ():
        pages = keys // cell.page_size
        order = torch.randperm(pages - 1, generator=generator)
        rows.append(first + torch.cat([order, torch.tensor([pages - 1])]))
        first += pages
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).int().to(device) if rows else None
    return torch.tensor([keys for _, keys in cell.sequences], dtype=torch.int32).to(device), table


def sdpa_provider(backend: SDPBackend | None) -> Callable[..., torch.Tensor]:
    def call(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        top_left = cell.causal and cell.seqlen != cell.keys  # SDPA's causal mask is not the one that is meant
        if cell.lengths or cell.window is not None or top_left:
            if backend is SDPBackend.FLASH_ATTENTION:
                return torch_varlen(cell, q, k, v)
            raise NotImplementedError("SDPA has no windows and no variable lengths")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"is_causal": cell.causal, "enable_gqa": cell.heads != cell.kv_heads}
        if backend is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return call


def torch_varlen(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if cell.window is None else cell.window
    options: dict[str, Any] = {"window_size": (left, 0 if cell.causal else -1)}
    if cell.heads != cell.kv_heads:
        options["enable_gqa"] = True
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return varlen_attn(*packed, *cu_seqlens(cell, q.device.type), cell.seqlen, cell.keys, **options).view(q.shape)


def fa3(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    import fa3_fwd_interface

    window = (-1, -1) if cell.window is None else (cell.window, 0)
    options = {"causal": cell.causal, "window_size": window}
    if cell.lengths:
        starts = cu_seqlens(cell, q.device.type)
        longest = (cell.seqlen, cell.keys)
        result = fa3_fwd_interface.flash_attn_varlen_func(q[0], k[0], v[0], *starts, *longest, **options)
    else:
        result = fa3_fwd_interface.flash_attn_func(q, k, v, **options)
    return (result[0] if isinstance(result, tuple) else result).view(q.shape)


class Jax:
    """jax.nn.dot_product_attention by one of its implementations, "cudnn" or "xla" (which is for tests), on the arrays
    where they lie. Its own timer runs many calls as one compiled program."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def attend(self, cell: Cell, q: Any, k: Any, v: Any) -> Any:
        import jax

        return jax.nn.dot_product_attention(q, k, v, is_causal=cell.causal, implementation=self.implementation)

    def arrays(self, *arrays: torch.Tensor) -> list[Any]:
        # Or JAX takes most of the GPU's memory at once, which is full of others' arrays.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        return [jax.dlpack.from_dlpack(x) for x in arrays]

    def __call__(
        self, cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        if cell.lengths or cell.window is not None or (cell.causal and cell.seqlen != cell.keys):
            raise NotImplementedError("measured without windows, variable lengths and JAX's top-left causal mask")
        if q.device.type == "cuda":
            torch.cuda.synchronize()
        return torch.from_dlpack(self.attend(cell, *self.arrays(q, k, v)).block_until_ready())

    def timer(self, cell: Cell, arrays: list[tuple[torch.Tensor, ...]], milliseconds: float) -> JaxTimer:
        return JaxTimer(functools.partial(self.attend, cell), [self.arrays(*own[:3]) for own in arrays], milliseconds)


def flashcore_provider(backend: str | None) -> Callable[..., torch.Tensor]:
    def call(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        window = None if cell.window is None else (cell.window, 0)
        options = {"causal": cell.causal, "window": window, "backend": backend}
        if cell.decodes:
            lengths, table = cache_of(cell, q.device.type)
            k, v = (x.view(-1, cell.page_size, *x.shape[2:]) if cell.page_size else x for x in (k, v))
            q, given = (x.view(cell.batch, cell.seqlen, *x.shape[2:]) for x in (q, out))
            options.update(page_table=table, batch_invariant=cell.batch_invariant)
            flashcore.attention_kvcache(q, k, v, lengths, out=given, **options)
            return out
        if not cell.lengths:
            return flashcore.attention(q, k, v, out=out, **options)
        options.update(max_seqlen_q=cell.seqlen, max_seqlen_k=cell.keys)
        flashcore.attention_varlen(q[0], k[0], v[0], *cu_seqlens(cell, q.device.type), out=out[0], **options)
        return out

    return call


def peers_of(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    if device == "cpu":
        return {"sdpa": sdpa_provider(None)}
    return {
        "flash": sdpa_provider(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa_provider(SDPBackend.CUDNN_ATTENTION),
        "efficient": sdpa_provider(SDPBackend.EFFICIENT_ATTENTION),
        "fa3": fa3,
        "jax": Jax("cudnn"),
    }
