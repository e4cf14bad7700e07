"""The chat through `main`, with two tiny models that have learned three replies by heart (a second each)."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from niels_gpt import chat_cli, paths
from niels_gpt.checkpoint import load_model
from niels_gpt.data.types import Message
from niels_gpt.special_tokens import SPECIAL_TOKENS

HEADER = "generation settings (settings defaults + CLI overrides):"


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
    return str(request.getfixturevalue("chat_checkpoint" if request.param == "subword" else "byte_chat_checkpoint"))


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
        self, chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--ckpt", str(chat_checkpoint), "--temperature", "9", "--max-new-tokens", "20", "--seed")
        one, again, other = (chat(monkeypatch, capsys, "hi\n", *flags, seed) for seed in ("1", "1", "2"))
        assert one == again != other

    def test_the_end_of_input_leaves(
        self, chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert chat(monkeypatch, capsys, "", "--ckpt", str(chat_checkpoint)) == (0, "> \n", "")

    def test_help_and_an_empty_reply(
        self, chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = chat(monkeypatch, capsys, "/help\nsay nothing\n", "--ckpt", str(chat_checkpoint))
        assert status == 0 and all(command in out for command in ("/exit", "/reset", "/help"))
        assert err == "(no reply)\n"

    def test_a_line_that_does_not_fit_is_refused_and_the_chat_goes_on(
        self, chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = chat(monkeypatch, capsys, "xyz" * 99 + "\nhi\n", "--ckpt", str(chat_checkpoint))
        assert status == 0 and "hello ✨ friend" in out
        assert err.startswith("Error: prompt length ") and "exceeds model capacity 64" in err

    def test_sentinels_in_the_users_text_are_only_text(
        self, chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hot = ("--temperature", "5", "--top-k", "0", "--max-new-tokens", "40")
        for seed in range(5):
            _, out, _ = chat(monkeypatch, capsys, "hi\nhi\n", "--ckpt", str(chat_checkpoint), *hot, "--seed", str(seed))
            assert "<|ngpt_" not in out
        loaded = load_model(chat_checkpoint, device="cpu")
        prompt = loaded.chat_format.encode_prompt(
            [Message("user", SPECIAL_TOKENS["asst"])], context=999, max_new_tokens=1
        )
        assert prompt.ids.count(loaded.tokenizer.special_token_ids()["asst"]) == 1

    def test_the_settings_block_is_json_with_the_overrides(
        self, chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("/exit\n"))
        assert (
            chat_cli.main(["--ckpt", str(chat_checkpoint), "--top-k", "7", "--system", "be kind", "--no-kv-cache"]) == 0
        )
        out = capsys.readouterr().out
        assert out.startswith(HEADER + "\n{")
        shown = json.loads(out[len(HEADER) : out.index("\n}\n") + 2])
        wanted = {"temperature": 0.9, "top_k": 7, "top_p": None, "max_new_tokens": 256, "seed": 42}
        assert shown.items() >= (wanted | {"system": "be kind", "use_cache": False, "step": 100}).items()

    def test_a_system_prompt_of_the_command_line_holds_for_a_loaded_conversation(
        self, chat_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
        flags = ("--ckpt", str(chat_checkpoint), "--load", str(tmp_path / "a.jsonl"))
        assert "[system prompt: be kind]" in chat(monkeypatch, capsys, "/system\n", *flags, "--system", "be kind")[1]
        monkeypatch.setattr(sys, "stdin", io.StringIO("/system\n"))
        assert chat_cli.main(list(flags)) == 0 and "[system prompt: none]" in capsys.readouterr().out


class TestOneShot:
    def test_one_question_prints_the_reply_alone(
        self, either: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, out, err = chat(monkeypatch, capsys, "", "--ckpt", either, "--prompt", "hi")
        assert (status, out) == (0, "hello ✨ friend\n")
        assert err.startswith(HEADER)

    def test_several_questions_are_independent(
        self, chat_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--ckpt", str(chat_checkpoint), "--temperature", "2", "--prompt", "hi", "--prompt", "bye")
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
        self, tmp_path: Path, chat_checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        damaged = tmp_path / "cut.pt"
        damaged.write_bytes(chat_checkpoint.read_bytes()[:5000])
        for flags in (
            ["--ckpt", str(tmp_path / "none.pt")],
            ["--ckpt", str(damaged)],
            ["--ckpt", str(tmp_path)],
            ["--ckpt", str(chat_checkpoint), "--tokenizer", str(tmp_path / "none.model")],
            ["--ckpt", str(chat_checkpoint), "--system-file", str(tmp_path / "none.txt")],
        ):
            assert chat_cli.main(flags) == 1, flags
            out, err = capsys.readouterr()
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1, flags


class TestProcess:
    @staticmethod
    def command(chat_checkpoint: Path, *flags: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "niels_gpt.chat_cli",
            "--ckpt",
            str(chat_checkpoint),
            "--temperature",
            "0",
            *flags,
        ]

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(paths.PROJECT_ROOT), "PYTHONIOENCODING": "utf-8"}

    def test_piped_lines_get_replies(self, chat_checkpoint: Path, tmp_path: Path) -> None:
        done = subprocess.run(
            self.command(chat_checkpoint, "--system", ""),
            input=b"hi\n/reset\nbye\xff\n/exit\n",
            capture_output=True,
            cwd=tmp_path,
            env=self.environment(),
        )
        assert done.returncode == 0 and done.stderr == b""
        out = done.stdout.decode()
        assert out.startswith(HEADER) and "\n> hello ✨ friend\n> > " in out

    def test_a_reader_that_leaves_is_no_error(self, chat_checkpoint: Path, tmp_path: Path) -> None:
        with subprocess.Popen(
            self.command(chat_checkpoint, "--system", "", *["--prompt", "hi"] * 3),
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


@pytest.mark.parametrize(("stream", "flags"), [("stdin", ["--system", ""]), ("stdout", ["--prompt", "hi"])])
def test_a_stdin_or_stdout_that_is_closed_is_an_empty_one(
    chat_checkpoint: Path,
    stream: str,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, stream, None)  # as Python has it after `<&-` or `>&-`
    assert chat_cli.main(["--ckpt", str(chat_checkpoint), "--max-new-tokens", "4", *flags]) == 0
    getattr(sys, stream).close()
    out, err = capsys.readouterr()
    assert (out if stream == "stdin" else err).startswith(HEADER)
