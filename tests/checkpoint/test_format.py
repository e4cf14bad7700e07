"""The checkpoint file: what goes in comes out, and what it cannot hold or lacks is named."""

import enum
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from niels_gpt import files
from niels_gpt.checkpoint import FORMAT_VERSION, build_model, load_checkpoint, save_checkpoint
from niels_gpt.checkpoint.plain import plain
from niels_gpt.config import TrainConfig, to_dict
from tests.checkpoint.samples import TINY, equal, save, trained
from tests.reference import BUNDLE, needs_bundle
from tests.varied import GENERATIONS

all_generations = pytest.mark.parametrize("arch", GENERATIONS.values(), ids=GENERATIONS)
SIX = ["model_cfg", "train_cfg", "model_state", "step", "optimizer_state", "best_val_loss"]


@all_generations
def test_round_trip(tmp_path, arch):
    path = tmp_path / "a.pt"
    resume = {"phase": "pretrain", "seed": 1, "nested": {"list": [1, 2.5, None, True], "tuple": (1, "x")}}
    model, optimizer = trained(arch)
    save(path, arch, model=model, optimizer=optimizer, resume=resume, tokenizer_model=b"spm bytes")
    found = load_checkpoint(path, device="cpu")
    assert found["model_cfg"] == to_dict(TINY)
    assert found["train_cfg"] == {"seed": 42, "B": 2}
    assert (found["step"], found["best_val_loss"]) == (7, 2.5)
    assert equal(found["model_state"], dict(model.state_dict()))
    assert equal(found["optimizer_state"], optimizer.state_dict())
    assert found["resume"] == {"format_version": FORMAT_VERSION, **resume}
    assert found["tokenizer_model"].dtype == torch.uint8
    assert found["tokenizer_model"].numpy().tobytes() == b"spm bytes"
    rebuilt = build_model(found)
    assert rebuilt.arch == arch and rebuilt.cfg == TINY
    x = torch.arange(8)[None]
    assert torch.equal(rebuilt.eval()(x), model.eval()(x))


def test_an_optimizer_goes_on_from_a_saved_state_to_the_bit(tmp_path):
    model, optimizer = trained()
    save(tmp_path / "a.pt", model=model, optimizer=optimizer)
    found = load_checkpoint(tmp_path / "a.pt", device="cpu")
    again = build_model(found)
    resumed = torch.optim.AdamW(again.parameters(), lr=1e-3, betas=(0.9, 0.95))
    resumed.load_state_dict(found["optimizer_state"])
    x = torch.arange(8)[None]
    for m, o in ((model.eval(), optimizer), (again.eval(), resumed)):
        o.zero_grad()
        m(x, x).backward()
        o.step()
    assert equal(dict(model.state_dict()), dict(again.state_dict()))


def test_the_six_keys_in_published_order_and_nothing_else_by_default(tmp_path):
    save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(content) == SIX
    assert list(content["model_cfg"]) == ["V", "T", "C", "L", "H", "d_ff", "dropout", "rope_theta"]
    state = content["model_state"]
    assert all(t.dtype == torch.float32 for t in state.values())
    assert state["lm_head.weight"].data_ptr() == state["tok_emb.weight"].data_ptr(), "the tied matrix is stored twice"


def test_optional_keys_are_absent_and_load_as_none(tmp_path):
    save(tmp_path / "a.pt", optimizer=None, best_val_loss=None)
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == SIX[:4]
    found = load_checkpoint(tmp_path / "a.pt", device="cpu")
    for key in ("optimizer_state", "best_val_loss", "resume", "tokenizer_model"):
        assert found[key] is None


@pytest.mark.parametrize("best", [math.nan, math.inf])
def test_a_best_loss_that_nothing_can_beat_is_dropped(tmp_path, best):
    save(tmp_path / "a.pt", best_val_loss=best)
    assert load_checkpoint(tmp_path / "a.pt", device="cpu")["best_val_loss"] is None
    model, _ = trained()
    content = {"model_cfg": to_dict(TINY), "train_cfg": {}, "model_state": model.state_dict(), "step": 1}
    torch.save({**content, "best_val_loss": best}, tmp_path / "b.pt")
    assert load_checkpoint(tmp_path / "b.pt", device="cpu")["best_val_loss"] is None


def test_model_and_optimizer_may_be_state_dicts_and_train_cfg_a_record(tmp_path):
    model, optimizer = trained()
    names = TrainConfig.__dataclass_fields__
    train_cfg = TrainConfig(**dict.fromkeys(names, 1))  # type: ignore[arg-type]
    save(tmp_path / "a.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), train_cfg=train_cfg)
    found = load_checkpoint(tmp_path / "a.pt", device="cpu")
    assert equal(found["model_state"], dict(model.state_dict()))
    assert list(found["train_cfg"]) == list(names)


def test_saving_float16_or_a_slice_stores_float32_and_no_more_than_the_slice(tmp_path):
    model, _ = trained()
    large = torch.zeros(500_000)
    save(tmp_path / "a.pt", model=model.half(), optimizer=None, resume={"slice": large[:10]})
    found = load_checkpoint(tmp_path / "a.pt", device="cpu")
    assert {t.dtype for t in found["model_state"].values()} == {torch.float32}
    assert found["resume"]["slice"].shape == (10,)
    assert (tmp_path / "a.pt").stat().st_size < 200_000


def test_values_are_converted_to_plain_ones():
    class Level(enum.IntEnum):
        LOW = 1

    given = {
        "path": Path("a/b"),
        "numpy": [np.float64(0.5), np.int64(3), np.bool_(True)],
        "version": torch.__version__,
        "enum": Level.LOW,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    copied = plain(given, "resume")
    assert copied["path"] == str(Path("a/b"))
    assert [type(v) for v in copied["numpy"]] == [float, int, bool]
    assert type(copied["version"]) is str and type(copied["enum"]) is int
    assert type(copied["parameter"]) is torch.Tensor and not copied["parameter"].requires_grad


@pytest.mark.parametrize("value", [np.zeros(2), {1, 2}, object(), b"bytes", torch.zeros(2).to_sparse(), 1j])
def test_other_values_are_refused_by_name_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"resume\.deep\[1\]"):
        save(tmp_path / "a.pt", resume={"deep": [0, value]})
    assert not list(tmp_path.iterdir())


def test_nested_without_end_is_refused(tmp_path):
    loop: list[object] = []
    loop.append(loop)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value, said in ((loop, "contains itself"), (deep, "too deeply")):
        with pytest.raises(ValueError, match=said):
            plain(value, "resume")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weights", "moments"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, bad, where):
    model, optimizer = trained()
    with torch.no_grad():
        if where == "weights":
            model.blocks[1].attn.proj.weight[2, 3] = bad
        else:
            optimizer.state[model.tok_emb.weight]["exp_avg"][0, 0] = bad
    name = {"weights": "blocks.1.attn.proj.weight", "moments": "optimizer_state.state.0.exp_avg"}[where]
    with pytest.raises(ValueError, match=name):
        save(tmp_path / "a.pt", model=model, optimizer=optimizer)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_refused_when_saving(tmp_path):
    compiled_names = {f"_orig_mod.{k}": v for k, v in trained()[0].state_dict().items()}
    with pytest.raises(ValueError, match="_orig_mod"):
        save(tmp_path / "a.pt", model=compiled_names)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_checkpoint(tmp_path / "nothing.pt", device="cpu")
    with pytest.raises(ValueError, match="is a folder"):
        load_checkpoint(tmp_path, device="cpu")


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", b"version https://git-lfs.github.com/spec/v1\n"])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a checkpoint|damaged"):
        load_checkpoint(tmp_path / "a.pt", device="cpu")


@pytest.mark.parametrize("key", SIX[:4])
def test_a_missing_key_is_named(tmp_path, key):
    save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    del content[key]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"lacks {key}"):
        load_checkpoint(tmp_path / "a.pt", device="cpu")


@pytest.mark.parametrize(("key", "value"), [("step", "7"), ("model_state", [1]), ("model_cfg", 3), ("step", True)])
def test_a_key_of_the_wrong_kind_is_named(tmp_path, key, value):
    save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**content, key: value}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"its {key} is a"):
        load_checkpoint(tmp_path / "a.pt", device="cpu")


def test_a_newer_format_is_refused(tmp_path):
    save(tmp_path / "a.pt", resume={"format_version": FORMAT_VERSION + 1})
    with pytest.raises(ValueError, match="newer niels-gpt"):
        load_checkpoint(tmp_path / "a.pt", device="cpu")


def test_shared_containers_do_not_grow(tmp_path):
    laughs: list[object] = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    save(tmp_path / "a.pt", resume={"x": laughs})
    assert load_checkpoint(tmp_path / "a.pt", device="cpu")["resume"]["x"][0][1]


@needs_bundle
@pytest.mark.parametrize("name", ["v1/best_with_opt", "v1/best_no_opt_no_val", "v2/train_run/pretrain/latest"])
def test_published_checkpoints_survive_our_saver(tmp_path, name):
    published = load_checkpoint(BUNDLE / f"{name}.pt", device="cpu")
    content = torch.load(BUNDLE / f"{name}.pt", weights_only=True)
    assert equal(published["model_state"], dict(content["model_state"]))
    save_checkpoint(
        tmp_path / "ours.pt",
        model_cfg=published["model_cfg"],
        train_cfg=published["train_cfg"],
        model=build_model(published),
        optimizer=published["optimizer_state"],
        step=published["step"],
        best_val_loss=published["best_val_loss"],
    )
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(ours) == [key for key in SIX if content.get(key) is not None]
    assert list(ours["model_state"]) == list(content["model_state"])
    assert "_raw" not in ours["model_cfg"]  # the web app calls ModelConfig(**model_cfg)
    for key in ours:
        theirs = {k: v for k, v in content[key].items() if k != "_raw"} if key == "model_cfg" else content[key]
        assert equal(ours[key], dict(theirs) if isinstance(theirs, dict) else theirs), key


@needs_bundle
def test_published_files_load_whatever_their_name(tmp_path):
    files.publish_copy(BUNDLE / "v1/best_with_opt.pt", tmp_path / "renamed.bin")
    assert load_checkpoint(tmp_path / "renamed.bin", device="cpu")["step"] == 1000
