"""Chat with a checkpoint in the terminal, or answer single questions in a script.

    python -m niels_gpt.chat_cli --ckpt checkpoints/best.pt
    python -m niels_gpt.chat_cli --ckpt checkpoints/best.pt --prompt "What is rain?"

Any generation of checkpoint works: `load_model` brings the tokenizer and the chat format that belong to it. This file
turns lines into messages and steps into visible text, nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch

from niels_gpt import paths
from niels_gpt.checkpoint import LoadedModel, load_model
from niels_gpt.data.types import Message
from niels_gpt.device import resolve_device
from niels_gpt.generate import Sampling, StopText, stream_steps
from niels_gpt.settings import Settings, default_settings

BUILT_IN_SYSTEM = "You are a helpful assistant."
SYSTEM_FILE = "system_surly.txt"  # in configs/
DEFAULT_SEED = 42
HELP = "/help  this list\n/reset forget the conversation\n/exit  leave (as do Ctrl-D, and Ctrl-C at the prompt)"
# On a terminal, control characters out of an untrained model would move the cursor or worse.
UNPRINTABLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class ChatOptions:
    """How to answer: fixed for one run of the program."""

    system: str  # "" = no system message
    sampling: Sampling
    max_new_tokens: int
    seed: int = DEFAULT_SEED
    use_cache: bool = True


class Conversation:
    """The messages so far, and one random generator for all replies."""

    def __init__(self, loaded: LoadedModel, options: ChatOptions) -> None:
        self._loaded, self._options = loaded, options
        self._generator = torch.Generator().manual_seed(options.seed)
        self._stop_ids, self._banned_ids = _stop_and_banned_ids(loaded)
        self._told_cap = False
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        system = self._options.system
        self.messages = [Message("system", system)] if system else []
        self.reply_tokens = 0

    def reply(self, text: str) -> Generator[str, None, None]:
        """Yield the visible reply to a user's text, piece by piece, without blanks around it.

        Both are remembered when the iterator ends or is closed early, unless the reply is empty. Raises ValueError if
        the text does not fit the model's context; then nothing is remembered.
        """
        asked, said = Message("user", text), ""
        ids, max_new_tokens = self._prompt(asked)
        self.reply_tokens = 0
        steps = stream_steps(
            self._loaded.model,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=self._options.sampling,
            generator=self._generator,
            stop_ids=self._stop_ids,
            banned_ids=self._banned_ids,
            tokenizer=self._loaded.tokenizer,
            use_cache=self._options.use_cache,
        )
        stop = StopText(self._loaded.chat_format.text_stops)

        def pieces() -> Iterator[str]:
            for step in steps:
                self.reply_tokens += 1
                yield stop.push(step.text)
                if stop.found:
                    return
            yield stop.flush()

        try:
            for piece in _stripped(pieces()):
                said += piece
                yield piece
        finally:
            if said:
                self.messages += [asked, Message("assistant", said)]

    def _prompt(self, asked: Message) -> tuple[list[int], int]:
        """Ids to continue, and how many tokens the reply may have."""
        context, wanted = self._loaded.model.cfg.T, self._options.max_new_tokens
        prompt = self._loaded.chat_format.encode_prompt([*self.messages, asked], context=context, max_new_tokens=wanted)
        if prompt.dropped:
            _note(f"note: the oldest messages no longer fit the context of {context} tokens; left out {prompt.dropped}")
        room = context - len(prompt.ids)
        if wanted <= room or not self._options.use_cache:  # without a cache, the window slides instead
            return prompt.ids, wanted
        if not self._told_cap:
            _note(f"warning: after {len(prompt.ids)} tokens of prompt the context has room for {room} new ones only")
            self._told_cap = True
        return prompt.ids, room


def _stop_and_banned_ids(loaded: LoadedModel) -> tuple[frozenset[int], tuple[int, ...]]:
    """What ends a reply and what is never sampled: the chat format's ids unless the settings say otherwise."""
    chat, settings = loaded.chat_format, loaded.settings or default_settings()
    asked_stop, asked_bans = settings.generation.stop_token_id, settings.generation.banned_token_ids
    stops = chat.stop_ids if asked_stop is None else frozenset({asked_stop})
    if asked_bans is not None:
        return stops, asked_bans
    if settings.sft_format.ban_role_tokens_during_generation:
        return stops, chat.banned_ids
    return stops | frozenset(chat.banned_ids), ()  # a role that may be sampled starts another turn: this one ends


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The same text without blanks at its two ends."""
    started, held = False, ""
    for piece in pieces:
        text = held + piece if started else piece.lstrip()
        visible = text.rstrip()
        held = text[len(visible) :]
        if visible:
            started = True
            yield visible


def run_chat(loaded: LoadedModel, options: ChatOptions) -> int:
    """Read lines from stdin and answer each until /exit, end of input or Ctrl-C; returns the exit status 0."""
    conversation = Conversation(loaded, options)
    read_line = _line_reader()
    while True:
        try:
            line = _clean(read_line()).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line == "/exit":
            return 0
        if line == "/help":
            print(HELP)
        elif line == "/reset":
            conversation.reset()
        elif line:
            try:
                _speak(conversation, line)
            except KeyboardInterrupt:
                print()
            except ValueError as error:
                _note(f"Error: {error}")


def answer_once(loaded: LoadedModel, options: ChatOptions, questions: Sequence[str]) -> int:
    """Answer each question in a conversation of its own, on stdout; returns the exit status 0."""
    for question in questions:
        if len(questions) > 1:
            print(f"> {question}")
        _speak(Conversation(loaded, options), _clean(question))
    return 0


def _speak(conversation: Conversation, text: str) -> None:
    """Print the reply as it comes; on a terminal also how fast it came."""
    on_terminal = sys.stdout.isatty()
    start, empty = time.perf_counter(), True
    with contextlib.closing(conversation.reply(text)) as pieces:
        for piece in pieces:
            print(piece.translate(UNPRINTABLE) if on_terminal else piece, end="", flush=True)
            empty = False
    if empty:
        _note("(no reply)")
    print(flush=True)
    if on_terminal:
        seconds = time.perf_counter() - start
        print(f"[{conversation.reply_tokens} tokens, {conversation.reply_tokens / seconds:.1f} tokens/s]", flush=True)


def _line_reader() -> Callable[[], str]:
    """Editing and history where a person types; plain lines from pipes and tests."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from prompt_toolkit import PromptSession

            session: PromptSession[str] = PromptSession()
            return lambda: session.prompt("> ")
    return lambda: input("> ")


def _clean(text: str) -> str:
    """Bytes of the command line or a pipe that are not UTF-8 arrive as surrogates; they become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def build_options(settings: Settings | None, system: str, args: argparse.Namespace | None = None) -> ChatOptions:
    """Generation settings (defaults for a checkpoint that brings none) with what the command line overrides."""
    generation = (settings or default_settings()).generation
    given = {} if args is None else {key: value for key, value in vars(args).items() if value is not None}
    return ChatOptions(
        system=system,
        sampling=Sampling(
            temperature=given.get("temperature", generation.temperature),
            top_k=given.get("top_k", generation.top_k),
            top_p=given.get("top_p", generation.top_p),
            repetition_penalty=generation.repetition_penalty,
        ),
        max_new_tokens=given.get("max_new_tokens", generation.max_new_tokens),
        seed=given.get("seed", DEFAULT_SEED),
        use_cache=given.get("kv_cache", True),
    )


def system_prompt(system_file: str | None = None, system: str | None = None) -> str:
    """The first of: the file named, the text given, configs/system_surly.txt (here, else shipped), the built-in one."""
    if system_file is not None:
        return _read_text(Path(system_file))
    if system is not None:
        return system
    here = paths.CONFIG_DIR / SYSTEM_FILE
    if here.is_file():
        return _read_text(here)
    try:
        return _read_text(paths.shipped(f"configs/{SYSTEM_FILE}"))
    except FileNotFoundError:
        return BUILT_IN_SYSTEM


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no system prompt file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the system prompt file {path} is not UTF-8 text") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chat_cli", description="Chat with a checkpoint. Type /help for commands.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="PATH", help="checkpoint to chat with, such as checkpoints/best.pt")
    add("--prompt", action="append", metavar="TEXT", help="answer this and leave; may be repeated, each on its own")
    add("--max-new-tokens", type=int, metavar="N", help="longest reply (default: from the checkpoint's settings)")
    add("--temperature", type=float, metavar="X", help="0 = always the likeliest token (default: from the settings)")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest; 0 = off (default: from the settings)")
    add("--top-p", type=float, metavar="P", help="sample within this total probability; 0 = off (default: same)")
    add("--seed", type=int, default=DEFAULT_SEED, help="of the replies (default: %(default)s)")
    add("--system", metavar="TEXT", help="system prompt (default: configs/system_surly.txt)")
    add("--system-file", metavar="PATH", help="file with the system prompt; wins over --system")
    add("--no-kv-cache", dest="kv_cache", action="store_false", help="full forward pass per token: slow, for debugging")
    add("--device", metavar="NAME", help="cpu, mps or cuda (default: the best there is)")
    add("--tokenizer", metavar="PATH", help="tokenizer model, where the checkpoint does not carry its own")
    add("--ignore-tokenizer-hash", action="store_true", help="accept a tokenizer other than the one trained with")
    return parser


def _check_flags(args: argparse.Namespace) -> None:
    """ValueError for values that make no sense, before anything is loaded."""
    Sampling(temperature=args.temperature or 0, top_k=args.top_k, top_p=args.top_p)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {args.max_new_tokens}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2^63 - 1, not {args.seed}")
    if any(not text.strip() for text in args.prompt or ()):
        raise ValueError("--prompt is empty; give it a question")
    args.device = resolve_device(args.device)


def _run(args: argparse.Namespace) -> int:
    system = system_prompt(args.system_file, args.system)
    loaded = load_model(
        args.ckpt,
        device=args.device,
        tokenizer_path=args.tokenizer,
        ignore_tokenizer_hash=args.ignore_tokenizer_hash,
    )
    options = build_options(loaded.settings, _clean(system), args)
    shown = asdict(options)
    shown = {"ckpt": args.ckpt, "step": loaded.step, "device": args.device, **shown.pop("sampling"), **shown}
    _print_settings(shown, sys.stderr if args.prompt else sys.stdout)
    return answer_once(loaded, options, args.prompt) if args.prompt else run_chat(loaded, options)


def _print_settings(shown: dict[str, object], out: TextIO) -> None:
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
        _note(f"error: {error}")
        return 2
    try:
        status = _run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has gone. Python would complain about the unwritten rest when it exits.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        _note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
