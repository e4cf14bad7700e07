"""Compiles C++ of this package on first use and keeps it in the user's cache folder; without a compiler there is none.

A build is known by a hash of its sources, its flags and this machine's processor, so a new version or another machine
sharing the home folder builds its own. Programs that start together wait for one build.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from niels_gpt import files

SHARED = Path(__file__).parent  # headers for all
COMPILERS = ("c++", "g++", "clang++")
# Loops become vectors only as far as no result changes: NaN and infinity survive.
PLAIN_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w", "-fno-math-errno", "-fno-trapping-math")
ARM = platform.machine() in ("arm64", "aarch64")
NATIVE = "-mcpu=native" if ARM else "-march=native"
# Where the compiler knows them: sums in the order of vectors where the code asks for it, and the widest vectors.
WISHES = ("-fopenmp-simd", *(() if ARM else ("-mprefer-vector-width=512",)))
LONGEST_BUILD = 300  # seconds


def cache_folder() -> Path:
    """Where builds are kept: XDG_CACHE_HOME or the system's usual folder for caches."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "niels-gpt"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/niels-gpt"
    return Path.home() / ".cache/niels-gpt"


@functools.cache
def load(main: Path, declare: Callable[[ctypes.CDLL], ctypes.CDLL]) -> ctypes.CDLL | str:
    """The library compiled from `main`, its functions declared, or the reason why there is none. Tried once."""
    try:
        return declare(ctypes.CDLL(str(_built(main))))
    except (OSError, RuntimeError, Timeout) as error:
        return str(error)


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual names that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    return next((found for name in names if (found := shutil.which(name))), None)


def _built(main: Path) -> Path:
    """The library's file, made if need be. OSError or RuntimeError when it cannot be made."""
    target = cache_folder() / f"{main.stem}-{_fingerprint(main)}.so"
    if target.is_file():
        return target
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler (c++, g++ or clang++) on the PATH")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=LONGEST_BUILD):
            if not target.is_file():
                with files.replacing(target) as temporary:
                    _compile(found, main, temporary)
        return target
    except OSError as error:
        if isinstance(error, Timeout):
            raise
        # No place in the home folder: this process builds its own, in a folder that is the user's alone.
        own = Path(tempfile.mkdtemp(prefix="niels-gpt-")) / target.name
        atexit.register(shutil.rmtree, own.parent, ignore_errors=True)
        _compile(found, main, own)
        return own


def _compile(found: str, main: Path, target: Path) -> None:
    if sys.stderr.isatty():
        print(f"building the native {main.stem} (once, some seconds) ...", file=sys.stderr, flush=True)
    said = ""
    for flags in ([NATIVE, *WISHES], [NATIVE], []):  # an old compiler may not know this machine
        command = [found, *PLAIN_FLAGS, *flags, f"-I{SHARED}", "-o", str(target), str(main)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_BUILD, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{found} took more than {LONGEST_BUILD} s") from None
        if done.returncode == 0:
            return
        said = said or done.stderr.strip()
    raise RuntimeError(f"{found} failed: {said[:300]}")


def _fingerprint(main: Path) -> str:
    folders = (main.parent, SHARED)
    sources = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".h", ".cpp")]
    parts = [path.read_bytes() for path in sources]
    parts += [text.encode() for text in (main.name, *PLAIN_FLAGS, NATIVE, *WISHES, *_processor())]
    return files.sha256_bytes(b"\0".join(parts))[:16]


def _processor() -> Iterator[str]:
    """What compiled code depends on: system, architecture, and the features of the processor."""
    yield platform.system()
    yield platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        for name in ("model name", "flags", "Features"):
            yield next((line for line in lines if line.startswith(name)), "")
    else:
        yield platform.processor()
