"""A trial in a process of its own: whatever happens there comes back as a result."""

from __future__ import annotations

import json
import threading
import time

import psutil
import pytest

from niels_gpt.bench import trial as module
from niels_gpt.bench import trial_cli
from niels_gpt.bench.trial import Result, Trial, result_of, row_of, run_trial
from niels_gpt.settings import validate_overrides
from tests.bench.trials import MODEL, tiny_trial


def kill_the_next_child(done: threading.Event) -> None:
    me = psutil.Process()
    while not done.is_set():
        for child in me.children():
            if module.PROGRAM in " ".join(child.cmdline()):
                child.kill()
                return
        time.sleep(0.01)


def test_a_killed_process_counts_as_out_of_memory() -> None:
    done = threading.Event()
    killer = threading.Thread(target=kill_the_next_child, args=(done,))
    killer.start()
    result = run_trial(tiny_trial(steps_measure=10**6), 60)
    done.set()
    killer.join()
    assert result.status == "oom" and "killed" in result.message


def test_a_trial_that_takes_too_long_is_ended_with_all_it_has_started() -> None:
    result = run_trial(tiny_trial(steps_measure=10**6), 0.3)
    assert result.status == "timeout" and 0.3 <= result.seconds < 15
    assert not [c for c in psutil.Process().children() if module.PROGRAM in " ".join(c.cmdline())]


def test_a_broken_trial_is_an_error_row_with_its_configuration() -> None:
    trial = tiny_trial(amp=True, amp_dtype="fp32")
    row = row_of(run_trial(trial, 120))
    assert row["status"] == "error" and "fp32" in row["message"]
    assert {"stdout", "stderr"} <= row.keys()
    assert {name: row[name] for name in trial.config()} == trial.config()


@pytest.mark.parametrize(
    ("code", "stderr", "status"),
    [
        (-9, "", "oom"),
        (1, "terminate called after throwing an instance of 'std::bad_alloc'", "oom"),
        (1, "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "oom"),
        (-11, "", "error"),
        (1, "RuntimeError: mps: unknown allocation mode", "error"),
        (0, "", "error"),
    ],
)
def test_the_end_of_a_process_without_a_result(code: int, stderr: str, status: str) -> None:
    result = module._understood(tiny_trial(), code, "Loading...\n", stderr)
    assert result.status == status and result.message


def test_a_result_survives_being_a_line() -> None:
    result = Result(tiny_trial(4), "ok", 1.5, 10667.0, 10**8, 4711, (0.001, 0.002), {"logits": "f"}, {"rss_mb": 1.0})
    assert result_of(result.trial, json.loads(json.dumps(row_of(result)))) == result


def test_a_trial_of_settings_carries_what_the_step_depends_on() -> None:
    settings = validate_overrides(
        {"model": {"C": 64, "H": 2}, "training": {"pretrain": {"optimizer": "muon"}}, "benchmark": {"seed": 7}}
    )
    trial = Trial.of(settings, device="cpu", micro_B=3)
    assert (trial.model.C, trial.micro_B, trial.seed) == (64, 3, 7)
    assert trial.settings == {"model": {"C": 64, "H": 2}, "training": {"pretrain": {"optimizer": "muon"}}}
    assert Trial.from_dict(json.loads(json.dumps(trial.as_dict()))) == trial


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {name: MODEL[name] for name in MODEL if name != "H"}}, "model_cfg lacks H"),
        ({"model": {**MODEL, "H": 3}}, "not divisible"),
        ({"model": 3}, "must be an object"),
        ({"micro_b": 1}, "unknown key 'micro_b'"),
    ],
)
def test_a_trial_that_is_none_is_wrong_usage(
    change: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        trial_cli.main(["--trial", json.dumps({"device": "cpu", "model": MODEL, "micro_B": 1} | change)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
