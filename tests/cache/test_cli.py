"""The cache programs: flags, exit statuses, and messages a person can act on."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from niels_gpt.cache import cli
from niels_gpt.cache.integrity import DEFAULT_CACHE_DIR
from niels_gpt.cache.pretrain import build_pretrain, open_mix
from niels_gpt.cache.sft import build_sft
from niels_gpt.data.registry import SOURCES, Source
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings, default_settings, validate_overrides
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import SentencePieceTokenizer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """An empty working folder with a config that names the tiny tokenizer and a mix of sources that exist."""
    monkeypatch.chdir(tmp_path)
    config = {
        "tokenizer": {"model_path": str(tiny_tokenizer.model_path), "vocab_size": 512},
        "model": {"V": 512},
        "data": {
            "mix_pretrain": {"text": 0.5, "primer": 0.3, "roam": 0.2},
            "mix_sft": {"primer": 1.0},
            "val_pretrain_source": "primer",
        },
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    (tmp_path / "data" / "text").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "data" / "text" / f"{i}.txt").write_text(f"file {i} " * 40)
    return tmp_path


def run(*argv: str) -> int:
    return cli.main([*argv, "--config", "c.json"])


def test_build_makes_what_a_source_has_and_keeps_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "primer", "text") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress line where nobody watches
    assert [line.split(":")[0] for line in out.splitlines()] == ["✓ pretrain/primer", "✓ sft/primer", "✓ pretrain/text"]
    assert "documents" in out and "tokens (train + val)" in out
    made = {path.relative_to(here).as_posix() for path in here.glob("data/cache/*/*/meta.json")}
    assert made == {f"data/cache/{name}/meta.json" for name in ("pretrain/primer", "pretrain/text", "sft/primer")}
    assert run("build", "primer", "text") == 0
    assert capsys.readouterr().out.count("up to date") == 3


def test_what_a_missing_cache_advises_makes_it(here: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    """With a tokenizer and folders of the config's own."""
    config = json.loads(Path("c.json").read_text())
    config["data"] |= {"mix_pretrain": {"primer": 1.0}, "caches": {"pretrain_token_cache": "p", "sft_token_cache": "s"}}
    Path("c.json").write_text(json.dumps(config))
    settings = validate_overrides(config)
    with pytest.raises(FileNotFoundError, match="no cache at p/primer; build it with: ") as caught:
        open_mix(settings, tiny_tokenizer, "train", 32)
    command = str(caught.value).partition("niels_gpt.cache.cli ")[2].partition(",")[0]
    assert command == "build primer --config FILE"
    assert cli.main(command.replace("FILE", "c.json").split()) == 0
    assert list(open_mix(settings, tiny_tokenizer, "train", 32)[0]) == ["primer"]


def test_the_documented_defaults() -> None:
    """Of build-all and build-sft-primer, wherever they are kept."""
    data = default_settings().data
    caches = {"seed": 42, "train_tokens": 200_000_000, "val_tokens": 5_000_000, "shard_bytes": 128 * 2**20}
    assert {name: getattr(data.caches, name) for name in caches} == caches
    primer = {"jsonl_path": "data/primer.jsonl", "seed": 42, "val_frac": 0.1, "t_max": 1024}
    assert {name: getattr(data.primer, name) for name in primer} == primer
    assert (data.roam.root_dir, DEFAULT_CACHE_DIR) == ("data/.roam-data", Path("data/cache"))
    assert (data.caches.pretrain_token_cache, data.caches.sft_token_cache) == ("data/cache/pretrain", "data/cache/sft")


def test_flags_choose_phase_folders_and_options(here: Path) -> None:
    (here / "data" / "text").rename(here / "mine")
    assert run("build", "text", "--text-dir", "mine", "--cache-dir", "c", "--shard-bytes", "600", "--seed", "7") == 0
    meta = json.loads((here / "c/pretrain/text/meta.json").read_text())
    assert meta["shard_bytes"] == 600 and meta["seed"] == 7 and meta["split_rule"].endswith("seed=7")
    assert run("build", "primer", "--phase", "sft", "--cache-dir", "c", "--out-dir", "talk", "--t-max", "20") == 0
    assert json.loads((here / "talk/primer/meta.json").read_text())["T_max"] == 20
    assert not (here / "c/pretrain/primer").exists()


def test_one_failing_source_does_not_stop_the_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "data/text/bad.txt").write_text(f"hello {SPECIAL_TOKENS['sys']} there")
    assert run("build", "text", "primer", "--phase", "pretrain") == 1
    captured = capsys.readouterr()
    assert (
        "✗ pretrain/text failed: " in captured.err
        and "special token literal" in captured.err
        and "✓ pretrain/primer" in captured.out
    )
    assert run("build", "dolly") == 1
    assert "✗ sft/dolly15k failed: databricks/databricks-dolly-15k: it is not in the" in capsys.readouterr().err


def test_build_all_builds_the_mixes_beside_the_tokenizer(
    here: Path, tiny_tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run("build-all", "--cache-dir", "data/cache", "--fineweb-train-tokens", "10", "--roam-dir", "data/.roam") == 0
    )
    out = capsys.readouterr().out
    assert "- pretrain/roam skipped: there is no folder data/.roam" in out
    assert out.count("✓") == 3
    assert (here / "data/cache/tokenizer/spm.model").read_bytes() == tiny_tokenizer.model_bytes
    meta = json.loads((here / "data/cache/tokenizer/meta.json").read_text())
    assert meta["tokenizer_sha256"] == tiny_tokenizer.sha256 and meta["vocab_size"] == 512
    assert (here / "data/cache/tokenizer/tokenizer_meta.json").is_file()

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in here.rglob("*") if path.is_file() and path.name != ".verified"}

    before = contents()
    assert run("build-all") == 0
    assert contents() == before
    for path in (here / "data/cache").rglob("meta.json"):
        path.unlink()
    assert run("build-all") == 0
    assert contents() == before


def test_build_all_lists_every_missing_source(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((here / "c.json").read_text())
    config["data"]["mix_pretrain"] = {"fineweb_edu": 0.5, "wikitext": 0.3, "text": 0.2}
    config["data"]["mix_sft"] = {"oasst1": 0.5, "primer": 0.5}
    (here / "c.json").write_text(json.dumps(config))
    assert run("build-all") == 1
    captured = capsys.readouterr()
    assert captured.out.count("✓") == 2 and captured.err.count("✗") == 3
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: caches of the mixes are missing: ")
    for name in ("pretrain/fineweb_edu", "pretrain/wikitext", "sft/oasst1"):
        assert f"data/cache/{name}/meta.json" in last
    assert last.count("meta.json") == 3


def test_build_sft_primer_writes_to_a_folder_called_primer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "p.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]})
            + "\n"
            for i in range(10)
        )
    )
    flags = ["--primer-jsonl", "p.jsonl", "--seed", "1", "--val-frac", "0.2", "--t-max", "99"]
    for out_dir in ("x", "y/primer"):
        assert run("build-sft-primer", *flags, "--out-dir", out_dir) == 0
    one, two = ((here / folder / "primer" / "meta.json").read_bytes() for folder in ("x", "y"))
    assert one == two and json.loads(one)["val_examples"] == 2 and json.loads(one)["T_max"] == 99
    assert run("build-sft-primer", "--primer-jsonl", "none.jsonl") == 1
    assert "there is no primer file none.jsonl" in capsys.readouterr().err
    with open(here / "p.jsonl", "a") as file:
        file.write("{broken\n")
    assert run("build-sft-primer", *flags, "--out-dir", "x") == 1
    assert "p.jsonl: line 11: not valid JSON" in capsys.readouterr().err
    assert run("build-sft-primer", *flags, "--out-dir", "x", "--skip-bad") == 0
    assert "dropped 1 malformed" in capsys.readouterr().out


def test_every_command_builds_in_the_folders_of_its_config(here: Path) -> None:
    """What lies in those of the settings may belong to another one."""
    config = json.loads((here / "c.json").read_text())
    config["data"]["caches"] = {"pretrain_token_cache": "mine/text", "sft_token_cache": "mine/primer"}
    (here / "c.json").write_text(json.dumps(config))
    for command, phases in (("build-sft-primer", 1), ("build primer", 2), ("build-all", 2)):
        assert run(*command.split()) == 0
        assert (here / "mine/primer/primer/meta.json").is_file() and not (here / "data/cache").exists()
        assert (here / "mine/text/primer/meta.json").is_file() == (phases == 2)
        shutil.rmtree(here / "mine")


def test_show_and_verify(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show") == 1
    assert "no caches in data/cache/pretrain or data/cache/sft" in capsys.readouterr().err
    assert run("build", "primer") == 0
    assert run("show") == run("verify") == run("verify", "primer") == 0
    out = capsys.readouterr().out
    assert "✓ sft/primer: 6 files are as written" in out
    shown = out.split("✓ pretrain/primer: 8")[0]
    assert shown.count("  token ") == shown.count("  conversation ") == 3 and " MB, tokenizer " in shown
    chat = next(line for line in shown.splitlines() if "conversation 0: " in line)
    before, trained = chat.split("<asst>")[0], chat.split("⟦")[1].split("⟧")[0]
    assert "⟦" not in before and "<usr>" in before and trained.endswith("<eot>") and len(trained) > 10
    path = here / "data/cache/sft/primer/train_labels.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    for command in ("show", "verify"):
        assert run(command) == 1
        captured = capsys.readouterr()
        assert "✗ sft/primer: " in captured.err and "train_labels.bin is damaged" in captured.err
        assert "✓ pretrain/primer" in captured.out


def test_no_cache_is_passed_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a name without one, nor a folder whose meta.json is gone; what is being built is not there yet."""
    assert run("build", "primer") == 0
    (here / "data/cache/sft/.text.new").mkdir()
    for command in ("show", "verify"):
        capsys.readouterr()
        assert run(command, "primer", "dolly", "text") == 1
        out, err = capsys.readouterr()
        assert "✓ pretrain/primer" in out and "✓ sft/primer" in out
        where = "no cache of that name in data/cache/pretrain or data/cache/sft; there is primer"
        assert err == f"✗ dolly15k: {where}\n✗ text: {where}\n"
    meta = here / "data/cache/sft/primer/meta.json"
    was = meta.read_text()
    meta.unlink()
    for command in ("show", "verify"):
        assert run(command) == 1
        out, err = capsys.readouterr()
        assert "✓ pretrain/primer" in out and "sft/primer" not in out
        assert err.startswith("✗ sft/primer: data/cache/sft/primer is damaged or not finished: it has no meta.json; ")
    meta.write_text(was + " ")
    guard = meta.with_name("meta.json.sha256").read_text()
    assert run("verify") == 1
    err = capsys.readouterr().err
    assert f"meta.json.sha256 names {guard[:64]}; build it" in err and "  meta.json" not in err


def test_the_new_folder_of_a_killed_build_is_a_cache_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between the two renames of a swap it is what training reads."""
    assert run("build", "primer", "--phase", "sft") == 0
    primer = here / "data/cache/sft/primer"
    primer.with_name(".primer.old").mkdir()
    primer.rename(primer.with_name(".primer.new"))
    assert run("verify", "primer") == 0
    assert "✓ sft/primer: 6 files are as written" in capsys.readouterr().out


def test_a_character_that_cannot_be_printed_is_no_damage(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("build", "primer", "--phase", "sft") == 0
    capsys.readouterr()
    for encoding, errors in (("ascii", "surrogateescape"), ("latin-1", "strict")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors=errors))
        assert run("show") == 0
        assert b"\\u2713 sft/primer: " in written.getvalue() and b"\\u27e6" in written.getvalue()
    monkeypatch.setattr("rich.console.Console.print", lambda *_, **__: "\u2713".encode("ascii"))
    assert run("show") == 1
    assert capsys.readouterr().err.startswith("error: 'ascii' codec can't encode")


def test_the_quickstart_and_the_program_make_the_same_primer_caches(
    here: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    config = json.loads((here / "c.json").read_text())
    config["data"]["primer"] = {"val_frac": 0.02}
    (here / "c.json").write_text(json.dumps(config))
    assert run("build", "primer") == 0
    settings = validate_overrides(config)
    for build, phase in ((build_pretrain, "pretrain"), (build_sft, "sft")):  # as the quickstart calls them
        assert build(settings, tiny_tokenizer, "primer", root=here / "data/cache" / phase)["reused"]
    assert json.loads((here / "data/cache/sft/primer/meta.json").read_text())["val_frac"] == 0.02


def test_the_budgets_of_a_stream(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(settings: Settings) -> Iterator[Document]:
        return (Document(f"text {i} of a stream", "fineweb_edu") for i in range(10**9))

    for name in ("fineweb_edu", "other"):
        monkeypatch.setitem(SOURCES, name, Source(name, lambda *_: {"dataset_name": "made"}, stream=stream))
    flags = ["--fineweb-train-tokens", "3000", "--fineweb-val-tokens", "200"]
    assert run("build", "fineweb_edu", "other", *flags, "--train-tokens", "900", "--val-tokens", "50") == 0
    for name, train, val in (("fineweb_edu", 3000, 200), ("other", 900, 50)):
        meta = json.loads((here / f"data/cache/pretrain/{name}/meta.json").read_text())
        assert (meta["train_tokens"], meta["val_tokens"]) == (train, val)
        assert (meta["train_tokens_target"], meta["val_tokens_target"], meta["streaming"]) == (train, val, True)


def test_adding_a_file_says_what_was_reused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "text") == 0
    (here / "data/text/new.txt").write_text("a new one")
    capsys.readouterr()
    assert run("build", "text") == 0
    assert "reused 20 documents, tokenized 1" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("niels_gpt.cache.encode._batches", interrupt)
    assert run("build", "text") == 130
    assert "run the same command again to go on" in capsys.readouterr().err


def test_wrong_usage_and_wrong_files_end_without_a_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv in ([], ["build"], ["build", "primer", "--phase", "dpo"], ["nonsense"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
    for flag, number in (("--workers", "0"), ("--workers", "-1"), ("--workers", "two"), ("--tasks", "0")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run("build", "primer", flag, number)
        assert caught.value.code == 2
        assert f"argument {flag}: {number!r} must be a whole number, at least 1" in capsys.readouterr().err
    assert run("build", "primer", "--tokenizer", "none.model") == 1
    assert "error: there is no tokenizer model none.model" in capsys.readouterr().err
    (here / "c.json").write_text('{"data": 3}')
    assert run("build", "primer") == 1
    assert "error: " in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["cli", "build", "primer", "--config", "gone.json"])
    with pytest.raises(SystemExit) as caught, pytest.warns(RuntimeWarning):
        runpy.run_module("niels_gpt.cache.cli", run_name="__main__")
    assert caught.value.code == 1
