"""Publish a checkpoint on the Hugging Face hub, with a model card: `niels-gpt upload`, or `tools/upload_checkpoint.py`.

The checkpoint is loaded first, as `chat` would. Everything goes up in one commit, and what the hub then has is compared
with what is here. A model that learned from texts of your own is published only if you say so.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from niels_gpt import files, paths
from niels_gpt.chat import note
from niels_gpt.checkpoint import LoadedModel, load_checkpoint, load_model, save_checkpoint
from niels_gpt.checkpoint.format import Checkpoint
from niels_gpt.checkpoint.loaded import TOKENIZER_BESIDE, settings_meta
from niels_gpt.command import exit_status
from niels_gpt.data.hub_errors import HubError
from niels_gpt.hub.card import MADE_HERE, Published, card, own_text
from niels_gpt.hub.fetch import DEFAULT_REPO, NotThere, fetch, library_for, locate, patiently, repo_id
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train.metrics import read_metrics

CARD = "README.md"
DEFAULT_FILE = "best.pt"  # in the folder of checkpoints


def upload_checkpoint(
    path: Path,
    repo: str = DEFAULT_REPO,
    *,
    private: bool = False,
    dry_run: bool = False,
    weights_only: bool = False,
    share_own_text: bool = False,
    tokenizer_path: Path | None = None,
    metrics: Path | None = None,
    scores: Path | None = None,
    license: str | None = None,
) -> str:
    """Publish and return the commit's address; with `dry_run` nothing is sent and the card is returned.

    weights_only: without optimizer state and data position, which only resuming needs. scores: JSON file, name -> bits
    per byte. Raises FileNotFoundError, ValueError (no checkpoint; texts of your own), HubError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    checkpoint = load_checkpoint(path, device="cpu")
    loaded = load_model(path, device="cpu", tokenizer_path=tokenizer_path)
    own = own_text(checkpoint, loaded)
    if own and not (private or share_own_text or dry_run):
        raise ValueError(
            f"{path} learned from texts of your own ({', '.join(own)}) and may repeat them to anyone; "
            "publish it for yourself with --private, or for all with --share-own-text"
        )
    with tempfile.TemporaryDirectory() as folder:
        content = _model_files(path, checkpoint, loaded, Path(folder) if weights_only else None)
        written = card(
            Published(
                repo=repo,
                file=path.name,
                sha256=_sha256(content[path.name]),
                checkpoint=checkpoint,
                loaded=loaded,
                evals=_last_evals(metrics or _metrics_of(checkpoint)),
                scores=_read_scores(scores),
                license=license,
            )
        )
        content[CARD] = written.encode()
        for name, item in content.items():
            size = item.stat().st_size if isinstance(item, Path) else len(item)
            note(f"{name}: {size:,} bytes, sha256 {_sha256(item)}")
        return written if dry_run else _publish(repo, content, private)


def _model_files(
    path: Path, checkpoint: Checkpoint, loaded: LoadedModel, weights_only_in: Path | None
) -> dict[str, Path | bytes]:
    """Name on the hub -> what goes there: the checkpoint, or a copy of its weights alone, and a tokenizer it lacks."""
    sent = path
    if weights_only_in is not None:
        sent = weights_only_in / path.name
        _save_without_training_state(sent, checkpoint)
    elif checkpoint["optimizer_state"] is not None:
        note("note: it goes up with its optimizer state; --weights-only leaves that out, a third of the size")
    content: dict[str, Path | bytes] = {path.name: sent}
    if isinstance(loaded.tokenizer, SentencePieceTokenizer) and checkpoint["tokenizer_model"] is None:
        content[TOKENIZER_BESIDE] = loaded.tokenizer.model_bytes
    return content


def _save_without_training_state(path: Path, checkpoint: Checkpoint) -> None:
    settings = (checkpoint["resume"] or {}).get("settings")
    save_checkpoint(
        path,
        model_cfg=checkpoint["model_cfg"],
        train_cfg=checkpoint["train_cfg"],
        model=checkpoint["model_state"],
        optimizer=None,
        step=checkpoint["step"],
        best_val_loss=checkpoint["best_val_loss"],
        resume=None if settings is None else {"settings": settings},
        tokenizer_model=checkpoint["tokenizer_model"],
    )


def _publish(repo: str, content: Mapping[str, Path | bytes], private: bool) -> str:
    library = library_for(repo)
    api = library.HfApi()
    with _if_stopped(f"{repo} may have been made on the hub, but nothing was published in it"):
        patiently(lambda: api.create_repo(repo, private=private, exist_ok=True), repo)
        about = patiently(lambda: api.model_info(repo), repo)
        if private and not about.private:
            raise HubError(
                f"{repo}: it exists and is public; make it private in its settings on the hub, or choose another"
            )
        sent = {name: item for name, item in content.items() if name != CARD or not _has_own_card(repo)}
    operations = [
        library.CommitOperationAdd(name, item if isinstance(item, bytes) else str(item)) for name, item in sent.items()
    ]
    note(f"uploading {', '.join(sent)} to {repo}")
    message = f"Upload {next(iter(content))}"
    with _if_stopped(f"{repo} is there, and all of the files are in it or none; the same command publishes them"):
        commit = patiently(lambda: api.create_commit(repo, operations, commit_message=message), repo)
    address: str = commit.commit_url
    with _if_stopped(f"it is published as {address}, but was not compared with what is here"):
        for name, item in sent.items():
            _compare(repo, name, item, commit.oid)
    return address


@contextmanager
def _if_stopped(truth: str) -> Iterator[None]:
    """Ctrl-C inside the block says this."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(truth) from None


def _has_own_card(repo: str) -> bool:
    """Whether the repository has a README that its owner wrote, which is left alone."""
    try:
        remote = locate(repo, CARD)
    except NotThere:
        return False
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / CARD
        fetch(remote, target, lambda _: None)
        own = MADE_HERE not in target.read_text(encoding="utf-8", errors="replace")
    if own:
        note(f"note: {repo} has a {CARD} that was not written here; it stays as it is")
    return own


def _compare(repo: str, name: str, item: Path | bytes, commit: str) -> None:
    remote = locate(repo, name, commit)
    size = item.stat().st_size if isinstance(item, Path) else len(item)
    large = len(remote.digest) == len(files.sha256_bytes(b""))
    if remote.size != size or (large and remote.digest != _sha256(item)):
        raise HubError(f"{repo}: {name} is not on the hub what it is here (commit {commit[:7]}); upload it again")


def _sha256(item: Path | bytes) -> str:
    return files.sha256_file(item) if isinstance(item, Path) else files.sha256_bytes(item)


# scores


def _metrics_of(checkpoint: Checkpoint) -> Path | None:
    """The metrics of the run that made it, where they are here."""
    run = (settings_meta(checkpoint) or {}).get("run_id")
    path = paths.RUNS_DIR / Path(str(run)).name / "metrics.jsonl"
    return path if run and path.is_file() else None


def _last_evals(path: Path | None) -> list[dict[str, Any]]:
    """The last evaluation of each phase; FileNotFoundError for a file that is not there."""
    if path is None:
        return []
    if not path.is_file():
        raise FileNotFoundError(f"there are no metrics at {path}")
    last: dict[str, dict[str, Any]] = {}
    for entry in read_metrics(path):
        if entry.get("kind") == "eval" and entry.get("losses"):
            last[str(entry["phase"])] = entry
    return list(last.values())


def _read_scores(path: Path | None) -> dict[str, float] | None:
    if path is None:
        return None
    scores = files.read_json(path)
    good = isinstance(scores, dict) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for value in scores.values()
    )
    if not good:
        raise ValueError(f'{path} must be a JSON object of names and bits per byte, such as {{"wikitext": 1.23}}')
    return {str(name): float(value) for name, value in scores.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="niels-gpt upload", description="Publish a checkpoint on the Hugging Face hub.", allow_abbrev=False
    )
    add = parser.add_argument
    best = paths.CHECKPOINT_DIR / DEFAULT_FILE
    add("--checkpoint", type=Path, default=best, metavar="PATH", help="what to publish (default: %(default)s)")
    add(
        "--repo",
        type=repo_id,
        default=DEFAULT_REPO,
        metavar="OWNER/NAME",
        help="made if it does not exist (default: %(default)s)",
    )
    add("--private", action="store_true", help="only you can see the repository")
    add("--dry-run", action="store_true", help="print the model card and send nothing")
    add("--weights-only", action="store_true", help="leave out the optimizer's state, which only resuming needs")
    add("--share-own-text", action="store_true", help="publish although it learned from texts of your own")
    add("--tokenizer", type=Path, metavar="PATH", help="its tokenizer, where it does not carry it")
    add("--metrics", type=Path, metavar="PATH", help="metrics.jsonl of its run (default: found in runs/)")
    add("--scores", type=Path, metavar="PATH", help="JSON of names and bits per byte for the card")
    add("--license", metavar="NAME", help="of the model, as the hub names licences, such as mit or cc-by-sa-4.0")
    args = parser.parse_args(argv)

    def work() -> None:
        try:
            print(_upload(args))
        except KeyboardInterrupt as stop:
            note(f"stopped; {str(stop) or 'nothing was published'}")
            raise

    return exit_status(work)


def _upload(args: argparse.Namespace) -> str:
    return upload_checkpoint(
        args.checkpoint,
        args.repo,
        private=args.private,
        dry_run=args.dry_run,
        weights_only=args.weights_only,
        share_own_text=args.share_own_text,
        tokenizer_path=args.tokenizer,
        metrics=args.metrics,
        scores=args.scores,
        license=args.license,
    )


if __name__ == "__main__":
    sys.exit(main())
