# SPDX-License-Identifier: Apache-2.0
"""FlashCore in JAX: dot_product_attention as a custom call of XLA, on the CPU and on NVIDIA GPUs.

Works under jax.jit, jax.vmap, jax.shard_map and, with shapes that may be symbolic, jax.export (whose `disabled_checks`
must name the custom calls, `TARGETS`). There is no backward pass yet: differentiating it raises.
"""

from __future__ import annotations

import functools
import inspect
import warnings

import flashcore
from flashcore import _core

try:
    import jax
    import jax.ffi
    import jax.numpy as jnp
    import numpy as np
except ImportError as error:
    raise ImportError("flashcore.jax needs JAX 0.5 or later; flashcore.attention works with any") from error
if not hasattr(_core, "xla_handlers"):
    raise ImportError("this FlashCore was built without its handlers for XLA (FLASHCORE_JAX=OFF)")

__all__ = ["TARGETS", "dot_product_attention"]

TARGETS = ("flashcore_attention", "flashcore_attention_varlen")
"""The names of the custom calls, for jax.export.DisabledSafetyCheck.custom_call."""

for _platform, _handlers in _core.xla_handlers().items():
    for _name, _handler in _handlers.items():
        jax.ffi.register_ffi_target(_name, _handler, platform=_platform)

_JAX_OWN = jax.nn.dot_product_attention
_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"dot_product_attention goes to jax.nn, not to FlashCore: {reason}", stacklevel=3)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _call(target, options, *arrays):
    """(out, lse) of one custom call. `options`: causal, window_left, window_right (-1: unlimited), scale."""
    query, _, value = arrays[:3]
    *outer, heads, _ = query.shape
    lse = (*outer[:-1], heads, outer[-1])
    results = [
        jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype),
        jax.ShapeDtypeStruct(lse, jnp.float32),
    ]
    causal, left, right, scale = options
    call = jax.ffi.ffi_call(target, results, vmap_method="broadcast_all")
    sides = {"window_left": np.int64(left), "window_right": np.int64(right)}
    return call(*arrays, causal=causal, scale=np.float64(scale), **sides)


@_call.defjvp
def _no_gradient(target, options, primals, tangents):
    raise NotImplementedError(
        "FlashCore has no backward pass yet: use jax.nn.dot_product_attention where you differentiate, or put the "
        "inputs through jax.lax.stop_gradient"
    )


def _bottom_right(queries, keys, is_causal, local_window):
    """How many keys take part, and the window (-1: unlimited) that FlashCore aligns with the last query and key.

    JAX aligns the first query with the first key. Keys that no query sees are cut off. None where a query may see none.
    """
    left, right = (-1, -1) if local_window is None else local_window
    if local_window is not None and min(left, right) < 0:
        return None
    if is_causal:
        right = 0
    if right >= 0:
        keys = min(keys, queries + right)
        right = queries - keys + right
    if left >= 0:
        left = left + keys - queries
        if left < 0:
            return None
    return keys, left, right


def _sections(lengths, rows):
    """Where two sections of each sequence's `rows` begin, its own and its padding; and the end."""
    offsets = jnp.arange(lengths.shape[0], dtype=jnp.int32) * rows
    starts = jnp.stack([offsets, offsets + jnp.clip(lengths, 0, rows)], 1).ravel()
    return jnp.append(starts, jnp.int32(lengths.shape[0] * rows))


def _platform(array) -> str:
    """Where the array is, and while JAX traces where it puts what nobody has placed."""
    try:
        return next(iter(array.devices())).platform
    except (AttributeError, jax.errors.ConcretizationTypeError):  # traced
        device = jax.config.jax_default_device or jax.default_backend()
        return device if isinstance(device, str) else device.platform


def _why_not(query, key, value, bias, mask, scale, lengths, window, implementation) -> str | None:
    if bias is not None or mask is not None:
        return "bias is given" if mask is None else "mask is given"
    if implementation is not None:
        return f"implementation={implementation!r} asks for it"
    if query.ndim not in (3, 4) or key.ndim != query.ndim or value.ndim != query.ndim:
        return "the arrays have not 3 or 4 dimensions"
    if key.shape != value.shape or key.shape[-1] != query.shape[-1] or key.shape[:-3] != query.shape[:-3]:
        return "the shapes do not fit each other"
    if not (key.dtype == value.dtype == query.dtype):
        return "the dtypes differ"
    if isinstance(scale, jax.core.Tracer):
        return "scale is traced"
    if window is None:
        return "a query may see no key"
    if lengths and (window[1] >= 0 or window[2] >= 0):
        return "sequence lengths together with is_causal or local_window_size"
    head_dim, platform = query.shape[-1], _platform(query)
    if not 0 < head_dim <= 256:
        return "head_dim is not 1 to 256"
    if platform == "cpu":
        return None if query.dtype in (jnp.float32, jnp.float16, jnp.bfloat16) else f"dtype {query.dtype}"
    if platform not in ("gpu", "cuda") or not flashcore.info()["devices"]:
        return f"FlashCore does not run on this platform ({platform})"
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"dtype {query.dtype} on a GPU"
    return "head_dim is no multiple of 8" if head_dim % 8 else None


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation=None,
    return_residual=False,
):
    """jax.nn.dot_product_attention, computed by FlashCore where FlashCore can.

    query: (batch, queries, heads, head_dim) or (queries, heads, head_dim); key, value: (batch, keys, heads_k, head_dim)
    or (keys, heads_k, head_dim), heads_k dividing heads. As in JAX, is_causal and local_window_size, a number of keys
    to either side or (left, right), align the first query with the first key. query_seq_lengths, key_value_seq_lengths:
    (batch), int32, with neither of them. What FlashCore does not do (bias, mask, other dtypes and shapes) goes to
    jax.nn, with one warning for each reason. Returns an array of query's shape and dtype, and with return_residual the
    log-sum-exp, (batch, queries, heads) in float32.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    lengths = query_seq_lengths is not None or key_value_seq_lengths is not None
    both = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    window = None
    if query.ndim in (3, 4) and key.ndim == query.ndim:
        window = _bottom_right(query.shape[-3], key.shape[-3], is_causal, both)
    reason = _why_not(query, key, value, bias, mask, scale, lengths, window, implementation)
    if reason is not None:
        _warn_once(reason)
        options = {
            "scale": scale,
            "is_causal": is_causal,
            "query_seq_lengths": query_seq_lengths,
            "key_value_seq_lengths": key_value_seq_lengths,
            "local_window_size": local_window_size,
            "implementation": implementation,
        }
        if return_residual or "return_residual" in inspect.signature(_JAX_OWN).parameters:
            options["return_residual"] = return_residual
        return _JAX_OWN(query, key, value, bias, mask, **options)
    if query.shape[-2] % max(key.shape[-2], 1):
        raise ValueError(f"query: {query.shape[-2]} heads are no multiple of key's {key.shape[-2]}")
    keys, left, right = window
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v = (x if x.ndim == 4 else x[None] for x in (query, key, value))
    if lengths:
        out, lse = _padded(q, k, v, query_seq_lengths, key_value_seq_lengths, scale)
    else:
        if keys != k.shape[1]:
            k, v = k[:, :keys], v[:, :keys]
        out, lse = _call("flashcore_attention", (False, left, right, scale), q, k, v)
        lse = lse.swapaxes(1, 2)
    out, lse = out.reshape(query.shape), lse.reshape(query.shape[:-1])
    return (out, lse) if return_residual else out


def _padded(q, k, v, lengths_q, lengths_k, scale):
    """Attention over the first lengths_q queries and lengths_k keys of each sequence; zeros for the other queries."""
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    lengths_q = jnp.full((batch,), queries, jnp.int32) if lengths_q is None else jnp.asarray(lengths_q, jnp.int32)
    lengths_k = jnp.full((batch,), keys, jnp.int32) if lengths_k is None else jnp.asarray(lengths_k, jnp.int32)
    lengths_k = jnp.clip(lengths_k, 0, keys)
    used = jnp.stack([lengths_k, jnp.zeros_like(lengths_k)], 1).ravel()
    packed = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    sections = _sections(lengths_q, queries), _sections(lengths_k, keys)
    out, lse = _call("flashcore_attention_varlen", (False, -1, -1, scale), *packed, *sections, used)
    return out, lse.T
