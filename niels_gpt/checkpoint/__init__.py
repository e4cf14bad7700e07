"""Checkpoints: the file (`format`, `plain`), its weights (`weights`), its folder (`folder`), all of chat (`loaded`)."""

from niels_gpt.checkpoint.folder import (
    PhasePaths,
    newest_good,
    phase_paths,
    prepare_phase,
    publish,
    sidecar_path,
    step_path,
)
from niels_gpt.checkpoint.format import (
    FORMAT_VERSION,
    Checkpoint,
    is_good,
    load_checkpoint,
    save_checkpoint,
    training_record,
)
from niels_gpt.checkpoint.loaded import LoadedModel, is_byte_model, load_model
from niels_gpt.checkpoint.plain import NotFinite
from niels_gpt.checkpoint.weights import (
    architecture_of,
    build_model,
    check_same_model,
    load_into,
    validate_model_config_match,
)

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "LoadedModel",
    "NotFinite",
    "PhasePaths",
    "architecture_of",
    "build_model",
    "check_same_model",
    "is_byte_model",
    "is_good",
    "load_checkpoint",
    "load_into",
    "load_model",
    "newest_good",
    "phase_paths",
    "prepare_phase",
    "publish",
    "save_checkpoint",
    "sidecar_path",
    "step_path",
    "training_record",
    "validate_model_config_match",
]
