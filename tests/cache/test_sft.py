"""Chat caches: built with every drop counted, reproduced to the bit, packed so that conversations stay apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from niels_gpt.cache.format import SftExamples, open_sft
from niels_gpt.cache.sft import build_sft, open_mix
from niels_gpt.cache.sft_build import build_primer_sft_cache, build_sft_cache
from niels_gpt.chat_format import render
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.reference import BUNDLE, needs_bundle

EOT = 6
OPTIONS: dict[str, Any] = {"seed": 42, "val_frac": 0.1}


def chat(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": "words " * (i % 5 + 1)}]


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps({"messages": line})) + "\n" for line in lines)
    )
    return path


def opened(folder: Path, split: str, tokenizer: SentencePieceTokenizer) -> SftExamples:
    ids = tokenizer.special_token_ids()
    return open_sft(
        folder.parent, folder.name, split, tokenizer_sha256=tokenizer.sha256, vocab_size=512, special_token_ids=ids
    )


def examples_of(folder: Path, split: str, tokenizer: SentencePieceTokenizer) -> list[tuple[list[int], list[int]]]:
    examples = opened(folder, split, tokenizer)
    return [tuple(part.tolist() for part in examples.example(i)) for i in range(len(examples))]


# Building


def test_examples_are_rendered_and_counted(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    chats = [chat(i) for i in range(30)]
    counts: list[tuple[str, int]] = []
    meta = build_sft_cache(
        chats,
        tmp_path / "x",
        tokenizer=tiny_tokenizer,
        **OPTIONS,
        progress=lambda done: counts.append((done.what, done.documents)),
    )
    order = torch.randperm(30, generator=torch.Generator().manual_seed(42)).tolist()
    assert counts == [("val", 3), ("train", 27)]  # a few hundred at a time
    for split, chosen in (("val", sorted(order[:3])), ("train", sorted(order[3:]))):
        assert examples_of(tmp_path / "x", split, tiny_tokenizer) == [render(tiny_tokenizer, chats[i]) for i in chosen]
        assert meta["bytes"][split] == sum(len(chats[i][1]["content"]) for i in chosen)
        assert meta["documents"][split] == len(chosen)


def test_malformed_and_colliding_chats_are_dropped_and_counted(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    bad: list[Any] = [
        [],
        [{"role": "user", "content": "nobody answers"}],
        [{"role": "robot", "content": "x"}, *chat(1)],
        [{"role": "user", "content": None}, *chat(1)],
        [{"role": "user", "content": f"a {SPECIAL_TOKENS['eot']} b"}, *chat(1)],
    ]
    meta = build_sft_cache(bad + [chat(i) for i in range(20)], tmp_path / "x", tokenizer=tiny_tokenizer, **OPTIONS)
    assert meta["dropped"] == {"collision": 1, "malformed": 2, "no_assistant": 2}
    assert (meta["dropped_collisions"], meta["dropped_malformed_examples"]) == (1, 4)
    assert meta["train_examples"] + meta["val_examples"] == 20
    with pytest.raises(ValueError, match="special token literal"):
        build_sft_cache([*bad, chat(1)], tmp_path / "y", tokenizer=tiny_tokenizer, **OPTIONS, strict=True)
    with pytest.raises(ValueError, match="no conversation to train on is left for z"):
        build_sft_cache(bad, tmp_path / "z", tokenizer=tiny_tokenizer, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_build_without_validation_warns_and_names_lines(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"role": "user", "content": f"a {SPECIAL_TOKENS['eot']} b"}, {"role": "assistant", "content": "c"}]
    val = torch.randperm(11, generator=torch.Generator().manual_seed(42)).tolist()[0]
    chats = [chat(i) if i != val else bad for i in range(11)]
    meta = build_sft_cache(chats, tmp_path / "x", tokenizer=tiny_tokenizer, **OPTIONS)
    assert (meta["train_examples"], meta["val_examples"]) == (10, 0)
    said = capsys.readouterr().err
    assert said.startswith("warning: x has no conversation for validation (dropped: 1 collision)")
    build_sft_cache([chat(i) for i in range(11)], tmp_path / "y", tokenizer=tiny_tokenizer, **OPTIONS)
    assert capsys.readouterr().err == ""

    path = write_jsonl(tmp_path / "p.jsonl", [chat(0), bad, "not json", *(chat(i) for i in range(20))])
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer, **OPTIONS, "t_max": 1024}
    with pytest.raises(ValueError, match=r"p\.jsonl: line 2: special token literal"):
        build_primer_sft_cache(path, tmp_path / "z", **options)
    build_primer_sft_cache(path, tmp_path / "z", strict=False, **options)
    said = capsys.readouterr().err
    assert "special token literal in a message (line 2)" in said and "not valid JSON (line 3)" in said


def test_a_byte_tokenizer_has_no_chat_caches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sentinels"):
        build_sft_cache([chat(1), chat(2)], tmp_path / "x", tokenizer=ByteTokenizer(), **OPTIONS)


def test_primer_cache_counts_reconcile(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    lines: list[Any] = [
        *(chat(i) for i in range(20)),
        "not json",
        '{"messages": []}',
        "",
        [{"role": "user", "content": "?"}],
    ]
    path = write_jsonl(tmp_path / "p.jsonl", lines)
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer, **OPTIONS, "t_max": 1024}
    with pytest.raises(ValueError, match=r"p\.jsonl: line 21: not valid JSON"):
        build_primer_sft_cache(path, tmp_path / "x", **options)
    unanswered = write_jsonl(tmp_path / "q.jsonl", [chat(0), [{"role": "user", "content": "?"}], chat(1)])
    meta = build_primer_sft_cache(unanswered, tmp_path / "q", strict=True, **options)
    assert meta["dropped"] == {"no_assistant": 1} and sum(meta["documents"].values()) == 2
    meta = build_primer_sft_cache(path, tmp_path / "x", strict=False, **options)
    assert meta["dropped"] == {"malformed": 2, "no_assistant": 1}
    assert sum(meta["documents"].values()) + sum(meta["dropped"].values()) == 23
    assert (meta["source"], meta["T_max"], meta["split_rule"]) == ("primer", 1024, "by example, val_frac=0.1, seed=42")
    again = build_primer_sft_cache(path, tmp_path / "x", strict=False, **options)
    assert again.pop("reused") and again == meta
    with pytest.raises(FileNotFoundError, match="convert_primer_txt_to_jsonl"):
        build_primer_sft_cache(tmp_path / "none.jsonl", tmp_path / "x", **options)


def test_long_primer_conversations_keep_their_last_tokens(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    long = [{"role": "user", "content": "many " * 50}, {"role": "assistant", "content": "Indeed."}]
    path = write_jsonl(tmp_path / "p.jsonl", [long])
    meta = build_primer_sft_cache(path, tmp_path / "x", tokenizer=tiny_tokenizer, seed=1, val_frac=0.0, t_max=16)
    ids, labels = render(tiny_tokenizer, long)
    assert examples_of(tmp_path / "x", "train", tiny_tokenizer) == [(ids[-16:], labels[-16:])]
    assert meta["bytes"] == {"train": len("Indeed."), "val": 0} and meta["val_examples"] == 0
    assert len(opened(tmp_path / "x", "val", tiny_tokenizer)) == 0


# Mixes


def settings_for(tmp_path: Path, mix: dict[str, float], **primer: Any) -> Settings:
    data = {"caches": {"sft_token_cache": str(tmp_path / "sft")}, "mix_sft": mix, "primer": primer}
    return validate_overrides({"data": data, "model": {"V": 512}, "tokenizer": {"vocab_size": 512}})


def test_a_mix_opens_with_its_weights(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [chat(i) for i in range(20)])
    settings = settings_for(tmp_path, {"primer": 0.4, "oasst1": 0.6}, jsonl_path=str(path), t_max=64)
    root = tmp_path / "sft"
    assert build_sft(settings, tiny_tokenizer, "primer", root=root)["train_examples"] == 18
    assert build_sft(settings, tiny_tokenizer, "primer", root=root)["reused"]
    with pytest.raises(FileNotFoundError, match=r"cache\.cli build oasst1 --phase sft"):
        open_mix(settings, tiny_tokenizer, "train")
    build_sft_cache([chat(1)], root / "oasst1", tokenizer=tiny_tokenizer, **OPTIONS)
    assert open_mix(settings, tiny_tokenizer, "train")[1] == pytest.approx({"primer": 0.4, "oasst1": 0.6})
    assert open_mix(settings, tiny_tokenizer, "val")[1] == {"primer": 1.0}
    assert "warning: oasst1 is left out of the val mix" in capsys.readouterr().err
    with pytest.raises(OSError, match="oasst1: it is not in the Hugging Face cache"):
        build_sft(settings, tiny_tokenizer, "oasst1", root=root)


# The published caches, to the bit


@needs_bundle
def test_reference_rendering() -> None:
    tokenizer = load_tokenizer(BUNDLE / "v2/tokenizer/spm.model")
    for case in json.loads((BUNDLE / "v2/sft_rendered.json").read_text()):
        assert render(tokenizer, case["messages"]) == (case["input_ids"], case["labels"])


@needs_bundle
@pytest.mark.parametrize("source", ["dolly15k", "primer"])
def test_reference_caches_are_reproduced_to_the_bit(tmp_path: Path, source: str) -> None:
    expected = BUNDLE / "v2/cache/sft" / source
    tokenizer = load_tokenizer(BUNDLE / "v2/tokenizer/spm.model")
    jsonl = BUNDLE / "v2/corpus/primer.jsonl"
    if source == "primer":
        meta = build_primer_sft_cache(jsonl, tmp_path / source, tokenizer=tokenizer, **OPTIONS, t_max=64)
    else:
        chats = [json.loads(line)["messages"] for line in jsonl.read_text().splitlines()]
        meta = build_sft_cache(chats, tmp_path / source, tokenizer=tokenizer, **OPTIONS)
    wanted = json.loads((expected / "meta.json").read_text())
    assert {key: meta[key] for key in wanted} == wanted
    for path in [*expected.glob("*.bin"), *expected.glob("*.npy")]:
        assert (tmp_path / source / path.name).read_bytes() == path.read_bytes()
