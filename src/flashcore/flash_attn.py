# SPDX-License-Identifier: Apache-2.0
"""FlashAttention's functions by their names and signatures (flash_attn 2), computed by FlashCore.

    from flashcore.flash_attn import flash_attn_func  # instead of: from flash_attn import flash_attn_func

Shapes, alignment of masks (the last query stands at the last key), windows (-1 is unlimited) and results are
FlashAttention's; tensors may lie on the CPU too, in float32 too there. What FlashCore does not do is refused by its
name with NotImplementedError. There is no backward pass yet: inputs that require grad are refused unless under
torch.no_grad().
"""

from __future__ import annotations

from . import torch as ops  # says which PyTorch it needs

__all__ = ["flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def _refuse(**options) -> None:
    """Raises for the first option that has another value than the one with which it does nothing."""
    for name, (value, idle) in options.items():
        if value is not idle and value != idle:
            raise NotImplementedError(f"{name}: FlashCore does not support it; got {value!r:.80}, expected {idle!r}")


def _prepared(head_dim, *tensors):
    """The tensors with a last stride of 1 and, on a GPU, a head dimension that is a multiple of 8 (zeros beside)."""
    padding = -head_dim % 8 if tensors[0].is_cuda else 0
    if padding:
        return [ops.torch.nn.functional.pad(x, (0, padding)) for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _options(head_dim, softmax_scale, causal, window_size, softcap) -> dict:
    left, right = (None if side < 0 else side for side in window_size)
    return {
        "scale": head_dim**-0.5 if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window": (left, right),
        "softcap": softcap,
    }


def _result(out, head_dim, with_lse):
    """Also FlashAttention's third result, the pattern of dropout: empty where there is none."""
    out, lse = out if with_lse else (out, None)
    out = out if out.shape[-1] == head_dim else out[..., :head_dim]
    return (out, lse, out.new_empty(0)) if with_lse else out


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention. q: (batch, seqlen_q, heads_q, head_dim); k, v: (batch, seqlen_k, heads_k, head_dim).

    softmax_scale: None means 1 / sqrt(head_dim). window_size: keys seen to the left and to the right. deterministic is
    for backward; the forward pass always is. dropout_p and alibi_slopes are refused. Returns out, of q's shape; with
    return_attn_probs (out, softmax_lse of (batch, heads_q, seqlen_q) in float32, an empty tensor).
    """
    _refuse(dropout_p=(dropout_p, 0.0), alibi_slopes=(alibi_slopes, None))
    head_dim = q.shape[-1]
    q, k, v = _prepared(head_dim, q, k, v)
    options = _options(head_dim, softmax_scale, causal, window_size, softcap)
    return _result(ops.attention(q, k, v, return_lse=return_attn_probs, **options), head_dim, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_func of query, key and value in one tensor, qkv: (batch, seqlen, 3, heads, head_dim)."""
    return flash_attn_func(
        *qkv.unbind(2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention over sequences packed one after another.

    q: (total_q, heads_q, head_dim); k, v: (total_k, heads_k, head_dim).
    cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32, where each sequence begins, and the end. max_seqlen_q,
    max_seqlen_k: the longest. dropout_p, alibi_slopes and block_table are refused. Returns out, of q's shape; with
    return_attn_probs (out, softmax_lse of (heads_q, total_q) in float32, an empty tensor).
    """
    _refuse(dropout_p=(dropout_p, 0.0), alibi_slopes=(alibi_slopes, None), block_table=(block_table, None))
    head_dim = q.shape[-1]
    q, k, v = _prepared(head_dim, q, k, v)
    out = ops.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        return_lse=return_attn_probs,
        **_options(head_dim, softmax_scale, causal, window_size, softcap),
    )
    return _result(out, head_dim, return_attn_probs)


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention over a cache of keys and values, to which new ones are appended first: one call for a step of decoding.

    q: (batch, seqlen_q, heads_q, head_dim). k_cache, v_cache: (batch, seqlen_cache, heads_k, head_dim), or with
    block_table, (batch, blocks a sequence) int32, (blocks, block_size, heads_k, head_dim). k, v: new tokens, (batch,
    seqlen_new, heads_k, head_dim), written into the caches at cache_seqlens. cache_seqlens: int, or (batch) int32, of
    tokens in the cache before; None means all of it. num_splits: 0, or 1 for results that do not depend on the batch.
    rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad and alibi_slopes are refused. Returns out, of q's shape; with
    return_softmax_lse (out, softmax_lse of (batch, heads_q, seqlen_q) in float32).
    """
    _refuse(
        rotary_cos=(rotary_cos, None),
        rotary_sin=(rotary_sin, None),
        cache_batch_idx=(cache_batch_idx, None),
        cache_leftpad=(cache_leftpad, None),
        alibi_slopes=(alibi_slopes, None),
    )
    if num_splits not in (0, 1):
        raise NotImplementedError(f"num_splits: FlashCore chooses it; got {num_splits!r:.80}, expected 0 or 1")
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if isinstance(cache_seqlens, int):
        cache_seqlens = q.new_full((q.shape[0],), cache_seqlens, dtype=ops.torch.int32)
    return ops.attention_kvcache(
        q if q.stride(-1) == 1 else q.contiguous(),
        k_cache,
        v_cache,
        cache_seqlens,
        key=k,
        value=v,
        page_table=block_table,
        return_lse=return_softmax_lse,
        batch_invariant=num_splits == 1,
        **_options(q.shape[-1], softmax_scale, causal, window_size, softcap),
    )
