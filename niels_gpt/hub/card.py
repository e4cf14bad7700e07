"""The model card of a published checkpoint: what it is, what it read and under which licences, how good, how to run.

Only what the checkpoint, its settings and its run's metrics say; what they do not say is called unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from niels_gpt.checkpoint import LoadedModel
from niels_gpt.checkpoint.format import Checkpoint
from niels_gpt.checkpoint.sources import is_beginning_known, learned_from
from niels_gpt.config import ModelConfig

MADE_HERE = "<!-- written by niels-gpt upload; remove this line to keep your own text at the next upload -->"
OWN_TEXT = ("roam", "text", "jsonl")  # sources that are the user's own
# What each source is, its licence, and its name on the hub ("" if it is not from there).
_SOURCES = {
    "chitchat": ("small talk between people (package chitchat-dataset)", "MIT", ""),
    "primer": ("the dialogues that come with niels-gpt", "MIT", ""),
    "wikitext": ("WikiText-103, Wikipedia articles", "CC BY-SA 3.0 and GFDL", "Salesforce/wikitext"),
    "fineweb_edu": ("FineWeb-Edu, educational web pages", "ODC-By 1.0", "HuggingFaceFW/fineweb-edu"),
    "gutenberg": ("books of Project Gutenberg", "public domain in the USA", "nikolina-p/gutenberg_clean_en_splits"),
    "wiki_summaries": ("first paragraphs of Wikipedia articles", "CC BY-SA 4.0, Wikipedia and its contributors", ""),
    "dolly15k": ("Dolly 15k, instructions and answers", "CC BY-SA 3.0", "databricks/databricks-dolly-15k"),
    "oasst1": ("OpenAssistant conversations", "Apache 2.0", "OpenAssistant/oasst1"),
    "roam": ("the author's own notes", "the author's own", ""),
    "text": ("the author's own text files", "the author's own", ""),
    "jsonl": ("the author's own chats", "the author's own", ""),
}
UNKNOWN_BEGINNING = "It began with the weights of another checkpoint, which does not say what it had read. "
_UNKNOWN_SOURCE = ("not known to this version of niels-gpt", "unknown", "")


@dataclass(frozen=True)
class Published:
    """What is published, for its card."""

    repo: str
    file: str
    sha256: str
    checkpoint: Checkpoint
    loaded: LoadedModel
    evals: Sequence[Mapping[str, Any]] = ()  # entries of the run's metrics, the last of each phase
    scores: Mapping[str, float] | None = None  # further figures, in bits per byte
    license: str | None = None  # of the model, as the hub names licences


def own_text(checkpoint: Checkpoint, loaded: LoadedModel) -> list[str]:
    """Sources of the user's own that the model learned from."""
    mixes = learned_from(checkpoint, loaded.settings)
    return sorted({name for mix in mixes.values() for name in mix if name in OWN_TEXT})


def card(published: Published) -> str:
    """The README.md of the repository, in Markdown."""
    name = published.repo.rpartition("/")[2]
    parts = [
        _front_matter(published),
        f"# {name}\n\n{MADE_HERE}\n\n{_opening(published)}",
        f"## How to run it\n\n{_how_to_run(published)}",
        f"## What it read\n\n{_sources(published)}",
        f"## How it is built\n\n{_shape(published)}",
        f"## Scores\n\n{_scores(published)}",
        f"## Limits\n\n{_limits(published)}",
        f"## Files\n\n| file | sha256 |\n|---|---|\n| `{published.file}` | `{published.sha256}` |",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(published: Published) -> str:
    mixes = learned_from(published.checkpoint, published.loaded.settings)
    sources = {source for mix in mixes.values() for source in mix}
    lines = ["---", "library_name: niels-gpt", "pipeline_tag: text-generation", "tags: [niels-gpt, pytorch]"]
    if published.license is not None:
        lines.append(f"license: {json.dumps(published.license)}")
    on_hub = sorted(hub for source in sources if (hub := _SOURCES.get(source, _UNKNOWN_SOURCE)[2]))
    if on_hub:
        lines += ["datasets:", *(f"- {hub}" for hub in on_hub)]
    return "\n".join([*lines, "---"])


def _opening(published: Published) -> str:
    loaded = published.loaded
    reads = "bytes" if loaded.tokenizer.kind == "byte" else f"tokens of a vocabulary of {loaded.tokenizer.vocab_size:,}"
    return (
        f"A small language model of {loaded.model.num_parameters:,} parameters, trained from scratch with niels-gpt. "
        f"It reads {reads}, {loaded.model.cfg.T} of them at a time, and answers in a chat."
    )


def _how_to_run(published: Published) -> str:
    tokenizer = ""
    if published.loaded.tokenizer.kind != "byte":
        tokenizer = "Its tokenizer comes with it. "
    return (
        f"Install niels-gpt, then:\n\n```bash\nniels-gpt download --repo {published.repo} --file {published.file}\n"
        f"niels-gpt chat --ckpt checkpoints/{published.file}\n```\n\n"
        f"{tokenizer}The file holds tensors and plain values only: loading it runs no code."
    )


def _sources(published: Published) -> str:
    mixes = learned_from(published.checkpoint, published.loaded.settings)
    if not mixes:
        return "The checkpoint does not record it."
    rows = ["| phase | share | source | licence |", "|---|---|---|---|"]
    for phase, mix in mixes.items():
        for source, share in sorted(mix.items(), key=lambda item: -item[1]):
            what, licence, hub = _SOURCES.get(source, _UNKNOWN_SOURCE)
            linked = f" ([{hub}](https://huggingface.co/datasets/{hub}))" if hub else ""
            rows.append(f"| {phase} | {share:.0%} | {source}: {what}{linked} | {licence} |")
    after = "Shares are those of the training positions that were asked for; licences that ask for attribution or for "
    unknown = "" if is_beginning_known(published.checkpoint) else UNKNOWN_BEGINNING
    return "\n".join(rows) + f"\n\n{unknown}{after}sharing alike concern whoever passes on the texts."


def _shape(published: Published) -> str:
    model, checkpoint = published.loaded.model, published.checkpoint
    arch = model.arch
    rows = ["| | |", "|---|---|"]
    rows += [f"| {field.name} | {getattr(model.cfg, field.name):,} |" for field in fields(ModelConfig)]
    rows += [f"| {name} | {value} |" for name, value in vars(arch).items()]
    rows.append(f"| steps | {checkpoint['step']:,} |")
    raw = checkpoint["train_cfg"]
    for name in ("B", "micro_B", "accum_steps", "optimizer", "base_lr", "weight_decay", "seed"):
        if isinstance(raw.get(name), (int, float, str)):
            rows.append(f"| {name} | {raw[name]} |")
    return (
        "A decoder-only transformer with rotary positions (interleaved pairs) and a tied head; V: vocabulary, "
        "T: context, C: width, L: layers, H: heads.\n\n" + "\n".join(rows)
    )


def _scores(published: Published) -> str:
    byte = published.loaded.tokenizer.kind == "byte"
    unit = "bits per byte" if byte else "bits per token"
    rows = [f"| {name} | {value:.3f} bits per byte |" for name, value in (published.scores or {}).items()]
    for entry in published.evals:
        for name, loss in entry["losses"].items():
            rows.append(f"| validation, {name}, {entry['phase']} step {entry['step']:,} | {_bits(loss, unit)} |")
    best = published.checkpoint["best_val_loss"]
    if best is not None:
        rows.append(f"| best validation of the run | {_bits(best, unit)} |")
    if not rows:
        return "None recorded."
    warning = (
        "" if byte else "\n\nBits per token depend on the tokenizer: compare them only with models of the same one."
    )
    return "\n".join(["| measured on | score |", "|---|---|", *rows]) + warning


def _bits(nats: float | None, unit: str) -> str:
    return "not finite" if nats is None or not math.isfinite(nats) else f"{nats / math.log(2):.3f} {unit}"


def _limits(published: Published) -> str:
    limits = [
        "It is very small: it knows little, reasons badly, and says false things fluently. Rely on nothing it says.",
        "It was not aligned or filtered for safety; what it read, it may repeat, word for word.",
        f"It sees {published.loaded.model.cfg.T} positions; what was said before that is forgotten.",
    ]
    own = own_text(published.checkpoint, published.loaded)
    if own:
        limits.append(f"It learned from its author's own texts ({', '.join(own)}) and may repeat pieces of them.")
    return "\n".join(f"- {limit}" for limit in limits)
