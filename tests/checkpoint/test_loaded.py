"""From a file to a model that can chat: which tokenizer it gets, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from niels_gpt import files, paths
from niels_gpt.chat_format import TextChat, TokenChat
from niels_gpt.checkpoint import LoadedModel, load_model, save_checkpoint, sidecar_path, training_record
from niels_gpt.config import NEW, V1, V2, Architecture, ModelConfig
from niels_gpt.model.gpt import GPT
from niels_gpt.settings import ResolvedSettings, resolve_settings
from niels_gpt.tokenizer import ByteTokenizer
from tests.reference import BUNDLE, needs_bundle

TOKENIZER = BUNDLE / "v2/tokenizer/spm.model"
UNKNOWN_FIELD = bytes([0xFA, 0x7F, 1, 0x41])  # protobuf: the same tokenizer to SentencePiece, other bytes to a hash


def resolved(**tokenizer: object) -> ResolvedSettings:
    model = {"V": 512, "T": 16, "C": 16, "L": 1, "H": 2, "d_ff": 24}
    if tokenizer.get("type") == "byte":
        model["V"] = 256
    return resolve_settings("sft", {"model": model, "tokenizer": tokenizer}, run_id="test")


def saved(path: Path, settings: ResolvedSettings, arch: Architecture = NEW, **changes: object) -> Path:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "model_cfg": settings.model_cfg,
        "train_cfg": training_record(settings),
        "model": GPT(settings.model_cfg, arch),
        "optimizer": None,
        "step": 3,
        "best_val_loss": None,
    }
    save_checkpoint(path, **{**values, **changes})  # type: ignore[arg-type]
    return path


@pytest.fixture(autouse=True)
def empty_project(tmp_path, monkeypatch):
    """No tokenizer lies about by chance: neither in the current folder nor in the project's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path / "nowhere")


@pytest.fixture
def run(tmp_path, tiny_tokenizer) -> SimpleNamespace:
    """Settings that name the tiny tokenizer, its path and bytes, and a second tokenizer that does not fit."""
    path = tmp_path / "own" / "spm.model"
    files.write_bytes(path, tiny_tokenizer.model_bytes)
    other = tmp_path / "other" / "spm.model"
    files.write_bytes(other, tiny_tokenizer.model_bytes + UNKNOWN_FIELD)
    return SimpleNamespace(
        settings=resolved(model_path=str(path), vocab_size=512),
        path=path,
        other=other,
        bytes=tiny_tokenizer.model_bytes,
    )


def test_everything_that_chat_needs_is_in_the_one_file(tmp_path, run):
    record = {"settings": run.settings.settings.model_dump(mode="json")}
    path = saved(tmp_path / "a.pt", run.settings, resume=record, tokenizer_model=run.bytes)
    run.path.unlink()
    found = load_model(path, device="cpu")
    assert isinstance(found, LoadedModel)
    assert not found.model.training and found.model.arch == NEW
    assert found.tokenizer.encode("hello") and found.tokenizer.sha256 == files.sha256_bytes(run.bytes)
    assert isinstance(found.chat_format, TokenChat)
    assert found.settings == run.settings.settings
    assert (found.checkpoint_path, found.step) == (path, 3)


def test_the_training_record(run):
    record = training_record(run.settings)
    assert record["seed"] == run.settings.train_cfg.seed
    assert record["_raw"]["micro_B"] == record["B"]
    assert record["_settings_meta"] == {
        "run_id": "test",
        "resolved_settings_path": None,
        "overrides_source": None,
        "tokenizer_sha256": files.sha256_file(run.path),
        "phase": "sft",
    }


def test_without_an_embedded_tokenizer_the_settings_name_it(tmp_path, run):
    path = saved(tmp_path / "a.pt", run.settings)
    files.write_json(sidecar_path(path), run.settings.record())
    found = load_model(path, device="cpu")
    assert found.tokenizer.model_path == run.path
    assert found.settings == run.settings.settings


def test_a_damaged_sidecar_does_not_matter(tmp_path, run):
    path = saved(tmp_path / "a.pt", run.settings, tokenizer_model=run.bytes)
    sidecar_path(path).write_text('{"half')
    assert load_model(path, device="cpu").settings is None


def test_a_tokenizer_named_by_the_caller_comes_first(tmp_path, run):
    path = saved(tmp_path / "a.pt", run.settings, tokenizer_model=run.bytes)
    moved = run.path.rename(tmp_path / "moved.model")
    assert load_model(path, device="cpu", tokenizer_path=moved).tokenizer.model_path == moved


def test_nothing_found_names_the_flag(tmp_path, run):
    path = saved(tmp_path / "a.pt", run.settings)
    with pytest.raises(FileNotFoundError, match=rf"{files.sha256_file(run.path)}.*--tokenizer"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("embedded", [True, False])
def test_another_tokenizer_of_the_same_size_is_refused(tmp_path, run, embedded):
    path = saved(tmp_path / "a.pt", run.settings, tokenizer_model=run.bytes if embedded else None)
    with pytest.raises(ValueError, match="tokenizer hash mismatch") as caught:
        load_model(path, device="cpu", tokenizer_path=run.other)
    for part in (files.sha256_file(run.path), files.sha256_file(run.other), "--ignore-tokenizer-hash"):
        assert part in str(caught.value)
    found = load_model(path, device="cpu", tokenizer_path=run.other, ignore_tokenizer_hash=True)
    assert found.tokenizer.sha256 == files.sha256_file(run.other)


def test_an_embedded_tokenizer_must_be_the_recorded_one(tmp_path, run):
    path = saved(tmp_path / "a.pt", run.settings, tokenizer_model=run.other.read_bytes())
    with pytest.raises(ValueError, match="tokenizer hash mismatch"):
        load_model(path, device="cpu")


def test_an_unrecorded_tokenizer_is_used_with_a_warning(tmp_path, run, capsys):
    path = saved(tmp_path / "a.pt", run.settings, train_cfg={"seed": 1})
    load_model(path, device="cpu", tokenizer_path=run.path)
    assert "unchecked" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model(tmp_path, run, capsys):
    small = ModelConfig(V=400, T=16, C=16, L=1, H=2, d_ff=24, dropout=0.0, rope_theta=1e4)
    path = saved(tmp_path / "a.pt", run.settings, model_cfg=small, model=GPT(small), tokenizer_model=run.bytes)
    load_model(path, device="cpu")
    assert "512 ids, the model only 400" in capsys.readouterr().err
    tiny = ModelConfig(V=6, T=16, C=16, L=1, H=2, d_ff=24, dropout=0.0, rope_theta=1e4)
    path = saved(tmp_path / "b.pt", run.settings, model_cfg=tiny, model=GPT(tiny), tokenizer_model=run.bytes)
    with pytest.raises(ValueError, match="'eot': 6"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("arch", [NEW, V1])
def test_byte_models_of_this_project(tmp_path, arch):
    settings = resolved(type="byte")
    path = saved(tmp_path / "a.pt", settings, arch, resume={"settings": settings.settings.model_dump(mode="json")})
    found = load_model(path, device="cpu")
    assert isinstance(found.tokenizer, ByteTokenizer) and isinstance(found.chat_format, TextChat)
    assert found.settings == settings.settings
    with pytest.raises(ValueError, match="byte model"):
        load_model(path, device="cpu", tokenizer_path="spm.model")


def test_published_byte_models_are_known_by_their_architecture(tmp_path):
    byte = resolved(type="byte")
    path = saved(tmp_path / "v1.pt", byte, V1, train_cfg={"seed": 42})
    assert isinstance(load_model(path, device="cpu").tokenizer, ByteTokenizer)
    path = saved(tmp_path / "v2.pt", byte, V2, train_cfg={"seed": 42})  # 256 ids do not make a byte model
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        load_model(path, device="cpu")


@needs_bundle
def test_published_models():
    found = load_model(BUNDLE / "v1/best_with_opt.pt", device="cpu")
    assert isinstance(found.tokenizer, ByteTokenizer) and isinstance(found.chat_format, TextChat)
    assert found.settings is None and found.step == 1000
    for phase, step in (("pretrain", 30), ("sft", 12)):
        found = load_model(BUNDLE / f"v2/train_run/{phase}/latest.pt", device="cpu", tokenizer_path=TOKENIZER)
        assert isinstance(found.chat_format, TokenChat)
        assert found.step == step and found.model.arch == V2
        assert found.settings is not None and found.settings.model.C == found.model.cfg.C
        with pytest.raises(FileNotFoundError, match="--tokenizer"):
            load_model(BUNDLE / f"v2/train_run/{phase}/latest.pt", device="cpu")


@needs_bundle
def test_a_published_model_refuses_a_tokenizer_it_was_not_trained_with(run):
    with pytest.raises(ValueError, match="tokenizer hash mismatch"):
        load_model(BUNDLE / "v2/train_run/sft/latest.pt", device="cpu", tokenizer_path=run.path)
