"""A pipeline: pretraining, then fine-tuning from its best checkpoint, within one time budget if there is one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from niels_gpt import files, paths
from niels_gpt.config import to_dict
from niels_gpt.settings import resolve_settings
from niels_gpt.tokenizer import open_tokenizer
from niels_gpt.train.distributed import ALONE, World
from niels_gpt.train.lineage import newest, pretrained_model, spent_seconds
from niels_gpt.train.lock import only_training_here
from niels_gpt.train.pretrain import run_pretrain
from niels_gpt.train.saving import Origin
from niels_gpt.train.sft import run_sft, sft_job
from niels_gpt.train.start import Start, TimeLimit

Config = Path | Mapping[str, Any]
KEYS = {"pretrain_config_path", "sft_config_path"}


def pipeline_configs(config: str | Path | Mapping[str, Any]) -> tuple[Config, Config]:
    """The two config files a pipeline names: found from the current folder, else by file name in the pipeline's own.

    Settings instead of a file are those of both phases. ValueError unless the file holds exactly two paths.
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
        if not isinstance(content[key], str):
            raise ValueError(f"{config}: {key} must be the path of a config file, not {content[key]!r:.80}")
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
    What keeps fine-tuning from starting is an error before pretraining, not after hours of it.
    """
    pretrain_config, sft_config = pipeline_configs(config)
    world.on_main(lambda: check_configs(pretrain_config, sft_config))
    with only_training_here(world):
        spent = world.from_main(lambda: spent_seconds("pretrain", resume_path, no_auto_resume))
        limits = world.from_main(lambda: budget_shares(limit or TimeLimit(), pretrain_config, spent))
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


def check_configs(pretrain_config: Config, sft_config: Config) -> None:
    """Raise what would keep fine-tuning from starting where pretraining ends; nothing is written.

    FileNotFoundError or ValueError: a config, the tokenizer or a cache is missing or bad, or the two configs differ in
    the model or the tokenizer.
    """
    first, second = resolve_settings("pretrain", pretrain_config), resolve_settings("sft", sft_config)
    one, other = ({**to_dict(found.model_cfg), **to_dict(found.arch)} for found in (first, second))
    different = [f"model.{key} ({one[key]}, {other[key]})" for key in one if one[key] != other[key]]
    read, tokenizer = open_tokenizer(first.settings), open_tokenizer(second.settings)
    if read.sha256 != tokenizer.sha256:
        different.append(f"the tokenizer ({read.sha256 or 'bytes'}, {tokenizer.sha256 or 'bytes'})")
    if different:
        raise ValueError(
            f"fine-tuning goes on with the model of pretraining, but {pretrain_config} and {sft_config} differ in"
            f" {', '.join(different)}; give both the same"
        )
    sft_job(Start(second, "cpu", tokenizer, resume=None))  # opens all that it needs


def budget_shares(limit: TimeLimit, pretrain_config: Config, spent: float = 0.0) -> dict[str, TimeLimit]:
    """How a time limit is shared out: `training.sft_share` of it is fine-tuning's.

    spent: seconds that earlier sessions have used of the pretraining that goes on.
    """
    if limit.minutes is None and limit.deadline is None:
        return {"pretrain": limit, "sft": limit}
    share = resolve_settings("pretrain", pretrain_config).settings.training.sft_share
    if limit.minutes is not None:
        return {"pretrain": TimeLimit(limit.minutes * (1 - share)), "sft": TimeLimit(limit.minutes * share)}
    assert limit.deadline is not None
    now = time.time()
    total = spent + limit.deadline - now
    return {"pretrain": TimeLimit(None, now + max(0.0, total * (1 - share) - spent)), "sft": limit}


def _what_is_left(whole: TimeLimit, share: TimeLimit) -> TimeLimit:
    """What pretraining has left of the limit, or fine-tuning's share if it has left nothing."""
    if whole.minutes is None:
        return whole
    left = whole.minutes - spent_seconds("pretrain", None, False) / 60
    return TimeLimit(left) if left > 0 else share


def sft_is_under_way() -> bool:
    """Whether there is an unfinished run of fine-tuning that began with the weights that are pretraining's best now."""
    found = newest("sft")
    if found is None or not found.resume.get("origin") or found.resume.get("is_finished", True):
        return False
    return Origin(**found.resume["origin"]).is_still_there()
