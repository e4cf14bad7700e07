"""The quality benchmark: an exact n-gram floor, both systems trained for real, and what is made of their curves."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from niels_gpt.data.registry import get_source
from niels_gpt.device import choose_precision
from tools import quality_systems
from tools.bench_quality import main, parse
from tools.quality_ngram import KneserNey, discounts
from tools.quality_report import Results, compare, plot, reached_at, read_results, table, verdict, write_results
from tools.quality_systems import OURS, PEER, Blocks, Clock, Point, Run, Scored, llama
from tools.quality_text import Floor, Text, build_text, documents, make_overrides, measure_floor, open_text

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "tokenizer": {"vocab_size": 512},
    "model": {"V": 512, "T": 32, "C": 16, "L": 1, "H": 2, "d_ff": 32, "dropout": 0.0},
    "data": {"mix_pretrain": {"primer": 1.0}, "val_pretrain_source": "primer", "primer": {"val_frac": 0.1}},
    "training": {"pretrain": {"micro_B": 4, "optimizer": "muon", "warmup_steps": 1, "total_steps": 100}},
}


# ---- the n-gram


def test_kneser_ney_by_hand() -> None:
    """Bigrams of ab, ab, ac: (start a) 3, (a b) 2, (a c) 1, so n1 = n2 = n3 = 1, n4 = 0, Y = 1/3."""
    model = KneserNey([b"ab", b"ab", b"ac"], order=2)
    # Each of a, b, c follows one symbol only: three continuations, all counted once, so the fallback of 1/2.
    unigram = 0.5 / 3 + 0.5 / 256
    unseen = 0.5 / 256
    left_of_a = (1 + 1 / 3) / 3  # D2 = 2 - 3Y = 1 from (a b), D1 = 1 - 2Y = 1/3 from (a c)
    after_a = model.distribution(b"a")
    assert after_a[ord("b")] == pytest.approx((2 - 1) / 3 + left_of_a * unigram, abs=1e-15)
    assert after_a[ord("c")] == pytest.approx((1 - 1 / 3) / 3 + left_of_a * unigram, abs=1e-15)
    assert after_a[ord("z")] == pytest.approx(left_of_a * unseen, abs=1e-15)
    assert model.distribution(b"")[ord("a")] == pytest.approx((3 - 3) / 3 + 3 / 3 * unigram, abs=1e-15)
    assert model.distribution(b"z")[ord("b")] == pytest.approx(unigram, abs=1e-15)  # z was never seen
    expected = math.log2(unigram) + math.log2(after_a[ord("b")])
    assert model.log2_probabilities([b"ab"]).sum() == pytest.approx(expected, abs=1e-12)


def reference(docs: list[bytes], order: int, context: bytes) -> list[float]:
    """The same from the definitions, with dictionaries and fractions."""
    plain: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    before: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for doc in docs:
        symbols = [256, *doc]
        for i in range(1, len(symbols)):
            for k in range(1, min(order, i + 1) + 1):
                gram = tuple(symbols[i - k + 1 : i + 1])
                plain[k][gram] += 1
                if k > 1:
                    before[gram[1:]].add(gram[0])
    p = [Fraction(1, 256)] * 256
    history = (256, *context)
    for k in range(1, order + 1):
        counts = {g: c if k == order or g[0] == 256 else len(before[g]) for g, c in plain[k].items()}
        d = [Fraction(x).limit_denominator(10**9) for x in discounts(np.array(list(counts.values())))]
        here = history[len(history) - k + 1 :] if k > 1 else ()
        if k - 1 > len(history):
            break
        after = {g[-1]: c for g, c in counts.items() if g[:-1] == here}
        if after:
            total = sum(after.values())
            backoff = sum(d[min(c, 3)] for c in after.values()) / total
            p = [
                (after[w] - d[min(after[w], 3)]) / total + backoff * p[w] if w in after else backoff * p[w]
                for w in range(256)
            ]
    return [float(x) for x in p]


def test_kneser_ney_is_its_definition_and_sums_to_one() -> None:
    draw = random.Random(5)
    docs = [bytes(draw.choices(b"abcd ", (9, 5, 3, 1, 4), k=draw.randrange(40))) for _ in range(30)]
    model = KneserNey(docs)
    for _ in range(40):
        context = bytes(draw.choices(b"abcd xyz", k=draw.randrange(9)))
        found = model.distribution(context)
        assert found.sum() == pytest.approx(1, abs=1e-12) and found.min() > 0
        np.testing.assert_allclose(found, reference(docs, 5, context), rtol=1e-7)


def test_scores_are_the_distribution_at_every_byte() -> None:
    model = KneserNey([b"the cat sat on the mat", b"the hat", b""])
    held_out = [b"the bat", b"", b"a mat"]
    every = [model.distribution(doc[:i])[doc[i]] for doc in held_out for i in range(len(doc))]
    np.testing.assert_allclose(model.log2_probabilities(held_out), np.log2(every), rtol=1e-12)


def test_discounts() -> None:
    counts = np.repeat([1, 2, 3, 4], [40, 20, 10, 5])
    assert discounts(counts) == pytest.approx([0, 0.5, 1.25, 2.0])  # Y = 40 / 80
    assert discounts(np.array([7, 8, 9])) == pytest.approx([0, 0.5, 1.0, 1.5])  # nothing to estimate them from
    assert KneserNey([b"a", b"b"]).order == 2  # nothing is longer
    with pytest.raises(ValueError, match="no text"):
        KneserNey([b""])


# ---- the text and the peer


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("quality")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    overrides = make_overrides(folder / "tiny.json", folder, minutes=1, seed=3)
    build_text(overrides)
    return open_text(overrides, max_windows=5)


def test_the_floor_scores_the_bytes_the_models_are_scored_on(tiny_text: Text) -> None:
    tokenizer, T = tiny_text.tokenizer, tiny_text.settings.model.T
    source = get_source("primer").documents
    assert source is not None
    held_out = tiny_text.held_out.arrays[0]
    assert [d.decode() for d in documents(held_out, tokenizer)] == [d.text for d in source(tiny_text.settings, "val")]
    floor = measure_floor(tiny_text)
    assert floor.train_bytes == sum(len(d.text.encode()) for d in source(tiny_text.settings, "train"))
    assert 0 < floor.everything < 2 and len(tiny_text.starts) == 5

    class Uniform(torch.nn.Module):
        cfg = tiny_text.settings.model

        def forward(self, x: torch.Tensor, y: torch.Tensor, *, segment: None = None) -> torch.Tensor:
            return (y != -100).sum() * math.log(2)  # a bit a token

    bits = tiny_text.bits(Uniform(), device="cpu", precision=choose_precision("cpu", False, "bf16"), everything=True)
    windows = [held_out[i + 1 : i + T + 1] for i in range(0, len(held_out) - T, T)]
    lengths = [len(tokenizer.token_bytes(int(i))) for window in windows for i in window]
    assert floor.held_out_bytes == sum(lengths)
    assert bits == pytest.approx(sum(n > 0 for n in lengths) / sum(lengths))


def test_the_peer_has_our_shape_and_is_scored_alike(tiny_text: Text) -> None:
    torch.manual_seed(0)
    model, settings = llama(tiny_text.settings), tiny_text.settings.model
    C, head = settings.C, settings.C // settings.H
    ours = settings.V * C + settings.L * (4 * C * C + 3 * C * settings.d_ff + 2 * C + 2 * head) + C
    assert sum(p.numel() for p in model.parameters()) == ours - settings.L * 2 * head  # Llama has no QK-norm
    rows = torch.randint(settings.V, (2, settings.T))
    with torch.no_grad():
        nats = Scored(model, settings.T)(rows[:, :-1], rows[:, 1:])
        mean = model(input_ids=rows, labels=rows).loss
    assert nats.item() == pytest.approx(mean.item() * 2 * (settings.T - 1), rel=1e-5)


def test_blocks_hold_the_training_text_once(tiny_text: Text) -> None:
    blocks = tiny_text.blocks()
    text = tiny_text.train["primer"].arrays[0]
    assert np.array_equal(blocks.ravel(), text[: len(text) // 32 * 32])
    item = Blocks(blocks)[1]
    assert torch.equal(item["input_ids"], torch.from_numpy(blocks[1])) and len(Blocks(blocks)) == len(blocks)


def test_the_clock_leaves_out_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(quality_systems.time, "perf_counter", lambda: now[0])
    clock = Clock()
    clock.start()
    now[0] = 103.0
    with clock.paused():
        now[0] = 110.0
    now[0] = 111.0
    assert clock.elapsed == 4.0


# ---- the program


def bench(config: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/bench_quality.py"), "--config", config, *args]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=240, env=offline)


def test_both_systems_learn_under_one_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    out = tmp_path / "out"
    args = (tmp_path / "tiny.json", "--out", out, "--minutes", 0.05, "--points", 3, "--windows", 4)
    done = bench(*args, "--peer-lr", 0.003, "--peer-batch", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((out / "results.json").read_text())
    assert [run["name"] for run in record["runs"]] == ["ours", "peer 0.003 x4"]
    for run in record["runs"]:
        points = run["points"]
        minutes = [point["minutes"] for point in points]
        assert minutes == sorted(minutes) and minutes[0] == 0 and minutes[-1] >= 0.05
        assert points[-1]["tokens"] > points[0]["tokens"] == 0
        assert points[-1]["bits"] < points[0]["bits"] and 0 < run["final_bits"] < 8
    assert record["comparisons"][0]["peer"] == "peer 0.003 x4" and 0 < record["floor"]["everything"] < 8
    assert "| minutes | ours | peer 0.003 x4 |" in done.stdout and "5-gram" in done.stdout
    assert ElementTree.parse(out / "quality-0.05min.svg").getroot().tag.endswith("svg")
    fresh = ("--out", tmp_path / "fresh", "--only", "peer", "--peer-lr", "best")
    for wrong, reason in ((("--windows", 3), "other windows"), (fresh, "run a short one first")):
        assert main(["--config", *map(str, (*args, *wrong))]) == 1
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ("--minutes", "0"),
        ("--threads", "0"),
        ("--peer-lr", "best", "1"),
        ("--peer-lr", "x"),
        ("--peer-batch", "8", "0"),
    ],
)
def test_usage_errors(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(list(wrong))
    assert stop.value.code == 2 and wrong[0] in capsys.readouterr().err


# ---- what is made of the curves


def made_run(system: str, curve: list[tuple[float, float]], lr: float | None = None) -> Run:
    points = [Point(minutes, bits, int(1000 * minutes)) for minutes, bits in curve]
    name = OURS if system == OURS else f"peer {lr:g}"
    return Run(system, name, lr, 16, 4.0, 1, 42, 1000, "fp32", points, curve[-1][1] + 0.01)


OUR_RUN = made_run(OURS, [(0, 8.0), (1, 3.0), (2, 2.0), (4.0, 1.5)])
PEERS = [
    made_run(PEER, [(0, 8.0), (2, 4.0), (4.1, 2.25)], 0.003),
    made_run(PEER, [(0, 8.0), (2, 4.0), (4.0, 2.5)], 0.001),
    made_run(PEER, [(0, 8.0), (2, 4.0), (4.0, 2.75)], 0.01),
]
FLOOR = Floor(1.9, 2.0, 5, 1000, 100)


def test_reached_at() -> None:
    assert reached_at(OUR_RUN.points, 2.25) == pytest.approx(1.75)
    assert reached_at(OUR_RUN.points, 2.0) == pytest.approx(2.0)
    assert reached_at(OUR_RUN.points, 9.0) == 0
    assert reached_at(OUR_RUN.points, 1.4) is None
    bumpy = [Point(0, 4, 0), Point(1, 2, 1), Point(2, 3, 2), Point(3, 1, 3)]
    assert reached_at(bumpy, 2.5) == pytest.approx(0.75)  # the first time counts


def test_compare_takes_the_best_peer() -> None:
    found = compare([OUR_RUN, *PEERS])
    assert found is not None and found.peer == "peer 0.003"
    assert found.our_minutes == pytest.approx(1.75) and found.ratio == pytest.approx(1.75 / 4.1)
    assert compare([OUR_RUN]) is None and compare(PEERS) is None
    behind = compare([made_run(OURS, [(0, 8.0), (4, 3.0)]), *PEERS])
    assert behind is not None and behind.our_minutes is None and behind.ratio is None


def test_table_and_verdict() -> None:
    runs = [OUR_RUN, PEERS[1], PEERS[0], PEERS[2]]
    rows = table(runs, FLOOR).splitlines()
    assert rows[0] == "| minutes | ours | peer 0.001 | peer 0.003 | peer 0.01 |"
    assert rows[2] == "| 0.00 | 8.0000 | 8.0000 | 8.0000 | 8.0000 |"
    assert rows[4] == "| 4.10 | 2.0000 | 2.5000 | 2.2500 | 2.7500 |" and rows[5] == "| 4.00 | 1.5000 |  |  |  |"
    said = verdict(runs, FLOOR)
    assert "after 1.75 minutes: 0.43 of its time (target 0.5: met)" in said
    assert "peer 0.003 does NOT beat" in said and "ours does" not in said and "edge" not in said
    assert "0.001, is at the edge" in verdict([PEERS[1], PEERS[2], PEERS[2]], None)
    slow = made_run(OURS, [(0, 8.0), (4.0, 2.2)])
    assert "NOT met" in verdict([slow, *PEERS], None)
    assert "has NOT reached" in verdict([made_run(OURS, [(0, 8.0), (4, 3.0)]), *PEERS], None)


def test_results_are_kept_and_read_again(tmp_path: Path) -> None:
    path, setup = tmp_path / "results.json", {"tokenizer": "abc", "windows": 4}
    results = read_results(path, setup)
    assert not results.runs and results.best_peer() is None
    for run in (OUR_RUN, PEERS[0], PEERS[1], PEERS[0]):
        results.add(run)
    results.floor = FLOOR
    write_results(path, results)
    again = read_results(path, setup)
    assert again == Results(setup, FLOOR, [OUR_RUN, PEERS[1], PEERS[0]])
    assert again.best_peer() == PEERS[0] and again.best_peer(7.0) is None
    assert again.of(4.0, 1, 42) == [OUR_RUN, PEERS[1], PEERS[0]] and again.of(4.0, 2, 42) == []
    assert json.loads(path.read_text())["comparisons"][0]["ratio"] == pytest.approx(1.75 / 4.1)
    with pytest.raises(ValueError, match="other tokenizer"):
        read_results(path, {**setup, "tokenizer": "abd"})
    path.write_text('{"setup": {}, "floor": null}')
    with pytest.raises(ValueError, match="not a result of this benchmark"):
        read_results(path, setup)


def test_the_plot_shows_every_curve() -> None:
    root = ElementTree.fromstring(plot([OUR_RUN, *PEERS], FLOOR))
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points", "") for line in root.iter(f"{space}polyline")]
    assert len(lines) == 1 + 4  # the axes and the curves
    ours = [tuple(map(float, pair.split(","))) for pair in lines[1].split()]
    assert len(ours) == 3 and [x for x, _ in ours] == sorted(x for x, _ in ours)
    assert [y for _, y in ours] == sorted(y for _, y in ours)  # fewer bits are further down
    labels = [text.text or "" for text in root.iter(f"{space}text")]
    assert "ours: 1.500" in labels and "byte 5-gram: 1.900" in labels
