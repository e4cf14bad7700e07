"""The chat through `main`, with two tiny models that have learned three replies by heart (a second each)."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niels_gpt import chat as chat_module
from niels_gpt import chat_cli, paths
from niels_gpt.chat import Conversation, _stripped, answer_once, build_options, run_chat, system_prompt
from niels_gpt.chat_format import format_chat, render
from niels_gpt.checkpoint import LoadedModel, load_model, save_checkpoint
from niels_gpt.config import NEW, V1, Architecture, ModelConfig
from niels_gpt.data.types import Message
from niels_gpt.generate import Step
from niels_gpt.model.gpt import GPT
from niels_gpt.model.loss import IGNORED
from niels_gpt.settings import Settings
from niels_gpt.special_tokens import SPECIAL_TOKENS
from niels_gpt.tokenizer import ByteTokenizer, SentencePieceTokenizer

REPLIES = {"hi": "hello ✨ friend", "bye": "see you\nsoon", "say nothing": ""}
HEADER = "generation settings (settings defaults + CLI overrides):"


def learn(rows: Sequence[tuple[list[int], list[int]]], V: int, T: int, arch: Architecture) -> GPT:
    """A model that has learned rows of (ids, labels) by heart."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(V=V, T=T, C=48, L=1, H=4, d_ff=96, dropout=0.0, rope_theta=10000.0), arch)
    width = max(len(ids) for ids, _ in rows)
    x = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])[:, :-1]
    y = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(x, y) / (y != IGNORED).sum()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    return model.eval()


def write(path: Path, model: GPT, tokenizer: SentencePieceTokenizer | None = None) -> Path:
    save_checkpoint(
        path,
        model_cfg=model.cfg,
        train_cfg={},
        model=model,
        optimizer=None,
        step=100,
        best_val_loss=None,
        tokenizer_model=None if tokenizer is None else tokenizer.model_bytes,
    )
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: SentencePieceTokenizer) -> Path:
    """A subword model with its tokenizer inside."""
    rows = [
        render(tiny_tokenizer, [Message("user", asked), Message("assistant", said)]) for asked, said in REPLIES.items()
    ]
    return write(tmp_path_factory.mktemp("chat") / "sub.pt", learn(rows, 512, 64, NEW), tiny_tokenizer)


@pytest.fixture(scope="module")
def byte_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model of the first generation, which goes on as the user after each reply."""
    rows = []
    for asked, said in REPLIES.items():
        prompt = ByteTokenizer().encode(format_chat([Message("user", asked)]))
        reply = ByteTokenizer().encode(f"{said}\nuser: ")
        rows.append((prompt + reply, [IGNORED] * len(prompt) + reply))
    return write(tmp_path_factory.mktemp("chat") / "byte.pt", learn(rows, 256, 64, V1))


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, *flags: str
) -> tuple[int, str, str]:
    """Run `main` with `typed` on stdin; returns (status, stdout after the settings block, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    status = chat_cli.main(["--system", "", "--temperature", "0", "--device", "cpu", *flags])
    out, err = capsys.readouterr()
    return status, out.partition("\n}\n")[2] if out.startswith(HEADER) else out, err


@pytest.fixture(params=["subword", "byte"])
def either(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("checkpoint" if request.param == "subword" else "byte_checkpoint"))


class TestInteractive:
    def test_replies_of_both_generations(
        self, either: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = chat(monkeypatch, capsys, "hi\n\n  \n/reset\nbye\n/exit\nhi\n", "--ckpt", either)
        assert (status, err) == (0, "")
        assert out == "> hello ✨ friend\n> > > > see you\nsoon\n> "

    def test_the_cache_changes_nothing(
        self, either: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for sampling in ((), ("--temperature", "1.5", "--seed", "3")):
            flags = ("--ckpt", either, *sampling, "--max-new-tokens", "20")
            assert chat(monkeypatch, capsys, "hi\n", *flags) == chat(
                monkeypatch, capsys, "hi\n", *flags, "--no-kv-cache"
            )

    def test_the_seed_decides_what_is_sampled(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--ckpt", str(checkpoint), "--temperature", "9", "--max-new-tokens", "20", "--seed")
        one, again, other = (chat(monkeypatch, capsys, "hi\n", *flags, seed) for seed in ("1", "1", "2"))
        assert one == again != other

    def test_the_end_of_input_leaves(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert chat(monkeypatch, capsys, "", "--ckpt", str(checkpoint)) == (0, "> \n", "")

    def test_help_and_an_empty_reply(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = chat(monkeypatch, capsys, "/help\nsay nothing\n", "--ckpt", str(checkpoint))
        assert status == 0 and all(command in out for command in ("/exit", "/reset", "/help"))
        assert err == "(no reply)\n"

    def test_a_line_that_does_not_fit_is_refused_and_the_chat_goes_on(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = chat(monkeypatch, capsys, "xyz" * 99 + "\nhi\n", "--ckpt", str(checkpoint))
        assert status == 0 and "hello ✨ friend" in out
        assert err.startswith("Error: prompt length ") and "exceeds model capacity 64" in err

    def test_sentinels_in_the_users_text_are_only_text(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hot = ("--temperature", "5", "--top-k", "0", "--max-new-tokens", "40")
        for seed in range(5):
            _, out, _ = chat(monkeypatch, capsys, "hi\nhi\n", "--ckpt", str(checkpoint), *hot, "--seed", str(seed))
            assert "<|ngpt_" not in out
        loaded = load_model(checkpoint, device="cpu")
        prompt = loaded.chat_format.encode_prompt(
            [Message("user", SPECIAL_TOKENS["asst"])], context=999, max_new_tokens=1
        )
        assert prompt.ids.count(loaded.tokenizer.special_token_ids()["asst"]) == 1

    def test_the_settings_block_is_json_with_the_overrides(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("/exit\n"))
        assert chat_cli.main(["--ckpt", str(checkpoint), "--top-k", "7", "--system", "be kind", "--no-kv-cache"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(HEADER + "\n{")
        shown = json.loads(out[len(HEADER) : out.index("\n}\n") + 2])
        wanted = {"temperature": 0.9, "top_k": 7, "top_p": None, "max_new_tokens": 256, "seed": 42}
        assert shown.items() >= (wanted | {"system": "be kind", "use_cache": False, "step": 100}).items()


class TestOneShot:
    def test_one_question_prints_the_reply_alone(
        self, either: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = chat(monkeypatch, capsys, "", "--ckpt", either, "--prompt", "hi")
        assert (status, out) == (0, "hello ✨ friend\n")
        assert err.startswith(HEADER)

    def test_several_questions_are_independent(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--ckpt", str(checkpoint), "--temperature", "2", "--prompt", "hi", "--prompt", "bye")
        _, both, _ = chat(monkeypatch, capsys, "", *flags)
        _, one, _ = chat(monkeypatch, capsys, "", *flags[:-2])
        _, other, _ = chat(monkeypatch, capsys, "", *flags[:4], "--prompt", "bye")
        assert both == f"> hi\n{one}> bye\n{other}"


class TestErrors:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--temperature", "-1"], "temperature"),
            (["--temperature", "nan"], "temperature"),
            (["--top-p", "1.5"], "top_p"),
            (["--top-k", "-2"], "top_k"),
            (["--max-new-tokens", "0"], "max_new_tokens"),
            (["--seed", "-1"], "seed"),
            (["--prompt", " "], "--prompt"),
            (["--device", "tpu"], "device"),
        ],
    )
    def test_bad_values_are_one_line_and_status_2(
        self, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert chat_cli.main(["--ckpt", "nowhere.pt", *flags]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err

    def test_missing_and_damaged_files_are_one_line_and_status_1(
        self, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        damaged = tmp_path / "cut.pt"
        damaged.write_bytes(checkpoint.read_bytes()[:5000])
        for flags in (
            ["--ckpt", str(tmp_path / "none.pt")],
            ["--ckpt", str(damaged)],
            ["--ckpt", str(tmp_path)],
            ["--ckpt", str(checkpoint), "--tokenizer", str(tmp_path / "none.model")],
            ["--ckpt", str(checkpoint), "--system-file", str(tmp_path / "none.txt")],
        ):
            assert chat_cli.main(flags) == 1, flags
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1, flags


class TestSystemPrompt:
    def test_file_then_text_then_configs_here_then_shipped_then_built_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = tmp_path / "mine.txt"
        file.write_text("from a file\n", encoding="utf-8")
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs/system_surly.txt").write_text("from here\n", encoding="utf-8")
        assert system_prompt(str(file), "given") == "from a file"
        assert system_prompt(None, "given") == "given"
        assert system_prompt(None, "") == ""
        assert system_prompt() == "from here"
        (tmp_path / "configs/system_surly.txt").unlink()
        assert system_prompt() == paths.shipped("configs/system_surly.txt").read_text(encoding="utf-8").strip()
        monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path)
        assert system_prompt() == chat_module.BUILT_IN_SYSTEM
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="not UTF-8"):
            system_prompt(str(file))

    def test_it_opens_every_prompt(self, checkpoint: Path) -> None:
        loaded = load_model(checkpoint, device="cpu")
        conversation = Conversation(loaded, build_options(None, "be kind", temperature=0))
        list(conversation.reply("hi"))
        assert conversation.messages[:2] == [Message("system", "be kind"), Message("user", "hi")]
        conversation.reset()
        assert conversation.messages == [Message("system", "be kind")]


class TestConversation:
    @pytest.fixture
    def loaded(self, checkpoint: Path) -> LoadedModel:
        return load_model(checkpoint, device="cpu")

    def test_turns_are_remembered_and_an_empty_reply_is_not(self, loaded: LoadedModel) -> None:
        conversation = Conversation(loaded, build_options(None, "", temperature=0))
        assert "".join(conversation.reply("hi")) == REPLIES["hi"]
        assert conversation.messages == [Message("user", "hi"), Message("assistant", REPLIES["hi"])]
        conversation.reset()
        assert list(conversation.reply("say nothing")) == [] and conversation.messages == []

    @pytest.mark.parametrize(
        ("overrides", "stops", "bans"),
        [
            (None, {"eot"}, {"sys", "usr", "asst"}),
            ({"sft_format": {"ban_role_tokens_during_generation": False}}, {"sys", "usr", "asst", "eot"}, set()),
            ({"generation": {"stop_token_id": 5, "banned_token_ids": [6]}}, {"asst"}, {"eot"}),
        ],
    )
    def test_what_ends_a_reply_and_what_is_never_sampled(
        self,
        overrides: dict[str, object] | None,
        stops: set[str],
        bans: set[str],
        loaded: LoadedModel,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        ids = loaded.tokenizer.special_token_ids()
        passed: dict[str, Any] = {}

        def spy(*_: object, **options: object) -> Iterator[Step]:
            passed.update(options)
            return iter(())

        monkeypatch.setattr(chat_module, "stream_steps", spy)
        loaded = replace(loaded, settings=None if overrides is None else Settings.model_validate(overrides))
        assert list(Conversation(loaded, build_options(loaded.settings, "")).reply("hi")) == []
        assert passed["stop_ids"] == {ids[name] for name in stops}
        assert set(passed["banned_ids"]) == {ids[name] for name in bans}

    @given(st.lists(st.text(alphabet=" \n\tab", max_size=4), max_size=8))
    def test_blanks_around_a_reply_are_not_shown(self, pieces: list[str]) -> None:
        assert "".join(_stripped(iter(pieces))) == "".join(pieces).strip()

    def test_dropped_turns_are_told_when_their_number_grows(
        self, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
    ) -> None:
        conversation = Conversation(loaded, build_options(None, "", temperature=0))
        conversation.messages = [Message("user", "hi"), Message("assistant", REPLIES["hi"])] * 8
        list(conversation.reply("hi"))
        told = capsys.readouterr().err
        assert "oldest messages no longer fit the context of 64 tokens" in told and told.count("\n") == 1
        conversation.messages = conversation.messages[:16]
        list(conversation.reply("hi"))
        assert capsys.readouterr().err == ""

    def test_a_reply_that_fills_the_context_is_told_and_one_cut_by_the_user_is_not(
        self, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
    ) -> None:
        endless = {"generation": {"banned_token_ids": sorted(loaded.chat_format.stop_ids)}}
        loaded = replace(loaded, settings=Settings.model_validate(endless))
        for overrides, told in (({}, True), ({"max_new_tokens": 9}, False), ({"use_cache": False}, False)):
            answer_once(loaded, build_options(loaded.settings, "", **overrides), ["hi"])
            assert ("context is full" in capsys.readouterr().err) is told

    def test_an_interrupted_reply_is_remembered_as_far_as_it_went(self, loaded: LoadedModel) -> None:
        conversation = Conversation(loaded, build_options(None, "", temperature=0))
        reply = conversation.reply("hi")
        begun = next(reply) + next(reply)
        reply.close()
        assert 0 < len(begun) < len(REPLIES["hi"])
        assert conversation.messages == [Message("user", "hi"), Message("assistant", begun)]

    def test_ctrl_c_stops_a_reply_quietly_and_leaves_at_the_prompt(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = ["hi", "/reset", "bye"]

        def read() -> str:
            if not lines:
                raise KeyboardInterrupt
            return lines.pop(0)

        monkeypatch.setattr(chat_module, "_line_reader", lambda: read)
        whole = Conversation.reply

        def interrupted(self: Conversation, text: str):  # type: ignore[no-untyped-def]
            for piece in whole(self, text):
                yield piece
                if text == "hi":
                    raise KeyboardInterrupt

        monkeypatch.setattr(Conversation, "reply", interrupted)
        assert run_chat(loaded, build_options(None, "", temperature=0)) == 0
        out, err = capsys.readouterr()
        first = out.partition("\n")[0]
        assert REPLIES["hi"].startswith(first) and first != REPLIES["hi"] and err == ""
        assert out.endswith(f"\n{REPLIES['bye']}\n\n")

    def test_speed_is_shown_and_controls_are_hidden_on_a_terminal_only(
        self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(Conversation, "reply", lambda self, text: (piece for piece in ("a\x1b[2J", "\x9bb\n\tc")))
        answer_once(loaded, build_options(None, ""), ["hi"])
        assert capsys.readouterr().out == "a\x1b[2J\x9bb\n\tc\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        answer_once(loaded, build_options(None, ""), ["hi"])
        shown, speed = capsys.readouterr().out.rsplit("\n", 2)[:2]
        assert shown == "a\ufffd[2J\ufffdb\n\tc" and speed.endswith("tokens/s]")


class TestProcess:
    @staticmethod
    def command(checkpoint: Path, *flags: str) -> list[str]:
        return [sys.executable, "-m", "niels_gpt.chat_cli", "--ckpt", str(checkpoint), "--temperature", "0", *flags]

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(paths.PROJECT_ROOT), "PYTHONIOENCODING": "utf-8"}

    def test_piped_lines_get_replies(self, checkpoint: Path, tmp_path: Path) -> None:
        done = subprocess.run(
            self.command(checkpoint, "--system", ""),
            input=b"hi\n/reset\nbye\xff\n/exit\n",
            capture_output=True,
            cwd=tmp_path,
            env=self.environment(),
        )
        assert done.returncode == 0 and done.stderr == b""
        out = done.stdout.decode()
        assert out.startswith(HEADER) and "\n> hello ✨ friend\n> > " in out

    def test_a_reader_that_leaves_is_no_error(self, checkpoint: Path, tmp_path: Path) -> None:
        with subprocess.Popen(
            self.command(checkpoint, "--system", "", *["--prompt", "hi"] * 3),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=self.environment(),
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            err = process.stderr.read().decode()
        assert process.returncode == 0
        assert err.startswith(HEADER) and err.endswith("\n}\n")
