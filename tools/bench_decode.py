"""Tokens/s of greedy generation at batch 1 beside Hugging Face transformers at the same shape, in one run.

    python tools/bench_decode.py [--shape quickstart|default] [--rounds 5] [--new-tokens 128]

Ours is `stream_steps` as the chat uses it (with log-probability and entropy of every token); theirs is
Qwen3ForCausalLM.generate with its dynamic cache. Random weights, prompt of 64 tokens, prefill included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from niels_gpt.config import ModelConfig
from niels_gpt.generate import Sampling, stream_steps
from niels_gpt.model.gpt import GPT
from tools.bench_common import KEYS, SHAPES, hugging_face_twin, interleaved, machine, median_and_spread

PROMPT_TOKENS = 64
GREEDY = Sampling(temperature=0.0)  # audit: the benchmark's own choice


def measure(name: str, rounds: int, new_tokens: int) -> dict[str, list[float]]:
    shape = SHAPES[name]
    fields = {key: shape[key] for key in KEYS}
    ours = GPT(ModelConfig(**fields, dropout=0.0, rope_theta=10000.0)).eval()
    theirs = hugging_face_twin(shape).eval()
    prompt = torch.randint(shape["V"], (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0))

    def our_run() -> None:
        made = sum(1 for _ in stream_steps(ours, prompt, max_new_tokens=new_tokens, sampling=GREEDY))
        assert made == new_tokens

    def their_run() -> None:
        with torch.inference_mode():
            ids: Any = theirs.generate(  # type: ignore[operator]
                prompt[None],
                attention_mask=torch.ones(1, PROMPT_TOKENS, dtype=torch.long),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert ids.shape[1] == PROMPT_TOKENS + new_tokens

    runs: dict[str, Callable[[], Any]] = {"transformers Qwen3.generate": their_run, "niels-gpt stream_steps": our_run}
    seconds = interleaved(runs, warmup=1, rounds=rounds)
    return {candidate: [new_tokens / t for t in times] for candidate, times in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="timed generations of each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens per generation (default: %(default)s)")
    args = parser.parse_args(argv)
    print(machine())
    for name in ("quickstart", "default") if args.shape == "all" else [args.shape]:
        print(f"\n{name}: {SHAPES[name]}\n\n| engine | tok/s | best..worst | x transformers |\n|---|---|---|---|")
        rates = measure(name, args.rounds, args.new_tokens)
        reference = median_and_spread(rates["transformers Qwen3.generate"])[0]
        for candidate, values in rates.items():
            median, best, worst = median_and_spread(values)
            print(f"| {candidate} | {median:.0f} | {best:.0f}..{worst:.0f} | {median / reference:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
