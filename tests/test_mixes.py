"""What a byte model reads: its streams in the place of token caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from niels_gpt.data.registry import get_source
from niels_gpt.data.types import SPLITS
from niels_gpt.mixes import open_mixes
from niels_gpt.settings import validate_overrides
from niels_gpt.tokenizer import ByteTokenizer


def test_notes_are_learned_from_through_the_gate_of_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleaned, masked, without repeats, split in groups, by the settings of roam: what a token model reads of them."""
    monkeypatch.chdir(tmp_path)
    Path("notes/deeper").mkdir(parents=True)
    for i in range(12):
        Path(f"notes/n{i:02}.md").write_text(f"# note {i}\n{f'text{i} ' * 150}")
    shared = "a passage of more than fifty bytes that three of the notes have in common"
    for i in range(3):
        Path(f"notes/deeper/shared{i}.md").write_text(f"{shared}\n{f'own{i} ' * 200}")
    Path("notes/again.md").write_bytes(Path("notes/n00.md").read_bytes())
    Path("notes/linked.md").write_text("See [[n00|the first]] or mail someone@example.org. " + "linked " * 90)
    Path("notes/other.txt").write_text("unwanted " * 90)
    roam = {"root_dir": "notes", "glob_pattern": "**/*.md", "split_seed": 7, "val_frac": 0.2}
    data = {"mix_pretrain": {"primer": 0.9, "roam": 0.1}, "val_pretrain_source": "primer", "roam": roam}
    settings = validate_overrides({"tokenizer": {"type": "byte"}, "model": {"V": 256, "T": 64}, "data": data})
    mixes = open_mixes(settings, ByteTokenizer(), 64)
    read = {}
    for split in SPLITS:
        wanted = [document.text for document in get_source("roam").documents(settings, split)]
        (stream,) = mixes[split][0]["roam"].arrays
        read[split] = stream.tobytes().decode()
        assert read[split] == "\n\n".join(wanted)
    text = read["train"] + read["val"]
    assert text.count("note 0\n") == 1 and "See the first" in text
    assert "someone@example.org" not in text and "unwanted" not in text
    assert sum(shared in part for part in read.values()) == 1
    Path("notes/n03.md").write_text("new words " * 90)
    open_mixes(settings, ByteTokenizer(), 64)
    assert sum(b"new words" in path.read_bytes() for path in Path("data/cache/streams").glob("roam_*.bin")) == 1
