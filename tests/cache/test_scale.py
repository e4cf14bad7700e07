"""The build as a datatrove pipeline: the same bytes as the plain build, from several tasks."""

from __future__ import annotations

import builtins
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from niels_gpt.cache import cli, scale
from niels_gpt.cache.pretrain import build_pretrain
from niels_gpt.cache.scale import Where, build_scaled
from niels_gpt.data.registry import SOURCES, Source
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings, validate_overrides
from niels_gpt.tokenizer import SentencePieceTokenizer
from tests.cache.samples import write_notes
from tests.cache.test_resume import contents

pytest.importorskip("datatrove", reason="the extra scale is not installed")


def settings_for(tmp_path: Path) -> Settings:
    text = {"root_dir": str(write_notes(tmp_path / "text", 200))}
    return validate_overrides({"data": {"text": text, "caches": {"shard_bytes": 5000}}})


def test_tasks_make_the_bytes_of_the_plain_build(tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer) -> None:
    settings = settings_for(tmp_path)
    plain = build_pretrain(settings, tiny_tokenizer, "text", root=tmp_path / "plain")
    scaled = build_scaled(settings, tiny_tokenizer, "text", root=tmp_path / "scaled", where=Where("local", 2))
    assert scaled == plain
    assert contents(tmp_path / "scaled") == contents(tmp_path / "plain")


def inline(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """One process for all tasks, so that what is patched here holds in them."""
    from datatrove.executor import LocalPipelineExecutor

    real = LocalPipelineExecutor.__init__
    monkeypatch.setattr(
        LocalPipelineExecutor, "__init__", lambda self, *a, **options: real(self, *a, **{**options, "workers": 1})
    )
    monkeypatch.setattr(scale, "CHUNK_DOCUMENTS", chunk)


@pytest.mark.parametrize("stream", [False, True])
def test_many_chunks_and_a_killed_task(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    inline(monkeypatch, 7)
    settings, name, budgets = settings_for(tmp_path), "text", {}
    if stream:
        name, budgets = "made", {"train_tokens": 3000, "val_tokens": 500}

        def texts(settings: Settings) -> Iterator[Document]:
            return (Document(f"text {i} " * (i % 9), name) for i in range(10**6))

        monkeypatch.setitem(SOURCES, name, Source(name, lambda *_: {}, stream=texts))
        settings = validate_overrides({"reproducibility": {"dataset_shuffle_buffer_size": 40}})
    build_pretrain(settings, tiny_tokenizer, name, root=tmp_path / "plain", **budgets)
    options: dict[str, Any] = {"root": tmp_path / "scaled", "where": Where("local", 3), **budgets}
    real, made = scale._encode, 0

    def stop(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made == 5:
            raise KeyError("as if it were killed")
        return real(*args)

    monkeypatch.setattr(scale, "_encode", stop)
    with pytest.raises(RuntimeError, match="a task failed: 'as if it were killed'; the logs are in"):
        build_scaled(settings, tiny_tokenizer, name, **options)
    build_scaled(settings, tiny_tokenizer, name, **options)
    assert contents(tmp_path / "scaled") == contents(tmp_path / "plain")


SBATCH = """#!/bin/sh
n=$(ls "$SUBMITTED" | wc -l)
for script; do :; done
{ echo "# $*"; cat "$script"; } > "$SUBMITTED/$n"
echo "Submitted batch job $((100 + n))"
"""


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for two programs of Slurm; returns the folder of the jobs that were submitted."""
    for name, text in (("sbatch", SBATCH), ("scontrol", "#!/bin/sh\necho localhost\n")):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    jobs = folder / "jobs"
    jobs.mkdir()
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SUBMITTED", str(jobs))
    return jobs


def run_array(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Slurm does with a job: its program once for each number of its array, here in this process."""
    import dill

    (last,), (pickled,) = (re.findall(p, script) for p in (r"--array=0-(\d+)\n", r"launch_pickled_pipeline (\S+)"))
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    before = signal.getsignal(signal.SIGUSR1)
    for number in range(int(last) + 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        with open(pickled, "rb") as file:
            dill.load(file).run()
    signal.signal(signal.SIGUSR1, before)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")


def test_what_is_submitted_to_slurm_makes_the_same_bytes(
    tmp_path: Path,
    tiny_tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but Slurm itself: what it is told, and what the jobs that it would start do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scale, "CHUNK_DOCUMENTS", 20)
    write_notes(tmp_path / "text", 100)
    build = ["build", "text", "--text-dir", "text", "--tokenizer", str(tiny_tokenizer.model_path)]
    slurm = [*build, "--executor", "slurm", "--tasks", "3", "--partition", "big", "--time-limit", "01:30:00"]
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setenv("PATH", str(tmp_path))
        assert cli.main(slurm) == 1
    assert "there is no Slurm here" in capsys.readouterr().err
    jobs = programs(tmp_path, monkeypatch)
    assert cli.main(slurm) == 0
    assert "pretrain/text: its tasks are queued" in capsys.readouterr().out
    encode, _, write, _ = (path.read_text() for path in sorted(jobs.iterdir()))  # a summary of their logs after each
    assert all(f"#SBATCH --{line}\n" in encode for line in ("partition=big", "time=01:30:00", "array=0-2"))
    assert f"source {sys.prefix}/bin/activate\n" in encode or sys.prefix == sys.base_prefix
    assert "--dependency=afterok:100" in write.splitlines()[0] and "--array=0-0\n" in write
    assert not Path("data/cache/pretrain/text").exists()
    run_array(encode, monkeypatch)
    run_array(write, monkeypatch)
    assert cli.main([*build, "--cache-dir", "plain"]) == 0
    assert contents(Path("data/cache/pretrain/text")) == contents(Path("plain/pretrain/text"))


def test_the_command_and_its_errors(
    tmp_path: Path,
    tiny_tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inline(monkeypatch, 50)
    monkeypatch.chdir(tmp_path)
    write_notes(tmp_path / "text", 30)
    argv = ["build", "text", "--text-dir", "text", "--tokenizer", str(tiny_tokenizer.model_path), "--executor", "local"]
    assert cli.main([*argv, "--tasks", "2"]) == 0
    assert "✓ pretrain/text: " in capsys.readouterr().out
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("datatrove"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main([*argv, "--seed", "3"]) == 1
    assert 'needs datatrove; install it with: pip install "niels-gpt[scale]"' in capsys.readouterr().err
