"""Old config layouts, translated into overrides of today's settings with warnings that say what changed.

Three are known: `{"model": ..., "train": ...}` of the byte models (with `p_train`, `cache_dir`, `streams_cache_dir`),
settings trees with fields that never had an effect, and a whole `resolved_settings.json`. Values are moved, not
checked: `settings` checks the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DEPTH = 4  # levels of objects that have knobs below them

RENAMED_SOURCES = {"wiki": "wikitext", "dolly": "dolly15k", "fineweb": "fineweb_edu"}
SFT_ONLY_SOURCES = frozenset({"dolly15k", "oasst1"})
BYTE_V = 256  # an old config of this size was a byte model
BYTE_ARCHITECTURE = {"norm_type": "layernorm", "mlp_type": "gelu", "mlp_bias": True, "qk_norm": False}
SUBWORD_ARCHITECTURE = {"mlp_bias": True, "qk_norm": False}  # what old records leave unsaid

RENAMED = {"tokenizer.tokenizer_type": "tokenizer.type"}
WITHOUT_EFFECT = (
    "tokenizer.normalization",
    "tokenizer.byte_fallback",
    "data.caches.raw_cache_dir",
    "sft_format.assistant_only_loss",  # labels are assistant turns only, always
    "data.chunking",
    "data.wikitext.chunking",
    "data.wikitext.streaming",
    "data.wikitext.test_split",
    "data.wikitext.max_tokens",
    "data.fineweb_edu.chunking",
    "data.fineweb_edu.streaming",
    "data.fineweb_edu.max_tokens",
    "data.gutenberg.chunking",
    "data.gutenberg.streaming",
    "data.gutenberg.max_tokens",
    "data.roam.chunking",
    "model.attention.attn_type",
    "model.attention.kv_cache_dtype",
    "sft_format.packing_policy",
    "sft_format.require_eot",
    "sft_format.allow_truncate_mid_turn",
    "benchmark.lr",
    "benchmark.binary_search_max_micro_B",
)


def translate(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(overrides in today's layout, warnings); `given` is left as it is."""
    tree = _copied(given, DEPTH)
    warnings: list[str] = []
    tree = _from_record(tree, warnings)
    _from_model_and_train(tree, warnings)
    _from_cache_folders(tree, warnings)
    _rename(tree, warnings)
    _drop(tree, warnings)
    return tree, warnings


def _from_record(tree: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """A resolved_settings.json holds the settings of a run under one key."""
    if not ({"run_id", "settings"} <= tree.keys() and isinstance(tree["settings"], dict)):
        return tree
    warnings.append("this is a record of a run (resolved_settings.json): using its settings, and nothing else of it")
    settings = tree["settings"]
    if "arch" not in tree and isinstance(settings.get("model"), dict):
        settings["model"] = SUBWORD_ARCHITECTURE | settings["model"]
    return settings


def _from_model_and_train(tree: dict[str, Any], warnings: list[str]) -> None:
    """`train` -> training of both phases (an old file served the phase it was given to)."""
    train, mix = tree.get("train"), tree.get("p_train")
    if isinstance(train, dict):
        del tree["train"]
        mix = train.pop("p_train", mix)
        train.pop("total_steps_smoke", None)
        if "B" in train:
            train["micro_B"] = train.pop("B")
        if "beta1" in train and "beta2" in train:
            train["betas"] = [train.pop("beta1"), train.pop("beta2")]
        for phase in ("pretrain", "sft"):
            knobs = _section(tree, "training", phase)
            knobs.update({name: value for name, value in train.items() if name not in knobs})
        said = "old config layout: `train` was read as training.pretrain and training.sft (B is now micro_B)"
        model = tree.get("model")
        if isinstance(model, dict) and model.get("V") == BYTE_V and "tokenizer" not in tree:
            tree["tokenizer"] = {"type": "byte"}
            tree["model"] = BYTE_ARCHITECTURE | model
            said += f"; V={BYTE_V} was read as a byte model (LayerNorm, GELU)"
        warnings.append(said)
    if isinstance(mix, dict) or ("p_train" in tree and mix is None):
        tree.pop("p_train", None)
    if isinstance(mix, dict):
        renamed = _renamed_sources(mix)
        name = "mix_sft" if SFT_ONLY_SOURCES & renamed.keys() else "mix_pretrain"
        _section(tree, "data").setdefault(name, renamed)
        warnings.append(f"p_train is now data.{name}")
    if isinstance(tree.get("allow_missing_idx"), bool):
        _section(tree, "data").setdefault("allow_missing_idx", tree.pop("allow_missing_idx"))
        warnings.append("allow_missing_idx is now data.allow_missing_idx")


def _from_cache_folders(tree: dict[str, Any], warnings: list[str]) -> None:
    """`cache_dir` names one cache, told by its last folder, or else the folder above all of them."""
    for name in ("streams_cache_dir", "cache_dir"):
        folder = tree.get(name)
        if not isinstance(folder, str):
            continue
        del tree[name]
        last = folder.rstrip("/").rpartition("/")[2]
        if name == "streams_cache_dir" or last in ("pretrain", "sft", "streams"):
            found = {("streams" if name == "streams_cache_dir" else last): folder}
        else:
            found = {kind: f"{folder.rstrip('/')}/{kind}" for kind in ("pretrain", "sft", "streams")}
        caches = _section(tree, "data", "caches")
        for kind, path in found.items():
            caches.setdefault(f"{kind}_token_cache", path)
        warnings.append(f"{name} is now {', '.join(f'data.caches.{kind}_token_cache' for kind in found)}")


def _rename(tree: dict[str, Any], warnings: list[str]) -> None:
    for old, new in RENAMED.items():
        parent, name = _parent(tree, old)
        if parent is not None and name in parent:
            value = parent.pop(name)
            parent.setdefault(new.rpartition(".")[2], value)
            warnings.append(f"{old} is now {new}")
    parent, _ = _parent(tree, "data.wikitext.val_split")
    if parent is not None and parent.get("val_split") == "val":
        parent["val_split"] = "validation"
        warnings.append('data.wikitext.val_split "val" is now "validation", the name the dataset uses')
    for mix in ("mix_pretrain", "mix_sft"):
        parent, _ = _parent(tree, f"data.{mix}")
        given = parent.get(mix) if parent is not None else None
        if parent is not None and isinstance(given, dict) and (renamed := _renamed_sources(given)) != given:
            old_names = ", ".join(sorted(given.keys() & RENAMED_SOURCES.keys()))
            parent[mix] = renamed
            warnings.append(f"data.{mix}: {old_names} renamed to {', '.join(sorted(renamed.keys() - given.keys()))}")


def _drop(tree: dict[str, Any], warnings: list[str]) -> None:
    dropped = []
    for path in WITHOUT_EFFECT:
        parent, name = _parent(tree, path)
        if parent is not None and name in parent:
            del parent[name]
            dropped.append(path)
    if dropped:
        warnings.append(f"these settings have no effect and were left out: {', '.join(dropped)}")


def _renamed_sources(mix: dict[str, Any]) -> dict[str, Any]:
    """Old source names replaced, unless the new name is there as well."""
    return {RENAMED_SOURCES.get(k, k) if RENAMED_SOURCES.get(k) not in mix else k: v for k, v in mix.items()}


def _parent(tree: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, str]:
    """The object that would hold the last name of a dotted path (None if it is not there), and that name."""
    *above, name = path.split(".")
    node: Any = tree
    for step in above:
        node = node.get(step) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), name


def _section(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    """The nested object at `path`, made where it is missing; what is no object is left, and a scratch one returned."""
    node = tree
    for step in path:
        below = node.setdefault(step, {})
        if not isinstance(below, dict):
            return {}
        node = below
    return node


def _copied(value: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """A copy down to `depth` levels of objects."""
    return dict(_copied_items(value, depth))


def _copied_items(value: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        yield key, _copied(item, depth - 1) if isinstance(item, Mapping) and depth > 1 else item
