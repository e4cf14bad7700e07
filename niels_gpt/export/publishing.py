"""From a checkpoint to a folder under its final name: written beside it, compared, then renamed; or nothing at all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from niels_gpt import files
from niels_gpt.cache.folder import replacing_folder
from niels_gpt.checkpoint import LoadedModel
from niels_gpt.export import gguf_file, llama_cpp
from niels_gpt.export.hf import write_hf
from niels_gpt.export.needs import needed
from niels_gpt.export.verify import verify_hf
from niels_gpt.export.verify_gguf import verify_gguf

RECORD = "export.json"  # what was exported, how, and the sha256 of every other file
Say = Callable[[str], None]


def export_hf(loaded: LoadedModel, out: Path, dtype: str, *, overwrite: bool, say: Say) -> list[str]:
    """Make the Hugging Face folder `out`; returns lines for people. ValueError: the reason why there is none."""
    with _publishing(out, overwrite) as folder, quiet_transformers():
        say("writing the folder")
        write_hf(loaded, folder, dtype)
        say("comparing it with the model, in transformers")
        worst = verify_hf(folder, loaded, dtype)
        _record(folder, loaded, {"format": "hf", "dtype": dtype, "largest_logit_difference": worst})
    return [f"logits within {worst:.1g} of the model's; token ids and chat template equal"]


def export_gguf(
    loaded: LoadedModel, out: Path, dtypes: Sequence[str], *, overwrite: bool, approximate_gelu: bool, say: Say
) -> list[str]:
    """Make the folder `out` of one GGUF file per dtype and a Modelfile; returns and raises like `export_hf`.

    approximate_gelu: accept that llama.cpp computes the GELU of byte models approximately.
    """
    if not approximate_gelu:
        gguf_file.check_exact(loaded.model.arch)
    lines, facts = [], {}
    with _publishing(out, overwrite) as folder, quiet_transformers():
        for dtype in dtypes:
            path = folder / _file_name(dtype)
            say(f"writing {path.name}")
            gguf_file.write_gguf(loaded, path, dtype)
            say(f"comparing {path.name} with the model")
            moved = verify_gguf(path, loaded, dtype)
            lines.append(
                f"{path.name}: " + (f"rounding moves logits by up to {moved:.2g}" if moved else "exact weights")
            )
            facts[path.name] = {"dtype": dtype, "rounding_moves_logits_by": moved}
        lines.append(_llama_cpp_says(folder, loaded, dtypes, say))
        files.write_text(folder / "Modelfile", gguf_file.modelfile(loaded, _file_name(dtypes[0])))
        _record(folder, loaded, {"format": "gguf", "files": facts})
    return lines


def _llama_cpp_says(folder: Path, loaded: LoadedModel, dtypes: Sequence[str], say: Say) -> str:
    python = llama_cpp.python_with_llama_cpp()
    if python is None:
        return "llama-cpp-python is not installed here: the files were read back, but not by llama.cpp itself"
    say("asking llama.cpp")
    if "f32" not in dtypes:
        llama_cpp.compare(python, folder / _file_name(dtypes[0]), loaded, rows=0)
        return "llama.cpp itself: token ids and chats equal (logits are compared in an f32 file only)"
    worst = llama_cpp.compare(python, folder / _file_name("f32"), loaded)
    return f"llama.cpp itself: token ids and chats equal, logits within {worst:.1g} of the model's"


def _file_name(dtype: str) -> str:
    return f"niels-gpt-{dtype}.gguf"


@contextmanager
def _publishing(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `out`; an export that is there already is replaced only if asked for."""
    _check_target(out, overwrite)
    with replacing_folder(out) as folder:
        _check_target(out, overwrite)  # another export may have taken the name while this one waited
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb+" if os.name == "nt" else "rb") as file:
                    os.fsync(file.fileno())


def _check_target(out: Path, overwrite: bool) -> None:
    """ValueError unless `out` is free, or an earlier export that may be replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder")
    if Path(os.path.realpath(os.curdir)).is_relative_to(os.path.realpath(out)):
        raise ValueError(
            f"{out} is or holds the folder that you are in, and an export takes the place of what is there; "
            f"name a new folder, such as {out / 'niels-gpt-export'}"
        )
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"{out} is there already; choose another name, or pass --overwrite")
        if not (out / RECORD).is_file():
            raise ValueError(f"{out} holds something other than an export (no {RECORD}); it is left alone")


def _record(folder: Path, loaded: LoadedModel, facts: dict[str, Any]) -> None:
    hashes = {path.name: files.sha256_file(path) for path in sorted(folder.iterdir())}
    about = {"checkpoint": loaded.checkpoint_path.name, "step": loaded.step, "sha256": hashes}
    files.write_json(folder / RECORD, about | facts)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers: what goes wrong is found by comparing."""
    logging = needed("transformers").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
