# SPDX-License-Identifier: Apache-2.0
"""PyTorch's scaled_dot_product_attention in FlashCore's terms: which calls FlashCore does, and torch's causal mask."""

from __future__ import annotations

import torch

import flashcore

_capable: set[str] = set()


def _device_problem(kind: str, index: int | None) -> str | None:
    if kind == "cpu":
        return None
    if kind == "cuda":
        if not _capable:
            devices = flashcore.info()["devices"]
            _capable.update(x["device"] for x in devices if float(x["compute_capability"]) >= 8.0)
        if f"cuda:{torch.cuda.current_device() if index is None else index}" in _capable:
            return None
    return f"FlashCore does not run on this device ({kind})"


# torch.compile takes the answer for a constant; see _warn_once in torch.py.
_device_problem._dynamo_marked_constant = True

_CPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_ALIGNMENT = 8  # elements of 16 bits in 16 bytes


def _rows_are_aligned(x) -> bool:
    """Whether the rows begin at multiples of 16 bytes. torch.compile cannot trace where a tensor begins in its storage:
    compiled code takes it to be aligned, and the operator refuses one that is not."""
    begins = torch.compiler.is_compiling() or x.storage_offset() % _ALIGNMENT == 0
    return begins and not any(stride % _ALIGNMENT for stride in x.stride()[:-1])


def why_not(query, key, value, attn_mask=None, dropout_p=0.0, enable_gqa=False) -> str | None:
    """Why FlashCore cannot do this call of SDPA, in a few words; None if it can. Tensors are (batch, heads, ., .)."""
    if attn_mask is not None:
        return "attn_mask is given"
    if dropout_p != 0.0:
        return "dropout_p is not 0"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "an input requires grad, and there is no backward pass yet (use torch.no_grad())"
    kind = query.device.type
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind):
        return "autocast is on"
    tensors = (query, key, value)
    if any(x.layout is not torch.strided or x.is_nested for x in tensors):
        return "an input is no plain dense tensor"
    if not (query.dim() == key.dim() == value.dim() == 4):
        return "an input is not (batch, heads, sequence, head_dim)"
    batch, heads, _, head_dim = query.shape
    heads_k, keys = key.shape[1], key.shape[2]
    same = key.shape[0] == value.shape[0] == batch and value.shape[1:3] == key.shape[1:3]
    if not same or keys == 0 or head_dim == 0 or not key.shape[3] == value.shape[3] == head_dim:
        return "shapes differ between query, key and value, or have no extent"
    if heads != heads_k and not (enable_gqa and heads_k and heads % heads_k == 0):
        return "the number of heads differs without enable_gqa"
    if head_dim > 256:
        return "head_dim is larger than 256"
    problem = _device_problem(kind, query.device.index)
    if problem is not None:
        return problem
    if query.dtype not in (_CPU_DTYPES if kind == "cpu" else _CUDA_DTYPES):
        return f"dtype {query.dtype} on {kind}"
    if not (key.dtype == value.dtype == query.dtype and key.device == value.device == query.device):
        return "dtypes or devices differ"
    for x in tensors:
        if x.stride()[-1] != 1 and head_dim != 1:
            return "the last stride is not 1"
        if kind == "cuda" and not _rows_are_aligned(x):
            return "rows are not aligned to 16 bytes"
    if kind == "cuda" and head_dim % _ALIGNMENT:
        return "head_dim is no multiple of 8"
    return None


def top_left(query, key, value, is_causal: bool):
    """key, value, causal and window that mean torch's is_causal, which aligns the first query with the first key.

    FlashCore aligns the last with the last. With fewer keys than queries the window moves; keys after the last query
    are seen by nobody and are cut off.
    """
    if not is_causal:
        return key, value, False, None
    queries, keys = query.shape[2], key.shape[2]
    if queries > keys:
        return key, value, False, (None, queries - keys)
    if keys > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
    return key, value, True, None


def attempt(query, key, value, is_causal, scale, enable_gqa, return_lse=False):
    """SDPA of plain tensors by FlashCore, the result in query's order of memory; NotImplemented if it refuses them.

    Its own validation is the quickest test of what it takes: it raises before anything is written.
    """
    if torch._C._is_any_autocast_enabled() or (not enable_gqa and query.shape[1] != key.shape[1]):
        return NotImplemented
    try:
        causal, window = is_causal, None
        if is_causal and query.shape[2] != key.shape[2]:
            key, value, causal, window = top_left(query, key, value, is_causal)
        out = None if query.is_contiguous() else torch.empty_like(query)
        return flashcore.attention(
            query, key, value, causal=causal, window=window, scale=scale, layout="bhsd", out=out, return_lse=return_lse
        )
    except (TypeError, ValueError, IndexError):
        return NotImplemented
    except RuntimeError:
        if _device_problem(query.device.type, query.device.index) is None:
            raise
        return NotImplemented
