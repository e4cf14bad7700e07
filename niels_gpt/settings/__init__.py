"""Every knob of niels-gpt: its only default, its bounds, one line of help; and how overrides become a run's settings.

`tree` and `data` hold the knobs, `resolve` turns overrides into settings, `errors` words what is wrong with them (one
ValueError, one line per problem), `legacy` translates old config layouts, `doc` puts every setting in words.
"""

from niels_gpt.settings.data import (
    BYTE_VOCABULARY,
    DATA_SEEDS,
    DIALOGUE_DELIMITER,
    PRETRAIN_SOURCES,
    SFT_SOURCES,
    DataSettings,
    NotesSettings,
    StreamSource,
    TokenizerSettings,
    checked_mix,
)
from niels_gpt.settings.resolve import (
    PHASES,
    PIECE_IDS,
    ResolvedSettings,
    load_overrides,
    new_run_id,
    resolve_settings,
    tokenizer_file,
    validate_overrides,
)
from niels_gpt.settings.tree import (
    GenerationSettings,
    ModelSettings,
    PhaseSettings,
    Settings,
    SftPhaseSettings,
    Weights,
    default_settings,
    model_config_of,
    train_config_of,
)

__all__ = [
    "BYTE_VOCABULARY",
    "DATA_SEEDS",
    "DIALOGUE_DELIMITER",
    "PHASES",
    "PIECE_IDS",
    "PRETRAIN_SOURCES",
    "SFT_SOURCES",
    "DataSettings",
    "GenerationSettings",
    "ModelSettings",
    "NotesSettings",
    "PhaseSettings",
    "ResolvedSettings",
    "Settings",
    "SftPhaseSettings",
    "StreamSource",
    "TokenizerSettings",
    "Weights",
    "checked_mix",
    "default_settings",
    "load_overrides",
    "model_config_of",
    "new_run_id",
    "resolve_settings",
    "tokenizer_file",
    "train_config_of",
    "validate_overrides",
]
