# SPDX-License-Identifier: Apache-2.0
"""FlashCore as one of PyTorch's flash-attention implementations: the registry of torch.nn.attention, "flashcore".

While it is active, PyTorch's own kernels behind F.scaled_dot_product_attention and torch.nn.attention.varlen give way
to FlashCore's forward pass for the calls that FlashCore does; the others run as before. Gradients are right: PyTorch's
own backward kernels take our output and log-sum-exp, which mean the same as theirs.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch.nn import attention as registry

import flashcore

from ._torch_sdpa import attempt

NAME = "flashcore"


class _Override:
    """Our kernels in the place of PyTorch's, until `remove` is called: what the registry keeps."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        for operator, key, kernel in KERNELS:
            exists = hasattr(torch.ops.aten, operator)
            if exists and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key):
                self._replace(operator, key, kernel)

    def _replace(self, operator, key, kernel):
        original = torch.library.get_kernel(f"aten::{operator}", key)

        def run(keys, *args, **kwargs):
            result = kernel(*args, **kwargs)
            return original.call_boxed(keys, *args, **kwargs) if result is NotImplemented else result

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden
            self.library.impl(operator, run, key, with_keyset=True)

    def remove(self):
        self.library._destroy()


def _detached(*tensors):
    """Autograd's part is done above the kernels; FlashCore would refuse tensors that require grad."""
    return tuple(x.detach() if x.requires_grad else x for x in tensors)


def _sdpa(query, key, value, dropout_p, is_causal, scale):
    if dropout_p != 0.0:
        return NotImplemented
    return attempt(*_detached(query, key, value), is_causal, scale, enable_gqa=True, return_lse=True)


def _sdpa_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    if attn_mask is not None:
        return NotImplemented
    return _sdpa(query, key, value, dropout_p, is_causal, scale)


def _no_dropout(query):
    """The state of a random generator that was not used."""
    return query.new_empty((2,), dtype=torch.uint64), query.new_empty((), dtype=torch.uint64), query.new_empty(0)


def _sdpa_cuda(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    result = NotImplemented if return_debug_mask else _sdpa(query, key, value, dropout_p, is_causal, scale)
    if result is NotImplemented:
        return result
    return *result, None, None, query.shape[2], key.shape[2], *_no_dropout(query)


def _flash(
    out,
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):
    """aten::_flash_attention_forward: inputs (batch, sequence, heads, head_dim), or packed (total, heads, head_dim)."""
    others = dropout_p != 0.0 or return_debug_mask or alibi_slopes is not None or block_table is not None
    if others or num_splits not in (None, 0, 1):
        return NotImplemented
    query, key, value = _detached(query, key, value)
    packed = cum_seq_q is not None
    if packed != (cum_seq_k is not None) or (seqused_k is not None and not packed):
        return NotImplemented
    left, right = (None if side is None or side < 0 else side for side in (window_size_left, window_size_right))
    options = {
        "causal": is_causal,
        "window": (left, right),
        "scale": scale,
        "batch_invariant": num_splits == 1,
        "return_lse": True,
        "out": out,
    }
    try:
        if not packed:
            return flashcore.attention(query, key, value, **options)
        options.update(max_seqlen_q=max_q, max_seqlen_k=max_k, seqused_k=seqused_k)
        return flashcore.attention_varlen(query, key, value, cum_seq_q, cum_seq_k, **options)
    except (TypeError, ValueError):
        return NotImplemented


def _forward(query, *args, **kwargs):
    result = _flash(None, query, *args, **kwargs)
    return result if result is NotImplemented else (*result, *_no_dropout(query))


def _forward_inplace(out, *args, **kwargs):
    result = _flash(out, *args, **kwargs)
    return result if result is NotImplemented else result[1]


# Operators of aten, each where this PyTorch has it (2.11 has no _flash_attention_forward_no_dropout_inplace).
KERNELS = (
    ("_scaled_dot_product_flash_attention_for_cpu", "CPU", _sdpa_cpu),
    ("_scaled_dot_product_flash_attention", "CUDA", _sdpa_cuda),
    ("_flash_attention_forward", "CUDA", _forward),
    ("_flash_attention_forward_no_dropout_inplace", "CUDA", _forward_inplace),
)

registry.register_flash_attention_impl(NAME, register_fn=_Override)


def activate() -> None:
    """Lets PyTorch's scaled_dot_product_attention and varlen_attn run on FlashCore, in the whole process.

    The same as torch.nn.attention.activate_flash_attention_impl("flashcore"), once flashcore.torch has been imported.
    Calls that FlashCore does not do, and those for which PyTorch chooses another of its backends, run as before.
    """
    registry.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Gives PyTorch its own implementation back."""
    registry.restore_flash_attention_impl()


@contextlib.contextmanager
def activated():
    """activate() for a block; afterwards the implementation that was active before is active again."""
    before = registry.current_flash_attention_impl()
    activate()
    try:
        yield
    finally:
        if before is None:
            restore()
        else:
            registry.activate_flash_attention_impl(before)
