"""What a finished quickstart shows: size, speed, bits per byte beside baselines, recall, samples, next commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from niels_gpt import paths
from niels_gpt.cache.pretrain import open_mix
from niels_gpt.checkpoint import LoadedModel, load_model
from niels_gpt.data.registry import get_source
from niels_gpt.eval import byte_unigram_bits, held_out_bits, window_starts
from niels_gpt.recall import Recall, held_out_questions, likeliest_replies, measure_recall, trained_questions
from niels_gpt.settings import Settings

SAMPLE_QUESTIONS = ("what is your name?", "what is the capital of france?", "tell me a joke")
HELD_OUT = "data/primer_heldout.jsonl"
UNIFORM_BITS = 8.0  # bits per byte of a model that knows nothing
FULL_AFTER_MINUTES = 5.0  # of training; a shorter run is measured on an even sample, or measuring would take longer
FEWEST_WINDOWS, FEWEST_QUESTIONS = 32, 100


@dataclass(frozen=True)
class SourceScore:
    """Validation bits per byte of one source."""

    base: float  # after pretraining
    final: float  # after fine-tuning
    unigram: float  # a table of byte frequencies
    text_bytes: int


@dataclass(frozen=True)
class Summary:
    """What a finished quickstart shows."""

    parameters: int
    tokens: dict[str, int]  # positions trained on, per phase
    seconds: dict[str, float]
    scores: dict[str, SourceScore]
    trained_recall: Recall
    trained_questions: int  # that there are; a short run is asked a sample of them
    held_out_recall: Recall
    samples: list[tuple[str, str]]


def measure(
    loaded: LoadedModel,
    base: Path,
    settings: Settings,
    trained: Mapping[str, Mapping[str, Any]],
    system: str,
    say: Callable[[str], None],
) -> Summary:
    """Measure the finished model; everything here is computed now, from the files it was trained with.

    base: the checkpoint that fine-tuning started from.
    """
    share = min(1.0, sum(getattr(settings.training, phase).minutes for phase in trained) / FULL_AFTER_MINUTES)
    say("bits per byte")
    scores = source_scores(loaded, base, settings, share)
    say("primer recall")
    questions = trained_questions(settings)
    trained_recall = measure_recall(loaded, sample_of(questions, share), system=system)
    held_out = measure_recall(loaded, held_out_questions(paths.shipped(HELD_OUT)), system=system)
    say("sample replies")
    options = {phase: getattr(settings.training, phase) for phase in trained}
    summary = Summary(
        parameters=loaded.model.num_parameters,
        tokens={p: r["final_step"] * options[p].rows * settings.model.T for p, r in trained.items()},
        seconds={p: r["seconds"] for p, r in trained.items()},
        scores=scores,
        trained_recall=trained_recall,
        trained_questions=len(questions),
        held_out_recall=held_out,
        samples=list(zip(SAMPLE_QUESTIONS, likeliest_replies(loaded, SAMPLE_QUESTIONS, system=system), strict=True)),
    )
    say("measured")
    return summary


def sample_of(questions: dict[str, list[str]], share: float) -> dict[str, list[str]]:
    """A share of the questions, evenly spread over them."""
    asked = min(len(questions), max(FEWEST_QUESTIONS, round(share * len(questions))))
    names = list(questions)
    return {names[i * len(names) // asked]: questions[names[i * len(names) // asked]] for i in range(asked)}


def source_scores(loaded: LoadedModel, base: Path, settings: Settings, share: float = 1.0) -> dict[str, SourceScore]:
    """Bits per byte of every pretraining source before and after fine-tuning, on the same windows of its validation
    split: a share of them, evenly spread.
    """
    device = loaded.model.tok_emb.weight.device.type
    pretrained = load_model(base, device=device).model
    streams, _ = open_mix(settings, loaded.tokenizer, "val", settings.model.T)
    scores = {}
    for name, stream in streams.items():
        documents = get_source(name).documents
        assert documents is not None, f"{name} is in mix_pretrain, so it has text"
        texts = {split: (d.text.encode() for d in documents(settings, split)) for split in ("train", "val")}
        unigram = byte_unigram_bits(texts["train"], texts["val"])
        most = max(FEWEST_WINDOWS, round(share * len(window_starts(stream, settings.model.T))))
        before, after = (
            held_out_bits(model, stream, loaded.tokenizer, settings, max_windows=most)
            for model in (pretrained, loaded.model)
        )
        scores[name] = SourceScore(before.value, after.value, unigram, after.text_bytes)
    return scores


def show(console: Console, summary: Summary, seconds: float, out: Path) -> None:
    """Print the summary. seconds: wall time of both phases together; out: the run's folder, seen from the user's."""
    total = sum(summary.tokens.values())
    trained = sum(summary.seconds.values())
    console.print(
        f"\n{summary.parameters:,} parameters; {total:,} tokens in {trained:.0f} s of training "
        f"({total / trained:,.0f} tokens/s; this run took {seconds:.0f} s)",
        markup=False,
    )
    table = Table(title="validation bits per byte (held-out text, context and stride T)", title_justify="left")
    for column in ("source", "pretrained", "fine-tuned", "byte unigram", "uniform", "bytes"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, s in summary.scores.items():
        figures = (f"{s.base:.3f}", f"{s.final:.3f}", f"{s.unigram:.3f}", f"{UNIFORM_BITS:.3f}", f"{s.text_bytes:,}")
        table.add_row(name, *figures)
    console.print(table)
    asked, known = summary.trained_recall.asked, summary.trained_questions
    which = "trained questions" if asked == known else f"{asked:,} of {known:,} trained questions"
    for title, recall in ((which, summary.trained_recall), ("held-out", summary.held_out_recall)):
        console.print(f"primer recall, {title}: {recall.right}/{recall.asked} ({recall.share:.1%})", markup=False)
    console.print("\nsample replies at temperature 0:", markup=False)
    for question, reply in summary.samples:
        console.print(f"  > {question}\n  {reply}", markup=False)
    best = out / paths.CHECKPOINT_DIR / "best.pt"
    named = shlex.quote(str(best))
    console.print(
        f"\nmodel: {best} (carries its tokenizer; settings beside it); logs: {out / paths.RUNS_DIR}/\n"
        f"chat:    niels-gpt chat --ckpt {named}\n"
        f'ask:     niels-gpt chat --ckpt {named} --temperature 0 --prompt "what is your name?"\n'
        "longer:  niels-gpt quickstart --minutes 30 --out longer",
        markup=False,
    )
