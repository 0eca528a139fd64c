# SPDX-License-Identifier: Apache-2.0
"""FlashCore in Hugging Face transformers: after `register()`, attn_implementation="flashcore" takes it.

Serves causal and bidirectional self-attention, cross attention, grouped queries, sliding windows, softcaps, padding on
either side, growing and static caches, with and without torch.compile. A mask of another form goes to PyTorch's SDPA,
as with attn_implementation="sdpa". What is not supported (dropout, attention sinks, position biases, transformers'
paged cache) is refused by its name. Inference only: there is no backward pass yet.

How masks travel: transformers makes one mask for each forward pass (`make_mask`), and hands it to the attention of
every layer (`attend`). Between the two it is one of
    None                             every key is in use; the last query stands at the last key
    int32 (batch, 1, 1, 1)           so many keys are in use, counted from the first; the last query stands at the last
    int32 (batch, 1, 1, 2)           as many keys are in use as there are queries, counted from the first
    int32 (batch, 1, 1, 4)           rows in use: queries from, to, keys from, to; the last query stands at the last key
    a 4-D mask of another dtype      for SDPA
With four dimensions transformers passes it on as it is; its last extent tells compiled code what to do.
"""

from __future__ import annotations

import warnings

import torch

from . import torch as ops  # says which PyTorch it needs

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations import hub_kernels
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
    from transformers.utils.import_utils import is_tracing
except ImportError as error:
    raise ImportError("flashcore.transformers needs transformers 5 or later") from error

__all__ = ["register"]

NAME = "flashcore"


def make_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    use_vmap=False,
    device="cpu",
    **kwargs,
):
    """A mask in one of the forms above. The arguments are those of transformers.masking_utils.sdpa_mask.

    attention_mask: (batch, tokens seen), True for what is no padding. Where it is given, its values decide which form,
    so they are read once for each forward pass (which synchronizes a GPU).
    """

    def for_sdpa():
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    # transformers says where a mask is plainly causal, or plainly nothing, by allowing to skip it; but for a compiled
    # step of decoding, where it is causal.
    bidirectional = allow_is_bidirectional_skip
    causal = not bidirectional and (allow_is_causal_skip or q_length == 1)
    if use_vmap or not (causal or bidirectional):
        return for_sdpa()
    first = q_offset - kv_offset  # the key row at which the first query stands
    end = first + q_length

    def first_keys(end):  # of a static cache
        if isinstance(end, torch.Tensor):
            return torch.zeros(batch_size, 1, 1, 1, dtype=torch.int32, device=device) + end.to(torch.int32)
        if end == kv_length:
            return None
        return torch.full((batch_size, 1, 1, 2 if end == q_length else 1), end, dtype=torch.int32, device=device)

    if attention_mask is None:
        return None if bidirectional else first_keys(end)
    if is_tracing(attention_mask):
        return for_sdpa()
    # The quick way for what has no padding. (Static caches count on the device; there the mask is as long as they say.)
    needed = kv_length if bidirectional else 0 if isinstance(end, torch.Tensor) else end
    if attention_mask.shape[1] - kv_offset >= needed and bool(attention_mask.all()):
        return None if bidirectional else first_keys(end)
    real = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
    counts = real.sum(1)
    begins = real.int().argmax(1)
    ends = torch.where(counts > 0, kv_length - real.flip(1).int().argmax(1), 0)
    facts = torch.stack([begins, ends, counts, counts.new_zeros(()) + end + 0 * counts]).tolist()
    begin, until, count, (end, *_) = facts
    if any(u - b != n for b, u, n in zip(begin, until, count, strict=True)):
        return for_sdpa()  # padding between tokens
    if all(n == kv_length for n in count):
        return None
    if causal and all(n == end for n in count):
        return first_keys(end)
    if causal or local_size is not None:
        first = end - q_length
        queries = (begins - first).clamp(0, q_length), (ends - first).clamp(0, q_length)
    else:
        queries = torch.zeros_like(begins), torch.full_like(ends, q_length)
    return torch.stack([*queries, begins, ends], 1).to(torch.int32).view(batch_size, 1, 1, 4)


def _sections(begin, end, length):
    """Where three sections of each sequence's `length` rows begin: before, in and after [begin, end); and the end."""
    offsets = torch.arange(begin.shape[0], device=begin.device, dtype=torch.int32) * length
    starts = torch.stack([torch.zeros_like(begin), begin, end], 1) + offsets[:, None]
    return torch.nn.functional.pad(starts.flatten(), (0, 1), value=begin.shape[0] * length)


def _padded(query, key, value, rows, options):
    """Attention over the rows in use, as sequences that lie packed in the same memory.

    query, key, value: (batch, heads, tokens, head_dim). Returns (batch, queries, heads, head_dim). Rows of padding
    become sequences without keys. The host reads nothing.
    """
    batch, heads, queries, _ = query.shape
    heads_k, keys = key.shape[1:3]
    by_head = key.stride(1) > key.stride(2)  # the memory of caches: each head of a sequence is a sequence of its own
    if by_head:
        query = query.reshape(batch * heads_k, heads // heads_k, queries, -1)
        key, value = (x.reshape(batch * heads_k, 1, keys, -1) for x in (key, value))
        rows = rows.repeat_interleave(heads_k, 0)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    begin_q, end_q, begin_k, end_k = rows.unbind(1)
    none = torch.zeros_like(end_k)
    out = ops.attention_varlen(
        q,
        k,
        v,
        _sections(begin_q, end_q, queries),
        _sections(begin_k, end_k, keys),
        max_seqlen_q=queries,
        max_seqlen_k=keys,
        seqused_k=torch.stack([none, end_k - begin_k, none], 1).flatten(),
        **options,
    )
    if by_head:
        out = out.view(batch, heads_k, queries, heads // heads_k, -1).transpose(1, 2)
    return out.reshape(batch, queries, heads, -1)


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    s_aux=None,
    position_bias=None,
    cache=None,
    **kwargs,
):
    """transformers' attention function. query, key, value: (batch, heads, tokens, head_dim).

    Returns (batch, tokens, heads, head_dim) and None in the place of attention weights.
    """
    for name, refused in (
        ("dropout", dropout),
        ("s_aux", s_aux is not None),
        ("position_bias", position_bias is not None),
        ("cache", cache is not None),
        ("output_attentions", kwargs.get("output_attentions")),
    ):
        if refused:
            raise NotImplementedError(f'{name}: attn_implementation="flashcore" does not support it')
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = None
    if sliding_window is not None:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    options = {"causal": causal, "window": window, "scale": scaling, "softcap": softcap or 0.0}
    mask = attention_mask
    if mask is not None and mask.dim() == 2:  # from models that make their masks themselves
        shape = query.shape[0], query.shape[2], key.shape[2], key.shape[2] - query.shape[2]
        skips = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal}
        mask = make_mask(*shape, attention_mask=mask.bool(), local_size=sliding_window, device=mask.device, **skips)
    if kwargs.get("cu_seq_lens_q") is not None:  # sequences packed in a batch of one
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        starts = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k", kwargs["cu_seq_lens_q"])
        hints = {"max_seqlen_q": kwargs.get("max_length_q"), "max_seqlen_k": kwargs.get("max_length_k")}
        return ops.attention_varlen(q, k, v, *starts, **hints, **options)[None], None
    if mask is not None and mask.dtype == torch.int32 and mask.shape[-1] == 2:
        key, value, mask = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]], None
    if mask is None:
        return ops.attention(*(x.transpose(1, 2) for x in (query, key, value)), **options), None
    if mask.dtype != torch.int32:
        if not torch.compiler.is_compiling():
            warnings.warn("flashcore: a mask that is neither causal nor padding goes to PyTorch's SDPA", stacklevel=2)
        kwargs.update(scaling=scaling, is_causal=causal, softcap=softcap)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    rows = mask.flatten(1)
    if rows.shape[1] == 1:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ops.attention_kvcache(q, k, v, rows[:, 0], **options), None
    return _padded(query, key, value, rows, options), None


def register() -> None:
    """Makes attn_implementation="flashcore" known to transformers. Calling it again does nothing more."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    load = hub_kernels.load_and_register_attn_kernel
    if getattr(load, "of_flashcore", False):
        return

    def load_unless_ours(attn_implementation, *args, **kwargs):
        if attn_implementation == NAME:
            from . import flash_attn

            return flash_attn
        return load(attn_implementation, *args, **kwargs)

    # transformers takes each name with "flash" in it for a package with FlashAttention's functions, and would look for
    # it on its hub. Ours has them.
    load_unless_ours.of_flashcore = True
    hub_kernels.load_and_register_attn_kernel = load_unless_ours
