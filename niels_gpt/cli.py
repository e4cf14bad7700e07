"""`niels-gpt <command>`: a table of programs and nothing else."""

from __future__ import annotations

import signal
import sys
import threading
from importlib import import_module
from signal import SIGINT, default_int_handler
from types import ModuleType

from niels_gpt.command import exit_status

COMMANDS = {
    "quickstart": ("niels_gpt.quickstart", "train a small chat model offline, in minutes, and talk to it"),
    "chat": ("niels_gpt.chat_cli", "talk to a checkpoint, or answer one --prompt"),
    "download": ("niels_gpt.hub.download", "bring a published checkpoint here from the Hugging Face hub"),
    "upload": ("niels_gpt.hub.upload", "publish a checkpoint on the Hugging Face hub, with a model card"),
    "train": ("niels_gpt.train.run", "pretrain, fine-tune or both, from a config"),
    "plan": ("niels_gpt.plan.cli", "what the best model is that this machine can make in so many hours"),
    "runs": ("niels_gpt.train.runs_cli", "what was trained here, how well, and where the time went"),
    "doctor": ("niels_gpt.doctor.cli", "will training work on this machine? every choice with its reason, and a try"),
    "bench": ("niels_gpt.bench.sweep", "which model sizes train how fast here, and how large a batch fits"),
    "tokenizer": ("niels_gpt.tokenizer.train_cli", "train a tokenizer on files, sources or the mix of a config"),
    "cache": ("niels_gpt.cache.cli", "build, show and verify token caches"),
    "notes": ("niels_gpt.notes_cli", "see what would be learned from your own notes, then build their cache"),
    "export": ("niels_gpt.export.cli", "take a checkpoint to transformers (hf) or llama.cpp and Ollama (gguf)"),
    "import": ("niels_gpt.export.import_cli", "make a checkpoint of a Hugging Face folder of the Llama family"),
    "settings": ("niels_gpt.settings.doc", "every setting with its default, bounds and meaning"),
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    # Each program ends by an `exit_status` of its own; this one is for what comes before that, or is a --help.
    return exit_status(lambda: _run(arguments), stopped="interrupted", expected=(), reader_gone=0)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        _help()
        return 0
    if arguments[0] not in COMMANDS:
        print(f"niels-gpt: unknown command {arguments[0]!r}; commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    status: int = _loaded(COMMANDS[arguments[0]][0]).main(arguments[1:])
    return status


def _loaded(name: str) -> ModuleType:
    """The module of a program. Its libraries take seconds to load: meanwhile Ctrl-C simply ends the process.

    As an exception it would come out of the middle of one of them, or be swallowed there.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(SIGINT) is not default_int_handler:
        return import_module(name)
    signal.signal(SIGINT, signal.SIG_DFL)
    try:
        return import_module(name)
    finally:
        signal.signal(SIGINT, default_int_handler)


def _help() -> None:
    print("usage: niels-gpt <command> [options]      (niels-gpt <command> --help for its options)\n")
    for name, (_, help_line) in COMMANDS.items():
        print(f"  {name:<11} {help_line}")


if __name__ == "__main__":
    sys.exit(main())
