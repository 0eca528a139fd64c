# SPDX-License-Identifier: Apache-2.0
"""flashcore.jax: jax.nn.dot_product_attention by a custom call of XLA, under every transformation that it supports."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would leave PyTorch no memory on a GPU
jax = pytest.importorskip("jax")
fj = pytest.importorskip("flashcore.jax")
jnp = jax.numpy

TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.fixture
def place(device):
    try:
        found = jax.devices(device)[0]
    except RuntimeError:
        pytest.skip(f"JAX has no {device} device here")
    with jax.default_device(found):
        yield found


@pytest.fixture
def dtypes(device):
    return ("float16", "bfloat16") if device == "cuda" else ("float32", "float16", "bfloat16")


@pytest.fixture(autouse=True)
def _nothing_goes_to_jax(request):
    with warnings.catch_warnings():
        if "goes_to_jax" not in request.node.name:
            warnings.filterwarnings("error", message="dot_product_attention goes to jax.nn")
        yield


def arrays(place, dtype, queries=37, keys=37, batch=(2,), seed=0):
    shapes = (*batch, queries, 4, 32), (*batch, keys, 2, 32), (*batch, keys, 2, 32)
    random = np.random.default_rng(seed)
    return [jax.device_put(jnp.asarray(random.standard_normal(s), dtype), place) for s in shapes]


RECENT = "return_residual" in inspect.signature(jax.nn.dot_product_attention).parameters


def expected(query, key, value, *, scale=None, **options):
    """JAX's own in float32, with a mask in the place of the other options, some of which JAX 0.5 forgets."""
    own = functools.partial(jax.nn.dot_product_attention, implementation="xla", scale=scale)
    arrays = [x.astype(jnp.float32) for x in (query, key, value)]
    window = options.get("local_window_size", 1 << 20)
    left, right = (window, window) if isinstance(window, int) else window
    queries, keys = np.arange(query.shape[1])[:, None], np.arange(key.shape[1])
    mask = (keys >= queries - left) & (keys <= queries + (0 if options.get("is_causal") else right))
    mask = np.broadcast_to(mask, (len(query), 1, *mask.shape))
    real = np.ones((len(query), 1, query.shape[1], 1), bool)
    if "key_value_seq_lengths" in options:
        mask = mask & (keys < np.asarray(options["key_value_seq_lengths"])[:, None, None, None])
    if "query_seq_lengths" in options:
        real = queries < np.asarray(options["query_seq_lengths"])[:, None, None, None]
    with jax.default_matmul_precision("highest"):
        want = own(*arrays, mask=jnp.asarray(mask)) * real.swapaxes(1, 2)
        if RECENT:
            assert abs(own(*arrays, **options) - want).max() <= 1e-5
    return want


def assert_close(got, want, dtype, what=""):
    assert got.shape == want.shape and got.dtype == jnp.dtype(dtype), what
    error = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max()
    assert error <= TOLERANCE[dtype], f"{what}: {error}"


MASKS = (
    {},
    {"is_causal": True},
    {"local_window_size": 40},
    {"local_window_size": (45, 3)},
    {"local_window_size": (41, 7), "is_causal": True},
    {"scale": 0.3},
)


@pytest.mark.parametrize("queries, keys", [(37, 37), (37, 60), (60, 37), (1, 50), (1, 3000), (5, 1500)])
@pytest.mark.parametrize("options", MASKS, ids=str)
def test_matches_jax(place, dtypes, queries, keys, options):
    for dtype in dtypes:
        inputs = arrays(place, dtype, queries, keys)
        want = expected(*inputs, **options)
        assert_close(fj.dot_product_attention(*inputs, **options), want, dtype, "eager")
        jitted = jax.jit(lambda *x: fj.dot_product_attention(*x, **options))
        assert_close(jitted(*inputs), want, dtype, "jit")
        one = [x[0] for x in inputs]
        assert_close(fj.dot_product_attention(*one, **options), want[0], dtype, "without batch")


def test_residual_is_the_log_sum_exp(place, dtypes):
    for dtype in dtypes:
        query, key, value = arrays(place, dtype)
        scores = np.einsum(
            "bqkgd,bskd->bqkgs",
            np.asarray(query, np.float64).reshape(2, 37, 2, 2, 32),
            np.asarray(key, np.float64),
        )
        want = np.log(np.exp(scores / 32**0.5).sum(-1)).reshape(2, 37, 4)
        lse = fj.dot_product_attention(query, key, value, return_residual=True)[1]
        assert lse.dtype == jnp.float32 and np.abs(np.asarray(lse) - want).max() <= 1e-4


@pytest.mark.parametrize("given", ["both", "query", "key_value"])
def test_sequence_lengths(place, dtypes, given):
    lengths = {"query": [20, 37], "key_value": [31, 5]}
    options = {f"{n}_seq_lengths": jnp.array(x, jnp.int32) for n, x in lengths.items() if given in (n, "both")}
    for dtype in dtypes:
        inputs = arrays(place, dtype, 37, 40)
        want = expected(*inputs, **options)
        assert_close(fj.dot_product_attention(*inputs, **options), want, dtype)
        many = [jnp.stack([x, x[::-1]]) for x in inputs]
        got = jax.jit(jax.vmap(lambda *x: fj.dot_product_attention(*x, **options)))(*many)
        assert_close(got[0], want, dtype, "vmap")
        assert_close(got[1], expected(*(x[1] for x in many), **options), dtype, "vmap")


def test_vmap(place, dtypes):
    for dtype in dtypes:
        inputs = arrays(place, dtype, batch=(3, 2))

        def call(*x):
            return fj.dot_product_attention(*x, is_causal=True)

        want = jnp.stack([expected(*(x[i] for x in inputs), is_causal=True) for i in range(3)])
        assert_close(jax.vmap(call)(*inputs), want, dtype)
        assert_close(jax.jit(jax.vmap(jax.vmap(call)))(*inputs), want, dtype, "twice")
        query, key, value = inputs
        got = jax.vmap(call, in_axes=(0, None, None))(query, key[0], value[0])
        assert_close(got[1], expected(query[1], key[0], value[0], is_causal=True), dtype, "shared keys")


MESH = """
    import jax, jax.numpy as jnp, numpy as np, warnings
    import flashcore.jax as fj
    from functools import partial
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    shard_map = getattr(jax, "shard_map", None)
    if shard_map is None:
        from jax.experimental.shard_map import shard_map
    warnings.filterwarnings("error", message="dot_product_attention goes")
    assert len(jax.devices()) == 2
    mesh = Mesh(np.array(jax.devices()), ("x",))
    query, key, value = jax.random.normal(jax.random.key(0), (3, 4, 37, 2, 32))
    want = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    for spec in (P("x"), P(None, None, "x")):  # over the batch, over the heads
        call = partial(fj.dot_product_attention, is_causal=True)
        sharded = shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
        inputs = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value)]
        for function in (sharded, jax.jit(sharded)):
            got = function(*inputs)
            assert got.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
            assert float(abs(got - want).max()) < 2e-6
        assert float(abs(jax.jit(call)(*inputs) - want).max()) < 2e-6
"""


def test_mesh_of_two_cpu_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(MESH)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_export_with_symbolic_shapes(place):
    export = pytest.importorskip("jax.export")
    sizes = export.symbolic_shape("batch, length")
    shapes = [jax.ShapeDtypeStruct((*sizes, heads, 32), jnp.float16) for heads in (4, 2, 2)]
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in fj.TARGETS]
    call = jax.jit(lambda *x: fj.dot_product_attention(*x, is_causal=True))
    platform = "cpu" if place.platform == "cpu" else "cuda"
    exported = export.export(call, platforms=[platform], disabled_checks=allowed)(*shapes)
    for queries in (37, 5):
        inputs = arrays(place, "float16", queries, queries, batch=(3,))
        assert_close(exported.call(*inputs), expected(*inputs, is_causal=True), "float16")


def test_differentiating_is_refused(place):
    query, key, value = arrays(place, "float16")
    with pytest.raises(NotImplementedError, match="no backward pass yet.*stop_gradient"):
        jax.grad(lambda q: fj.dot_product_attention(q, key, value).sum())(query)
    stopped = jax.grad(lambda q: (fj.dot_product_attention(jax.lax.stop_gradient(q), key, value) * q).sum())(query)
    assert stopped.shape == query.shape


def test_what_goes_to_jax_warns_once_and_says_why(place, device, monkeypatch):
    query, key, value = arrays(place, "float16")
    mask = jnp.ones((1, 1, 37, 37), bool)
    lengths = jnp.array([3, 30], jnp.int32)
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    for reason, args, options in (
        ("mask", (query, key, value, None, mask), {}),
        ("bias", (query, key, value, mask * 1.0), {}),
        ("implementation", (query, key, value), {"implementation": "xla"}),
        ("lengths together", (query, key, value), {"key_value_seq_lengths": lengths, "is_causal": True}),
        ("no key", (query, key[:, :5], value[:, :5]), {"local_window_size": 3}),
        *([("dtype", wide, {})] if device == "cuda" else []),
    ):
        monkeypatch.setattr(fj, "_warned", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                got = fj.dot_product_attention(*args, **options)
        messages = [str(w.message) for w in caught if "goes to jax.nn" in str(w.message)]
        assert len(messages) == 1 and reason in messages[0], (reason, messages)
        assert (np.asarray(got) == np.asarray(jax.nn.dot_product_attention(*args, **options))).all()


def test_wrong_input(place):
    query, key, value = arrays(place, "float16")
    with pytest.raises(ValueError, match="heads"):
        fj.dot_product_attention(query[:, :, :3], key, value)


def test_signature_is_jaxs():
    ours = inspect.signature(fj.dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    if not RECENT:
        ours = {name: p for name, p in ours.items() if name != "return_residual"}
    assert [(n, p.kind, p.default) for n, p in ours.items()] == [(n, p.kind, p.default) for n, p in theirs.items()]
