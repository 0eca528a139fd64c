# SPDX-License-Identifier: Apache-2.0
"""flashcore.torch: the operators under every part of PyTorch that traces, the drop-in for SDPA, the provider."""

from __future__ import annotations

import itertools
import warnings

import pytest
from reference import Options, emulation, errors, meets_standard

import flashcore

torch = pytest.importorskip("torch")
ft = pytest.importorskip("flashcore.torch")
F = torch.nn.functional
sdpa = ft.scaled_dot_product_attention

OPTIONS = (
    {},
    {"causal": True},
    {"window": (3, None), "softcap": 20.0},
    {"window": (2, 4), "scale": 0.3, "batch_invariant": True},
)
STARTS = [0, 5, 5, 37]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def fixed(arrays, layout="bshd", **sizes):
    q, k, v = arrays.qkv(2, sizes.get("queries", 37), sizes.get("keys", 37), 4, 2, 32, "float16", seed=1)
    return [x.transpose(1, 2) for x in (q, k, v)] if layout == "bhsd" else [q, k, v]


def packed(arrays):
    starts = arrays.int32(STARTS)
    return [x[0] for x in fixed(arrays)] + [starts, starts]


def cached(arrays, layout="bshd"):
    """Queries and a cache with room behind the keys."""
    q, k, v = arrays.qkv(2, 3, 40, 4, 2, 32, "float16", seed=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v)) if layout == "bhsd" else (q, k, v)
    return [q, k, v, arrays.int32([30, 7])]


def paged(arrays):
    q, k, v = arrays.qkv(4, 3, 16, 4, 2, 32, "float16", seed=2)
    return [q[:2], k, v, arrays.int32([30, 7])], arrays.int32([[3, 1], [0, 2]])


def new_tokens(arrays, layout):
    k, v = arrays.qkv(2, 3, 3, 2, 2, 32, "float16", seed=8)[1:]
    k, v = (x.transpose(1, 2) for x in (k, v)) if layout == "bhsd" else (k, v)
    return {"key": k, "value": v}


def through_dispatcher(function, *args, **options):
    """Calls while an (idle) mode is active, so that there is no short way past the dispatcher."""

    class Idle(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Idle.seen += func.namespace == "flashcore"
            return func(*args, **(kwargs or {}))

    with Idle():
        result = function(*args, **options)
    assert Idle.seen == 1
    return result


def calls(arrays):
    """Every operator, with and without lse: its function here and in flashcore, arrays, options."""
    for options, return_lse in itertools.product(OPTIONS, (False, True)):
        options = {**options, "return_lse": return_lse}
        for layout in ("bshd", "bhsd"):
            yield ft.attention, flashcore.attention, fixed(arrays, layout), {**options, "layout": layout}
        yield ft.attention_varlen, flashcore.attention_varlen, packed(arrays), options
        hints = {"max_seqlen_q": 32, "max_seqlen_k": 32, "seqused_k": arrays.int32([3, 0, 30])}
        yield ft.attention_varlen, flashcore.attention_varlen, packed(arrays), {**options, **hints}
        for layout in ("bshd", "bhsd"):
            yield kvcache, flashcore.attention_kvcache, cached(arrays, layout), {**options, "layout": layout}
        inputs, table = paged(arrays)
        yield kvcache, flashcore.attention_kvcache, inputs, {**options, "page_table": table}


kvcache = ft.attention_kvcache


def strides(x):
    """Those that mean something."""
    return [stride for stride, extent in zip(x.stride(), x.shape, strict=True) if extent > 1]


def same(arrays, got, expected):
    got, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (got, expected))
    assert len(got) == len(expected)
    return all(strides(a) == strides(b) and arrays.same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_operators_give_what_flashcore_gives(arrays):
    for function, core, inputs, options in calls(arrays):
        expected = core(*inputs, **options)
        assert same(arrays, function(*inputs, **options), expected), options
        assert same(arrays, through_dispatcher(function, *inputs, **options), expected), options


def test_opcheck(arrays):
    """PyTorch's own checks of schema, fake kernel, autograd registration and tracing with dynamic shapes."""
    plain = (True, 3, None, 0.5, 0.0, False, None)
    lengths = (*packed(arrays), 32, 32, None)
    pages, table = paged(arrays)
    new = new_tokens(arrays, "bshd").values()
    for operator, inputs in (
        ("attention", (*fixed(arrays), "bshd")),
        ("attention", (*fixed(arrays, "bhsd"), "bhsd")),
        ("attention_varlen", lengths),
        ("attention_kvcache", (*cached(arrays), None, "bshd")),
        ("attention_kvcache", (*pages, table, "bshd")),
        ("attention_kvcache_append", (*cached(arrays), *new, None, "bshd")),
    ):
        for name in (operator, f"{operator}_lse"):
            torch.library.opcheck(getattr(torch.ops.flashcore, name).default, (*inputs, *plain))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(arrays, dynamic):
    for function, core, inputs, options in calls(arrays):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *inputs, function=function, options=options: function(*inputs, **options),
            fullgraph=True,
            backend="aot_eager",
            dynamic=dynamic,
        )
        assert same(arrays, compiled(*inputs), core(*inputs, **options)), options


@pytest.mark.parametrize("how", ["direct", "dispatched", "compiled"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_appending_to_a_cache(arrays, layout, how):
    """Also under torch.compile the caches hold the new tokens afterwards, and their version counters say so."""
    call = {
        "direct": kvcache,
        "dispatched": lambda *args, **options: through_dispatcher(kvcache, *args, **options),
        "compiled": torch.compile(kvcache, fullgraph=True, backend="aot_eager"),
    }[how]
    expected, got = cached(arrays, layout), cached(arrays, layout)
    options = {**new_tokens(arrays, layout), "causal": True, "layout": layout}
    version = got[1]._version
    result = call(*got, **options)
    assert arrays.same_bits(result, flashcore.attention_kvcache(*expected, **options))
    assert all(map(arrays.same_bits, got, expected)) and not arrays.same_bits(got[1], cached(arrays, layout)[1])
    assert got[1]._version > version
    with pytest.raises(ValueError, match="key and value"):
        kvcache(*got, key=options["key"])


class Block(torch.nn.Module):
    """A small attention layer: projections around attention, as models have them."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.into = torch.nn.Linear(64, 3 * 64)
        self.out = torch.nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.into(x).view(*x.shape[:2], 3, 2, 32).unbind(2)
        return self.out(self.attend(q, k, v).reshape(x.shape))


ATTENDS = {
    "operator": lambda q, k, v: ft.attention(q, k, v, causal=True),
    "drop-in": lambda q, k, v: sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2),
}


@pytest.fixture(params=ATTENDS)
def block(request, arrays):
    torch.manual_seed(0)
    model = Block(ATTENDS[request.param]).to(arrays.device, torch.float16).eval()
    return model, arrays.random((2, 19, 64), "float16", 3)


def close(a, b):
    return (a - b).abs().max() <= 2e-3


@torch.no_grad()
def test_inductor(block):
    model, x = block
    compiled = torch.compile(model, fullgraph=True)
    assert close(compiled(x), model(x))


@torch.no_grad()
def test_export_with_dynamic_shapes(block):
    model, x = block
    length = torch.export.Dim("length", min=2, max=512)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {1: length}})
    assert any("flashcore" in str(node.target) for node in exported.graph.nodes)
    for n in (19, 7, 100):
        other = torch.randn_like(x[:, :1].expand(-1, n, -1).contiguous())
        assert close(exported.module()(other), model(other))


def test_fake_tensors(arrays):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = fixed(arrays)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in real)
        out, lse = ft.attention(q, k, v, return_lse=True)
        assert sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True).shape == (2, 4, 37, 32)
    assert out.shape == real[0].shape and out.dtype == torch.float16 and out.device == real[0].device
    assert lse.shape == (2, 4, 37) and lse.dtype == torch.float32


def test_gradients_are_refused_and_no_grad_is_offered(arrays):
    q, k, v = fixed(arrays)
    key = k.clone().requires_grad_()
    expected = flashcore.attention(q, k, v)
    message = r"key: it requires grad.*torch\.no_grad\(\)"
    compiled = torch.compile(ft.attention, fullgraph=True, backend="aot_eager")
    for call in (ft.attention, lambda *args: through_dispatcher(ft.attention, *args), compiled):
        with pytest.raises(Exception, match=message):
            call(q, key, v)
        with torch.no_grad():
            assert arrays.same_bits(call(q, key, v), expected)


def test_wrong_input_names_the_argument(arrays):
    q, k, v = fixed(arrays)
    for call in (ft.attention, lambda *args: through_dispatcher(ft.attention, *args)):
        with pytest.raises(ValueError, match="^value: "):
            call(q, k, v[:, :5])


def test_cuda_graph(device, arrays):
    if device != "cuda":
        pytest.skip("CUDA graphs are CUDA's")
    inputs = fixed(arrays)
    for function in (ft.attention, lambda *x: sdpa(*(a.transpose(1, 2) for a in x), enable_gqa=True)):
        function(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*inputs)
        inputs[0].mul_(-1)
        graph.replay()
        assert arrays.same_bits(out, function(*inputs))


def test_compiled_into_cuda_graphs(device, arrays):
    if device != "cuda":
        pytest.skip("CUDA graphs are CUDA's")
    inputs = fixed(arrays)
    compiled = torch.compile(lambda *x: ft.attention(*x, causal=True) + 1, fullgraph=True, mode="reduce-overhead")
    expected = flashcore.attention(*inputs, causal=True) + 1
    for _ in range(3):
        assert arrays.same_bits(compiled(*inputs).clone(), expected)


# The drop-in


def test_the_signature_is_torchs():
    import inspect

    (schema,) = torch._C._jit_get_schemas_for_operator("aten::scaled_dot_product_attention")
    ours = inspect.signature(sdpa).parameters.values()
    assert [(p.name, p.kind is p.KEYWORD_ONLY) for p in ours] == [(a.name, a.kwarg_only) for a in schema.arguments]
    assert [p.default for p in ours if p.default is not p.empty] == [
        a.default_value for a in schema.arguments if a.has_default_value()
    ]


@pytest.mark.parametrize("queries, keys", [(37, 37), (37, 90), (90, 37), (1, 50), (50, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_drop_in(arrays, queries, keys, is_causal):
    """Top left, unlike flashcore.attention. Expected is what torch gives in float64."""
    options = Options()
    if is_causal:
        options = Options(causal=True) if queries <= keys else Options(window=(None, queries - keys))
    for dtype, transposed, scale in itertools.product(arrays.dtypes, (False, True), (None, 0.1)):
        q, k, v = arrays.qkv(3, queries, keys, 4, 2, 40, dtype, seed=queries * keys, score=4.0)
        inputs = [x.transpose(1, 2) for x in (q, k, v)]
        if not transposed:
            inputs = [x.contiguous() for x in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = sdpa(*inputs, is_causal=is_causal, scale=scale, enable_gqa=True)
        wide = [x.double() for x in inputs]
        expected = F.scaled_dot_product_attention(*wide, is_causal=is_causal, scale=scale, enable_gqa=True)
        assert strides(out) == strides(torch.empty_like(inputs[0])) and out.dtype == inputs[0].dtype
        seen = min(queries, keys) if is_causal else keys
        seen = Options(options.causal, options.window, scale), k[:, :seen], v[:, :seen]
        yard = emulation(arrays, q, seen[1], seen[2], seen[0])[0].transpose(1, 2)
        assert meets_standard(errors(arrays, out, expected), errors(arrays, yard, expected), dtype, 4.0 * 8)
        torch._dynamo.reset()
        compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
        assert same(arrays, compiled(*inputs, is_causal=is_causal, scale=scale, enable_gqa=True), out)


def test_rows_are_tested_for_alignment_under_compile(arrays):
    from flashcore._torch_sdpa import _rows_are_aligned

    compiled = torch.compile(lambda x: x + 1 if _rows_are_aligned(x) else x - 1, fullgraph=True, backend="aot_eager")
    whole = arrays.random((2, 3, 4, 16), "float16", 3)
    for x, aligned in ((whole, True), (whole[..., :12], True), (whole[:, :, 1:], True), (whole[..., 1:9], False)):
        assert _rows_are_aligned(x) == aligned
    packed = arrays.random((2, 3, 4, 12), "float16", 3)
    assert not _rows_are_aligned(packed)
    assert arrays.same_bits(compiled(whole), whole + 1) and arrays.same_bits(compiled(packed), packed - 1)


def test_what_goes_to_torch_warns_once_and_says_why(arrays, monkeypatch):
    monkeypatch.setattr(ft, "_warned", set())
    q, k, v = (x.transpose(1, 2).contiguous() for x in arrays.qkv(2, 8, 8, 2, 2, 16, "float16", seed=5))
    leaf = k.clone().requires_grad_()
    wide = [x.to(torch.float32 if arrays.on_gpu else torch.float64) for x in (q, k, v)]
    for reason, args, keywords in (
        ("attn_mask", (q, k, v, torch.ones(8, 8, dtype=torch.bool, device=q.device)), {}),
        ("dropout_p", (q, k, v), {"dropout_p": 1e-30}),
        ("requires grad", (q, leaf, v), {}),
        ("dtype", wide, {}),
        ("sequence, head_dim", (q[0], k[0], v[0]), {}),
        ("last stride", (q.mT.contiguous().mT, k, v), {}),
        ("shapes differ", (q, k[:1], v[:1]), {}),
    ):
        for call in (sdpa, torch.compile(sdpa, backend="aot_eager")):
            ft._warned.clear()
            torch._dynamo.reset()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results = [call(*args, **keywords) for _ in range(2)]
            ours = [str(w.message) for w in caught if "goes to torch" in str(w.message)]
            assert len(ours) == 1 and reason in ours[0], (reason, ours)
            expected = F.scaled_dot_product_attention(*args, **keywords)
            assert (results[0] - expected).abs().max() <= 2e-3
    out = sdpa(q, leaf, v)
    out.sum().backward()
    assert leaf.grad is not None


@pytest.mark.filterwarnings("ignore:.*goes to torch")
def test_autocast_follows_torch(device, arrays):
    q, k, v = (x.transpose(1, 2) for x in arrays.qkv(2, 8, 8, 2, 2, 16, "float16", seed=5))
    with torch.autocast(device, torch.bfloat16):
        assert sdpa(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*goes to torch")
def test_errors_are_torchs_own(arrays):
    q, k, v = (x.transpose(1, 2) for x in arrays.qkv(2, 8, 8, 4, 2, 16, "float16", seed=5))
    for args in ((q, k, v), (q, k[..., :8], v)):
        with pytest.raises(RuntimeError) as expected:
            F.scaled_dot_product_attention(*args)
        with pytest.raises(RuntimeError) as got:
            sdpa(*args)
        assert str(got.value).splitlines()[0] == str(expected.value).splitlines()[0]


# The provider


@pytest.fixture
def counted(monkeypatch):
    """How often FlashCore computes attention."""
    calls = []
    for name in ("attention", "attention_varlen"):
        real = getattr(flashcore, name)

        def call(*args, real=real, **keywords):
            result = real(*args, **keywords)
            calls.append(keywords)
            return result

        monkeypatch.setattr(flashcore, name, call)
    return calls


@pytest.fixture
def only_flash():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


def test_activated_for_a_block(arrays, counted, only_flash):
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

    q, k, v = (x.transpose(1, 2) for x in arrays.qkv(2, 64, 64, 4, 4, 32, arrays.half, seed=7))
    before = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not counted
    with ft.activated():
        assert current_flash_attention_impl() == "flashcore"
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert len(counted) == 1
        assert arrays.same_bits(out, flashcore.attention(q, k, v, causal=True, layout="bhsd"))
        counted.clear()
        with ft.activated():
            pass
        assert current_flash_attention_impl() == "flashcore"
        F.scaled_dot_product_attention(q, k, v)
        assert len(counted) == 1
    counted.clear()
    assert current_flash_attention_impl() is None
    assert arrays.same_bits(F.scaled_dot_product_attention(q, k, v, is_causal=True), before) and not counted
    activate_flash_attention_impl("flashcore")
    try:
        F.scaled_dot_product_attention(q, k, v)
        assert len(counted) == 1
    finally:
        ft.restore()


def test_provider_does_without_operators_that_this_torch_has_not(arrays, counted, only_flash, monkeypatch):
    from flashcore import _torch_provider

    kernels = (("_an_operator_of_another_torch", "CUDA", None), *_torch_provider.KERNELS)
    monkeypatch.setattr(_torch_provider, "KERNELS", kernels)
    q, k, v = (x.transpose(1, 2) for x in arrays.qkv(2, 64, 64, 4, 4, 32, arrays.half, seed=7))
    with ft.activated():
        F.scaled_dot_product_attention(q, k, v)
    assert len(counted) == 1


def test_provider_leaves_the_rest_to_torch(device, arrays, counted):
    q, k, v = (x.transpose(1, 2) for x in arrays.qkv(2, 16, 16, 2, 2, 32, "float16", seed=7))
    mask = torch.ones(16, 16, dtype=torch.bool, device=device).tril()
    for args, keywords in (((q, k, v), {"attn_mask": mask}), ([x.float() for x in (q, k, v)], {"dropout_p": 0.5})):
        torch.manual_seed(0)
        expected = F.scaled_dot_product_attention(*args, **keywords)
        with ft.activated():
            torch.manual_seed(0)
            assert arrays.same_bits(F.scaled_dot_product_attention(*args, **keywords), expected)
    assert not counted


@pytest.mark.parametrize("is_causal", [False, True])
def test_training_with_the_provider(arrays, counted, only_flash, is_causal):
    """torch's own backward on our output and log-sum-exp gives gradients as good as on its own."""
    dtype = arrays.half if arrays.on_gpu else "float32"
    inputs = [x.transpose(1, 2) for x in arrays.qkv(2, 130, 130, 4, 4, 64, dtype, seed=9, score=3.0)]
    weight = arrays.random(inputs[0].shape, dtype, 11)

    def gradients(inputs, weight):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = F.scaled_dot_product_attention(*leaves, is_causal=is_causal)
        return torch.autograd.grad((out * weight).sum(), leaves)

    own = gradients(inputs, weight)
    assert not counted
    with ft.activated():
        ours = gradients(inputs, weight)
    assert len(counted) == 1
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients([x.double() for x in inputs], weight.double())
    for a, b, e in zip(ours, own, expected, strict=True):
        assert meets_standard(errors(arrays, a, e), errors(arrays, b, e), dtype, 16.0)


def test_varlen_attn_with_the_provider(device, arrays, counted):
    if device != "cuda":
        pytest.skip("torch.nn.attention.varlen is CUDA's")
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, starts, _ = packed(arrays)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    for window in ((-1, -1), (-1, 0), (4, 0)):
        counted.clear()
        expected = varlen_attn(q, k, v, starts, starts, 32, 32, window_size=window)
        with ft.activated():
            out = varlen_attn(q, k, v, starts, starts, 32, 32, window_size=window)
        assert len(counted) == 1 and (out - expected).abs().max() <= 2e-3
