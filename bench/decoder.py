# SPDX-License-Identifier: Apache-2.0
"""A decoder of transformers' Llama classes with random weights: attn_implementation="flashcore" beside "sdpa", in turn.

    python bench/decoder.py                                                 # as in the tables: 24 layers, 8192 tokens
    python bench/decoder.py --layers 2 --context 256 --tokens 8 --rounds 1  # a trial, on the CPU too

Times of one process, medians of --rounds: the forward pass over the context (prefill) without a cache and into a static
one, and each further token of greedy generation from it, with a static cache eager and compiled (on a GPU), and with a
growing one. A ratio is SDPA's time over FlashCore's. On a GPU also what part of a prefill the attention kernels are,
which bounds its ratio. Before anything is timed, the logits of both are held against the same model in float32:
FlashCore's largest error at most twice SDPA's plus 1e-5, its relative Frobenius error at most 1.25 times SDPA's; exit
status 1 if not.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import sys
import time

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore.transformers

PAIR = ("flashcore", "sdpa")


def build(options, device, dtype):
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=options.context + options.tokens + 1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


def errors_of(model, ids):
    """For each implementation the largest error and the relative Frobenius error of the logits, against float32."""
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("sdpa")
    with sdpa_kernel(SDPBackend.MATH):
        expected = exact(ids).logits
    del exact
    found = {}
    for name in PAIR:
        model.set_attn_implementation(name)
        difference = model(ids).logits.float() - expected
        found[name] = (difference.abs().max().item(), (difference.norm() / expected.norm()).item())
    return found


def sdpa_kernels(run) -> list[str]:
    """Which of SDPA's kernels a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sorted({e.key.removeprefix("aten::") for e in profile.key_averages() if "aten::_scaled_dot" in e.key})


def kernel_milliseconds(run) -> tuple[float, float]:
    """The GPU's time in a call's attention kernels, and in all of its kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times = {e.key.lower(): e.self_device_time_total / 1e3 for e in profile.key_averages()}
    names = ("flashcore", "sdpa", "flash_fwd", "fmha")  # FlashCore's, cuDNN's, and PyTorch's two of its own
    return sum(t for name, t in times.items() if any(n in name for n in names)), sum(times.values())


def seconds(run, device) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def ways(model, ids, options, device):
    """Name of a measurement, and what it times: functions whose times are subtracted, and by what it is divided."""

    def generate(tokens, **keywords):
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **keywords)

    cache = transformers.StaticCache(config=model.config, max_cache_len=options.context + options.tokens)

    def fill():
        cache.reset()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    yield "prefill", (lambda: model(ids, use_cache=False, logits_to_keep=1),), 1
    yield "prefill, static cache", (fill,), 1
    kinds = {
        "token, growing cache": {},
        "token, static cache": {"cache_implementation": "static", "disable_compile": True},
    }
    if device == "cuda":
        kinds["token, static cache, compiled"] = {"cache_implementation": "static"}
    for name, keywords in kinds.items():
        # The second of two lengths goes off: what is left are steps of decoding.
        runs = [lambda n=n, keywords=keywords: generate(n, **keywords) for n in (options.tokens, 2)]
        yield name, runs, options.tokens - 2


@torch.no_grad()
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=256, help="to generate; at least 3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--commit", default="unknown", help="for the results")
    options = parser.parse_args(argv)
    flashcore.transformers.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(options, device, torch.bfloat16)
    ids = torch.randint(0, 32000, (1, options.context), generator=torch.Generator().manual_seed(1)).to(device)

    found = errors_of(model, ids[:, :2048])
    (largest, relative), (yard_largest, yard_relative) = (found[name] for name in PAIR)
    good = largest <= 2 * yard_largest + 1e-5 and relative <= 1.25 * yard_relative
    print(f"logits against float32 (largest, relative): {found}: {'good' if good else 'WRONG'}")
    report = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "options": vars(options)}
    report.update(torch=torch.__version__, transformers=transformers.__version__, errors=found, milliseconds={})
    if not good:
        return 1

    for way, runs, parts in ways(model, ids, options, device):
        times = {name: [] for name in PAIR}
        kernels = []
        for round_ in range(-1, options.rounds):  # the first warms up, and compiles
            for name in PAIR:
                model.set_attn_implementation(name)
                if round_ < 0 and name == "sdpa":
                    kernels = sdpa_kernels(runs[-1])
                first, *rest = (seconds(run, device) for run in runs)
                if round_ >= 0:
                    times[name].append((first - sum(rest)) / parts * 1e3)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratio = medians["sdpa"] / medians["flashcore"]
        report["milliseconds"][way] = {**medians, "ratio": ratio, "sdpa_kernels": kernels}
        both = ", ".join(f"{name} {value:.3f} ms" for name, value in medians.items())
        print(f"{way}: {both}, ratio {ratio:.2f}; {kernels}")
        if way == "prefill" and device == "cuda":
            for name in PAIR:
                model.set_attn_implementation(name)
                attention, total = kernel_milliseconds(runs[0])
                report["milliseconds"][way][f"{name}_kernels_milliseconds"] = attention, total
                print(f"  {name}: attention kernels {attention:.2f} of {total:.2f} ms on the GPU")
    if options.json:
        report.update(kind="decoder", commit=options.commit, date=datetime.date.today().isoformat())
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
