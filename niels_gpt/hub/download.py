"""Bring a published checkpoint here: `niels-gpt download`, or `python tools/download_checkpoint.py`.

A download that broke off goes on where it was. The file appears under its name only when its size and hash are those of
the hub and it loads as a checkpoint, without running code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path, PurePosixPath

from niels_gpt import paths
from niels_gpt.chat import note
from niels_gpt.checkpoint import is_byte_model, is_good, load_checkpoint
from niels_gpt.checkpoint.loaded import TOKENIZER_BESIDE, recorded_tokenizer
from niels_gpt.checkpoint.weights import check_weights, model_config_of
from niels_gpt.command import exit_status
from niels_gpt.config import V1
from niels_gpt.data.hub_errors import HubError
from niels_gpt.hub.fetch import DEFAULT_REPO, NotThere, fetch, locate, repo_id
from niels_gpt.tokenizer import load_tokenizer

DEFAULT_FILE = "best.pt"


def download_checkpoint(
    repo: str = DEFAULT_REPO, file: str = DEFAULT_FILE, *, revision: str | None = None, out: Path | None = None
) -> Path:
    """The checkpoint's path in `out` (default: checkpoints/), which is not asked of the hub if it is there already.

    With a subword model that does not carry its tokenizer comes the tokenizer, if its repository has it and it is not
    there yet: a download that was stopped between the two has only the first.
    Raises HubError, OSError, or ValueError where the file is no checkpoint; what came is then not kept, and what was
    there stays.
    """
    folder = paths.CHECKPOINT_DIR if out is None else out
    target = folder / PurePosixPath(file).name
    if target.exists():
        if not is_good(target):
            raise ValueError(
                f"{target} is there already and is not a sound checkpoint; nothing was downloaded: to have it anew, "
                "move it away"
            )
        note(f"{target} is there already and is not downloaded again; to have it anew, move it away")
        try:
            _bring_tokenizer(target, repo, revision)
        except HubError as error:  # the model is here; its tokenizer may lie where its settings say
            note(f"note: its tokenizer did not come: {error}")
        return target
    remote = locate(repo, file, revision)
    note(f"downloading {remote.name} of commit {remote.commit[:7]}, {remote.size / 1e6:,.1f} MB, to {target}")
    fetch(remote, target, _check)
    note(_described(target))
    _bring_tokenizer(target, repo, remote.commit)
    return target


def _check(path: Path) -> None:
    checkpoint = load_checkpoint(path, device="cpu")
    check_weights(model_config_of(checkpoint["model_cfg"]), checkpoint["model_state"])


def _described(path: Path) -> str:
    checkpoint = load_checkpoint(path, device="cpu")
    cfg, state = model_config_of(checkpoint["model_cfg"]), checkpoint["model_state"]
    arch = check_weights(cfg, state)
    parameters = sum(tensor.numel() for name, tensor in state.items() if name != "lm_head.weight")
    kind = "bytes" if is_byte_model(checkpoint) else f"{cfg.V:,} tokens"
    generation = "first" if arch == V1 else "second"
    return (
        f"{path}: {parameters:,} parameters of the {generation} generation, {kind}, context {cfg.T}, "
        f"step {checkpoint['step']:,}"
    )


def _bring_tokenizer(target: Path, repo: str, revision: str | None) -> None:
    checkpoint = load_checkpoint(target, device="cpu")
    beside = target.with_name(TOKENIZER_BESIDE)
    if is_byte_model(checkpoint) or checkpoint["tokenizer_model"] is not None or beside.exists():
        return
    wanted = recorded_tokenizer(checkpoint)
    try:
        remote = locate(repo, TOKENIZER_BESIDE, revision)
        fetch(remote, beside, lambda path: _check_tokenizer(path, wanted))
        note(f"its tokenizer: {beside}")
    except (NotThere, ValueError) as error:
        sha = f" (sha256 {wanted})" if wanted else ""
        note(
            f"note: the model needs its tokenizer{sha}, which did not come with it: {error}; chat with --tokenizer FILE"
        )


def _check_tokenizer(path: Path, wanted: str | None) -> None:
    found = load_tokenizer(path).sha256
    if wanted is not None and found != wanted:
        raise ValueError(f"{path} has the sha256 {found}, the model was trained with {wanted}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="niels-gpt download", description="Download a checkpoint from the Hugging Face hub.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--repo",
        type=repo_id,
        default=DEFAULT_REPO,
        metavar="OWNER/NAME",
        help="model repository (default: %(default)s)",
    )
    add("--file", default=DEFAULT_FILE, metavar="PATH", help="file in it (default: %(default)s)")
    add("--revision", metavar="NAME", help="branch, tag or commit (default: main)")
    add("--out", type=Path, metavar="DIR", help=f"folder to put it in (default: {paths.CHECKPOINT_DIR})")
    args = parser.parse_args(argv)
    if not PurePosixPath(args.file).name:
        parser.error("--file is empty")

    def work() -> None:
        target = download_checkpoint(args.repo, args.file, revision=args.revision, out=args.out)
        print(f"talk to it: niels-gpt chat --ckpt {target}")

    return exit_status(work, stopped="stopped; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
