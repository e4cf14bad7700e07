"""Tokens/s at batch 1 beside transformers and llama.cpp at the same shape, in one run, the candidates taking turns.

    python tools/bench_decode.py [--shape quickstart|default] [--rounds 5] [--new-tokens 256] [--llama-python PATH]
    python tools/bench_decode.py --ckpt checkpoints/best.pt --text FILE     # bits per byte of each kind of weights

Greedy, prompt of 64 tokens, prefill included, random weights; then prefill alone, of 448 tokens. Ours is `stream_steps`
as the chat uses it (with log-probability and entropy of every token). transformers: Qwen3ForCausalLM.generate with
its dynamic and its static cache. llama.cpp: where an interpreter with llama_cpp is named and gguf is installed here;
the same weights as ours. The bound is how often per second the packed weights can be read, with nothing done to them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from niels_gpt.checkpoint import load_model
from niels_gpt.config import ModelConfig
from niels_gpt.export.gguf_file import write_model
from niels_gpt.infer.cache import cache_for
from niels_gpt.infer.native.decoder import KINDS, NativeDecoder
from niels_gpt.infer.sampling import Sampling
from niels_gpt.infer.steps import stream_steps
from niels_gpt.model.gpt import GPT
from tools.bench_common import KEYS, SHAPES, hugging_face_twin, interleaved, machine, median_and_spread

PROMPT_TOKENS, PREFILL_TOKENS = 64, 448
READS = 16
GREEDY = Sampling(temperature=0.0)  # audit: the benchmark's own choice
REFERENCE = "transformers, dynamic cache"
LN2 = 0.6931471805599453


def random_model(name: str) -> GPT:
    generator = torch.Generator().manual_seed(0)
    model = GPT(ModelConfig(**{key: SHAPES[name][key] for key in KEYS}, dropout=0.0, rope_theta=10000.0)).eval()
    with torch.no_grad():  # ordinary initial weights repeat one token; these write something
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06)
    return model


def ours(model: GPT, prompt: list[int], new_tokens: int, **options: Any) -> Callable[[], list[int]]:
    def run() -> list[int]:
        steps = stream_steps(model, prompt, max_new_tokens=new_tokens, sampling=GREEDY, **options)
        ids = [step.token_id for step in steps]
        assert len(ids) == new_tokens
        return ids

    return run


def theirs(model: Any, prompt: list[int], new_tokens: int, cache: str | None) -> Callable[[], Any]:
    ids = torch.tensor([prompt])
    options = {} if cache is None else {"cache_implementation": cache}

    def run() -> Any:
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        assert made.shape[1] == len(prompt) + new_tokens

    return run


class LlamaCpp:
    """llama.cpp in a process of its own, with its own defaults; `run` generates greedily and returns the ids."""

    PROGRAM = """
import sys, json, numpy as np
from llama_cpp import llama_cpp as C
threads, vocabulary, *files = json.loads(sys.argv[1])
quiet = C.llama_log_callback(lambda *_: None)
C.llama_log_set(quiet, None)
C.llama_backend_init()
models = {file: C.llama_model_load_from_file(file.encode(), C.llama_model_default_params()) for file in files}
assert all(models.values())
contexts = {}

def context_of(file, exact):
    options = C.llama_context_default_params()
    options.n_ctx = options.n_batch = 512
    options.n_threads = options.n_threads_batch = threads
    if exact:
        options.type_k = options.type_v = options.flash_attn_type = 0  # attention in float32 too, as ours
    return C.llama_init_from_model(models[file], options)

print("ready", flush=True)
for line in sys.stdin:
    file, prompt, new_tokens, exact = json.loads(line)
    if (file, exact) not in contexts:
        contexts[file, exact] = context_of(file, exact)
    context, fresh, made = contexts[file, exact], prompt, []
    C.llama_memory_clear(C.llama_get_memory(context), True)
    for _ in range(new_tokens):
        array = (C.llama_token * len(fresh))(*fresh)
        assert C.llama_decode(context, C.llama_batch_get_one(array, len(fresh))) == 0
        logits = np.ctypeslib.as_array(C.llama_get_logits_ith(context, -1), (vocabulary,))
        fresh = [int(logits.argmax())]
        made += fresh
    print(json.dumps(made), flush=True)
"""

    def __init__(self, python: str, files: list[Path], vocabulary: int) -> None:
        argument = json.dumps([torch.get_num_threads(), vocabulary, *map(str, files)])
        command = [python, "-c", self.PROGRAM, argument]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{python} could not load the models; does it have llama_cpp?")

    def run(self, file: Path, prompt: list[int], new_tokens: int, exact: bool = False) -> list[int]:
        """exact: keys, values and attention in float32, where its default is float16."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([str(file), prompt, new_tokens, exact]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def measure(name: str, rounds: int, new_tokens: int, llama_python: str | None) -> None:
    model, twin = random_model(name), hugging_face_twin(SHAPES[name]).eval()
    V = model.cfg.V
    drawn = torch.randint(V, (PREFILL_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = drawn[:PROMPT_TOKENS]
    new_tokens = min(new_tokens, model.cfg.T - PROMPT_TOKENS)
    same = {kind: random_model(name) for kind in KINDS}  # each keeps its own packed weights
    packed = {kind: NativeDecoder(same[kind], kind) for kind in KINDS}
    runs: dict[str, Callable[[], Any]] = {
        REFERENCE: theirs(twin, prompt, new_tokens, None),
        "transformers, static cache": theirs(twin, prompt, new_tokens, "static"),
        "niels-gpt in PyTorch": ours(model, prompt, new_tokens, native=False),
        **{f"niels-gpt {kind}": ours(same[kind], prompt, new_tokens, weights=kind) for kind in KINDS},
    }
    llama_files: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        llama = None
        if llama_python is not None:
            llama_files = {kind: Path(folder) / f"{kind}.gguf" for kind in ("f32", "f16", "q8_0")}
            for kind, file in llama_files.items():
                write_model(model, file, kind, name, lambda writer: writer.add_tokenizer_model("none"))
            llama = LlamaCpp(llama_python, list(llama_files.values()), V)
            for kind, file in llama_files.items():
                runs[f"llama.cpp {kind}"] = lambda file=file: llama.run(file, prompt, new_tokens)
            exact = llama.run(llama_files["f32"], prompt, new_tokens, exact=True)
            agree = [a == b for a, b in zip(runs["niels-gpt fp32"](), exact, strict=True)]
            same_until = agree.index(False) if False in agree else len(agree)
            print(f"greedy tokens of ours and llama.cpp f32 (attention in f32) agree: {same_until} of {new_tokens}")
        reads = {f"read {kind}": lambda d=d: [d.read() for _ in range(READS)] for kind, d in packed.items()}
        seconds = interleaved({**runs, **reads}, warmup=1, rounds=rounds)
        report(seconds, runs, {kind: d.bytes for kind, d in packed.items()}, new_tokens)
        T = min(PREFILL_TOKENS, model.cfg.T - 1)
        prefill = {
            REFERENCE: theirs(twin, drawn[:T], 1, None),
            "niels-gpt": ours(model, drawn[:T], 1, native=False),
        }
        if llama is not None:
            prefill["llama.cpp f32"] = lambda: llama.run(llama_files["f32"], drawn[:T], 1)
        print(f"\n| prefill of {T} tokens | tok/s | best..worst | x transformers |\n|---|---|---|---|")
        rates = {k: [T / t for t in ts] for k, ts in interleaved(prefill, warmup=2, rounds=2 * rounds).items()}
        print_rates(rates)
        if llama is not None:
            llama.close()


def report(seconds: dict[str, list[float]], runs: Any, sizes: dict[str, int], new_tokens: int) -> None:
    print("\n| engine | tok/s | best..worst | x transformers |\n|---|---|---|---|")
    rates = {candidate: [new_tokens / t for t in seconds[candidate]] for candidate in runs}
    print_rates(rates)
    print("\n| weights | MB | read at GB/s | bound, tok/s | share reached |\n|---|---|---|---|---|")
    for kind, size in sizes.items():
        speed = median_and_spread([READS * size / t for t in seconds[f"read {kind}"]])[0]
        reached = median_and_spread(rates[f"niels-gpt {kind}"])[0]
        bound = speed / size
        print(f"| {kind} | {size / 1e6:.1f} | {speed / 1e9:.1f} | {bound:.0f} | {reached / bound:.0%} |", flush=True)


def print_rates(rates: dict[str, list[float]]) -> None:
    reference = median_and_spread(rates[REFERENCE])[0]
    for candidate, values in rates.items():
        median, best, worst = median_and_spread(values)
        print(f"| {candidate} | {median:.0f} | {best:.0f}..{worst:.0f} | {median / reference:.2f} |", flush=True)


def bits_per_byte(ckpt: str, text: str, limit: int) -> None:
    """Every token of the text predicted by the decoder itself, in windows of the context, for each kind of weights."""
    loaded = load_model(ckpt, device="cpu")
    model = loaded.model
    everything = loaded.tokenizer.encode(Path(text).read_text(encoding="utf-8"))
    ids = [int(i) for i in everything[:limit]]
    size = len(loaded.tokenizer.decode(ids).encode())
    print(f"{ckpt}: {len(ids)} tokens, {size} bytes of {text}")
    print("\n| weights | bits per byte | worse than fp32 |\n|---|---|---|")
    first = 0.0
    for kind in KINDS:
        decoder, cache, nats = NativeDecoder(model, kind), cache_for(model, B=1, T_max=model.cfg.T), 0.0
        for start in range(0, len(ids) - 1, model.cfg.T):
            window = ids[start : start + model.cfg.T + 1]
            for t, (token, target) in enumerate(pairwise(window)):
                found = decoder.step([token], [t], cache, [0])
                nats += float(found.logsumexp[0] - found.logits[0, target])
        value = nats / LN2 / size
        first = first or value
        print(f"| {kind} | {value:.5f} | {value / first - 1:+.3%} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="timed generations of each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens per generation (default: %(default)s)")
    parser.add_argument("--llama-python", metavar="PATH", help="an interpreter that can import llama_cpp")
    parser.add_argument("--ckpt", metavar="PATH", help="measure bits per byte of this checkpoint instead")
    parser.add_argument("--text", metavar="FILE", default="README.md", help="on this text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20000, help="at most this many of it (default: %(default)s)")
    args = parser.parse_args(argv)
    print(machine())
    if args.ckpt:
        bits_per_byte(args.ckpt, args.text, args.tokens)
        return 0
    for name in SHAPES if args.shape == "all" else [args.shape]:
        print(f"\n{name}: {SHAPES[name]}\n")
        measure(name, args.rounds, args.new_tokens, args.llama_python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
