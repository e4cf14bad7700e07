"""A pipeline: pretraining, then fine-tuning from its best checkpoint, within one time budget if there is one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from niels_gpt import checkpoint as ckpt
from niels_gpt import files, paths
from niels_gpt.settings import resolve_settings
from niels_gpt.train.distributed import ALONE, World
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.saving import Origin
from niels_gpt.train.sft import run_sft
from niels_gpt.train.start import TimeLimit, pretrained_model

Config = Path | Mapping[str, Any]
KEYS = {"pretrain_config_path", "sft_config_path"}


def pipeline_configs(config: str | Path | Mapping[str, Any]) -> tuple[Config, Config]:
    """The two config files a pipeline names, relative to the current folder or to the pipeline's own.

    Settings instead of a file are those of both phases.
    """
    if isinstance(config, Mapping):
        return config, config
    config = paths.find(config) or config
    content = files.read_json(config)
    keys = set(content) - {"_why"} if isinstance(content, dict) else set()
    if keys != KEYS:
        raise ValueError(f"{config} must hold exactly {' and '.join(sorted(KEYS))}, it holds {sorted(keys)}")
    found = []
    for key in ("pretrain_config_path", "sft_config_path"):
        path = Path(content[key])
        beside = Path(config).parent / path.name
        found.append(path if path.is_file() else beside)
    return found[0], found[1]


def run_pipeline(
    config: str | Path | Mapping[str, Any],
    *,
    device: str | None = None,
    resume_path: str | Path | None = None,
    no_auto_resume: bool = False,
    limit: TimeLimit | None = None,
    world: World = ALONE,
) -> dict[str, dict[str, Any]]:
    """Pretrain and fine-tune; what was interrupted goes on where it was. Returns what each phase returns.

    Fine-tuning that was interrupted goes on if it began with the weights that are pretraining's best now; otherwise it
    starts afresh. `resume_path` and `no_auto_resume` are about pretraining; both make fine-tuning start afresh.
    """
    pretrain_config, sft_config = pipeline_configs(config)
    limits = world.from_main(lambda: shares(limit or TimeLimit(), pretrain_config))
    afresh = no_auto_resume or resume_path is not None
    done: dict[str, dict[str, Any]] = {}
    if afresh or not world.from_main(sft_is_under_way):
        done["pretrain"] = run_pretrain(
            pretrain_config,
            device=device,
            resume_path=resume_path,
            no_auto_resume=no_auto_resume,
            limit=limits["pretrain"],
            world=world,
        )
    source = world.from_main(pretrained_model)
    under_way = not afresh and world.from_main(sft_is_under_way)
    done["sft"] = run_sft(
        sft_config,
        device=device,
        no_auto_resume=not under_way,
        init_model_path=source,
        limit=world.from_main(lambda: _what_is_left(limit or TimeLimit(), limits["sft"])),
        world=world,
    )
    return done


def shares(limit: TimeLimit, pretrain_config: Config) -> dict[str, TimeLimit]:
    """How a time limit is shared out before anything has run: `training.sft_share` of it is fine-tuning's."""
    if limit.minutes is None and limit.deadline is None:
        return {"pretrain": limit, "sft": limit}
    share = resolve_settings("pretrain", pretrain_config).settings.training.sft_share
    if limit.minutes is not None:
        return {"pretrain": TimeLimit(limit.minutes * (1 - share)), "sft": TimeLimit(limit.minutes * share)}
    assert limit.deadline is not None
    now, spent = time.time(), _pretrain_seconds()
    total = spent + limit.deadline - now
    return {"pretrain": TimeLimit(None, now + max(0.0, total * (1 - share) - spent)), "sft": limit}


def _what_is_left(whole: TimeLimit, share: TimeLimit) -> TimeLimit:
    """What pretraining has left of the limit, or fine-tuning's share if it has left nothing."""
    if whole.minutes is None:
        return whole
    left = whole.minutes - _pretrain_seconds() / 60
    return TimeLimit(left) if left > 0 else share


def _pretrain_seconds() -> float:
    """Seconds that pretraining has used, over all its sessions, by its newest checkpoint."""
    return float(_newest_record("pretrain").get("elapsed_s", 0.0))


def _newest_record(phase: str) -> dict[str, Any]:
    path = ckpt.newest_good(phase)
    return (ckpt.load_checkpoint(path, device="cpu")["resume"] or {}) if path is not None else {}


def sft_is_under_way() -> bool:
    """Whether there is an unfinished run of fine-tuning that began with the weights that are pretraining's best now."""
    record = _newest_record("sft")
    if not record.get("origin") or record.get("is_finished", True):
        return False
    return Origin(**record["origin"]).is_still_there()
