# SPDX-License-Identifier: Apache-2.0
"""What attention should give, how wrong it may be, and the check that compares the two.

All functions take arrays in bshd. The reference is float64 on the same (rounded) inputs and the same device. The
yardstick is PyTorch's SDPA pinned to its flash backend where that can express the problem, else `emulation`, which does
what it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from arrays import Arrays, torch

# Largest number of scores held at once: 32 Mi float64 are 256 MiB on the GPU; less on the CPU, where caches matter
# more.
SCORES_AT_ONCE = {True: 1 << 25, False: 1 << 21}


@dataclass(frozen=True)
class Options:
    """The options of a call that change its result."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float = 0.0

    def keywords(self) -> dict:
        """Keyword arguments, leaving out what has its default."""
        return {
            k: v for k, v in vars(self).items() if v is not None and v is not False and not (v == 0 and k == "softcap")
        }

    def scale_for(self, head_dim: int) -> float:
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale

    def limits(self) -> tuple[int | None, int | None]:
        """Keys seen to the left and to the right of the diagonal."""
        left, right = self.window or (None, None)
        return left, 0 if self.causal else right

    def masks(self) -> bool:
        return self.limits() != (None, None)


PLAIN = Options()


def visible(arrays: Arrays, options: Options, queries, keys, seqlen_q: int, seqlen_k: int):
    """Boolean (len(queries), len(keys)): which of the keys each of the queries sees, the last query standing on the
    last key."""
    offset = keys[None, :] - (queries[:, None] + (seqlen_k - seqlen_q))
    left, right = options.limits()
    seen = offset == offset
    if left is not None:
        seen = seen & (offset >= -left)
    if right is not None:
        seen = seen & (offset <= right)
    return seen


def _folded(query, key, value):
    """(batch, heads_k, rows, head_dim) each: the queries of a group of heads one below the other, head by head."""
    batch, seqlen_q, heads_q, head_dim = query.shape
    heads_k = key.shape[2]
    q = query.swapaxes(1, 2).reshape(batch, heads_k, heads_q // heads_k * seqlen_q, head_dim)
    return q, key.swapaxes(1, 2), value.swapaxes(1, 2)


def _unfolded(out, lse, batch, seqlen_q, heads_q):
    return out.reshape(batch, heads_q, seqlen_q, out.shape[-1]).swapaxes(1, 2), lse.reshape(batch, heads_q, seqlen_q)


def _blocks(arrays: Arrays, batch: int, heads: int, rows: int, keys: int):
    """Slices of the batch and of the rows that keep the scores in hand few."""
    budget = max(1, SCORES_AT_ONCE[arrays.on_gpu] // max(1, heads * keys))
    step_b = max(1, budget // max(1, rows))
    step_r = rows if step_b > 1 else max(1, min(rows, budget))
    for b in range(0, batch, step_b):
        for r in range(0, rows, step_r):
            yield slice(b, b + step_b), slice(r, min(rows, r + step_r))


def _run(arrays: Arrays, query, key, value, options: Options, work: str, attend):
    """Calls attend(q, k, v, positions of the rows) block by block and puts the results together."""
    batch, seqlen_q, heads_q, _ = query.shape
    q, k, v = (arrays.cast(arrays.contiguous(a), work) for a in _folded(query, key, value))
    _, heads_k, rows, _ = q.shape
    out = arrays.full((batch, heads_k, rows, v.shape[-1]), 0.0, work)
    lse = arrays.full((batch, heads_k, rows), -math.inf, work)
    if rows and key.shape[1]:
        positions = arrays.arange(rows) % seqlen_q
        for b, r in _blocks(arrays, batch, heads_k, rows, key.shape[1]):
            out[b, :, r], lse[b, :, r] = attend(q[b, :, r], k[b], v[b], positions[r])
    return _unfolded(out, lse, batch, seqlen_q, heads_q)


def reference(arrays: Arrays, query, key, value, options: Options = PLAIN):
    """Attention in float64: out (batch, seqlen_q, heads_q, head_dim) and lse (batch, heads_q, seqlen_q)."""
    xp = arrays.xp
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    scale = options.scale_for(query.shape[-1])

    def attend(q, k, v, positions):
        scores = xp.matmul(q, k.swapaxes(-1, -2)) * scale
        if options.softcap:
            scores = options.softcap * xp.tanh(scores / options.softcap)
        if options.masks():
            seen = visible(arrays, options, positions, arrays.arange(seqlen_k), seqlen_q, seqlen_k)
            scores = xp.where(seen, scores, -math.inf)
        top = xp.amax(scores, axis=-1, keepdims=True)
        top = xp.where(top == -math.inf, 0.0, top)
        weights = xp.exp(scores - top)
        total = xp.sum(weights, axis=-1, keepdims=True)
        none = total == 0
        total = xp.where(none, 1.0, total)
        return xp.matmul(weights, v) / total, xp.where(none, -math.inf, top + xp.log(total))[..., 0]

    return _run(arrays, query, key, value, options, "float64", attend)


def emulation(arrays: Arrays, query, key, value, options: Options = PLAIN, tile: int = 128):
    """Attention as a good flash kernel computes it: the online softmax in float32 over tiles of keys, the weights
    rounded to the inputs' dtype before the second product, the row sums not rounded, the output rounded. Returns out in
    that dtype and lse."""
    xp = arrays.xp
    dtype = dtype_name(query)
    seqlen_q, seqlen_k = query.shape[1], key.shape[1]
    scale = options.scale_for(query.shape[-1])

    def attend(q, k, v, positions):
        top = arrays.full((*q.shape[:-1], 1), -math.inf, "float32")
        total = arrays.full((*q.shape[:-1], 1), 0.0, "float32")
        out = arrays.full((*q.shape[:-1], v.shape[-1]), 0.0, "float32")
        for begin in range(0, seqlen_k, tile):
            end = min(seqlen_k, begin + tile)
            scores = xp.matmul(q, k[:, :, begin:end].swapaxes(-1, -2)) * scale
            if options.softcap:
                scores = options.softcap * xp.tanh(scores / options.softcap)
            if options.masks():
                keys = arrays.arange(seqlen_k)[begin:end]
                scores = xp.where(visible(arrays, options, positions, keys, seqlen_q, seqlen_k), scores, -math.inf)
            new_top = xp.maximum(top, xp.amax(scores, axis=-1, keepdims=True))
            offset = xp.where(new_top == -math.inf, 0.0, new_top)
            weights = xp.exp(scores - offset)
            shrink = xp.exp(top - offset)
            total = total * shrink + xp.sum(weights, axis=-1, keepdims=True)
            weights = arrays.cast(arrays.cast(weights, dtype), "float32")
            out = out * shrink + xp.matmul(weights, v[:, :, begin:end])
            top = new_top
        none = total == 0
        total = xp.where(none, 1.0, total)
        return out / total, xp.where(none, -math.inf, top + xp.log(total))[..., 0]

    out, lse = _run(arrays, query, key, value, options, "float32", attend)
    return arrays.cast(out, dtype), lse


def dtype_name(a) -> str:
    return str(a.dtype).removeprefix("torch.")


def sdpa_expresses(query, key, options: Options) -> bool:
    """Whether PyTorch's flash backend computes this problem. Its causal mask aligns top left (and CUDA's takes equal
    lengths only); a negative scale it does not compute rightly."""
    if torch is None or 0 in query.shape or 0 in key.shape:
        return False
    if options.window is not None or options.softcap or (options.scale is not None and options.scale <= 0):
        return False
    if query.shape[0] * query.shape[2] > 65535:  # CUDA's grid
        return False
    return not options.causal or query.shape[1] == key.shape[1]


def sdpa_flash(query, key, value, options: Options):
    """PyTorch's scaled_dot_product_attention, pinned to its flash backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    group = query.shape[2] // key.shape[2]
    q = query.transpose(1, 2)
    k, v = (a.repeat_interleave(group, dim=2).transpose(1, 2) for a in (key, value))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=options.causal, scale=options.scale)
    return out.transpose(1, 2)


def yardstick(arrays: Arrays, query, key, value, options: Options = PLAIN):
    """The output (in the inputs' dtype) whose errors ours are measured against."""
    if sdpa_expresses(query, key, options):
        return sdpa_flash(query, key, value, options)
    return emulation(arrays, query, key, value, options)[0]


def errors(arrays: Arrays, out, expected) -> tuple[float, float]:
    """The largest error and the relative Frobenius error against `expected` (float64). Not-a-numbers give infinity."""
    if 0 in tuple(expected.shape):
        return 0.0, 0.0
    difference = abs(arrays.float64(out) - expected)
    largest = float(difference.max())
    norm = math.sqrt(float((expected * expected).sum()))
    frobenius = math.sqrt(float((difference * difference).sum()))
    if math.isnan(largest) or math.isnan(frobenius):
        return math.inf, math.inf
    return largest, frobenius / norm if norm else (math.inf if frobenius else 0.0)


def score_magnitude(query, key, options: Options) -> float:
    """A bound for the scores (what rounding errors of scores are relative to): |scale| · max |q| · max |k|, in
    Euclidean norms."""
    if 0 in query.shape or 0 in key.shape:
        return 0.0
    norms = [math.sqrt(float((a * a).sum(-1).max())) for a in (query, key)]
    return abs(options.scale_for(query.shape[-1])) * norms[0] * norms[1]


def cancellation(arrays: Arrays, value, expected) -> float:
    """How much smaller the outputs are than the values that they are averages of (root mean squares); at least 1."""
    value = arrays.float64(value)
    sizes = [float((a * a).mean()) if 0 not in tuple(a.shape) else 0.0 for a in (value, expected)]
    return max(1.0, math.sqrt(sizes[0] / sizes[1])) if sizes[1] else 1.0


def meets_standard(
    ours: tuple[float, float], yard: tuple[float, float], dtype: str, magnitude: float, cancelled: float = 1.0
) -> bool:
    """The numeric standard: largest error at most 2 × yardstick's + 1e-5, relative Frobenius error at most 1.25 ×
    yardstick's.

    In float32 both errors are a few roundings, whose sums depend on the order of the additions, so that the ratio of
    two right answers scatters freely. There, and only there, the Frobenius error has a floor: twice one rounding
    (2⁻²⁴) of the summands, which are `cancelled` times as large as the outputs, and twice one of the scores, which the
    exponential turns from an absolute error of 2⁻²⁴ · |score| into a relative one of that size.
    """
    floor = 2.0**-23 * (1 + magnitude) * cancelled if dtype == "float32" else 0.0
    return ours[0] <= 2 * yard[0] + 1e-5 and ours[1] <= max(1.25 * yard[1], floor)


def lse_tolerance(magnitude: float, softcap: float) -> float:
    """How far lse may be off. It is computed in float32 from scores of at most `magnitude`: sums of head_dim ≤ 256
    products, whose rounding errors (truncation on tensor cores) stay below 16 steps of 2⁻²³. The logarithm and a
    softcap's tanh add 1e-6 of their own size.
    """
    return 1e-5 + 2e-6 * magnitude + 1e-6 * softcap


def assert_lse(arrays: Arrays, lse, expected, magnitude: float, softcap: float = 0.0, what: str = "") -> None:
    lse = arrays.float64(lse)
    assert tuple(lse.shape) == tuple(expected.shape), (
        f"{what}: lse has shape {tuple(lse.shape)}, not {tuple(expected.shape)}"
    )
    if 0 in tuple(expected.shape):
        return
    none = expected == -math.inf
    assert bool(((lse == -math.inf) == none).all()), f"{what}: lse is -inf elsewhere than where a query sees no key"
    error = arrays.xp.where(none, 0.0, abs(arrays.xp.where(none, 0.0, lse) - arrays.xp.where(none, 0.0, expected)))
    worst, limit = float(error.max()), lse_tolerance(magnitude, softcap)
    assert worst <= limit, f"{what}: lse is wrong by {worst:.3g}, more than {limit:.3g}"


def assert_attention(arrays: Arrays, out, lse, query, key, value, options: Options = PLAIN, what: str = "") -> None:
    """Checks a result of attention (bshd; lse may be None) against the numeric standard."""
    expected, expected_lse = reference(arrays, query, key, value, options)
    assert tuple(out.shape) == tuple(expected.shape), f"{what}: shape {tuple(out.shape)}, not {tuple(expected.shape)}"
    dtype = dtype_name(query)
    assert dtype_name(out) == dtype, f"{what}: dtype {dtype_name(out)}, not {dtype}"
    magnitude = score_magnitude(arrays.float64(query), arrays.float64(key), options)
    ours = errors(arrays, out, expected)
    yard = errors(arrays, yardstick(arrays, query, key, value, options), expected)
    assert meets_standard(ours, yard, dtype, magnitude, cancellation(arrays, value, expected)), (
        f"{what}: largest error {ours[0]:.3g} (yardstick {yard[0]:.3g}), "
        f"relative Frobenius error {ours[1]:.3g} (yardstick {yard[1]:.3g}), scores up to {magnitude:.3g}"
    )
    none = (expected_lse == -math.inf).swapaxes(1, 2)
    assert not bool((out[none] != 0).any()), f"{what}: a query that sees no key has an output that is not zero"
    if lse is not None:
        assert dtype_name(lse) == "float32", f"{what}: lse has dtype {dtype_name(lse)}"
        assert_lse(arrays, lse, expected_lse, magnitude, options.softcap, what)
