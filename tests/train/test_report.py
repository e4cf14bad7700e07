"""What a run says and records: lines, bar, metrics, TensorBoard, chart, and where its time went."""

from __future__ import annotations

import io
import json
import math
import re
import resource
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from niels_gpt.eval import BitsPerByte, EvalResult
from niels_gpt.train import board as board_module
from niels_gpt.train import clock as clock_module
from niels_gpt.train.bar import Bar, fitting
from niels_gpt.train.board import open_board
from niels_gpt.train.chart import MOST_POINTS, Chart, Curve
from niels_gpt.train.clock import ACTIVITIES, ActivityClock, shares
from niels_gpt.train.metrics import MetricsFile, read_metrics
from niels_gpt.train.report import Rate, Reporter, StepReport, one_line
from niels_gpt.train.runs_cli import main as runs
from niels_gpt.train.sample import Sample


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report(step: int, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "step": step,
        "total_steps": 30,
        "progress": step / 30,
        "lr": 0.001889,
        "loss": 6.0,
        "mean_loss": 6.0639,
        "grad_norm": 0.5,
        "tokens": 1000,
        "tokens_seen": 1000 * step,
        "seconds": 0.25,
        "remaining": 65.0,
        "memory": 2**29,
    }
    return StepReport(**values | changes)


def reporter(phase: str = "pretrain", **options: Any) -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    made = Reporter(phase, "r", console=Console(file=out, highlight=False, soft_wrap=True, **options))
    made.forget_after(0)
    made._mfu_of_rate, made._main_source = 1e-4, "wiki"  # as `start` sets them
    return made, out


EVALS = {"wiki": EvalResult(57.662, 10, BitsPerByte(math.log(2) * 54, 30)), "own": EvalResult(40.0, 10)}


def test_lines_are_those_of_the_published_logs_and_more_beside_them() -> None:
    made, out = reporter()
    made.step(report(10))
    made.evaluated(10, EVALS, 5.7662, True, Sample("Once", "upon\na \x1b[2J time"))
    made.step(report(11, total_steps=None, progress=0.37))
    made.close()
    assert out.getvalue().splitlines() == [
        "[pretrain] step 10/30 | lr 0.001889 | train_loss 6.0639 | last_val n/a",
        "[pretrain] 1:05 left | 4,000 tok/s | loss 6.064 | MFU 40% | lr 0.0019 | 0.50 GiB",
        "[pretrain] val_wiki_loss 5.7662 | val_own_loss 4.0000",
        "[pretrain] val_wiki_bpb 1.8000",
        "[pretrain] sample: Once -> upon a \N{REPLACEMENT CHARACTER}[2J time",
        "[pretrain] new best checkpoint at step 10 (val_loss=5.7662)",
        "[pretrain] step 11 (37%) | lr 0.001889 | train_loss 6.0639 | last_val 5.7662",
        "[pretrain] 1:05 left | 4,000 tok/s | loss 6.064 | MFU 40% | val 1.800 bpb | lr 0.0019 | 0.50 GiB",
    ]
    tuned, out = reporter("sft")
    tuned.evaluated(5, {"pretrain": EvalResult(1.0, 1)}, math.nan, False)
    tuned.step(report(6))
    assert out.getvalue().splitlines()[1] == (
        "[sft] step 6/30 | lr 0.001889 | train_loss 6.0639 | val_pretrain 1.0000 | val_sft n/a"
    )


def test_a_sample_that_the_output_cannot_hold_does_not_end_training() -> None:
    out = io.BytesIO()
    made = Reporter("pretrain", "r", console=Console(file=io.TextIOWrapper(out, encoding="ascii"), soft_wrap=True))
    made.evaluated(1, {}, math.nan, False, Sample("Once", "caf\u00e9"))
    made.console.file.flush()
    assert out.getvalue() == b"[pretrain] sample: Once -> caf?\n"


def test_what_is_recorded_can_be_read_by_any_json_reader() -> None:
    made, _ = reporter()
    made.step(report(1, loss=math.nan))
    made.evaluated(1, EVALS, math.inf, False, Sample("a", "b"))
    with made.saving(1):
        pass
    made.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = Path("runs/r/metrics.jsonl").read_text().splitlines()
    step, evaluated, spent = (json.loads(line, parse_constant=refuse) for line in lines)
    assert step["loss"] is None and step["loss_hex"] == "nan" and step["mfu"] == pytest.approx(0.4)
    assert evaluated["bits_per_byte"] == {"wiki": pytest.approx(1.8)} and evaluated["metric"] is None
    assert evaluated["sample"] == {"prompt": "a", "text": "b"}
    assert set(spent["seconds"]) == set(ACTIVITIES)


def test_the_rate_is_that_of_the_last_steps() -> None:
    rate = Rate()
    for _ in range(60):
        rate.add(100, 1.0)
    assert rate.value == pytest.approx(100)
    for _ in range(50):
        rate.add(100, 0.5)
    assert rate.value == pytest.approx(200)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_the_bar_never_wraps(width: int) -> None:
    out = io.StringIO()
    bar = Bar("pretrain", Console(file=out, force_terminal=True, width=width, color_system=None))
    made, _ = reporter()
    made._rate.add(1000, 0.25)
    made._last_bits, made._memory = 1.5, 2**29
    bar.show(0.5, made._pace(report(3)))
    bar.stop()
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", out.getvalue())]
    drawn = [line for line in drawn if line.strip()]
    assert len(drawn) <= 3, drawn  # the empty bar, the drawn one, and the last: one line each
    assert all(cell_len(line.rstrip()) <= width for line in drawn)
    shown = drawn[-1]
    assert " 50%" in shown
    assert ("1:05 left" in shown) == (width >= 60) and ("0.50 GiB" in shown) == (width >= 200)


def test_parts_that_do_not_fit_are_left_out_whole() -> None:
    assert fitting(["ab", "cd", "e"], 6) == "ab  cd"
    assert fitting(["ab", "cdefgh", "e"], 6) == "ab"
    assert fitting(["abc"], 2) == ""
    assert one_line(" a\tb\u202ec ") == "a b\N{REPLACEMENT CHARACTER}c"


def test_every_second_belongs_to_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    clock = ActivityClock()
    now[0] += 1
    with clock("step"):
        now[0] += 2
        with clock("data"):
            now[0] += 4
        now[0] += 8
    with pytest.raises(KeyError), clock("saving"):
        now[0] += 16
        raise KeyError
    now[0] += 32
    clock.carry({"step": 100.0})
    assert clock.seconds() == {"step": 110, "data": 4, "evaluation": 0, "logging": 0, "saving": 16, "other": 33}
    assert shares(clock.seconds())["data"] == pytest.approx(4 / 163) and shares({})["data"] == 0


def test_metrics_outlive_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files is as real as a full disk, and can be lifted again."""
    warnings: list[str] = []
    path = Path("runs/r/metrics.jsonl")
    metrics = MetricsFile(path, warnings.append)
    metrics.reopen("pretrain", 0)
    entry = {"phase": "pretrain", "kind": "step", "padding": "x" * 400}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for step in range(1, 6):
            metrics.record({**entry, "step": step})
        assert [e["step"] for e in read_metrics(path)] == [1, 2]
        assert path.read_text().endswith("}\n")  # no half line
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # not even a shorter copy can be written
        assert [e["step"] for e in metrics.reopen("pretrain", 4)] == [1, 2, 3, 4]  # a rollback forgets what waits, too
        assert [e["step"] for e in metrics.reopen("pretrain", 1)] == [1] == [e["step"] for e in read_metrics(path)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.record({**entry, "step": 2})
    metrics.close()
    assert [e["step"] for e in read_metrics(path)] == [1, 2]
    assert len(warnings) == 1 and "training goes on" in warnings[0]


def test_what_is_no_entry_of_a_run_is_passed_over() -> None:
    path = Path("runs/r/metrics.jsonl")
    path.parent.mkdir(parents=True)
    good = {"phase": "pretrain", "kind": "step", "step": 1}
    bad = [{"phase": "pretrain", "step": 1}, {**good, "phase": ["pretrain"]}, {**good, "step": "1"}, 3, {}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*bad, good]))
    assert read_metrics(path) == [good]


def test_going_back_forgets_what_will_be_done_again() -> None:
    path = Path("runs/r/metrics.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text('{"phase": "pretrain", "step": 9, "kind": "st')  # cut by a power failure
    made, _ = reporter()
    for step in range(1, 6):
        made.step(report(step))
    assert [entry["step"] for entry in made.forget_after(3)] == [1, 2, 3]
    made.step(report(4, loss=1.0))
    made.close()
    assert [(e["step"], e["loss"]) for e in read_metrics(path)] == [(1, 6.0), (2, 6.0), (3, 6.0), (4, 1.0)]
    assert made.chart._loss.points[-1] == (4, 1.0) and len(made.chart._loss.points) == 4


def test_tensorboard_reads_each_step_once_after_a_resume() -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, loss in ((1, 6, 5.0), (4, 8, 4.0)):  # the second session goes on from step 3
        made, _ = reporter()
        made._board = open_board(made.folder / "tensorboard", first - 1, say=print, warn=print)
        for step in range(first, last + 1):
            made.step(report(step, loss=loss))
        made.evaluated(last, EVALS, 5.0, False, Sample("Once", "upon"))
        made.close()
    found = accumulator.EventAccumulator("runs/r/tensorboard", size_guidance={"scalars": 0, "tensors": 0}).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 4.0), (5, 4.0), (6, 4.0), (7, 4.0), (8, 4.0)]
    assert found.Scalars("speed/mfu")[0].value == pytest.approx(0.4)
    assert [(e.step, e.value) for e in found.Scalars("val_bits_per_byte/wiki")] == [(8, pytest.approx(1.8))]
    assert {"train/lr", "train/grad_norm", "speed/tokens_per_s", "memory/bytes", "val_loss/own"} <= set(
        found.Tags()["scalars"]
    )
    sample = found.Tensors("sample/text_summary")[-1]  # of texts, this reader keeps what was to be forgotten
    assert sample.step == 8 and sample.tensor_proto.string_val[0].decode() == "**Once** upon"


def test_without_tensorboard_one_hint_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    monkeypatch.setattr(board_module, "_hinted", [])
    said: list[str] = []
    for _ in range(2):
        assert open_board(Path("tb"), 0, say=said.append, warn=said.append) is None
    assert len(said) == 1 and "pip install 'niels-gpt[board]'" in said[0] and not Path("tb").exists()


def test_a_board_that_cannot_write_is_one_warning() -> None:
    pytest.importorskip("tensorboard")
    Path("file").write_text("")
    said: list[str] = []
    assert open_board(Path("file/tb"), 0, say=said.append, warn=said.append) is None
    assert len(said) == 1 and "file/tb" in said[0]


def test_a_curve_is_bounded_and_keeps_its_mean() -> None:
    curve = Curve()
    for step in range(1, 5001):
        curve.add(step, 1.0 if step % 2 else 3.0)
    curve.add(5001, math.nan)
    curve.add(5001, None)
    assert MOST_POINTS / 2 <= len(curve.points) <= MOST_POINTS
    assert all(value == 2.0 for _, value in curve.points) and curve.points[-1][0] > 4990


def test_the_chart_is_one_wellformed_page_without_links() -> None:
    chart = Chart(Path("runs/r/report.html"), "a <b> run")
    chart.write(print, final=True)  # nothing to show yet
    for step in range(1, 21):
        chart.add({"kind": "step", "step": step, "loss": 5.0 - step / 10, "lr": 1e-3})
    chart.add({"kind": "eval", "step": 20, "bits_per_byte": {"wi&ki": 1.5}, "sample": {"prompt": "<", "text": ">"}})
    chart.write(print, final=True)
    page = Path("runs/r/report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", page)
    assert len(pictures) == 3
    drawn = [ElementTree.fromstring(picture) for picture in pictures]
    assert [len(p.attrib["points"].split()) for svg in drawn for p in svg.iter("polyline")] == [20, 1, 20]
    assert "a &lt;b&gt; run" in page and "wi&amp;ki 1.500 bits per byte" in page
    assert "http" not in page and "<script" not in page


def test_a_chart_that_cannot_be_written_does_not_end_training() -> None:
    Path("runs").write_text("")  # a file where the folder should be
    said: list[str] = []
    Chart(Path("runs/r/report.html"), "r").write(said.append, final=True)
    assert len(said) == 1 and "training goes on" in said[0]


def test_runs_lists_shows_and_holds_to_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert runs([]) == 0 and "no runs" in capsys.readouterr().out
    assert runs(["show"]) == 1 and "train something first" in capsys.readouterr().err
    made, _ = reporter()
    made.step(report(7))
    made.evaluated(7, EVALS, 5.0, False)
    made.clock.carry({"step": 99.0, "saving": 3.0})
    with made.saving(7):
        pass
    made.close()
    assert runs([]) == 0
    assert re.search(r"r +│ pretrain +│ +7 │ 6.0639 │ wiki 1.800 +│ +1.7", capsys.readouterr().out)
    for name in ("r", "runs/r", "runs/r/metrics.jsonl"):
        assert runs(["show", name, "--limit", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "pretrain, step 7; wiki 1.800" in out and re.search(r"saving +│ +3.0 │ +2.94%", out)
    assert runs(["show", "--limit", "0.02"]) == 1
    assert "over the limit of 2.00%: pretrain: saving took 2.9" in capsys.readouterr().err
    assert runs(["show", "nobody"]) == 1 and "no run 'nobody'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        runs(["show", "--limit", "2"])
    assert usage.value.code == 2
