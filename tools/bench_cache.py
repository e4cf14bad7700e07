"""MB/s of building a token cache beside `datasets.Dataset.map` with the same tokenizer, and the memory of a long stream

    python tools/bench_cache.py [--mb 100] [--rounds 3]       # ours and theirs in turn, in one run
    python tools/bench_cache.py --stream-gb 1                 # peak memory of all processes while a stream is built

The text is that of chitchat and the primer, made longer from its own words: a seeded draw of sentences in which some
words are exchanged or spelled anew, so that new words keep coming as in real text and no line appears twice. Theirs is
`map(batched=True, num_proc=2)` writing its Arrow cache; ours writes shards, hashes and an index. Both read the same
texts from an Arrow table on disk, and nothing of an earlier round.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import sentencepiece

from niels_gpt import paths
from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.data.registry import SOURCES, Source, get_source
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings, load_overrides, validate_overrides
from niels_gpt.tokenizer import load_tokenizer, train_tokenizer

NEW_WORD = 0.02  # share of words that are spelled anew, about that of web text
SYLLABLES = ("ka", "lo", "mi", "ter", "sen", "ra", "vo", "nik", "ul", "pre", "sta", "be", "dor", "in", "est", "qua")
NAME = "bench"
SEED = 7


def shipped_texts(settings: Settings) -> list[str]:
    found = [get_source(name).documents for name in ("chitchat", "primer")]
    return [document.text for documents in found if documents for document in documents(settings, "train")]


def made_texts(texts: list[str], n_bytes: int, seed: int) -> Iterator[str]:
    """About `n_bytes` of varied text, in documents of 8 to 59 lines of the given texts."""
    draw = random.Random(seed)
    lines = [line for text in texts for line in text.split("\n") if line]
    words = sorted({word for line in lines for word in line.split(" ")})
    while n_bytes > 0:
        document = []
        for line in draw.choices(lines, k=draw.randrange(8, 60)):
            parts = line.split(" ")
            for i in range(len(parts)):
                chance = draw.random()
                if chance < NEW_WORD:
                    parts[i] = "".join(draw.choices(SYLLABLES, k=draw.randrange(1, 5)))
                elif chance < 0.2:
                    parts[i] = draw.choice(words)
            document.append(" ".join(parts))
        text = "\n".join(document)
        n_bytes -= len(text.encode())
        yield text


def settings_for(folder: Path) -> Settings:
    overrides = load_overrides(paths.shipped("configs/quickstart.json"))
    overrides["tokenizer"]["model_path"] = str(folder / "spm.model")
    return validate_overrides(overrides)


def prepare(folder: Path, mb: float) -> tuple[Settings, Any]:
    """Settings with a tokenizer trained on the shipped text, and an Arrow table on disk with `mb` of made text."""
    import datasets

    settings = settings_for(folder)
    texts = shipped_texts(settings)
    train_tokenizer(texts, folder, vocab_size=settings.tokenizer.vocab_size)
    datasets.Dataset.from_dict({"text": list(made_texts(texts, int(mb * 1e6), SEED))}).save_to_disk(
        str(folder / "text")
    )
    return settings, datasets.load_from_disk(str(folder / "text"))


def register(documents: Any = None, stream: Any = None) -> None:
    about = {"dataset_name": NAME, "split_rule": None}
    SOURCES[NAME] = Source(NAME, lambda settings, phase: about, documents=documents, stream=stream)


def ours(settings: Settings, table: Any, folder: Path) -> None:
    def documents(settings: Settings, split: str) -> Iterator[Document]:
        return (Document(row["text"], NAME) for row in (table if split == "train" else ()))

    register(documents=documents)
    build_pretrain(settings, load_tokenizer(settings.tokenizer.model_path), NAME, root=folder / "ours")
    shutil.rmtree(folder / "ours")


class Theirs:
    """The function that `map` calls: a tokenizer in each process, one thread each, as two processes fill two cores."""

    def __init__(self, model_path: str, threads: int) -> None:
        self.model_path, self.threads = model_path, threads
        self.processor: Any = None

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        if self.processor is None:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=self.model_path)
        return {"ids": self.processor.encode(batch["text"], num_threads=self.threads)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "processor": None}


def theirs(settings: Settings, table: Any, folder: Path) -> None:
    table.map(
        Theirs(settings.tokenizer.model_path, threads=1),
        batched=True,
        num_proc=2,
        remove_columns=["text"],
        load_from_cache_file=False,
        cache_file_name=str(folder / "theirs.arrow"),
    )
    for path in folder.glob("theirs*.arrow"):
        path.unlink()


def compare(mb: float, rounds: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings, table = prepare(folder, mb)
        size = sum(len(row["text"].encode()) for row in table) / 1e6
        print(f"{size:.1f} MB in {len(table):,} documents, {settings.tokenizer.vocab_size} pieces")
        rates: dict[str, list[float]] = {"ours": [], "datasets.map": []}
        for round_ in range(rounds):
            for label, work in (("ours", ours), ("datasets.map", theirs)):
                began = time.perf_counter()
                work(settings, table, folder)
                rates[label].append(size / (time.perf_counter() - began))
                print(f"round {round_ + 1}: {label} {rates[label][-1]:.2f} MB/s", flush=True)
    ratios = [a / b for a, b in zip(rates["ours"], rates["datasets.map"], strict=True)]
    medians = {label: statistics.median(found) for label, found in rates.items()}
    print(", ".join(f"{label} {rate:.2f} MB/s" for label, rate in medians.items()), "(medians)")
    print(f"ours / datasets.map: {statistics.median(ratios):.2f} (of {', '.join(f'{r:.2f}' for r in ratios)})")


class PeakMemory:
    """The largest memory that this process and its children held together, sampled while the block runs.

    `pss` shares pages among the processes that use them; `rss` counts them once for each.
    """

    def __init__(self) -> None:
        self.pss = self.rss = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.25):
            pss = rss = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    found = process.memory_full_info()
                except psutil.Error:
                    continue
                rss += found.rss
                pss += getattr(found, "pss", found.rss)
            self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def stream(gb: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_for(folder)
        texts = shipped_texts(settings)
        train_tokenizer(texts, folder, vocab_size=settings.tokenizer.vocab_size)
        total = int(gb * 1e9)
        register(stream=lambda settings: (Document(text, NAME) for text in made_texts(texts, total, SEED)))
        tokenizer = load_tokenizer(settings.tokenizer.model_path)
        began = time.perf_counter()
        with PeakMemory() as peak:
            meta = build_pretrain(settings, tokenizer, NAME, root=folder / "ours", train_tokens=total, workers=2)
        seconds = time.perf_counter() - began
    read = sum(meta["bytes"].values())
    print(
        f"{read / 1e9:.2f} GB as one stream in {seconds:.0f} s ({read / 1e6 / seconds:.1f} MB/s with making the text)"
    )
    print(f"peak memory of all processes: {peak.pss / 1e6:.0f} MB (rss summed {peak.rss / 1e6:.0f} MB)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speed and memory of building token caches.")
    parser.add_argument("--mb", type=float, default=100.0, help="text to compare on (default: %(default)g)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison (default: %(default)s)")
    parser.add_argument("--stream-gb", type=float, help="instead, build a stream of this size and measure memory")
    args = parser.parse_args(argv)
    if args.stream_gb:
        stream(args.stream_gb)
    else:
        compare(args.mb, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
