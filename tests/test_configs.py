"""Every shipped config resolves for its phase and says why it exists."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from niels_gpt import files
from niels_gpt.batching import Batch
from niels_gpt.config import V1
from niels_gpt.data import registry
from niels_gpt.mixes import stream_config
from niels_gpt.rng import generator_for
from niels_gpt.settings import PHASES, resolve_settings
from niels_gpt.train.job import Job
from niels_gpt.train.loop import Loop
from niels_gpt.train.report import Reporter

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = ("pipeline", "offline_pipeline")
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.json") if path.stem not in PIPELINES)
NOT_MEANT_FOR = {
    "byte": ("sft",),
    "pretrain": ("sft",),
    "pretrain_smoke": ("sft",),
    "train": ("sft",),
    "sft": ("pretrain",),
}
NAMED_IN_THE_SPEC = {"smoke", "train", "pretrain", "sft", "pipeline", "pretrain_smoke"}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_config_of_the_spec_is_there() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.json")} >= NAMED_IN_THE_SPEC
    assert (ROOT / "configs" / "system_surly.txt").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_resolves_silently(path: Path, phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    resolve_settings(phase, path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("path", "phase"),
    [(path, phase) for path in CONFIGS for phase in PHASES if phase not in NOT_MEANT_FOR.get(path.stem, ())],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_every_config_takes_a_step(path: Path, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model, optimizer and step of the config, on one row of random ids instead of its batch of text."""
    config = files.read_json(path)
    knobs = config.setdefault("training", {}).setdefault(phase, {})
    knobs |= {"micro_B": 1, "accum_steps": 1}
    resolved = resolve_settings(phase, config)
    cfg = resolved.model_cfg
    monkeypatch.chdir(tmp_path)

    def batch(first: int, n: int) -> Batch:
        ids = torch.randint(cfg.V, (n, cfg.T + 1), generator=generator_for(1, "rows", first))
        return Batch(ids[:, :-1], ids[:, 1:])

    job = Job(phase, resolved, batch, evals={}, metric=lambda _: math.nan)
    loop = Loop(job, device="cpu", reporter=Reporter(phase, resolved.run_id, quiet=True), resume=None, init=None)
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    done = loop.train_step(1)  # at step 0 the warm-up has a learning rate of nothing
    assert done.applied and done.tokens == cfg.T
    assert abs(done.loss - math.log(cfg.V)) < 0.6  # untrained: as good as guessing
    assert all(not torch.equal(before[name], value) for name, value in loop.model.state_dict().items())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_says_why_it_exists(path: Path) -> None:
    config = files.read_json(path)
    assert next(iter(config)) == "_why" and len(config["_why"]) > 20


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_names_configs_of_one_model(name: str) -> None:
    pipeline = files.read_json(ROOT / "configs" / f"{name}.json")
    assert set(pipeline) == {"pretrain_config_path", "sft_config_path"}
    pretrain = resolve_settings("pretrain", pipeline["pretrain_config_path"])
    sft = resolve_settings("sft", pipeline["sft_config_path"])
    assert (pretrain.model_cfg, pretrain.arch) == (sft.model_cfg, sft.arch)


def test_what_the_spec_says_of_each() -> None:
    assert resolve_settings("pretrain", ROOT / "configs" / "smoke.json").train_cfg.total_steps == 1000
    assert resolve_settings("sft", ROOT / "configs" / "smoke.json").train_cfg.total_steps <= 50
    train = resolve_settings("pretrain", ROOT / "configs" / "train.json").train_cfg
    assert (train.total_steps, train.B, train.accum_steps, train.warmup_steps) == (20000, 16, 4, 200)
    assert (train.eval_every, train.eval_steps, train.ckpt_every, train.base_lr, train.min_lr) == (
        1000,
        25,
        1000,
        3e-4,
        3e-5,
    )
    tiny = resolve_settings("pretrain", ROOT / "configs" / "pretrain_smoke.json")
    assert tiny.train_cfg.total_steps == 2 and tiny.settings.tokenizer.vocab_size <= tiny.model_cfg.V
    assert resolve_settings("pretrain", ROOT / "configs" / "byte.json").arch == V1


def test_the_offline_config_needs_no_hub() -> None:
    settings = resolve_settings("pretrain", ROOT / "configs" / "offline.json").settings
    data = settings.data
    assert set(data.mix_pretrain) == {"wiki_summaries", "chitchat", "primer"}
    assert set(data.mix_sft) == {"primer", "chitchat"}
    for name in (*data.mix_pretrain, *data.mix_sft, data.val_pretrain_source):
        source = registry.SOURCES.get(name)
        assert source is not None or name in getattr(registry, "PLANNED", ()), name
        assert source is None or source.stream is None
    assert settings.tokenizer.vocab_size == settings.model.V
    budgets = [settings.training.pretrain.minutes, settings.training.sft.minutes]
    assert sum(minutes or 1000 for minutes in budgets) <= 120
    default = resolve_settings("pretrain", None).settings
    assert settings.tokenizer.model_path != default.tokenizer.model_path  # its tokenizer replaces no other
    assert data.caches.pretrain_token_cache != default.data.caches.pretrain_token_cache


def test_the_byte_config_needs_nothing_but_the_installation() -> None:
    settings = resolve_settings("pretrain", ROOT / "configs" / "byte.json").settings
    assert set(settings.data.mix_pretrain) == {"chitchat", "primer"} and settings.tokenizer.type == "byte"
    assert stream_config(settings).required_sources == ("chitchat", "primer")


ONE_STEP = """
import resource, sys
import torch
from niels_gpt.model import GPT
from niels_gpt.optim import build_optimizer
from niels_gpt.settings import resolve_settings

resolved = resolve_settings("pretrain", {})
model, options = GPT(resolved.model_cfg, resolved.arch).train(), resolved.training
optimizer = build_optimizer(model, options)
ids = torch.randint(resolved.model_cfg.V, (options.micro_B, resolved.model_cfg.T + 1))
for _ in range(2):
    model(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.soak
def test_the_default_model_trains_in_8_gb() -> None:
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", ONE_STEP], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert 0.3e9 < int(done.stdout) < 8e9
