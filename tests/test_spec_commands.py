"""Every command of the specification (docs/spec.md) and of the README, run as it is written there.

One folder stands for a checkout and one for each story that must not mix with it. Their configs are the shipped ones
made small, a hub listens on loopback, and a few large numbers and names are replaced (`SMALLER`). All commands run in
one process, which saves importing the libraries for each. What cannot run here names its own test (`ELSEWHERE`).
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from niels_gpt import files
from niels_gpt.checkpoint import load_checkpoint
from tests.hub import samples
from tests.hub.server import LoopbackHub
from tests.hub.worker import ROOT, Worker

PIECES = 512
HUB_TOKENIZER = "--source primer --source wikitext"
SMALLER = {  # what is written -> what is run
    f"--source chitchat {HUB_TOKENIZER}": f"{HUB_TOKENIZER} --vocab_size {PIECES} --out_dir artifacts/tokenizer/hub",
    "--vocab_size 16384": "--vocab_size 400",
    "--vocab_size 16000": f"--vocab_size {PIECES}",
    "--vocab_size 8000": "--vocab_size 400",
    "bytes 20000000": "bytes 20000",
    "bytes=20000000": "bytes=20000",
    "tokens 200000000": "tokens 4000",
    "tokens 5000000": "tokens 600",
    "--source chitchat": "--source primer",  # twelve megabytes less to read
    "build chitchat primer": "build primer",
    "~/notes": "notes",
    "OWNER/NAME": "somebody/small",
    "--max-new-tokens 256": "--max-new-tokens 8",
    "best.pt --no-kv-cache": "best.pt --no-kv-cache --max-new-tokens 8",
}
UNTIL, UNTIL_S = "--until 07:00", 6  # is run until so many seconds from now
GGUF, ROUND_TRIP = (
    "test_gguf.py::test_all_types_of_a_new_model",
    "test_import.py::test_a_round_trip_gives_the_same_bits",
)
SWEEP = ("tests/test_bench_sweep_smoke.py::test_a_sweep_measures_and_writes_its_files", "tools/bench_sweep.py")
ELSEWHERE = {  # a beginning of commands -> what runs them: a test or a file, and a text in it
    "make quickstart": (".ci/run", "make quickstart"),
    "make test": (".ci/run", "make test"),
    "python3 -m venv .venv": ("Makefile", "-m venv $(VENV)"),
    "source .venv/bin/activate": (".ci/run", "source .venv/bin/activate"),
    "pip install": ("Makefile", 'pip install -c constraints.txt -e ".[dev]"'),
    "niels-gpt quickstart": ("tests/test_quickstart.py::first", '"quickstart", "--minutes"'),
    "tensorboard --logdir runs": ("tests/test_spec_commands.py::test_tensorboard_finds_the_runs", '"--logdir"'),
    "torchrun": ("tests/train/test_distributed.py::Job", 'torchrun("train.run"'),
    "niels-gpt export hf": (f"tests/export/{ROUND_TRIP}", '"export", "hf", "--ckpt"'),
    "niels-gpt export gguf": (f"tests/export/{GGUF}", '"export", "gguf", "--ckpt"'),
    "niels-gpt import hf": (f"tests/export/{ROUND_TRIP}", '"import", "hf"'),
    "niels-gpt cache build-all --fineweb-train-tokens": ("tests/hub/test_build_all.py::built", "*BUILD_ALL"),
    "niels-gpt cache build text --executor slurm": (
        "tests/cache/test_scale.py::test_what_is_submitted_to_slurm_makes_the_same_bytes",  # all but Slurm itself
        '"--executor", "slurm"',
    ),
    "python tools/bench_sweep.py": SWEEP,
    "niels-gpt bench": SWEEP,
    "niels-gpt plan": ("tests/plan/test_planning.py::test_the_command", '"plan", "--hours"'),
    "niels-gpt train --plan": ("tests/plan/test_running.py::carried_out", '"train", "--plan", "plan.json"'),
    "niels-gpt doctor": ("tests/doctor/test_cli.py::test_a_machine_that_works", "doctor(capsys, "),
    "python tools/audit_config_coverage.py": (
        "tests/test_audit.py::test_the_tool_runs_from_a_bare_checkout",
        "tools/audit_config_coverage.py",
    ),
    "python tools/bench_train.py": (
        "tests/tools/test_bench_train.py::test_the_program_times_what_is_there_and_names_what_is_not",
        "bench_train.main(",
    ),
    "python tools/bench_decode.py": (
        "tests/tools/test_bench_decode.py::test_the_candidates_take_turns",
        "bench_decode.main(",
    ),
    "python tools/bench_quality.py": (
        "tests/tools/test_bench_quality.py::test_both_systems_learn_under_one_clock",
        "bench(",
    ),
}
FOLDERS = {  # a pattern in a command -> the folder it runs in, where that is not `checkout`
    "offline|upload": "offline",  # what was trained on own notes is not published
    "byte.json": "bytes",
    "niels-gpt download": "again",
    "download": "fresh",
}
ORDER = (  # what comes first, by pattern; the rest in the order of the documents
    r"generate_primer|convert_primer",
    r"tokenizer",
    r"cache\.cli|niels-gpt (cache|notes)",
    r"pretrain_smoke",
    r"--phase pretrain",
    r"--phase",
)
EXPECTED = {  # a pattern in a command -> what it must say
    "build-all": r"\u2713 sft/primer",
    "build-sft-primer": r"\u2713 sft/primer",
    "--print_config": r'"total_steps": \d+',
    "--list-profiles": r"pretrain_smoke\n",
    "phase pipeline": r"sft init from checkpoints/pretrain/best\.pt",
    "resume checkpoints/latest.pt": r"resumed from checkpoints/latest\.pt",
    "--device cpu": r"using device: cpu",
    "tokenizer_report": r"\[combined\] tokens=\d+ chars=\d+ tokens/char=",
    "get_device": r"^(cpu|cuda|mps)\n",
    "smoke_loaders": r"gutenberg",
    "chat_cli.*latest": r"generation settings \(settings defaults \+ CLI overrides\):",
    "upload": r"uploading .*best\.pt",
    "download": r"talk to it: niels-gpt chat",
    "sample_": r"sha256",
    "collisions": r"no special token collisions detected\.",
    "dry-run": r"nothing was written; build the cache with",
    "cache verify": r"files are as written",
    "inspect": r"%",
    "--until": r"\[pretrain\] finished \d+ steps[\s\S]*\[sft\] finished \d+ steps",
}
RESUME_OF_SFT = "python -m train.run --phase pretrain --config configs/train.json --resume checkpoints/latest.pt"
TYPED = "what is your name?\n\nhow are you?\n/exit\n"


@dataclass(frozen=True)
class Ran:
    status: int
    said: str
    checkpoints: frozenset[str]  # what the folder held after it


def commands_of(document: str) -> list[str]:
    """The commands of a document: lines of its bash blocks, and code in the cells of tables, but for that of files."""
    text = (ROOT / document).read_text(encoding="utf-8").partition("\n## Map")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    starts = r"`((?:python3?|niels-gpt|torchrun|tensorboard|pip|make) [^`]+)`"
    rows = re.findall(r"^\| [a-z].* \| .* \|$", text, flags=re.MULTILINE)  # of the specification, they have numbers
    cells = [found for row in rows for found in re.findall(starts, row)]
    return list(dict.fromkeys(line for line in (*lines, *cells) if line and not line.startswith("#")))


SPECIFIED = commands_of("docs/spec.md")
DOCUMENTED = commands_of("README.md")
COMMANDS = list(dict.fromkeys((*SPECIFIED, *DOCUMENTED)))


def elsewhere(command: str) -> tuple[str, str] | None:
    return next((what for start, what in ELSEWHERE.items() if command.startswith(start)), None)


def source_of(place: str) -> str:
    """The text of a file, or of the function or class FILE::NAME in it; "" if there is none."""
    path, _, name = place.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    if not name:
        return text
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
    return ast.get_source_segment(text, nodes[0]) or "" if nodes else ""


HERE = [command for command in COMMANDS if elsewhere(command) is None]


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A shipped config with a model of two blocks, two steps and a primer instead of chitchat and Wikipedia."""
    if "pretrain_config_path" in config:
        return config
    data, phases = config.setdefault("data", {}), config.setdefault("training", {})
    offline = {"chitchat", "wiki_summaries"}
    for mix in ("mix_pretrain", "mix_sft"):
        if offline & data.get(mix, {}).keys():
            data[mix] = {"primer": 1.0}
    if data.get("val_pretrain_source") in offline:
        data["val_pretrain_source"] = "primer"
    for phase in ("pretrain", "sft"):
        small = {
            "total_steps": 2,
            "warmup_steps": 1,
            "eval_every": 1,
            "eval_steps": 1,
            "ckpt_every": 1,
            "minutes": None,
        }
        phases[phase] = {**phases.get(phase, {}), **small, "micro_B": 2, "accum_steps": 2, "log_every": 1}
    is_byte = config.get("tokenizer", {}).get("type") == "byte"
    shape = {"V": 256 if is_byte else PIECES, "T": 128, "C": 32, "L": 2, "H": 2, "d_ff": 64}
    config["model"] = {**config.get("model", {}), **shape}
    if not is_byte:
        config["tokenizer"] = {**config.get("tokenizer", {}), "vocab_size": PIECES}
    return config


def make_checkout(folder: Path) -> None:
    for name in ("tools", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("primer.txt", "primer.jsonl", "public_facts.json"):
        files.write_bytes(folder / "data" / name, (ROOT / "data" / name).read_bytes())
    for path in (ROOT / "configs").iterdir():
        if path.suffix == ".json":
            files.write_json(folder / "configs" / path.name, shrunk(files.read_json(path)))
        else:
            files.write_bytes(folder / "configs" / path.name, path.read_bytes())
    text = (ROOT / "data" / "primer.txt").read_text(encoding="utf-8")
    for i, topic in enumerate(("rivers", "engines", "bread", "clouds", "chess")):
        note = " ".join(f"{topic} {n} and what I read about {topic}." for n in range(60))
        files.write_text(folder / f"data/.roam-data/{topic}.md", f"# {topic}\n\n{i} {note}\n")
        files.write_text(folder / f"notes/{topic}.md", f"# {topic}\n\n{note}\n\n{text[4000 * i : 4000 * i + 4000]}\n")
    mine = shrunk({"data": {"jsonl": {"path": "data/primer.jsonl"}, "mix_sft": {"jsonl": 1.0}}})
    files.write_json(folder / "mine.json", mine)


def smaller(command: str) -> str:
    for written, run in SMALLER.items():
        command = command.replace(written, run)
    end = datetime.now() + timedelta(seconds=UNTIL_S)
    return command.replace(UNTIL, f"--until {end:%Y-%m-%dT%H:%M:%S} --no-resume")


def place(command: str) -> str:
    return next((folder for pattern, folder in FOLDERS.items() if re.search(pattern, command)), "checkout")


def rank(command: str) -> int:
    return next((i for i, pattern in enumerate(ORDER) if re.search(pattern, command)), len(ORDER))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Ran]]]:
    """The folders after all commands, and what became of each."""
    top = tmp_path_factory.mktemp("commands")
    for name in ("checkout", "offline", "bytes", "fresh", "again"):
        make_checkout(top / name)
    ran: dict[str, Ran] = {}
    with LoopbackHub() as hub:
        samples.publish_all(hub)
        worker = Worker(hub.url, top / "hf_home", offline=False)
        for command in (*sorted(HERE, key=rank), RESUME_OF_SFT):
            if "cache build primer --config configs/quickstart" in smaller(command) or "notes --dir" in command:
                shutil.copytree(
                    top / "checkout/artifacts/tokenizer/v2",
                    top / "checkout/artifacts/tokenizer/quickstart",
                    dirs_exist_ok=True,
                )
            line = smaller(command)
            status = worker.ask(
                do="command", line=line, cwd=str(top / place(command)), typed=TYPED, token="hf_right", forget=False
            )
            saved = top / place(command) / "checkpoints"
            names = frozenset(path.relative_to(saved).as_posix() for path in saved.rglob("*.pt"))
            ran[command] = Ran(status, worker.said, names)
        worker.close()
    yield top, ran


@pytest.mark.parametrize("command", HERE)
def test_it_runs(command: str, world: tuple[Path, dict[str, Ran]]) -> None:
    done = world[1][command]
    assert done.status == 0 and "Traceback" not in done.said, done.said[-3000:]
    assert not re.search(r"^error: ", done.said, flags=re.MULTILINE), done.said[-3000:]
    for pattern, expected in EXPECTED.items():
        if re.search(pattern, command):
            assert re.search(expected, done.said, flags=re.MULTILINE), done.said[-3000:]


def test_every_other_command_has_its_own_test() -> None:
    assert {start for command in COMMANDS for start in ELSEWHERE if command.startswith(start)} == set(ELSEWHERE)
    for place, text in ELSEWHERE.values():
        assert text in source_of(place), (place, text)
    long = {line for line in SPECIFIED if elsewhere(line)}
    assert {line.split()[1] for line in long} == {"tools/audit_config_coverage.py", "tools/bench_sweep.py"}
    assert len(SPECIFIED) >= 30 and len(DOCUMENTED) >= 40


def test_the_roots_latest_may_be_of_the_other_phase(world: tuple[Path, dict[str, Ran]]) -> None:
    done = world[1][RESUME_OF_SFT]
    assert done.status == 0 and "warning: this checkpoint was saved by phase sft, this run is pretrain" in done.said


def test_what_the_smoke_run_leaves(world: tuple[Path, dict[str, Ran]]) -> None:
    """It is the first run of its folder."""
    left = world[1]["python -m train.run --phase pretrain --config configs/pretrain_smoke.json --no-resume"].checkpoints
    assert {"latest.pt", "best.pt", *(f"pretrain/{name}.pt" for name in ("latest", "best", "step_0000002"))} <= left
    assert not any(name.startswith("sft/") for name in left)


def test_what_training_leaves(world: tuple[Path, dict[str, Ran]]) -> None:
    checkpoints = world[0] / "checkout" / "checkpoints"
    for phase in ("pretrain", "sft"):
        assert {"latest.pt", "best.pt", "step_0000002.pt"} <= {path.name for path in (checkpoints / phase).iterdir()}
    offline = world[0] / "offline" / "checkpoints"  # a pipeline and nothing after it
    assert files.sha256_file(offline / "best.pt") == files.sha256_file(offline / "sft" / "best.pt")
    assert files.sha256_file(offline / "best.pt") != files.sha256_file(offline / "pretrain" / "best.pt")
    published = load_checkpoint(world[0] / "fresh" / "checkpoints" / "best.pt", device="cpu")
    assert published["step"] > 0


def test_tensorboard_finds_the_runs(world: tuple[Path, dict[str, Ran]]) -> None:
    """The program itself, which then says what it found instead of serving it."""
    pytest.importorskip("tensorboard")
    done = subprocess.run(
        [sys.executable, "-m", "tensorboard.main", "--inspect", "--logdir", "runs"],
        cwd=world[0] / "checkout",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and "train/loss" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_plan_and_its_run(tmp_path: Path) -> None:
    """Measuring takes a minute, and training what was asked for."""
    for line in ("plan --hours 0.05 --device cpu --out plan.json", "train --plan plan.json"):
        done = subprocess.run(
            [sys.executable, "-m", "niels_gpt.cli", *line.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert load_checkpoint(tmp_path / "checkpoints/best.pt", device="cpu")["step"] > 0
