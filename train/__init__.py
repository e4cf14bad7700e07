"""The specification's short name for niels_gpt.train: `python -m train.run` runs niels_gpt/train/run.py."""

from niels_gpt.train import __path__  # noqa: F401
