"""Make a checkpoint of a Hugging Face folder: Llama, Qwen3, or a GPT-NeoX as this project exports it

niels-gpt import hf niels-hf --out checkpoints/imported.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from niels_gpt.checkpoint import save_checkpoint
from niels_gpt.command import exit_status
from niels_gpt.export.import_hf import Imported, read_hf
from niels_gpt.export.publishing import quiet_transformers
from niels_gpt.export.verify import load_with_transformers, same_logits
from niels_gpt.model.gpt import GPT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="niels-gpt import", description=__doc__.split("\n")[0], allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    command = kinds.add_parser("hf", help="a folder as transformers saves it", allow_abbrev=False)
    command.add_argument("folder", type=Path, metavar="DIR", help="folder with config.json and safetensors")
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="checkpoint to write")
    command.add_argument("--overwrite", action="store_true", help="replace a file of this name")
    return parser


def import_hf(folder: Path, out: Path) -> Imported:
    """Read a folder, compare with transformers, write the checkpoint; ValueError: the reason why there is none."""
    found = read_hf(folder)
    with torch.random.fork_rng(devices=[]):
        model = GPT(found.cfg, found.arch).eval()
    model.load_state_dict(found.state)
    with quiet_transformers():
        theirs = load_with_transformers("AutoModelForCausalLM", folder, dtype=torch.float32).eval()
        named = f"{folder} was not imported: the logits of transformers and of the model made here"
        same_logits(model, lambda ids: theirs(ids).logits, named=named)
    meta = {"tokenizer_sha256": found.tokenizer_sha256, "phase": None, "run_id": None}
    save_checkpoint(
        out,
        model_cfg=found.cfg,
        train_cfg={"imported_from": folder.resolve().name, "_settings_meta": meta},
        model=model,
        optimizer=None,
        step=0,
        best_val_loss=None,
        tokenizer_model=found.tokenizer_model,
    )
    return found


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return exit_status(lambda: _import(args), stopped=f"interrupted; nothing was written to {args.out}")


def _import(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} is there already; choose another name, or pass --overwrite")
    with Console(stderr=True).status(f"reading {args.folder} and comparing it with transformers"):
        found = import_hf(args.folder, args.out)
    for line in found.notes:
        print(f"note: {line}")
    print(f"imported to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
