"""The wheel: what is in it, and that an installation of it works far from any checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import niels_gpt
from niels_gpt.paths import PROJECT_ROOT as ROOT

SOURCES = ("niels_gpt", "train", "scripts", "configs")
SINGLE = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
PLACES = """
import json, sys
from niels_gpt import cli, paths
from niels_gpt.chat import system_prompt
from niels_gpt.quickstart import make_plan
from niels_gpt.recall import held_out_questions
from niels_gpt.settings import resolve_settings
from niels_gpt.data.registry import get_source
from niels_gpt.plan.law import shipped_law
from niels_gpt.streams import StreamBuildConfig, build_sources
from niels_gpt.train.pipeline import pipeline_configs
from niels_gpt.train.run import profiles

settings = make_plan(5, 42).settings
train, _ = build_sources(StreamBuildConfig(enabled_sources=("primer",), required_sources=("primer",)))
print(json.dumps({
    "root": str(paths.PROJECT_ROOT),
    "profiles": profiles(),
    "pipeline": [str(path) for path in pipeline_configs("configs/pipeline.json")],
    "V of byte.json": resolve_settings("pretrain", "configs/byte.json").model_cfg.V,
    "system": system_prompt(),
    "texts": sum(1 for _ in get_source("primer").documents(settings, "train")),
    "chats": sum(1 for _ in get_source("primer").chats(settings, "train")),
    "stream": len(train["primer"]),
    "law": type(shipped_law()).__name__,
    "held out": len(held_out_questions(paths.shipped("data/primer_heldout.jsonl"))),
}))
chat = ["chat", "--ckpt", sys.argv[1], "--temperature", "0", "--system", "", "--prompt", "hi"]
sys.exit(cli.main(chat))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip does it, of a copy: building in the checkout would leave files there, or take old ones along."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SINGLE:
        shutil.copy(ROOT / name, folder / "source" / name)
    # what a working copy may hold beside the shipped data must stay out
    (folder / "source/data/cache").mkdir(parents=True)
    for path in (*(ROOT / "data").glob("p*.*"), ROOT / "data" / "primer.txt"):
        shutil.copy(path, folder / "source" / "data" / path.name)
    for name in ("diary.txt", "primer.generated.txt", "cache/shard.bin"):
        (folder / "source/data" / name).write_text("private")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_module_and_all_data_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"niels_gpt-{niels_gpt.__version__}.dist-info/METADATA").decode()
        entry_points = archive.read(f"niels_gpt-{niels_gpt.__version__}.dist-info/entry_points.txt").decode()
    suffixes = {".py", ".cpp", ".h", ".json"}
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in ("niels_gpt", "train", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    }
    configs = {f"niels_gpt/shipped/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    data = {"primer.txt", "primer.jsonl", "primer_heldout.jsonl", "public_facts.json"}
    assert names == modules | configs | {f"niels_gpt/shipped/data/{name}" for name in data}
    assert "niels-gpt = niels_gpt.cli:main" in entry_points
    assert "Requires-Python: >=3.11" in metadata and "License-Expression: MIT" in metadata
    assert f"\nVersion: {niels_gpt.__version__}\n" in metadata


def test_an_installation_finds_its_files_and_chats(unpacked: Path, tmp_path: Path, chat_checkpoint: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", PLACES, str(chat_checkpoint)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shipped = unpacked / "niels_gpt" / "shipped"
    places, reply, rest = done.stdout.partition("hello \u2728 friend\n")
    assert reply and not rest
    said = json.loads(places)
    assert said["root"] == str(shipped)
    assert said["profiles"] == sorted(path.stem for path in (ROOT / "configs").glob("*.json"))
    assert said["pipeline"] == [str(shipped / "configs/pretrain.json"), str(shipped / "configs/sft.json")]
    assert said["V of byte.json"] == 256 and said["law"] == "Law"
    assert said["system"] == (ROOT / "configs/system_surly.txt").read_text(encoding="utf-8").strip()
    assert said["texts"] > 1000 and said["chats"] > 1000 and said["stream"] > 100_000 and said["held out"] == 60


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_pip_installs_a_quickstart(wheel: Path, tmp_path: Path) -> None:
    """A new environment with the wheel in it (and, for want of a network, this one's libraries)."""
    venv.create(tmp_path / "env", with_pip=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    work = tmp_path / "work"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [tmp_path / "env/bin" / program, *arguments]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("pip", "install", "--no-deps", "--no-index", str(wheel))
    assert str(site) in run("python", "-c", "import niels_gpt; print(niels_gpt.__file__)")
    assert "primer recall" in run("niels-gpt", "quickstart", "--minutes", "0.1", "--no-chat")
    ask = ("--ckpt", "checkpoints/best.pt", "--temperature", "0", "--prompt", "what is your name?")
    assert run("niels-gpt", "chat", *ask).strip()
    for kind in ("hf", "gguf"):
        run("niels-gpt", "export", kind, "--ckpt", "checkpoints/best.pt", "--out", kind)
        assert any((work / kind).iterdir())
    assert "niels-gpt train --plan plan.json" in run("niels-gpt", "plan", "--hours", "0.05", "--out", "plan.json")
