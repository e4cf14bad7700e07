"""Publishing checkpoints through the real library, against a hub on loopback: the card, what is refused, faults."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from niels_gpt import files
from niels_gpt.checkpoint import load_checkpoint, load_model
from niels_gpt.hub import upload
from niels_gpt.hub.card import UNKNOWN_BEGINNING
from niels_gpt.settings import resolve_settings
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.checkpoint.published import V2_SHAPES, checkpoint_bytes
from tests.hub.here import CARD, V1_FILE, Here
from tests.hub.server import Fault, LoopbackHub


@pytest.fixture
def mine(here: Here, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A checkpoint of this project, with the metrics of its run."""
    from niels_gpt.checkpoint import save_checkpoint, training_record
    from niels_gpt.config import NEW
    from niels_gpt.model.gpt import GPT

    torch.manual_seed(0)
    assert tiny_tokenizer.model_path is not None
    settings = resolve_settings(
        "sft",
        {
            "model": {"V": 512, "T": 32, "C": 32, "L": 2, "H": 2, "d_ff": 48},
            "tokenizer": {"model_path": str(tiny_tokenizer.model_path), "vocab_size": 512},
            "data": {"mix_pretrain": {"wikitext": 0.75, "chitchat": 0.25}, "mix_sft": {"primer": 1.0}},
        },
        run_id="run-1",
    )
    model = GPT(settings.model_cfg, NEW)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(32)[None], torch.arange(32)[None]).backward()
    optimizer.step()
    save_checkpoint(
        here.folder / "mine.pt",
        model_cfg=settings.model_cfg,
        train_cfg=training_record(settings),
        model=model,
        optimizer=optimizer,
        step=77,
        best_val_loss=2.0,
        resume={"settings": settings.settings.model_dump(mode="json"), "row": 5},
        tokenizer_model=tiny_tokenizer.model_bytes,
    )
    evals = [{"phase": "sft", "kind": "eval", "step": s, "losses": {"sft": 3.0 - s / 77}, "metric": 1} for s in (7, 77)]
    files.write_text(here.folder / "runs/run-1/metrics.jsonl", "".join(json.dumps(e) + "\n" for e in evals))
    return here.folder / "mine.pt"


def published(hub: LoopbackHub, repo: str) -> dict[str, bytes]:
    return list(hub.repositories["model", repo].commits.values())[-1]


def test_a_checkpoint_goes_up_and_comes_back(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/small", "--license", "cc-by-sa-4.0") == 0, here.said
    found = published(hub, "me/small")
    assert found["mine.pt"] == mine.read_bytes() and set(found) == {"mine.pt", CARD}
    assert (
        here.said.rstrip().splitlines()[-1]
        == f"{hub.url}/me/small/commit/{list(hub.repositories['model', 'me/small'].commits)[-1]}"
    )
    assert here.download("--repo", "me/small", "--file", "mine.pt") == 0
    loaded = load_model(here.folder / "checkpoints/mine.pt", device="cpu")
    assert loaded.step == 77 and loaded.settings is not None


def altered(mine: Path, name: str, phase: str | None, **data: object) -> Path:
    """The same checkpoint, as if a run of this phase and with these settings of the data had made it."""
    content = torch.load(mine, weights_only=True)
    content["train_cfg"]["_settings_meta"]["phase"] = phase
    content["resume"]["settings"]["data"].update(data)
    torch.save(content, mine.with_name(name))
    return mine.with_name(name)


def test_the_card_lists_what_the_phase_has_read(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    mixes = {"mix_pretrain": {"chitchat": 0.97, "primer": 0.03}, "mix_sft": {"primer": 0.95, "oasst1": 0.05}}
    for phase in ("pretrain", "sft"):
        altered(mine, f"{phase}.pt", phase, replay_pretrain=0.75, **mixes)
        assert here.upload("--checkpoint", f"{phase}.pt", "--repo", f"me/{phase}") == 0, here.said
    pretrained, tuned = (published(hub, f"me/{phase}")[CARD].decode() for phase in ("pretrain", "sft"))
    assert "| pretraining | 97% | chitchat" in pretrained and "| pretraining | 97% | chitchat" in tuned
    assert "fine-tuning" not in pretrained and "oasst1" not in pretrained and "Apache" not in pretrained
    rows = [line.split(":")[0] for line in tuned.splitlines() if line.startswith("| fine-tuning")]
    shares = ("73% | chitchat", "26% | primer", "1% | oasst1")  # a quarter of the chats, three quarters of the text
    assert rows == [f"| fine-tuning | {share}" for share in shares]
    assert "- OpenAssistant/oasst1" in tuned.split("---")[1]


def test_the_card_lists_what_pretraining_read_with_other_settings(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    """A pipeline of two configs: the checkpoint of fine-tuning carries the settings of fine-tuning alone."""
    content = torch.load(altered(mine, "sft.pt", "sft", mix_sft={"oasst1": 1.0}), weights_only=True)
    origin = {"path": "checkpoints/pretrain/best.pt", "run_id": "one", "step": 5}
    content["resume"]["origin"] = {**origin, "learned_from": {"pretraining": {"roam": 0.25, "fineweb_edu": 0.75}}}
    torch.save(content, mine.with_name("sft.pt"))
    assert here.upload("--checkpoint", "sft.pt", "--repo", "me/two") == 1
    assert "learned from texts of your own (roam)" in here.error()
    assert here.upload("--checkpoint", "sft.pt", "--repo", "me/two", "--private") == 0
    told = published(hub, "me/two")[CARD].decode()
    rows = [line.split(":")[0] for line in told.splitlines() if line.startswith(("| pretraining", "| fine-tuning"))]
    assert rows == ["| pretraining | 75% | fineweb_edu", "| pretraining | 25% | roam", "| fine-tuning | 100% | oasst1"]
    assert "ODC-By 1.0" in told and UNKNOWN_BEGINNING not in told

    content["resume"]["origin"] = {**origin, "learned_from": {}}  # as of an imported model
    torch.save(content, mine.with_name("sft.pt"))
    assert here.upload("--checkpoint", "sft.pt", "--repo", "me/imported") == 0
    told = published(hub, "me/imported")[CARD].decode()
    assert "| pretraining" not in told and "| fine-tuning | 100% | oasst1" in told and UNKNOWN_BEGINNING in told


def test_chats_of_ones_own_count_only_where_they_were_read(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    own = {"mix_pretrain": {"chitchat": 1.0}, "mix_sft": {"jsonl": 1.0}}
    altered(mine, "pretrain.pt", "pretrain", **own)
    assert here.upload("--checkpoint", "pretrain.pt", "--repo", "me/before") == 0, here.said
    for phase in ("sft", None):  # None: it does not say, so all that it may have read counts
        altered(mine, "sft.pt", phase, **own)
        assert here.upload("--checkpoint", "sft.pt", "--repo", "me/after") == 1
        assert "learned from texts of your own (jsonl)" in here.error()


def test_the_card_says_what_is_known(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    files.write_json(here.folder / "scores.json", {"wikitext": 1.234})
    flags = ("--checkpoint", "mine.pt", "--repo", "me/carded", "--scores", "scores.json", "--license", "mit")
    assert here.upload(*flags) == 0
    card = published(hub, "me/carded")[CARD].decode()
    head = card.split("---")[1]
    assert 'license: "mit"' in head and "- Salesforce/wikitext" in head and "chitchat" not in head
    for part in (
        "| pretraining | 75% | wikitext:",
        "CC BY-SA 3.0 and GFDL",
        "| fine-tuning | 100% | primer:",
        f"of {load_model(mine, device='cpu').model.num_parameters:,} parameters",
        "| T | 32 |",
        "| qk_norm | True |",
        "| steps | 77 |",
        "| wikitext | 1.234 bits per byte |",
        "| validation, sft, sft step 77 | 2.885 bits per token |",  # 2 / ln 2
        "| best validation of the run | 2.885 bits per token |",
        "niels-gpt download --repo me/carded --file mine.pt",
        f"| `mine.pt` | `{files.sha256_file(mine)}` |",
        "says false things fluently",
    ):
        assert part in card, part
    assert "step 7 |" not in card and str(here.folder) not in card


def test_publishing_again_replaces_the_card_unless_its_owner_wrote_it(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    flags = ("--checkpoint", "mine.pt", "--repo", "me/again")
    assert here.upload(*flags) == 0 and here.upload(*flags, "--license", "mit") == 0
    assert b'license: "mit"' in published(hub, "me/again")[CARD]
    hub.publish("me/again", {**published(hub, "me/again"), CARD: b"# my own words"}, kind="model")
    assert here.upload(*flags, "--weights-only") == 0 and "it stays as it is" in here.said
    found = published(hub, "me/again")
    assert found[CARD] == b"# my own words" and len(found["mine.pt"]) < mine.stat().st_size / 2
    files.write_bytes(here.folder / "slim.pt", found["mine.pt"])
    slim, whole = (load_checkpoint(p, device="cpu") for p in (here.folder / "slim.pt", mine))
    assert slim["optimizer_state"] is None and slim["resume"] is not None and "row" not in slim["resume"]
    assert all(torch.equal(slim["model_state"][name], tensor) for name, tensor in whole["model_state"].items())
    assert load_model(here.folder / "slim.pt", device="cpu").settings == load_model(mine, device="cpu").settings


def test_a_dry_run_sends_nothing(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/dry", "--dry-run", token=None) == 0
    assert hub.requests == [] and "# dry" in here.said and f"mine.pt: {mine.stat().st_size:,} bytes" in here.said


def test_published_generations_go_up_with_what_they_need(
    here: Here, hub: LoopbackHub, tiny_tokenizer: SentencePieceTokenizer, faulty: list[Fault]
) -> None:
    files.write_bytes(here.folder / "v1.pt", V1_FILE)
    sha = tiny_tokenizer.sha256
    files.write_bytes(here.folder / "v2.pt", checkpoint_bytes("v2", V2_SHAPES[0], 1, tokenizer_sha256=sha))
    files.write_bytes(here.folder / "spm.model", tiny_tokenizer.model_bytes)
    assert here.upload("--checkpoint", "v1.pt", "--repo", "me/v1") == 0, here.said
    assert here.upload("--checkpoint", "v2.pt", "--repo", "me/v2") == 0, here.said
    assert set(published(hub, "me/v1")) == {"v1.pt", CARD}
    assert set(published(hub, "me/v2")) == {"v2.pt", CARD, "spm.model"}
    card = published(hub, "me/v1")[CARD].decode()
    assert "The checkpoint does not record it." in card and "None recorded." in card and "It reads bytes" in card
    assert here.download("--repo", "me/v2", "--file", "v2.pt", "--out", "back") == 0
    assert load_model(here.folder / "back/v2.pt", device="cpu").tokenizer.sha256 == sha


def test_what_is_wrong_with_an_upload_is_one_line(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    files.write_bytes(here.folder / "cut.pt", mine.read_bytes()[:9000])
    files.write_text(here.folder / "bad.json", '{"wikitext": "good"}')
    for argv, told in (
        (("--checkpoint", "gone.pt"), "there is no checkpoint at gone.pt"),
        (("--checkpoint", "cut.pt"), "cut.pt is damaged"),
        (("--checkpoint", "mine.pt", "--scores", "bad.json"), "must be a JSON object of names and bits per byte"),
    ):
        assert here.upload(*argv, "--repo", "me/x") == 1 and told in here.error() and hub.requests == []
    flags = ("--checkpoint", "mine.pt", "--repo", "me/x")
    assert here.upload(*flags, token=None) == 1 and "hf auth login" in here.error()
    faulty.append(Fault("status", "/api/repos/create", method="POST", code=403))
    assert here.upload(*flags) == 1 and "(403)" in here.error()
    faulty.append(Fault("status", "/commit/", method="POST", code=500))
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/y") == 1
    faulty.clear()
    faulty.append(Fault("status", "/commit/", method="POST", code=500, times=2))
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/y") == 0 and "mine.pt" in published(hub, "me/y")


@pytest.mark.parametrize(
    ("stopped_in", "told"),
    [
        ("load_checkpoint", "stopped; nothing was published"),
        ("ask 0", "stopped; me/w may have been made on the hub, but nothing was published in it"),
        ("ask 2", "stopped; me/w is there, and all of the files are in it or none; the same command publishes them"),
        ("_compare", "stopped; it is published as URL, but was not compared with what is here"),
    ],
)
def test_what_ctrl_c_says_is_true(
    stopped_in: str, told: str, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = iter(range(9))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def answer(*_: object) -> SimpleNamespace:
        if stopped_in == f"ask {next(asked)}":
            stop()
        return SimpleNamespace(private=False, commit_url="URL", oid="1")

    monkeypatch.setattr(upload, "patiently", answer)
    monkeypatch.setattr(upload, "_has_own_card", lambda repo: False)
    if not stopped_in.startswith("ask"):
        monkeypatch.setattr(upload, stopped_in, stop)
    assert upload.main(["--checkpoint", str(mine), "--repo", "me/w"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == told


def test_metrics_cut_by_a_power_cut_are_read(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    log = here.folder / "runs/run-1/metrics.jsonl"
    log.write_text(log.read_text() + '{"phase": "sft", "kind": "eval", "losses": {"sft": 1.0}}\n{"phase": "sft", "ki')
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/cut") == 0, here.said
    assert "sft step 77 | 2.885 bits per token" in published(hub, "me/cut")[CARD].decode()
    flags = ("--checkpoint", "mine.pt", "--repo", "me/cut", "--metrics", "gone.jsonl")
    assert here.upload(*flags) == 1 and "there are no metrics at gone.jsonl" in here.error()


def test_without_a_name_the_best_model_of_this_folder_goes_up(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    assert here.upload("--repo", "me/best") == 1 and "there is no checkpoint at checkpoints/best.pt" in here.error()
    assert hub.requests == []
    files.write_bytes(here.folder / "checkpoints/best.pt", mine.read_bytes())
    assert here.upload("--repo", "me/best") == 0 and set(published(hub, "me/best")) == {"best.pt", CARD}


def test_what_arrives_otherwise_is_noticed(here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]) -> None:
    assert here.upload("--checkpoint", "mine.pt", "--repo", "me/z") == 0
    whole, real = hub.publish, hub.publish

    def damaging(name: str, content: dict[str, bytes], *, kind: str = "dataset") -> str:
        return real(name, {**content, "mine.pt": content["mine.pt"][:-1] + b"x"}, kind=kind)

    hub.publish = damaging  # type: ignore[method-assign,assignment]
    try:
        assert here.upload("--checkpoint", "mine.pt", "--repo", "me/z") == 1
        assert "is not on the hub what it is here" in here.error()
    finally:
        hub.publish = whole  # type: ignore[method-assign]


def test_texts_of_ones_own_are_published_only_on_request(
    here: Here, hub: LoopbackHub, mine: Path, faulty: list[Fault]
) -> None:
    altered(mine, "own.pt", "sft", mix_pretrain={"roam": 0.5, "wikitext": 0.5})
    flags = ("--checkpoint", "own.pt", "--repo", "me/own")
    assert here.upload(*flags) == 1 and "learned from texts of your own (roam)" in here.error() and not hub.requests
    assert here.upload(*flags, "--private") == 0 and "me/own" in hub.private
    hub.private.clear()
    assert here.upload(*flags, "--private") == 1 and "exists and is public" in here.error()
    assert here.upload(*flags, "--share-own-text") == 0
    assert "may repeat pieces of them" in published(hub, "me/own")[CARD].decode()
