# SPDX-License-Identifier: Apache-2.0
"""FlashCore in PyTorch: operators for torch.compile and torch.export, a drop-in for SDPA, a provider behind SDPA.

- `attention`, `attention_varlen`, `attention_kvcache`: as in flashcore, as operators `flashcore::...` of PyTorch's
  dispatcher.
- `scaled_dot_product_attention`: torch's function of that name; what FlashCore does not do goes to torch.
- `activate`, `restore`, `activated`: PyTorch's own `F.scaled_dot_product_attention` and `torch.nn.attention.varlen` run
  on FlashCore.

There is no backward pass yet: an operator whose input requires grad while grad is enabled raises.
"""

from __future__ import annotations

import warnings
from typing import Any

import flashcore

try:
    import torch
    from torch.nn.attention import register_flash_attention_impl as _  # noqa: F401
except ImportError as error:
    raise ImportError("flashcore.torch needs PyTorch 2.11 or later; flashcore.attention works with any") from error

from torch import Tensor

from ._torch_provider import activate, activated, restore
from ._torch_sdpa import attempt, top_left, why_not

__all__ = [
    "activate",
    "activated",
    "attention",
    "attention_kvcache",
    "attention_varlen",
    "restore",
    "scaled_dot_product_attention",
]

_OPTIONS = (
    "bool causal, SymInt? window_left, SymInt? window_right, float? scale, float softcap, bool batch_invariant, "
    "str? backend"
)
_library = torch.library.Library("flashcore", "DEF")


def _define(name: str, schema: str, compute, lse_shape):
    """Defines the operators `name` and `name_lse`: a schema has one kind of result. Returns both.

    compute(*arguments of the schema, **options): the call of flashcore. lse_shape(*arguments of the schema).
    """

    def run(return_lse, arguments):
        *arguments, causal, left, right, scale, softcap, batch_invariant, backend = arguments
        return compute(
            *arguments,
            causal=causal,
            window=(left, right),
            scale=scale,
            softcap=softcap,
            return_lse=return_lse,
            batch_invariant=batch_invariant,
            backend=backend,
        )

    def fake(query, key, value, *_):
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    def fake_lse(query, key, value, *rest):
        return fake(query, key, value), query.new_empty(lse_shape(query, *rest), dtype=torch.float32)

    def define(operator, result, kernel, fake):
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        _library.define(f"{operator}({schema}, {_OPTIONS}) -> {result}", tags=tags)
        overload = getattr(torch.ops.flashcore, operator).default
        _library.impl(operator, kernel, "CPU")
        _library.impl(operator, kernel, "CUDA")
        _library.impl(operator, lambda keys, *args: _no_backward(overload, keys, args), "Autograd", with_keyset=True)
        torch.library.register_fake(f"flashcore::{operator}", fake, lib=_library)
        return overload

    return (
        define(name, "Tensor", lambda *arguments: run(False, arguments), fake),
        define(f"{name}_lse", "(Tensor, Tensor)", lambda *arguments: run(True, arguments), fake_lse),
    )


def _no_backward(overload, keys, arguments):
    """What stands in autograd's place: refuses what would need a gradient; else goes on to the device."""
    if torch.is_grad_enabled():
        for argument, value in zip(overload._schema.arguments, arguments, strict=False):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{argument.name}: it requires grad; FlashCore has no backward pass yet: call it under "
                    f"torch.no_grad() or pass {argument.name}.detach()"
                )
    return overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def _fixed(query, key, value, layout, **options):
    return flashcore.attention(query, key, value, layout=layout, **options)


def _fixed_lse_shape(query, layout, *_):
    batch, rows, heads = query.shape[0], query.shape[1], query.shape[2]
    return (batch, heads, rows) if layout == "bshd" else (batch, rows, heads)


def _packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, **options):
    options.update(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, seqused_k=seqused_k)
    return flashcore.attention_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, **options)


_attention, _attention_lse = _define(
    "attention", "Tensor query, Tensor key, Tensor value, str layout", _fixed, _fixed_lse_shape
)
_varlen, _varlen_lse = _define(
    "attention_varlen",
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k, Tensor? seqused_k",
    _packed,
    lambda query, *_: (query.shape[1], query.shape[0]),
)


def _cached(query, key_cache, value_cache, cache_seqlens, page_table, layout, **options):
    options.update(page_table=page_table, layout=layout)
    return flashcore.attention_kvcache(query, key_cache, value_cache, cache_seqlens, **options)


def _appended(query, key_cache, value_cache, cache_seqlens, key, value, *rest, **options):
    result = _cached(query, key_cache, value_cache, cache_seqlens, *rest, key=key, value=value, **options)
    _count_write(key_cache, value_cache)
    return result


def _count_write(*tensors):
    """Tells autograd that something else than an operator of PyTorch has written to them."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


# Two pairs: a schema says whether the caches are written to, and tracing copies what may be.
_kvcache, _kvcache_lse = _define(
    "attention_kvcache",
    "Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, Tensor? page_table, str layout",
    _cached,
    lambda query, seqlens, table, layout, *_: _fixed_lse_shape(query, layout),
)
_kvcache_append, _kvcache_append_lse = _define(
    "attention_kvcache_append",
    "Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, Tensor key, Tensor value, "
    "Tensor? page_table, str layout",
    _appended,
    lambda query, seqlens, key, value, table, layout, *_: _fixed_lse_shape(query, layout),
)


def _direct(query, key, value) -> bool:
    """Whether nothing but the device has to see the call: no tracing, mode, transform or subclass is at work.

    An operator whose kernels are written in Python costs several microseconds in the dispatcher.
    """
    return (
        type(query) is type(key) is type(value) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    layout: str = "bshd",
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """flashcore.attention as an operator of PyTorch: for torch.compile(fullgraph=True), torch.export and fake tensors.

    Shapes, dtypes, options and errors are those of flashcore.attention, which has `out=` besides.
    """
    if _direct(query, key, value):
        return flashcore.attention(
            query,
            key,
            value,
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            layout=layout,
            return_lse=return_lse,
            batch_invariant=batch_invariant,
            backend=backend,
        )
    left, right = window or (None, None)
    operator = _attention_lse if return_lse else _attention
    return operator(query, key, value, layout, causal, left, right, scale, softcap, batch_invariant, backend)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """flashcore.attention_varlen as an operator of PyTorch. Shapes, dtypes, options and errors are those of that."""
    if _direct(query, key, value):
        return flashcore.attention_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            seqused_k=seqused_k,
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            return_lse=return_lse,
            batch_invariant=batch_invariant,
            backend=backend,
        )
    left, right = window or (None, None)
    operator = _varlen_lse if return_lse else _varlen
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k)
    return operator(query, key, value, *lengths, causal, left, right, scale, softcap, batch_invariant, backend)


def attention_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    page_table: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    layout: str = "bshd",
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """flashcore.attention_kvcache as an operator of PyTorch. Shapes, dtypes, options and errors are those of that.

    With key and value it writes to the caches, and its schema says so.
    """
    if (key is None) != (value is None):
        raise ValueError("key and value: got one of them, expected both or neither")
    if _direct(query, key_cache, value_cache):
        result = flashcore.attention_kvcache(
            query,
            key_cache,
            value_cache,
            cache_seqlens,
            key=key,
            value=value,
            page_table=page_table,
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            layout=layout,
            return_lse=return_lse,
            batch_invariant=batch_invariant,
            backend=backend,
        )
        if key is not None:
            _count_write(key_cache, value_cache)
        return result
    left, right = window or (None, None)
    arrays = (query, key_cache, value_cache, cache_seqlens)
    options = (page_table, layout, causal, left, right, scale, softcap, batch_invariant, backend)
    if key is None:
        return (_kvcache_lse if return_lse else _kvcache)(*arrays, *options)
    return (_kvcache_append_lse if return_lse else _kvcache_append)(*arrays, key, value, *options)


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"scaled_dot_product_attention goes to torch, not to FlashCore: {reason}", stacklevel=3)


# torch.compile then runs it while tracing. So does torch.compiler.assume_constant_result, which imports torch._dynamo.
_warn_once._dynamo_marked_constant = True


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, computed by FlashCore where FlashCore can.

    query: (batch, heads_q, seqlen_q, head_dim); key, value: (batch, heads_k, seqlen_k, head_dim). is_causal aligns the
    first query with the first key, as torch does. Whatever else torch takes (masks, dropout, inputs that require grad,
    other shapes and dtypes) goes to torch, with one warning for each reason. Returns a tensor of query's shape, dtype
    and order of memory.
    """
    if attn_mask is None and dropout_p == 0.0 and _direct(query, key, value):
        result = attempt(query, key, value, is_causal, scale, enable_gqa)
        if result is not NotImplemented:
            return result
    reason = why_not(query, key, value, attn_mask, dropout_p, enable_gqa)
    if reason is not None:
        _warn_once(reason)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    key, value, causal, window = top_left(query, key, value, is_causal)
    if query.stride(1) < query.stride(2):  # callers may view the result transposed back, as with torch
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return attention(query, key, value, causal=causal, window=window, scale=scale).transpose(1, 2)
    return attention(query, key, value, causal=causal, window=window, scale=scale, layout="bhsd")
