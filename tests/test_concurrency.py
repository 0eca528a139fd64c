# SPDX-License-Identifier: Apache-2.0
"""Several callers at once: threads, streams, a process that forks, and a CUDA graph that is captured and replayed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from arrays import torch
from reference import Options, assert_attention

import flashcore

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")


def problems(arrays, count):
    """Different in everything, so that mixed-up state would show."""
    for i in range(count):
        options = Options(causal=i % 2 == 0, softcap=20.0 if i % 3 == 0 else 0.0)
        head_dim = (64, 32, 128)[i % 3]
        yield arrays.qkv(1 + i % 2, 100 + 37 * i, 150 + 11 * i, 4, 2, head_dim, arrays.half, i), options


def call(tensors, options):
    return flashcore.attention(*tensors, return_lse=True, **options.keywords())


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_at_once(arrays, threads):
    """Each thread gets the bits that it gets alone."""
    work = list(problems(arrays, threads))
    alone = [call(*w) for w in work]
    arrays.synchronize()
    barrier = threading.Barrier(threads)
    wrong: list[str] = []

    def run(i):
        try:
            barrier.wait()
            for _ in range(20):
                result = call(*work[i])
                arrays.synchronize()
                if not all(arrays.same_bits(a, b) for a, b in zip(result, alone[i], strict=True)):
                    wrong.append(f"thread {i} got other bits than alone")
        except Exception as error:
            wrong.append(f"thread {i}: {error!r}")

    pool = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for t in pool:
        t.start()
    for t in pool:
        t.join(timeout=120)
        assert not t.is_alive(), "a thread hangs"
    assert not wrong, wrong


def test_errors_in_threads_do_not_mix(arrays):
    """A thread whose calls fail does not disturb one whose calls succeed."""
    tensors, options = next(problems(arrays, 1))
    alone = call(tensors, options)
    wrong: list[str] = []
    stop = threading.Event()

    def fail():
        while not stop.is_set():
            try:
                flashcore.attention(tensors[0], tensors[1], tensors[2][:, :5])
                wrong.append("no error")
            except ValueError as error:
                if "value" not in str(error):
                    wrong.append(str(error))

    other = threading.Thread(target=fail)
    other.start()
    try:
        for _ in range(30):
            assert all(arrays.same_bits(a, b) for a, b in zip(call(tensors, options), alone, strict=True))
    finally:
        stop.set()
        other.join(timeout=60)
    assert not other.is_alive() and not wrong, wrong[:3]


def test_gil_is_released(arrays):
    """While a call computes, another thread of Python goes on."""
    if arrays.on_gpu:
        pytest.skip("a launch takes microseconds")
    tensors = arrays.qkv(1, 3000, 3000, 4, 4, 128, "float32", 3)
    spans: list[float] = []

    def run():
        begin = time.perf_counter()
        flashcore.attention(*tensors)
        spans.append(time.perf_counter() - begin)

    worker = threading.Thread(target=run)
    longest, last = 0.0, time.perf_counter()
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    worker.join()
    assert spans, "the call failed"
    assert longest < spans[0] / 2, f"stood still for {longest:.3f} of {spans[0]:.3f} s"


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_number_of_threads(arrays, threads):
    """Any number of threads gives the same bits."""
    tensors = arrays.qkv(2, 200, 300, 4, 2, 64, arrays.half, 5, 4.0)
    before = flashcore.get_num_threads()
    expected = flashcore.attention(*tensors, causal=True, return_lse=True)
    try:
        flashcore.set_num_threads(threads)
        assert flashcore.get_num_threads() == threads
        assert flashcore.info()["cpu"]["threads"] == threads
        result = flashcore.attention(*tensors, causal=True, return_lse=True)
    finally:
        flashcore.set_num_threads(before)
    assert all(arrays.same_bits(a, b) for a, b in zip(result, expected, strict=True))
    assert_attention(arrays, *result, *tensors, Options(causal=True))


FORK = """
import os, sys
import numpy as np
import flashcore

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 300, 4, 64)).astype(np.float32) for _ in range(3))
flashcore.set_num_threads(4)
expected = flashcore.attention(q, k, v)
child = os.fork()
same = np.array_equal(flashcore.attention(q, k, v), expected)
if child == 0:
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
sys.exit(0 if same and status == 0 else 4)
"""


@needs_fork
def test_after_fork(device):
    """A pool of threads does not survive a fork; the child must notice and not wait for it."""
    if device != "cpu":
        pytest.skip("CUDA does not survive a fork")
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


EXIT = """
import threading
import numpy as np
import flashcore

a = np.random.default_rng(0).standard_normal((1, 2000, 8, 64)).astype(np.float32)
threading.Thread(target=lambda: [flashcore.attention(a, a, a) for _ in range(100)], daemon=True).start()
flashcore.attention(a[:, :50], a, a)
"""


def test_exit_while_computing(device):
    """The process ends cleanly although a daemon thread is in the middle of a call."""
    done = subprocess.run([sys.executable, "-c", EXIT], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_flushing_of_subnormals_elsewhere_does_not_matter(arrays):
    """A thread's own setting for subnormal numbers changes no bit, whichever thread computes."""
    if torch is None or arrays.on_gpu:
        pytest.skip("needs torch on the CPU")
    tensors = list(arrays.qkv(1, 100, 100, 4, 4, 64, "float32", 7, 8.0))
    tensors[2] = tensors[2] * 1e-36
    expected = flashcore.attention(*tensors)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        result = flashcore.attention(*tensors)
    finally:
        torch.set_flush_denormal(False)
    assert arrays.same_bits(result, expected)


# --- CUDA -------------------------------------------------------------------------------------------------------------


def needs_cuda(arrays):
    if not arrays.on_gpu:
        pytest.skip("streams and graphs are CUDA's")


def test_graph_captured_and_replayed_with_new_data(arrays):
    """The same graph, new numbers in the same memory: the bits of a plain call, each time."""
    needs_cuda(arrays)
    for tensors, options in problems(arrays, 3):
        static = [t.clone() for t in tensors]
        out = torch.empty_like(static[0])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            flashcore.attention(*static, out=out, **options.keywords())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flashcore.attention(*static, out=out, **options.keywords())
            returned, lse = flashcore.attention(*static, return_lse=True, **options.keywords())
        for seed in (50, 60, 70):
            fresh = [arrays.random(t.shape, arrays.half, seed + i) for i, t in enumerate(static)]
            for target, source in zip(static, fresh, strict=True):
                target.copy_(source)
            arrays.poison_in_place(out)
            graph.replay()
            expected, expected_lse = flashcore.attention(*fresh, return_lse=True, **options.keywords())
            torch.cuda.synchronize()
            assert arrays.same_bits(out, expected)
            assert arrays.same_bits(returned, expected) and arrays.same_bits(lse, expected_lse)


def test_graph_of_varlen_and_combine(arrays):
    """Replayed with other sequence lengths in the same cu_seqlens: the kernel reads them anew."""
    needs_cuda(arrays)
    shape = (100, 4, 64)
    tensors = [arrays.random(shape, arrays.half, 80 + i) for i in range(3)]
    cu = arrays.int32([0, 40, 100])
    hints = {"max_seqlen_q": 100, "max_seqlen_k": 100}
    flashcore.attention_varlen(*tensors, cu, cu, **hints)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashcore.attention_varlen(*tensors, cu, cu, return_lse=True, **hints)
        merged, _ = flashcore.combine([out, out], [lse, lse])
    for lengths in ([0, 100, 100], [0, 1, 100], [0, 50, 80]):
        cu.copy_(arrays.int32(lengths))
        graph.replay()
        fresh = arrays.int32(lengths)
        expected = flashcore.attention_varlen(*tensors, fresh, fresh, **hints)
        torch.cuda.synchronize()
        assert arrays.same_bits(out, expected)
        assert float(abs(merged.double() - expected.double()).max()) < 2e-3


def test_two_streams(arrays):
    """Calls in two streams overlap and keep to their own memory."""
    needs_cuda(arrays)
    work = list(problems(arrays, 2))
    alone = [call(*w) for w in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in work]
    results: list[list] = [[], []]
    for _ in range(30):
        for stream, w, found in zip(streams, work, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(call(*w))
    torch.cuda.synchronize()
    for found, expected in zip(results, alone, strict=True):
        for result in found:
            assert all(arrays.same_bits(a, b) for a, b in zip(result, expected, strict=True))


def test_runs_in_the_current_stream(arrays):
    """A call sees what its stream did before it, and what follows in the stream sees its result, without
    synchronizing."""
    needs_cuda(arrays)
    tensors, options = next(problems(arrays, 1))
    expected, _ = call(tensors, options)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = [torch.zeros_like(t) for t in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 25 ms: the copies below have not run when the call is made
        for target, source in zip(late, tensors, strict=True):
            target.copy_(source)
        out, _ = call(late, options)
        copy = out.clone()
    stream.synchronize()
    assert arrays.same_bits(copy, expected)


def test_does_not_synchronize(arrays):
    """A call returns while the stream is still busy."""
    needs_cuda(arrays)
    tensors, options = next(problems(arrays, 1))
    call(tensors, options)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second: the host may be busy
    begin = time.perf_counter()
    call(tensors, options)
    busy = not torch.cuda.current_stream().query()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    assert busy, f"the stream was idle when the call returned after {elapsed:.3f} s"


def test_current_device_is_kept(arrays):
    needs_cuda(arrays)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors, options = next(problems(arrays, 1))
    expected, _ = call(tensors, options)
    there = [t.to("cuda:1") for t in tensors]
    out, _ = call(there, options)
    assert torch.cuda.current_device() == 0 and out.device.index == 1
    assert arrays.same_bits(out.to("cuda:0"), expected)
    with pytest.raises(ValueError, match="cuda:1"):
        flashcore.attention(tensors[0], there[1], there[2])
