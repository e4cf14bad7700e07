"""The choices for a machine, each with its reason and what there is instead: pure functions of facts.

A check is "ok", a "note" (training works, something is slower or missing) or a "problem" (training will not work).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from niels_gpt.device import Precision, automatic_precision
from niels_gpt.machine import Machine

Status = Literal["ok", "note", "problem"]
LEAST_MEMORY = 2**30  # bytes: PyTorch and the smallest model take 0.6 to 0.8 GB
LITTLE_MEMORY = 3 * 2**30
MODERN = (8, 0)  # a GPU of this age is not too old for any PyTorch, so it must be too new for this one
TRITON_CAPABILITY = (7, 0)
INSTALLERS = {  # package manager -> how it installs a C++ compiler
    "apt-get": "sudo apt-get install g++",
    "dnf": "sudo dnf install gcc-c++",
    "yum": "sudo yum install gcc-c++",
    "pacman": "sudo pacman -S gcc",
    "zypper": "sudo zypper install gcc-c++",
    "apk": "sudo apk add g++",
    "brew": "xcode-select --install",
}
BY_SYSTEM = {"Darwin": "xcode-select --install", "Windows": "wsl --install"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor. command: the one thing to run; "" where nothing is to be done."""

    name: str
    status: Status
    value: str  # what was found or chosen
    reason: str
    fallback: str = ""
    command: str = ""


@dataclass(frozen=True)
class Text:
    """A source of the mix, as it stands."""

    name: str
    cached: bool
    trouble: str = ""  # why it can be neither read nor built offline
    optional: bool = False


@dataclass(frozen=True)
class Surroundings:
    """What is around the machine: this folder, the compiler's work, text."""

    folder: str
    free: int  # bytes of its disk
    needed: int  # bytes that a run of the settings takes
    unwritable: tuple[tuple[str, str], ...]  # (folder, why)
    kernels: str | None  # why there is no compiled training code; None: it is there
    decoder: str | None  # the same of the compiled decoder
    cxx_variable: str | None  # $CXX
    installer: str | None  # one of INSTALLERS
    texts: tuple[Text, ...]
    tokenizer: str | None  # path of the settings' tokenizer, "bytes", or None
    other_tokenizers: tuple[str, ...] = ()
    config: str | None = None  # file of the settings, None for the quickstart's


def device_of(machine: Machine) -> str:
    """The device that training chooses."""
    if machine.gpu is not None and machine.gpu.usable:
        return "cuda"
    return "mps" if machine.mps else "cpu"


def precision_of(machine: Machine, device: str) -> Precision:
    capability = machine.gpu.capability if machine.gpu is not None else (0, 0)
    return automatic_precision(device, capability, cpu_bf16=machine.cpu_bf16)


def all_checks(machine: Machine, around: Surroundings, device: str) -> list[Check]:
    """Everything, in the order it is shown."""
    on_machine: tuple[Callable[[Machine, str], Check], ...] = (check_device, check_precision, check_memory, check_cores)
    found = [check(machine, device) for check in on_machine]
    found.append(check_cxx(machine, around, device))
    found.append(check_torch_compile(machine, device))
    found.append(check_workers(machine))
    found += [check_disk(around), check_write(machine, around), check_text(around), check_tokenizer(around)]
    return found


def check_device(machine: Machine, device: str) -> Check:
    gpu = machine.gpu
    if device == "cuda" and gpu is not None:
        value = f"cuda: {gpu.name}, {_gib(gpu.memory)}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        if gpu.usable:
            return Check("device", "ok", value, "a CUDA GPU is the fastest there is", "--device cpu")
        reason = f"torch {machine.torch} has no code for this GPU"
        return Check("device", "problem", value, reason, "--device cpu", "niels-gpt doctor --device cpu")
    if gpu is not None and not gpu.usable:
        major, minor = gpu.capability
        reason = (
            f"{gpu.name} (compute capability {major}.{minor}) is there, but torch {machine.torch} has no code for it"
        )
        if gpu.capability >= MODERN:
            return Check("device", "note", device, reason, "a newer PyTorch", "pip install --upgrade torch")
        return Check("device", "note", device, reason, "a build of PyTorch for CUDA 12.6, which knows older GPUs")
    if device == "mps":
        return Check("device", "ok", "mps", "Apple's GPU is there", "--device cpu")
    instead = "no CUDA GPU" + ("" if machine.mps else " and no Apple GPU")
    reason = f"{machine.processor}; {instead}" if not machine.mps else "asked for"
    return Check("device", "ok", "cpu", reason, "none is needed: every part works on CPUs")


def check_precision(machine: Machine, device: str) -> Check:
    chosen = precision_of(machine, device)
    value = chosen.name + (" with a gradient scaler" if chosen.needs_scaler else "")
    fallback = "none is needed: float32 works everywhere" if chosen.dtype is None else '"amp": false (float32)'
    return Check("dtype", "ok", value, chosen.reason, fallback)


def check_memory(machine: Machine, device: str) -> Check:
    gpu = machine.gpu if device == "cuda" else None
    total, free = (gpu.memory, gpu.free) if gpu is not None else (machine.memory, machine.available)
    where = " on the GPU" if gpu is not None else ""
    value = f"{_gib(total)}{where}, {_gib(free)} free"
    fallback = "a step that does not fit is taken in smaller microbatches"
    if free < LEAST_MEMORY:
        show = "nvidia-smi" if gpu is not None else "tasklist" if machine.system == "Windows" else "top -o %MEM"
        show = "top -o mem" if gpu is None and machine.system == "Darwin" else show
        reason = "PyTorch and the smallest model take up to 0.8 GB; end programs that take much"
        return Check("memory", "problem", value, reason, fallback, show)
    if free < LITTLE_MEMORY:
        reason = "enough for small models; the benchmark tells how large a microbatch fits"
        return Check("memory", "note", value, reason, fallback, "niels-gpt bench")
    return Check("memory", "ok", value, "enough for the default model", fallback)


def check_cores(machine: Machine, device: str) -> Check:
    reason = "all that this process may use" if device == "cpu" else "they prepare batches; the GPU computes"
    return Check("cores", "ok", f"{machine.cores}: {machine.processor}", reason, "reproducibility.torch_num_threads")


def check_cxx(machine: Machine, around: Surroundings, device: str) -> Check:
    name, fallback = "C++ compiler", "PyTorch only: slower replies, and slower training in float32 on CPUs"
    trouble = around.kernels or around.decoder
    if trouble is None:
        used = "training and replies" if device == "cpu" else "replies on the CPU"
        reason = f"{used} use code that was compiled for this processor"
        return Check(name, "ok", machine.cxx or "not needed: all is built", reason, fallback)
    if around.cxx_variable:
        return Check(name, "note", f"$CXX is {around.cxx_variable}", trouble, fallback, "unset CXX")
    command = BY_SYSTEM.get(machine.system) or INSTALLERS.get(around.installer or "", INSTALLERS["apt-get"])
    return Check(name, "note", machine.cxx or "none", trouble, fallback, command)


def check_torch_compile(machine: Machine, device: str) -> Check:
    name, fallback = "torch.compile", '"compile": false, the default: every step runs as it is'
    if device == "mps":
        return Check(name, "note", "leave it off", "PyTorch's compiler is experimental on MPS", fallback)
    if device == "cpu":
        if machine.system == "Windows":
            return Check(name, "note", "leave it off", "on Windows it needs Microsoft's C++ compiler", fallback)
        triton = "Triton is there" if machine.triton else "Triton is not installed, and only GPUs need it"
        if machine.cxx is None:
            return Check(name, "note", "not possible", f"it needs a C++ compiler on CPUs; {triton}", fallback)
        return Check(name, "ok", "possible", f"through C++; {triton}", fallback)
    gpu = machine.gpu
    if not machine.triton:
        command = f"pip install {'triton-windows' if machine.system == 'Windows' else 'triton'}"
        return Check(name, "note", "not possible", "Triton is not installed, and GPUs need it", fallback, command)
    if gpu is not None and gpu.capability < TRITON_CAPABILITY:
        reason = f"Triton needs compute capability {TRITON_CAPABILITY[0]}.{TRITON_CAPABILITY[1]}"
        return Check(name, "note", "not possible", reason, fallback)
    if machine.cxx is None and machine.system != "Windows":
        reason = "Triton is there, but it needs a C compiler to start"
        command = BY_SYSTEM.get(machine.system, INSTALLERS["apt-get"])
        return Check(name, "note", "not possible", reason, fallback, command)
    return Check(name, "ok", "possible", "Triton is there", fallback)


def check_workers(machine: Machine) -> Check:
    n = machine.cores
    value = f"{n} process{'es' if n != 1 else ''} to tokenize with"
    return Check("workers", "ok", value, "one a core; training itself needs none", "--workers 1")


def check_disk(around: Surroundings) -> Check:
    value = f"{_gb(around.free)} free in {around.folder}"
    fallback = "a run whose disk fills up warns, keeps its last checkpoint and goes on"
    need = f"a run takes about {_gb(around.needed)}: checkpoints of both phases, caches, room for the system"
    if around.free < around.needed:
        return Check("disk", "problem", value, need, fallback, "niels-gpt quickstart --out /a/folder/on/a/larger/disk")
    return Check("disk", "ok", value, need, fallback)


def check_write(machine: Machine, around: Surroundings) -> Check:
    if not around.unwritable:
        return Check("write access", "ok", around.folder, "runs, checkpoints and caches can be written", "--out DIR")
    folder, why = around.unwritable[0]
    command = "cd %USERPROFILE%" if machine.system == "Windows" else "cd ~"
    value = f"none to {', '.join(name for name, _ in around.unwritable)}"
    return Check("write access", "problem", value, f"{folder}: {why}", "another folder to work in", command)


def check_text(around: Surroundings) -> Check:
    """The text of the mix: a cache of each source, or what it is built from."""
    config = f" --config {around.config}" if around.config else ""
    bad = [text for text in around.texts if text.trouble and not text.optional]
    fallback = "niels-gpt quickstart brings its own text"
    if bad:
        value = f"without {', '.join(text.name for text in bad)}"
        command = f"niels-gpt cache build {' '.join(text.name for text in bad)}{config}"
        if any("chitchat" in text.trouble for text in bad):
            command = "pip install chitchat-dataset"
        return Check("data", "problem", value, bad[0].trouble, fallback, command)
    parts = [f"{text.name} ({'cached' if text.cached else 'to be built'})" for text in around.texts if not text.trouble]
    left_out = [text.name for text in around.texts if text.trouble]
    reason = "every source of the mix is here, offline" + (f"; without {', '.join(left_out)}" if left_out else "")
    return Check("data", "ok", ", ".join(parts), reason, fallback)


def check_tokenizer(around: Surroundings) -> Check:
    fallback = '"tokenizer": {"type": "byte"} needs none'
    if around.tokenizer is not None:
        return Check("tokenizer", "ok", around.tokenizer, "the one that the settings name", fallback)
    others = f"; there is {', '.join(around.other_tokenizers)}" if around.other_tokenizers else ""
    if around.config is None:
        return Check("tokenizer", "ok", "none yet", f"quickstart trains its own in seconds{others}", fallback)
    reason = f"the settings name one that is not here{others}"
    return Check("tokenizer", "problem", "none", reason, fallback, f"niels-gpt tokenizer --config {around.config}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
