"""The loop's promises, in process: what a step is, what is skipped, saved, refused and reported."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from niels_gpt import checkpoint as ckpt
from niels_gpt import contention
from niels_gpt.batching import Batch
from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.checkpoint import format as checkpoint_format
from niels_gpt.command import Interrupted
from niels_gpt.eval import EvalResult
from niels_gpt.model.loss import IGNORED
from niels_gpt.settings import SftPhaseSettings, validate_overrides
from niels_gpt.tokenizer import SentencePieceTokenizer
from niels_gpt.train.loop import train
from niels_gpt.train.pretrain import pretrain_job, run_pretrain
from niels_gpt.train.report import Reporter
from niels_gpt.train.run import main
from niels_gpt.train.sft import run_sft
from niels_gpt.train.start import start_phase, weighted_metric
from tests.cache.samples import with_caches
from tests.train import workshop


def test_both_phases_train_and_return_what_they_promise(world: dict[str, Any], capsys: Any) -> None:
    pretrained = run_pretrain(world, device="cpu")
    tuned = run_sft(world, device="cpu", init_model_path=pretrained["best_path"])
    out = capsys.readouterr().out
    assert "pretrain: device=cpu, amp=false, activation_checkpointing=False, micro_B=4, accum_steps=2" in out
    assert "[pretrain] step 1/12 | lr 0.000000 | train_loss 6." in out
    assert "[pretrain] val_primer_loss " in out and "new best checkpoint at step" in out
    assert f"sft init from {pretrained['best_path']}" in out and "| val_pretrain n/a | val_sft n/a" in out
    both = {"final_step", "best_val_loss", "latest_path", "best_path", "tokens_seen", "seconds"}
    assert set(pretrained) == both | {"last_val_loss"}
    assert set(tuned) == both | {"last_val_pretrain_loss", "last_val_sft_loss"}
    assert pretrained["final_step"] == tuned["final_step"] == 12
    assert pretrained["last_val_loss"] < 6.2 and tuned["last_val_sft_loss"] < pretrained["last_val_loss"]
    for name in ("latest.pt", "best.pt"):
        assert Path("checkpoints", name).read_bytes() == Path("checkpoints/sft", name).read_bytes()
        assert Path("checkpoints", f"{name}.resolved_settings.json").is_file()
    loaded = ckpt.load_model("checkpoints/best.pt", device="cpu")  # by itself: it carries its tokenizer
    assert loaded.tokenizer.vocab_size == workshop.V and loaded.settings is not None


def test_every_step_on_a_cpu_looks_for_other_programs(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(contention, "look", lambda: looks.append(1))
    loop = workshop.make_loop(world)
    loop.train_step(0), loop.train_step(1)
    assert len(looks) == 2


def test_two_fresh_runs_are_identical_and_a_seed_matters(world: dict[str, Any]) -> None:
    first = workshop.weights_sha(run_pretrain(world, device="cpu")["latest_path"])
    assert workshop.weights_sha(run_pretrain(world, device="cpu", no_auto_resume=True)["latest_path"]) == first
    world["training"]["pretrain"]["seed"] = 43
    assert workshop.weights_sha(run_pretrain(world, device="cpu", no_auto_resume=True)["latest_path"]) != first


def test_accumulation_is_one_large_batch(world: dict[str, Any]) -> None:
    """Two microbatches of 4 rows give the gradient of their 8 rows together, per token, not per microbatch."""
    world["model"]["dropout"] = 0.0
    loop = workshop.make_loop(world, "sft")  # rows with different numbers of supervised tokens
    parts = [loop.job.batch(4 * m, 4) for m in range(2)]
    whole = Batch(*(torch.cat([getattr(b, name) for b in parts]) for name in ("x", "y", "segment")))
    counts = [int((b.y != IGNORED).sum()) for b in parts]
    assert counts[0] != counts[1]
    expected = loop.model(whole.x, whole.y, segment=whole.segment).item() / sum(counts)
    assert loop.train_step(0).loss == pytest.approx(expected, rel=1e-6)


def test_replay_puts_rows_of_text_among_the_chats(world: dict[str, Any]) -> None:
    plain = workshop.make_loop(world, "sft").job.batch(28, 4)
    world["data"]["replay_pretrain"] = 0.5
    loop = workshop.make_loop(world, "sft")
    mixed = loop.job.batch(28, 4)
    assert mixed.x.shape == plain.x.shape == (4, workshop.T)
    assert mixed.segment is not None and plain.segment is not None
    chats, text = mixed.y[::2], mixed.y[1::2]
    assert (chats == IGNORED).any() and not (text == IGNORED).any()  # of a text every token is learnt
    assert torch.equal(mixed.x[1::2, 1:], text[:, :-1]) and not mixed.segment[1::2].any()
    assert (plain.y[1::2] == IGNORED).any()
    assert torch.equal(loop.job.batch(29, 1).x, mixed.x[1:2])  # however the rows are cut
    assert loop.train_step(0).applied
    world["sft_format"] = {"include_eot_in_loss": False}
    mixed = workshop.make_loop(world, "sft").job.batch(0, 64)
    eot = loop.job.resolved.special_token_ids["eot"]  # of a chat it ends the turn, of a text the document
    assert not (mixed.y[::2] == eot).any() and (mixed.y[1::2] == eot).any() and not (mixed.y[1::2] == IGNORED).any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(world: dict[str, Any], poison: float) -> None:
    loop = workshop.make_loop(world)
    assert loop.train_step(0).applied
    before = workshop.weights(loop)
    state = json.dumps(loop.optimizer.state_dict(), default=lambda t: t.tolist())
    victim = loop.model.blocks[0].mlp.fc_a.weight
    hook = victim.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), poison))
    assert not loop.train_step(1).applied
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())
    assert json.dumps(loop.optimizer.state_dict(), default=lambda t: t.tolist()) == state
    assert loop.train_step(2).applied


def test_it_gives_up_after_several_bad_steps_in_a_row(world: dict[str, Any]) -> None:
    loop = workshop.make_loop(world)
    loop.model.blocks[0].mlp.fc_a.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(ValueError, match=r"not finite, also after 3 rollbacks .* lower training\.pretrain\.base_lr"):
        loop.run()


def test_a_loss_that_is_not_finite_never_becomes_the_best(world: dict[str, Any]) -> None:
    loop = workshop.make_loop(world)
    loop.job.evals.clear()  # type: ignore[attr-defined]
    assert loop.evaluate() is False and loop.state.best_val_loss is None


def test_a_weighted_metric_is_the_weighted_mean_and_nan_where_a_loss_is_missing() -> None:
    weights = {"pretrain_val_loss": 1.0, "sft_val_loss": 3.0}
    options = SftPhaseSettings(best_metric="weighted", best_metric_weights=weights)
    losses = {"pretrain_val_loss": EvalResult(8.0, 2), "sft_val_loss": EvalResult(4.0, 2)}
    assert weighted_metric(options, losses) == pytest.approx((4.0 + 3 * 2.0) / 4)
    assert weighted_metric(SftPhaseSettings(), losses) == 2.0
    for missing in (None, EvalResult(0.0, 0)):
        assert math.isnan(weighted_metric(options, {**losses, "pretrain_val_loss": missing}))


def test_fine_tuning_measures_what_it_learns_and_what_it_forgets(world: dict[str, Any]) -> None:
    weights = {"pretrain_val_loss": 1.0, "sft_val_loss": 1.0}
    world["training"]["sft"] |= {"best_metric": "weighted", "best_metric_weights": weights}
    result = run_sft(world, device="cpu", quiet=True)
    mean = (result["last_val_pretrain_loss"] + result["last_val_sft_loss"]) / 2
    assert result["best_val_loss"] == pytest.approx(mean, rel=0.05)


def test_a_best_that_nothing_can_be_measured_for_is_refused_at_once(world: dict[str, Any]) -> None:
    """Without its validation cache there would never be a best.pt, and nothing would say so."""
    world["data"] |= {"val_sft_source": "wikitext", "val_pretrain_source": "chitchat"}
    with pytest.raises(
        ValueError, match=r'needs sft_val_loss, .* build chitchat .* or set data\.val_sft_source to "sft"'
    ):
        workshop.make_loop(world, "sft")
    with pytest.raises(
        ValueError, match=r"needs pretrain_val_loss, .* or set data\.val_pretrain_source to a source th"
    ):
        workshop.make_loop(world, "sft", best_metric="pretrain_val_loss")
    assert dict(workshop.make_loop(world, "sft", save_best=False).job.evals) == {}  # nothing is wanted
    world["data"]["val_pretrain_source"] = "primer"
    evals = workshop.make_loop(world, "sft", save_best=True).job.evals
    assert evals["sft"] is evals["pretrain"]


def test_ids_beyond_the_vocabulary_are_named(world: dict[str, Any]) -> None:
    loop = workshop.make_loop(world)
    bad = Batch(torch.full((1, 4), workshop.V), torch.zeros(1, 4, dtype=torch.int64))
    object.__setattr__(loop.job, "batch", lambda first, rows: bad)
    with pytest.raises(ValueError, match=r"token id 512, the model knows 0\.\.511"):
        loop.train_step(0)


def test_a_signal_saves_at_the_next_step(world: dict[str, Any]) -> None:
    start = start_phase("pretrain", world, device="cpu", resume_path=None, no_auto_resume=True)
    job = pretrain_job(start)
    draw = job.batch

    def interrupting(first: int, rows: int) -> Batch:
        if first == 2 * 8:  # the first microbatch of step 2
            signal.raise_signal(signal.SIGTERM)
        return draw(first, rows)

    object.__setattr__(job, "batch", interrupting)
    with pytest.raises(Interrupted, match=r"after step 3; saved to checkpoints/pretrain/latest\.pt$") as stopped:
        train(job, device="cpu", reporter=Reporter("pretrain", "r", quiet=True))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert ckpt.load_checkpoint("checkpoints/pretrain/latest.pt", device="cpu")["step"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_is_a_warning_on_the_way_and_an_error_at_the_end(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(checkpoint_format.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match="the disk is full"):
        run_pretrain(world, device="cpu")
    err = capsys.readouterr().err
    assert "step 4: not saved" in err and "trying again at the next save" in err
    assert not list(Path("checkpoints").rglob("*.pt"))


def test_usage_errors(world: dict[str, Any], capsys: Any) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--phase", "pretrain"])
    assert leave.value.code == 2
    capsys.readouterr()
    Path("c.json").write_text(json.dumps({"training": {"pretrain": {"base_ler": 1}}}))
    assert main(["--phase", "pretrain", "--config", "c.json"]) == 1
    err = capsys.readouterr().err
    assert "base_ler" in err and "base_lr" in err and "Traceback" not in err
    assert main(["--phase", "pretrain", "--config", "nowhere.json"]) == 1
    assert main(["--phase", "pretrain", "--config", "c.json", "--device", "tpu"]) == 1
    assert "cpu, mps, cuda" in capsys.readouterr().err


def test_print_config_is_json_alone_and_writes_nothing(world: dict[str, Any], capsys: Any) -> None:
    Path("c.json").write_text(json.dumps(world))
    Path("p.json").write_text(json.dumps({"pretrain_config_path": "c.json", "sft_config_path": "c.json"}))
    assert main(["--phase", "pretrain", "--config", "c.json", "--print_config"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["C"] == 32
    assert main(["--phase", "pipeline", "--config", "p.json", "--print_config"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"pretrain", "sft"}
    assert not Path("runs").exists()


def test_auto_resume_looks_at_its_own_phase_only(world: dict[str, Any], capsys: Any) -> None:
    run_pretrain(world, device="cpu")
    Path("checkpoints/pretrain").rename("elsewhere")  # the root's latest.pt stays
    run_pretrain(world, device="cpu")
    assert "resumed from" not in capsys.readouterr().out
    run_pretrain(world, device="cpu", resume_path="elsewhere/latest.pt")
    assert "resumed from elsewhere/latest.pt" in capsys.readouterr().out
    for name, value, before in (("qk_norm", False, True), ("C", 16, 32)):
        changed = {**world, "model": {**world["model"], name: value}}
        expected = f"model.{name} (checkpoint {before}, settings {value}); use its settings, or leave --resume out"
        with pytest.raises(ValueError, match=rf"{re.escape(expected)}$"):
            run_pretrain(changed, device="cpu", resume_path="elsewhere/latest.pt")


def test_a_damaged_latest_falls_back_loudly(world: dict[str, Any], capsys: Any) -> None:
    run_pretrain(world, device="cpu")
    latest = Path("checkpoints/pretrain/latest.pt")
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.unlink()
    latest.write_bytes(content)
    run_pretrain(world, device="cpu")
    seen = capsys.readouterr()
    assert "DAMAGED; going back to step_0000012.pt" in seen.err
    assert "resumed from checkpoints/pretrain/step_0000012.pt" in seen.out


def test_a_best_loss_without_its_file_is_forgotten(world: dict[str, Any]) -> None:
    """A kill after the first step file and before best.pt leaves that behind; the next evaluation makes one."""
    run_pretrain(world, device="cpu", quiet=True)
    found = ckpt.phase_paths("pretrain")
    found.best.unlink()
    world["training"]["pretrain"] |= {
        "total_steps": 13,
        "base_lr": 1.0,
        "min_lr": 1.0,
    }  # a last step that makes it worse
    result = run_pretrain(world, device="cpu", quiet=True)
    assert result["final_step"] == 13 and found.best.is_file()
    assert ckpt.load_checkpoint(found.best, device="cpu")["step"] == 13


def test_fine_tuning_records_the_text_it_replays(
    world: dict[str, Any], tiny_tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    world["data"]["replay_pretrain"] = 0.5
    run_sft(world, device="cpu", quiet=True)
    resume = ckpt.load_checkpoint(ckpt.phase_paths("sft").latest, device="cpu")["resume"]
    assert resume is not None and set(resume["data"]) == {"primer", "text/primer"}
    settings = with_caches(validate_overrides(world), seed=2)
    build_pretrain(settings, tiny_tokenizer, "primer", root=settings.data.caches.pretrain_token_cache)
    world["training"]["sft"]["total_steps"] = 13
    capsys.readouterr()
    run_sft(world, device="cpu", quiet=True)
    assert "data was" in capsys.readouterr().err


def test_exact_to_the_bit_in_bf16(world: dict[str, Any]) -> None:
    """Two straight runs, and one that stops halfway and is taken up, under autocast with Muon and dropout."""
    world["training"]["pretrain"] |= {"amp": True, "amp_dtype": "bf16", "total_steps": 8, "warmup_steps": 2}
    shas = []
    for stops in ((8,), (8,), (5, 8)):
        shutil.rmtree("checkpoints", ignore_errors=True)
        for last in stops:
            stop_after(world, last)
        shas.append(workshop.weights_sha(ckpt.phase_paths("pretrain").latest))
    assert shas[0] == shas[1] == shas[2]


def stop_after(world: dict[str, Any], step: int) -> None:
    """Train to a step and save there as an interruption does, with the schedule of the whole run."""
    start = start_phase("pretrain", world, device="cpu", resume_path=None, no_auto_resume=False)
    job = pretrain_job(start)
    draw = job.batch

    def batch(first: int, rows: int) -> Batch:
        if first == (step - 1) * 8 and step < 8:
            signal.raise_signal(signal.SIGINT)  # honoured when the step is done
        return draw(first, rows)

    reporter = Reporter("pretrain", start.resolved.run_id, quiet=True)
    with contextlib.suppress(Interrupted):
        train(replace(job, batch=batch), device="cpu", reporter=reporter, resume=start.resume)


@pytest.mark.parametrize("above", [True, False])
def test_gradients_are_clipped_to_the_limit_and_left_alone_below_it(world: dict[str, Any], above: bool) -> None:
    parameters = list(workshop.make_loop(world).model.parameters())
    norm = sum(p.numel() for p in parameters) ** 0.5
    loop = workshop.make_loop(world, grad_clip=norm / 4 if above else norm * 1.01)
    for p in loop.model.parameters():
        p.grad = torch.ones_like(p)
    assert loop.stepper._clip() == pytest.approx(norm)
    expected = torch.tensor(0.25 if above else 1.0)
    for p in loop.model.parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected.expand_as(p), rtol=1e-4 if above else 0.0, atol=0.0)
