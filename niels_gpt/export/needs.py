"""The packages that exports need and nothing else does: named in one place, imported only where they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_PACKAGES = {
    "google.protobuf": "protobuf",
    "sentencepiece.sentencepiece_model_pb2": "protobuf",
    "tokenizers": "tokenizers",
    "safetensors.torch": "safetensors",
    "transformers": "transformers",
    "gguf": "gguf",
    "jinja2.sandbox": "jinja2",
}


def needed(module: str) -> ModuleType:
    """Import a module of the extra `export`; ValueError that names the extra if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module, module)
        raise ValueError(
            f"exporting and importing need the package {package} ({error}); pip install 'niels-gpt[export]'"
        ) from None
