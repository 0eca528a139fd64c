# SPDX-License-Identifier: Apache-2.0
"""Who holds the arrays that `flashcore verify` computes with: PyTorch, CuPy or NumPy, their timers and references."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import flashcore
from flashcore._numerics import sequences, visible

if TYPE_CHECKING:
    from flashcore._verify_cases import Case


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
