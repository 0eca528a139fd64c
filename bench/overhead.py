# SPDX-License-Identifier: Apache-2.0
"""What FlashCore costs the host behind each interface: microseconds a call, on a problem too small to matter.

    python bench/overhead.py

Calls in turn, the best of several rounds. On a GPU the calls return before the work is done, so this is the time to
issue them; the queue is emptied between rounds.
"""

from __future__ import annotations

import sys
import time

import torch

import flashcore
import flashcore.torch


def microseconds(calls: dict, synchronize, count=2000, rounds=9) -> dict[str, float]:
    """The best time of each call, in turn."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            synchronize()
            begin = time.perf_counter()
            for _ in range(count):
                call()
            best[name] = min(best[name], (time.perf_counter() - begin) / count * 1e6)
            synchronize()
    return best


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    q, k, v = torch.randn(3, 1, 1, 1, 64, device=device).half()
    flashcore.set_num_threads(1)
    ops = flashcore.torch
    options = ("bshd", True, None, None, None, 0.0, False, None)
    calls = {
        "flashcore.attention": lambda: flashcore.attention(q, k, v, causal=True),
        "flashcore.torch.attention": lambda: ops.attention(q, k, v, causal=True),
        "through the dispatcher": lambda: torch.ops.flashcore.attention(q, k, v, *options),
        "flashcore.torch.scaled_dot_product_attention": lambda: ops.scaled_dot_product_attention(q, k, v),
        "torch's scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    }
    with torch.no_grad():
        for name, value in microseconds(calls, synchronize).items():
            print(f"{name}: {value:.2f} us")

    try:
        import jax

        from flashcore.jax import dot_product_attention
    except ImportError as error:
        print(f"without JAX: {error}")
        return 0
    x = jax.numpy.ones(q.shape, "bfloat16" if device == "cuda" else "float32")  # each is what JAX itself can do there
    calls = {
        "flashcore.jax under jax.jit": jax.jit(lambda x: dot_product_attention(x, x, x)),
        "jax.nn under jax.jit": jax.jit(lambda x: jax.nn.dot_product_attention(x, x, x)),
        "x + 1 under jax.jit": jax.jit(lambda x: x + 1),
    }
    calls = {name: lambda call=call: call(x) for name, call in calls.items()}
    for name, value in microseconds(calls, lambda: jax.block_until_ready(calls["x + 1 under jax.jit"]())).items():
        print(f"{name}: {value:.2f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
