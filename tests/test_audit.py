"""The audit finds each planted violation where it is, and nothing in clean files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from niels_gpt import audit
from niels_gpt.special_tokens import EOT_TOKEN

ROOT = Path(__file__).resolve().parents[1]

CLEAN = '''
"""Mentions <|eot|> and temperature=0.7 in words only."""
import torch
LIMIT = 350
def f(temperature: float, top_k: int | None = None, *, dropout: float = LIMIT, x=0.5) -> int:
    B, T = f.shape
    T = x.shape[1]
    eps = config.eps
    amp = True
    torch.optim.AdamW(p, lr=cfg.base_lr, betas=(cfg.beta1, cfg.beta2))
    g(temperature=0.0, T=5)
    parser.add_argument("--top-k", default=None)
    parser.add_argument("--seed", default=42)
'''


def findings(source: str, file: str = "niels_gpt/x.py") -> list[str]:
    return [str(found) for found in audit.hardcoded(file, ast.parse(source))]


@pytest.mark.parametrize(
    ("source", "line", "name"),
    [
        ("x = 1\nbase_lr = 3e-4", 2, "base_lr"),
        ("T: int = 512", 1, "T"),
        ("B, T = 4, 32", 1, "T"),
        ("self.dropout = -0.1", 1, "dropout"),
        ("a = d_ff = 4 * 64", 1, "d_ff"),
        ("def f(x,\n      temperature=0.9): ...", 2, "temperature"),
        ("def f(*, top_k: int = 50): ...", 1, "top_k"),
        ("f = lambda eps=1e-8: eps", 1, "eps"),
        ("class C:\n    vocab_size: int = 256", 2, "vocab_size"),
        ("class C:\n    betas = (0.9, 0.95)", 2, "betas"),
        ("(H := 4)", 1, "H"),
        ("torch.optim.AdamW(p, lr=1e-3)", 1, "lr"),
        ("Adam(p, betas=(0.9, 0.99))", 1, "betas"),
        ("Muon(p,\n weight_decay=0.1)", 2, "weight_decay"),
        ("p.add_argument('--max-new-tokens', type=int, default=256)", 1, "--max-new-tokens"),
        ("p.add_argument('-v', '--vocab_size', default=16000)", 1, "--vocab_size"),
    ],
)
def test_a_hardcoded_number_is_found(source: str, line: int, name: str) -> None:
    found = findings(source)
    assert len(found) == 1 and found[0].startswith(f"niels_gpt/x.py:{line}: {name} is hardcoded as ")


@pytest.mark.parametrize("name", sorted(audit.HYPERPARAMETERS))
def test_every_listed_name_is_looked_for(name: str) -> None:
    assert len(findings(f"{name} = 1")) == 1


@pytest.mark.parametrize("source", ["x = {!r}", "f'{{y}}{}'", "g({!r})", "x = b'{}'", '"""Doc {}"""'])
def test_a_sentinel_literal_is_found(source: str) -> None:
    assert findings("\n" + source.format(EOT_TOKEN)) == [
        "niels_gpt/x.py:2: a sentinel literal; import it from niels_gpt.special_tokens"
    ]


def test_a_clean_file_passes() -> None:
    assert findings(CLEAN) == []


def test_only_the_homes_are_exempt() -> None:
    number, sentinel = "top_k = 50", f"x = {EOT_TOKEN!r}"
    assert (
        findings(number, "niels_gpt/settings/tree.py") == [] and findings(sentinel, "niels_gpt/special_tokens.py") == []
    )
    for file in ("niels_gpt/generate.py", "niels_gpt/tokenizer.py", "tools/x.py"):
        assert len(findings(f"{number}\n{sentinel}", file)) == 2
    assert len(findings(sentinel, "niels_gpt/settings/tree.py")) == 1


# the other way: knobs that nothing reads

GRAD_CLIP = next(knob for knob in audit.knobs() if knob.path == "training.sft.grad_clip")
SEED = next(knob for knob in audit.knobs() if knob.path == "training.sft.seed")
TYPE = next(knob for knob in audit.knobs() if knob.path == "tokenizer.type")
ROAM_FRACTION = next(knob for knob in audit.knobs() if knob.path == "data.roam.val_frac")


@pytest.mark.parametrize(
    ("knob", "source", "is_read"),
    [
        (GRAD_CLIP, "clip(job.train_cfg.grad_clip)", True),
        (GRAD_CLIP, "def f(phase: PhaseSettings): return phase.grad_clip", True),
        (GRAD_CLIP, "settings['training']['sft']['grad_clip']", True),
        (GRAD_CLIP, "settings.training.sft.grad_clip()", False),
        (GRAD_CLIP, "train_cfg.grad_clip = 3", False),
        (GRAD_CLIP, "train_cfg; grad_clip", False),
        (GRAD_CLIP, "self.options.grad_clip", True),
        (SEED, "job.train_cfg.seed", True),
        (SEED, "job.seed", False),
        (TYPE, "settings.tokenizer.type", True),
        (TYPE, "error.type", False),
        (ROAM_FRACTION, "chosen = settings.data.roam; chosen.val_frac", True),
        (ROAM_FRACTION, "chosen = settings.data.text; chosen.val_frac", False),
        (ROAM_FRACTION, "settings.data.roam.model_dump()", True),
    ],
)
def test_what_counts_as_reading(knob: audit.Knob, source: str, is_read: bool) -> None:
    assert audit.unread({"niels_gpt/x.py": ast.parse(source)}, [knob]) == ([] if is_read else [knob])


def test_validators_and_legacy_names_do_not_count_as_reading() -> None:
    validator = "class PhaseSettings(Section):\n  def v(self): return self.grad_clip, PhaseSettings"
    assert audit.unread({"niels_gpt/settings/tree.py": ast.parse(validator)}, [GRAD_CLIP])
    assert audit.unread({"niels_gpt/settings/legacy.py": ast.parse("training.grad_clip")}, [GRAD_CLIP])
    reader = "def resolve(training): return training.sft.grad_clip"
    assert not audit.unread({"niels_gpt/settings/tree.py": ast.parse(reader)}, [GRAD_CLIP])


def test_knobs_are_the_leaves_of_the_tree() -> None:
    knobs = {knob.path: knob.owner for knob in audit.knobs()}
    assert knobs["training.sft.base_lr"] == knobs["training.pretrain.base_lr"] == "PhaseSettings"
    assert knobs["data.wikitext.max_bytes"] == "LimitedSettings"
    assert "data" not in knobs and "data.mix_sft" in knobs


# the program


def project(tmp_path: Path, **sources: str) -> Path:
    for name, source in sources.items():
        path = tmp_path / "niels_gpt" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path


def test_the_program_reports_places_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = project(tmp_path, a="x = 1\ntop_k = 50", b=CLEAN, c="def (")
    assert audit.main(["--root", str(root)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "niels_gpt/a.py:2: top_k is hardcoded as 50; read it from settings"
    assert out[1].startswith("niels_gpt/c.py:1: is not valid Python") and len(out) == 2


def test_the_program_reports_unread_knobs_at_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = ROOT / "niels_gpt" / "settings" / "tree.py"
    root = project(tmp_path, **{"settings/tree": tree.read_text(encoding="utf-8")})
    assert audit.main(["--root", str(root)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "training.pretrain.grad_clip" in line)
    number = int(line.split(":")[1])
    declared = tree.read_text(encoding="utf-8").splitlines()[number - 1]
    assert line.endswith("is read nowhere; use or remove it") and declared.strip().startswith("grad_clip")


def test_awaited_names_exist() -> None:
    known = {knob.path for knob in audit.knobs()} | {knob.path.rpartition(".")[0] for knob in audit.knobs()}
    assert set(audit.AWAITED) <= known


def test_a_dumped_section_is_read() -> None:
    reader = {"niels_gpt/x.py": ast.parse("settings.benchmark.model_dump()")}
    assert not audit.unread(reader, [knob for knob in audit.knobs() if knob.section == "benchmark"])


def test_a_section_that_is_read_may_not_be_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = "class PhaseSettings(Section):\n    seed: int = 1"
    root = project(tmp_path, **{"settings/tree": knobs, "x": "settings.benchmark.model_dump()"})
    monkeypatch.setattr(audit, "AWAITED", ("benchmark", "data.oasst1"))
    said = [str(found) for found in audit.audit(root)[0] if "AWAITED" in found.message]
    assert said == ["niels_gpt/audit.py:1: AWAITED names benchmark, but all of it is read; remove it there"]


def test_the_program_counts_files_when_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--root", str(project(tmp_path, a=CLEAN, b=""))]) == 0
    assert capsys.readouterr().out == "OK 2 files scanned\n"
    (tmp_path / "empty").mkdir()
    assert audit.main(["--root", str(tmp_path / "empty")]) == 2


def test_the_tool_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    root = project(tmp_path, a=CLEAN)
    tool = [sys.executable, "tools/audit_config_coverage.py", "--root", str(root)]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "OK 1 files scanned\n")


def test_this_project_is_clean() -> None:
    found, _ = audit.audit(ROOT)
    assert not found, "\n".join(map(str, found))
