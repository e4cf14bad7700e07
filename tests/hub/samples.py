"""Small data sets in the form of the real ones: the same repositories, files, splits and columns, other content."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hub.server import LoopbackHub

WIKITEXT = "Salesforce/wikitext"
FINEWEB = "HuggingFaceFW/fineweb-edu"
GUTENBERG = "nikolina-p/gutenberg_clean_en_splits"
DOLLY = "databricks/databricks-dolly-15k"
OASST = "OpenAssistant/oasst1"
WORDS = ("river", "stone", "bread", "lamp", "winter", "song", "garden", "letter", "window", "cloud", "bridge", "clock")

Row = dict[str, Any]


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n)).capitalize() + "."


def wikitext_rows(n: int, seed: int) -> list[Row]:
    """Headings, blank rows and paragraphs, as in WikiText."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        text = ("", f" = Article {i} = \n", f" {sentence(rng, 30)} \n")[i % 3]
        rows.append({"text": text})
    return rows


def fineweb_rows(n: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    return [
        {
            "text": f"Page {seed}-{i}. {sentence(rng, 40)}",
            "id": f"<urn:uuid:{seed}-{i}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"http://example.org/{i}",
            "file_path": "s3://example/segment.warc.gz",
            "language": "en",
            "language_score": 0.9,
            "token_count": 42,
            "score": 3.5,
            "int_score": 4,
        }
        for i in range(n)
    ]


def gutenberg_rows(n: int) -> list[Row]:
    rng = random.Random(7)
    return [{"text": f"BOOK {i}\n\n" + "\n".join(sentence(rng, 12) for _ in range(40))} for i in range(n)]


def dolly_rows(n: int) -> list[Row]:
    rng = random.Random(3)
    return [
        {
            "instruction": f"Question {i}: {sentence(rng, 6)}",
            "context": sentence(rng, 20) if i % 3 == 0 else "",
            "response": sentence(rng, 10),
            "category": "open_qa",
        }
        for i in range(n)
    ]


def oasst_rows(n_trees: int) -> list[Row]:
    """Trees of a question, two answers, and a second exchange below the first; every fifth is Spanish."""
    rng = random.Random(5)
    rows = []
    for tree in range(n_trees):
        lang = "es" if tree % 5 == 4 else "en"
        below = {"q": None, "a0": "q", "a1": "q", "q2": "a0", "b0": "q2"}
        for name, parent in below.items():
            rows.append(
                {
                    "message_id": f"{tree}-{name}",
                    "parent_id": None if parent is None else f"{tree}-{parent}",
                    "user_id": "u",
                    "created_date": "2023-02-05T14:23:50.983374+00:00",
                    "text": f"{name} {sentence(rng, 8)}",
                    "role": "prompter" if name.startswith("q") else "assistant",
                    "lang": lang,
                    "review_count": 3,
                    "review_result": True,
                    "deleted": False,
                    "rank": None if name.startswith("q") else 0,
                    "synthetic": False,
                    "model_name": None,
                    "message_tree_id": f"{tree}-q",
                    "tree_state": "ready_for_export",
                }
            )
    return rows


def parquet(rows: list[Row]) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), target, row_group_size=100)
    return target.getvalue()


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(configs: dict[str, dict[str, str]]) -> bytes:
    """A README whose head names the files of every split of every configuration."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", "# A small data set in the form of the real one", ""]).encode()


def wikitext_files(seed: int = 0) -> dict[str, bytes]:
    config = "wikitext-103-raw-v1"
    splits = {split: f"{config}/{split}-*" for split in ("test", "train", "validation")}
    return {
        "README.md": card({config: splits}),
        f"{config}/test-00000-of-00001.parquet": parquet(wikitext_rows(9, seed + 1)),
        f"{config}/train-00000-of-00002.parquet": parquet(wikitext_rows(300, seed + 2)),
        f"{config}/train-00001-of-00002.parquet": parquet(wikitext_rows(150, seed + 3)),
        f"{config}/validation-00000-of-00001.parquet": parquet(wikitext_rows(60, seed + 4)),
    }


def publish_all(hub: LoopbackHub) -> dict[str, str]:
    """Publish every data set; returns the commit of each."""
    hub.moved["wikitext"] = WIKITEXT
    crawl = "CC-MAIN-2024-10"
    files = {
        WIKITEXT: wikitext_files(),
        FINEWEB: {
            "README.md": card({"default": {"train": "data/*/*"}, crawl: {"train": f"data/{crawl}/*"}}),
            f"data/{crawl}/train-00000-of-00002.parquet": parquet(fineweb_rows(250, 0)),
            f"data/{crawl}/train-00001-of-00002.parquet": parquet(fineweb_rows(250, 1)),
        },
        GUTENBERG: {
            "README.md": card({"default": {"train": "data/train-*"}}),
            "data/train-00000-of-00001.parquet": parquet(gutenberg_rows(12)),
        },
        DOLLY: {"README.md": b"# dolly\n", "databricks-dolly-15k.jsonl": jsonl(dolly_rows(60))},
        OASST: {
            "README.md": card({"default": {"train": "data/train-*", "validation": "data/validation-*"}}),
            "data/train-00000-of-00001-b42a775f407cee45.parquet": parquet(oasst_rows(20)),
            "data/validation-00000-of-00001-134b8fd0c89408b6.parquet": parquet(oasst_rows(2)),
        },
    }
    return {name: hub.publish(name, content) for name, content in files.items()}
