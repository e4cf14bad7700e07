"""Chat caches: built with every drop counted, reproduced to the bit, packed so that conversations stay apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from niels_gpt.cache.format import SftExamples, open_sft
from niels_gpt.cache.sft import build_sft, open_mix, pack_batch, padded_batch
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
    assert counts == [("val", i) for i in range(1, 4)] + [("train", i) for i in range(1, 28)]
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
    settings = settings_for(tmp_path, {"primer": 0.4, "oasst1": 0.6}, jsonl_path=str(path))
    root, options = tmp_path / "sft", {**OPTIONS, "t_max": 64}
    meta = build_sft(settings, tiny_tokenizer, "primer", root=root, **options)
    assert (
        meta["train_examples"] == 18 and build_sft(settings, tiny_tokenizer, "primer", root=root, **options)["reused"]
    )
    with pytest.raises(FileNotFoundError, match=r"cache\.cli build oasst1 --phase sft"):
        open_mix(settings, tiny_tokenizer, "train")
    build_sft_cache([chat(1)], root / "oasst1", tokenizer=tiny_tokenizer, **OPTIONS)
    assert open_mix(settings, tiny_tokenizer, "train")[1] == pytest.approx({"primer": 0.4, "oasst1": 0.6})
    assert open_mix(settings, tiny_tokenizer, "val")[1] == {"primer": 1.0}
    assert "warning: oasst1 is left out of the val mix" in capsys.readouterr().err
    with pytest.raises(OSError, match="oasst1: it is not in the Hugging Face cache"):
        build_sft(settings, tiny_tokenizer, "oasst1", root=root, **options)


# Batches


def stored(lengths: list[int], *, labelled: bool = True, first_id: int = 100) -> SftExamples:
    """Conversation i is `lengths[i]` tokens of id first_id+i; every second token is a target."""
    ids = np.concatenate([np.full(n, first_id + i, np.uint16) for i, n in enumerate(lengths)])
    labels = np.where(np.arange(len(ids)) % 2 == 1 if labelled else False, ids.astype(np.int32), -100)
    return SftExamples(ids, labels, np.cumsum([0, *lengths[:-1]]), "stored")


def test_packed_rows_hold_whole_conversations_apart_from_each_other() -> None:
    lengths = [3, 4, 5, 7, 9]
    source = stored(lengths)
    batch = pack_batch({"s": source}, {"s": 1.0}, B=200, T=20, generator=torch.Generator().manual_seed(0), eot_id=EOT)
    assert batch.x.shape == batch.y.shape == (200, 20) and batch.segment is not None and batch.x.dtype == torch.int64
    several = 0
    for x, y, segment in zip(batch.x.tolist(), batch.y.tolist(), batch.segment.tolist(), strict=True):
        starts = [i for i in range(20) if i == 0 or segment[i] != segment[i - 1]]
        assert segment == sorted(segment) and [segment[i] for i in starts] == list(range(len(starts)))
        several += len(starts) > 2
        for start, stop in zip(starts, [*starts[1:], 20], strict=True):
            number = x[start] - 100
            if x[start] == EOT:
                assert stop == 20 and set(y[start:]) == {-100} and set(x[start:]) == {EOT}
                continue
            ids, labels = source.example(number)
            assert x[start:stop] == ids[: stop - start].tolist()
            if stop < 20:
                assert stop - start == lengths[number]  # never cut
                assert y[start:stop] == [*labels[1:], -100]  # nothing predicts into the next one
            else:
                assert stop - start >= lengths[number] - 1
                assert y[start : stop - 1] == labels[1 : stop - start].tolist()
    assert several > 100


def test_only_a_rows_first_conversation_is_cut_and_keeps_its_end() -> None:
    ids = np.arange(100, 150)
    source = SftExamples(ids.astype(np.uint16), ids.astype(np.int32), np.array([0]), "long")
    batch = pack_batch({"s": source}, {"s": 1.0}, B=3, T=8, generator=torch.Generator().manual_seed(0), eot_id=EOT)
    assert batch.x.tolist() == [list(range(141, 149))] * 3 and batch.y.tolist() == [list(range(142, 150))] * 3
    assert batch.segment is not None and not batch.segment.any()


def test_packing_follows_the_weights_and_the_generator() -> None:
    sources = {"a": stored([10], first_id=100), "b": stored([10], first_id=200)}
    make = [
        pack_batch(sources, {"a": 0.25, "b": 0.75}, B=200, T=40, generator=torch.Generator().manual_seed(s), eot_id=EOT)
        for s in (1, 1, 2)
    ]
    assert torch.equal(make[0].x, make[1].x) and not torch.equal(make[0].x, make[2].x)
    share = (make[0].x == 100).sum() / ((make[0].x == 100) | (make[0].x == 200)).sum()
    assert 0.2 < share < 0.3
    with pytest.raises(ValueError, match="sum to 1"):
        pack_batch(sources, {"a": 0.5, "b": 0.75}, B=1, T=8, generator=torch.Generator(), eot_id=EOT)


@pytest.mark.parametrize("maker", [pack_batch, padded_batch])
def test_a_batch_without_targets_is_drawn_again(maker: Any) -> None:
    sources = {"mute": stored([9], labelled=False), "talk": stored([9], first_id=200)}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        batch = maker(sources, {"mute": 0.9, "talk": 0.1}, B=1, T=8, generator=generator, eot_id=EOT)
        assert (batch.y != -100).any()
    with pytest.raises(ValueError, match="no assistant token to learn from"):
        maker({"mute": sources["mute"]}, {"mute": 1.0}, B=1, T=8, generator=torch.Generator(), eot_id=EOT)


def test_padded_rows_hold_one_conversation() -> None:
    source = stored([4, 30])
    batch = padded_batch({"s": source}, {"s": 1.0}, B=16, T=10, generator=torch.Generator().manual_seed(0), eot_id=EOT)
    assert batch.segment is None
    rows = {tuple(row) for row in batch.x.tolist()}
    assert rows == {(100, 100, 100, 100, *[EOT] * 6), (101,) * 10}
    short = batch.y[batch.x[:, 0] == 100][0].tolist()
    assert short == [100, -100, 100, *[-100] * 7]


# The published caches and batches, to the bit


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


@needs_bundle
@pytest.mark.parametrize("source", ["dolly15k", "primer"])
def test_reference_batches_but_with_the_end_of_long_conversations(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same conversations are drawn; of longer ones the reference keeps the first T+1 tokens, ours are the last.

    The vectors are those of a reader of one source, which draws no source first.
    """
    monkeypatch.setattr("niels_gpt.cache.sft.draw_sources", lambda p, n, generator: list(p) * n)
    vectors = np.load(BUNDLE / f"v2/batches/sft_dataset_{source}_seed42_B4_T48.npz")
    tokenizer = load_tokenizer(BUNDLE / "v2/tokenizer/spm.model")
    examples = opened(BUNDLE / "v2/cache/sft" / source, "train", tokenizer)
    generator = torch.Generator().manual_seed(42)
    batch = padded_batch({source: examples}, {source: 1.0}, B=4, T=48, generator=generator, eot_id=EOT)
    all_examples = [examples.example(i) for i in range(len(examples))]
    long = 0
    for row, (x, y, y_masked) in enumerate(zip(vectors["x"], vectors["y"], vectors["y_masked"], strict=True)):
        beginning = [*x, y[-1]]
        ids, labels = next(e for e in all_examples if [*e[0], *[EOT] * 49][:49] == beginning)
        if len(ids) <= 49:
            assert batch.x[row].tolist() == x.tolist() and batch.y[row].tolist() == y_masked.tolist()
        else:
            long += 1
            assert batch.x[row].tolist() == ids[-49:-1].tolist() and batch.y[row].tolist() == labels[-48:].tolist()
    assert long
