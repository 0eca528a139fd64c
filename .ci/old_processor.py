# SPDX-License-Identifier: Apache-2.0
"""Runs the installed module on a processor that has only the baseline instruction set, and checks it against NumPy."""

import numpy as np

import flashcore

assert flashcore.info()["cpu"]["isa"] == "baseline", flashcore.info()["cpu"]

for dtype, tolerance in (np.float32, 1e-5), (np.float16, 2e-3):
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 2, 67, 64)).astype(dtype)
    scores = query.astype(float) @ key.astype(float).swapaxes(2, 3) / 8
    scores[:, :, ~np.tri(67, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(3, keepdims=True))
    expected = weights @ value.astype(float) / weights.sum(3, keepdims=True)
    error = np.abs(flashcore.attention(query, key, value, causal=True, layout="bhsd") - expected).max()
    print(f"{np.dtype(dtype)}: largest error {error:.2g}, allowed {tolerance}")
    assert error <= tolerance
