"""Chat with a checkpoint in the terminal, or answer single questions in a script.

    python -m niels_gpt.chat_cli --ckpt checkpoints/best.pt
    python -m niels_gpt.chat_cli --ckpt checkpoints/best.pt --prompt "What is rain?"

Any generation of checkpoint works: `load_model` brings the tokenizer and the chat format that belong to it. Here are
flags, files and exit codes; the chatting itself is `chat`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from typing import Any, TextIO, get_args

from niels_gpt.chat import DEFAULT_SEED, answer_once, build_options, note, run_chat, system_prompt
from niels_gpt.checkpoint import load_model
from niels_gpt.command import exit_status
from niels_gpt.device import resolve_device
from niels_gpt.infer.sampling import Sampling
from niels_gpt.settings import Weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="niels-gpt chat", description="Chat with a checkpoint. Type /help for commands.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="PATH", help="checkpoint to chat with, such as checkpoints/best.pt")
    add("--prompt", action="append", metavar="TEXT", help="answer this and leave; may be repeated, each on its own")
    add("--max-new-tokens", type=int, metavar="N", help="longest reply (default: from the checkpoint's settings)")
    add("--temperature", type=float, metavar="X", help="0 = always the likeliest token (default: from the settings)")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest; 0 = off (default: from the settings)")
    add("--top-p", type=float, metavar="P", help="sample within this total probability; 0 = off (default: same)")
    add("--min-p", type=float, metavar="P", help="drop tokens below this share of the likeliest one's probability")
    add("--weights", choices=get_args(Weights), help="of matrices on a CPU; fp16 and int8 are faster (default: same)")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: avoid repeated tokens; 1 = off (default: same)")
    add("--seed", type=int, default=DEFAULT_SEED, help="of the replies (default: %(default)s)")
    add("--system", metavar="TEXT", help="system prompt (default: configs/system_surly.txt)")
    add("--system-file", metavar="PATH", help="file with the system prompt; wins over --system")
    add("--inspect", action="store_true", help="show how surprising each token was, and what else was likely")
    add("--load", metavar="FILE", help="go on with a conversation that /save wrote, and with its system prompt")
    add("--no-history", dest="history", action="store_false", help="do not keep what you type for the next time")
    add("--no-kv-cache", dest="use_cache", action="store_const", const=False, help="full forward passes, for debugging")
    add("--device", metavar="NAME", help="cpu, mps or cuda (default: the best there is)")
    add("--tokenizer", metavar="PATH", help="tokenizer model, where the checkpoint does not carry its own")
    add("--ignore-tokenizer-hash", action="store_true", help="accept a tokenizer other than the one trained with")
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    """ValueError for values that make no sense, before anything is loaded."""
    Sampling(args.temperature or 0, args.top_k, args.top_p, args.repetition_penalty, args.min_p)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {args.max_new_tokens}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2^63 - 1, not {args.seed}")
    if any(not text.strip() for text in args.prompt or ()):
        raise ValueError("--prompt is empty; give it a question")
    if args.prompt and args.load:
        raise ValueError("--load goes on with a conversation, --prompt answers one question alone; choose one of them")
    args.device = resolve_device(args.device)


def _run(args: argparse.Namespace) -> int:
    system = system_prompt(args.system_file, args.system)
    loaded = load_model(
        args.ckpt,
        device=args.device,
        tokenizer_path=args.tokenizer,
        ignore_tokenizer_hash=args.ignore_tokenizer_hash,
    )
    options = build_options(
        loaded.settings,
        system,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        weights=args.weights,
        repetition_penalty=args.repetition_penalty,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        use_cache=args.use_cache,
    )
    shown = asdict(options)
    shown = {"ckpt": args.ckpt, "step": loaded.step, "device": args.device, **shown.pop("sampling"), **shown}
    _print_settings(shown, sys.stderr if args.prompt else sys.stdout)
    if args.prompt:
        return answer_once(loaded, options, args.prompt, inspect=args.inspect)
    asked = args.system is not None or args.system_file is not None
    return run_chat(loaded, options, inspect=args.inspect, load=args.load, keep_system=asked, history=args.history)


def _print_settings(shown: dict[str, Any], out: TextIO) -> None:
    print("generation settings (settings defaults + CLI overrides):", file=out)
    print(json.dumps(shown, indent=2, ensure_ascii=False), file=out, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        _check_flags(args)
    except ValueError as error:
        note(f"error: {error}")
        return 2
    return exit_status(lambda: _run(args), reader_gone=0)


if __name__ == "__main__":
    sys.exit(main())
