"""Which sources a checkpoint's model has learned from, in each phase of its life."""

from __future__ import annotations

from typing import Any

from niels_gpt.checkpoint.format import Checkpoint
from niels_gpt.checkpoint.loaded import settings_meta
from niels_gpt.data.registry import canonical_name
from niels_gpt.settings import Settings

Mixes = dict[str, dict[str, float]]  # phase -> source, by canonical name -> share of the phase's training positions


def learned_from(checkpoint: Checkpoint, settings: Settings | None) -> Mixes:
    """What the model read, first phase first; {} where the checkpoint does not say.

    settings: of the run that saved it. A pretrained model has read no chats; fine-tuning with replay reads text again.
    What a fine-tuned model had read before is what its run noted of the checkpoint it began with.
    """
    if settings is None:
        return {}
    data, before = settings.data, _before(checkpoint, settings)
    if (settings_meta(checkpoint) or {}).get("phase") == "pretrain":
        return {**before, "pretraining": _canonical(data.mix_pretrain)}
    parts = ((data.mix_sft, 1 - data.replay_pretrain), (data.mix_pretrain, data.replay_pretrain))
    tuned = {name: sum(mix.get(name, 0.0) * share for mix, share in parts) for mix, _ in parts for name in mix}
    times = sum(phase.startswith("fine-tuning") for phase in before) + 1
    return {**before, "fine-tuning" if times == 1 else f"fine-tuning {times}": _canonical(tuned)}


def is_beginning_known(checkpoint: Checkpoint) -> bool:
    """False if the model began with weights of which nothing says what they had learned from."""
    origin = _origin(checkpoint)
    return origin is None or bool(origin.get("learned_from", True))


def _before(checkpoint: Checkpoint, settings: Settings) -> Mixes:
    resume, origin = checkpoint["resume"] or {}, _origin(checkpoint)
    if origin is not None and origin.get("learned_from") is not None:
        return dict(origin["learned_from"])
    if (settings_meta(checkpoint) or {}).get("phase") == "pretrain" or ("origin" in resume and origin is None):
        return {}  # it began with random weights
    return {"pretraining": _canonical(settings.data.mix_pretrain)}  # older checkpoints: both phases had one config


def _origin(checkpoint: Checkpoint) -> dict[str, Any] | None:
    origin = (checkpoint["resume"] or {}).get("origin")
    return origin if isinstance(origin, dict) else None


def _canonical(mix: dict[str, float]) -> dict[str, float]:
    return {canonical_name(name): share for name, share in mix.items() if share}
