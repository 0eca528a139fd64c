# SPDX-License-Identifier: Apache-2.0
"""What FlashCore costs the host behind each interface: microseconds a call, on a tiny problem and on the study's own.

    python bench/overhead.py

Issued: many calls one after another, the mean of the best of several rounds. On a GPU the calls return before the work
is done, so this is the time to issue them; the queue is emptied between rounds. Alone: single calls, each with the wait
for its result, the median of the best round. Beside them, on a GPU, the least that any call takes: a kernel that does
nothing, which PyTorch launches, and the wait with nothing to wait for.

Chains, on a GPU: calls that depend on each other, in one program: what a longer chain takes more than a short one, for
each call that it has more, waited for. In a CUDA graph and under a compiler the host has nothing to do for a call, so
that a chain of `flashcore.attention` captured by hand is the GPU's own time; what a compiled one takes beyond that is
what the operator costs there.

Writes bench/results/host[-GPU].json, from which bench/report.py makes README's table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from host import OURS, PEER
from surroundings import RESULTS, short_name, surroundings

import flashcore
import flashcore.torch

SHAPES = {"1, 1, 1, 64 fp16": (1, 1, 1, 64), "1, 8, 512, 64 fp16": (1, 8, 512, 64)}  # batch, heads, sequence, head_dim
CHAINED = "1, 8, 512, 64 fp16"
SHORT, LONG = 4, 24  # calls of a chain
Call = Callable[[], Any]


def issued(calls: dict[Any, Call], synchronize: Call, count: int, rounds: int) -> dict[Any, float]:
    """The time of each call in its best round, rounds in turn."""
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


def alone(calls: dict[Any, Call], synchronize: Call, count: int, rounds: int) -> dict[Any, float]:
    """The time of each call with `synchronize` behind it: the median of its best round, rounds in turn."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            times = []
            for _ in range(count):
                begin = time.perf_counter()
                call()
                synchronize()
                times.append(time.perf_counter() - begin)
            best[name] = min(best[name], statistics.median(times) * 1e6)
    return best


def per_call(chains: dict[int, Call], synchronize: Call, rounds: int) -> float:
    """What one call more costs: from the best times of a short chain and a long one."""
    waited = {n: lambda run=run: (run(), synchronize()) for n, run in chains.items()}
    times = issued(waited, synchronize, 20, rounds)
    return (times[LONG] - times[SHORT]) / (LONG - SHORT)


@contextlib.contextmanager
def one_thread():
    """Keeps the CPU's backends to the calling thread."""
    threads = flashcore.get_num_threads(), torch.get_num_threads()
    flashcore.set_num_threads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        flashcore.set_num_threads(threads[0])
        torch.set_num_threads(threads[1])


def torch_calls(shape: tuple[int, ...], device: str) -> dict[str, Call]:
    q, k, v = torch.randn(3, *shape, device=device).half()
    out = torch.empty_like(q)
    ops = flashcore.torch
    options = ("bhsd", False, None, None, None, 0.0, False, None)
    return {
        OURS: lambda: flashcore.attention(q, k, v, layout="bhsd"),
        f"{OURS}, out=": lambda: flashcore.attention(q, k, v, layout="bhsd", out=out),
        "flashcore.torch.attention": lambda: ops.attention(q, k, v, layout="bhsd"),
        "the same through the dispatcher": lambda: torch.ops.flashcore.attention(q, k, v, *options),
        "flashcore.torch.scaled_dot_product_attention": lambda: ops.scaled_dot_product_attention(q, k, v),
        PEER: lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    }


def jax_calls(shape: tuple[int, ...], device: str) -> tuple[dict[str, Call], Call]:
    """The calls, and what waits for them. ImportError without JAX."""
    # Or JAX takes most of the GPU's memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from flashcore.jax import dot_product_attention

    batch, heads, rows, dim = shape
    dtype = "bfloat16" if device == "cuda" else "float32"  # each is what JAX itself can do there
    x = jax.random.normal(jax.random.key(1), (batch, rows, heads, dim), dtype)
    functions = {
        "flashcore.jax under jax.jit": lambda x: dot_product_attention(x, x, x),
        "jax.nn under jax.jit": lambda x: jax.nn.dot_product_attention(x, x, x),
        "x + 1 under jax.jit": lambda x: x + 1,
    }
    last = {}

    def keep(name: str, call: Callable) -> Call:
        def run():
            last[name] = call(x)

        return run

    calls = {name: keep(name, jax.jit(function)) for name, function in functions.items()}
    return calls, lambda: jax.block_until_ready(list(last.values()))


def chains(shape: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Microseconds of one call more in each kind of program, on a GPU."""
    q, k, v = torch.randn(3, *shape, device="cuda").half()

    def chain(attention: Callable, count: int) -> Callable:
        def run(x, k, v):
            for _ in range(count):
                x = attention(x, k, v, layout="bhsd")
            return x

        return run

    def captured(function: Callable) -> Call:
        with torch.cuda.stream(torch.cuda.Stream()):
            function(q, k, v)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function(q, k, v)
        return graph.replay

    def compiled(function: Callable) -> Call:
        program = torch.compile(function, fullgraph=True, mode="reduce-overhead")
        return lambda: program(q, k, v)

    def called(function: Callable) -> Call:
        return lambda: function(q, k, v)

    ours, operator = flashcore.attention, flashcore.torch.attention
    kinds = {
        f"{OURS} in a captured graph": (captured, ours),
        'flashcore.torch.attention under torch.compile(mode="reduce-overhead")': (compiled, operator),
        OURS: (called, ours),
        "flashcore.torch.attention": (called, operator),
    }
    made = {name: {n: make(chain(call, n)) for n in (SHORT, LONG)} for name, (make, call) in kinds.items()}
    for programs in made.values():
        for program in programs.values():
            for _ in range(4):  # compilers take the first calls to record
                program()
    torch.cuda.synchronize()
    return {name: per_call(programs, torch.cuda.synchronize, rounds) for name, programs in made.items()}


def jax_chain(shape: tuple[int, ...], rounds: int) -> float:
    """The same of flashcore.jax under jax.jit."""
    import jax

    from flashcore.jax import dot_product_attention

    batch, heads, rows, dim = shape
    q, k, v = jax.random.normal(jax.random.key(1), (3, batch, rows, heads, dim), "float16")

    def chain(count: int) -> Call:
        def run(x, k, v):
            for _ in range(count):
                x = dot_product_attention(x, k, v)
            return x

        program = jax.jit(run)
        return lambda: program(q, k, v).block_until_ready()

    return per_call({n: chain(n) for n in (SHORT, LONG)}, lambda: None, rounds)


def measure(device: str, count: int, rounds: int) -> dict[str, Any]:
    """The report's own part."""
    # On the CPU a call returns when the work is done: only the first problem, by one thread, tells of the host.
    shapes = dict(list(SHAPES.items())[: None if device == "cuda" else 1])
    told: dict[str, list[dict[str, Any]]] = {label: [] for label in shapes}

    def time_calls(calls: dict[tuple[str, str], Call], wait: Call) -> None:
        """By label and name; all in turn, since the machine's speed changes from one second to another."""
        fast, lone = issued(calls, wait, count, rounds), alone(calls, wait, count, rounds)
        for label, name in calls:
            told[label].append({"name": name, "issued": fast[label, name], "alone": lone[label, name]})

    every = {}
    for label, shape in shapes.items():
        calls = torch_calls(shape, device)
        results = [call().float() for call in calls.values()]
        if not all(torch.allclose(result, results[-1], atol=4e-3) for result in results):
            raise RuntimeError(f"{label}: the interfaces do not give the same result")
        every.update({(label, name): call for name, call in calls.items()})
    if device == "cuda":
        for label in shapes:
            every[label, "torch, a kernel that does nothing"] = lambda: torch.cuda._sleep(0)
            every[label, "nothing but the wait"] = lambda: None
    time_calls(every, torch.cuda.synchronize if device == "cuda" else lambda: None)
    found = chains(SHAPES[CHAINED], rounds) if device == "cuda" else {}
    # Last, since JAX's threads take part of the machine once it is there.
    try:
        for label, shape in shapes.items():
            calls, wait = jax_calls(shape, device)
            time_calls({(label, name): call for name, call in calls.items()}, wait)
        if device == "cuda":
            found["flashcore.jax under jax.jit"] = jax_chain(SHAPES[CHAINED], rounds)
    except ImportError as error:
        print(f"without JAX: {error}")
    report: dict[str, Any] = {"shapes": [{"label": label, "calls": calls} for label, calls in told.items()]}
    if found:
        report["chain_label"] = CHAINED
        report["chains"] = [{"name": name, "microseconds": value} for name, value in found.items()]
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What FlashCore costs the host behind each interface.")
    parser.add_argument("--count", type=int, default=300, help="calls of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="the folder of the result file")
    parser.add_argument("--commit", default="", help="what to write as commit where there is no git")
    options = parser.parse_args(argv)
    if options.count < 1 or options.rounds < 1:
        parser.error("--count and --rounds: expected 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method = {"count": options.count, "rounds": options.rounds}
    with torch.no_grad(), one_thread():
        facts = surroundings(device, options.commit)
        report = {"kind": "host", **facts, "method": method, **measure(device, options.count, options.rounds)}
    for shape in report["shapes"]:
        print(shape["label"])
        for call in shape["calls"]:
            print(f"  {call['name']}: {call['issued']:.2f} us issued, {call['alone']:.2f} alone")
    for chain in report.get("chains", ()):
        print(f"one call more, {chain['name']}: {chain['microseconds']:.2f} us")
    path = options.output / f"{'-'.join(filter(None, ('host', short_name(facts))))}.json"
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
