"""What became of a folder of notes, as plain values: counts, reasons with names, secrets by kind (never themselves)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from niels_gpt.data.notes.reading import find_others
from niels_gpt.data.notes.vault import Vault

BYTES_PER_TOKEN = 4.0  # of English with a subword tokenizer, where nothing better is known


def make_report(
    vault: Vault, train: Sequence[int], val: Sequence[int], bytes_per_token: float = BYTES_PER_TOKEN
) -> dict[str, Any]:
    """The report on a vault split into `train` and `val`; its values are JSON and its order is that of the paths."""
    dropped: dict[str, list[dict[str, str]]] = defaultdict(list)
    for note in vault.notes:
        if note.reason:
            dropped[note.reason].append({"name": note.name, "detail": note.detail})
    secrets: Counter[str] = Counter()
    for note in vault.notes:
        secrets.update(note.secrets)

    def amount(numbers: Sequence[int]) -> dict[str, int]:
        size = sum(vault.notes[i].size for i in numbers)
        return {"documents": len(numbers), "bytes": size, "estimated_tokens": round(size / bytes_per_token)}

    sizes = Counter(vault.group[i] for i in vault.kept)
    return {
        "folder": str(vault.root),
        "files": dict(sorted(vault.files.items())),
        "documents": len(vault.notes),
        "kept": amount(vault.kept),
        "dropped": {reason: dropped[reason] for reason in sorted(dropped)},
        "skipped": [{"name": one.name, "reason": one.reason, "detail": one.detail} for one in vault.skipped],
        "other_files": dict(sorted(find_others(vault.root, vault.paths).items())),
        "decoded": {note.name: note.encoding for note in vault.notes if note.encoding},
        "secrets": dict(sorted(secrets.items())),
        "secrets_by_file": {note.name: note.secrets for note in vault.notes if note.secrets},
        "secrets_rule": vault.settings.secrets,
        "special_tokens": [vault.notes[i].name for i in vault.kept if vault.notes[i].control],
        "sharing_a_passage": sum(size for size in sizes.values() if size > 1),
        "split": {"train": amount(train), "val": amount(val)},
    }


def remarks(report: dict[str, Any], source: str) -> list[str]:
    """What a person should know or do, a sentence each."""
    said = []
    if names := report["special_tokens"]:
        said.append(
            f"the text of {_some(names)} spells a special token; the cache cannot be built until it is reworded"
        )
    if report["kept"]["documents"] > 1 and not report["split"]["val"]["documents"]:
        said.append(
            f"no document is left for validation: all of them share passages, or too few are kept; raise "
            f"data.notes.shared_run or data.{source}.val_frac"
        )
    if report["other_files"] and source == "roam":
        found = ", ".join(f"{n} {suffix}" for suffix, n in report["other_files"].items())
        said.append(f"the folder has other files that are not read ({found}); --source text reads them too")
    if report["secrets"] and report["secrets_rule"] == "keep":
        said.append("the secrets above stay in the text, since data.notes.secrets is keep")
    return said


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
