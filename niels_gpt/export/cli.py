"""Take a checkpoint elsewhere: a Hugging Face folder, or GGUF files for llama.cpp and Ollama.

    niels-gpt export hf --ckpt checkpoints/best.pt --out niels-hf
    niels-gpt export gguf --ckpt checkpoints/best.pt --out niels-gguf --dtype f32 q8_0

Nothing appears under the name of --out unless it was loaded back and found equal to the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from niels_gpt.checkpoint import load_model
from niels_gpt.command import exit_status
from niels_gpt.export import gguf_file, hf
from niels_gpt.export.publishing import export_gguf, export_hf


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="niels-gpt export", description=__doc__.split("\n")[0], allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, help_line, dtypes in (
        ("hf", "a folder that plain transformers loads", tuple(hf.DTYPES)),
        ("gguf", "a folder of GGUF files, with a Modelfile for Ollama", gguf_file.DTYPES),
    ):
        command = kinds.add_parser(kind, help=help_line, description=help_line, allow_abbrev=False)
        add = command.add_argument
        add("--ckpt", required=True, metavar="PATH", help="checkpoint to export, such as checkpoints/best.pt")
        add("--out", required=True, type=Path, metavar="PATH", help="folder to make")
        add("--overwrite", action="store_true", help="replace an earlier export of this name")
        add("--tokenizer", metavar="PATH", help="tokenizer model, where the checkpoint does not carry its own")
        add("--ignore-tokenizer-hash", action="store_true", help="accept a tokenizer other than the one trained with")
        several = "; several make several files" if kind == "gguf" else ""
        count = "+" if kind == "gguf" else 1
        add("--dtype", nargs=count, choices=dtypes, default=["f32"], help=f"of the weights (default: f32){several}")
        if kind == "gguf":
            add("--approximate-gelu", action="store_true", help="byte models: accept llama.cpp's approximation of GELU")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.kind == "gguf" and args.out.suffix == ".gguf":
        parser.error(f"--out names a folder, which will hold the .gguf files; try --out {args.out.with_suffix('')}")
    return exit_status(lambda: _export(args), stopped=f"interrupted; {args.out} is as it was")


def _export(args: argparse.Namespace) -> None:
    with Console(stderr=True).status("reading the checkpoint") as status:
        loaded = load_model(
            args.ckpt,
            device="cpu",
            tokenizer_path=args.tokenizer,
            ignore_tokenizer_hash=args.ignore_tokenizer_hash,
        )
        dtypes = list(dict.fromkeys(args.dtype))
        common = {"overwrite": args.overwrite, "say": status.update}
        if args.kind == "hf":
            lines = export_hf(loaded, args.out, dtypes[0], **common)
        else:
            lines = export_gguf(loaded, args.out, dtypes, approximate_gelu=args.approximate_gelu, **common)
    for line in lines:
        print(line)
    print(f"exported to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
