"""The doctor's choices for machines of all kinds, as tables: what, why, and the one command."""

from __future__ import annotations

import pytest

from niels_gpt.device import has_code_for
from niels_gpt.doctor.checks import Check, Text, all_checks, device_of
from niels_gpt.machine import Machine
from tests.doctor.machines import GIB, around, gpu, machine

WINDOWS = machine(system="Windows", cxx=None)
MAC = machine(system="Darwin", mps=True)
NO_TEXT = Text("chitchat", cached=False, trouble="chitchat: the package chitchat-dataset is not installed")


def check(name: str, of: Machine, **surroundings: object) -> Check:
    found = {check.name: check for check in all_checks(of, around(**surroundings), device_of(of))}
    return found[name]


@pytest.mark.parametrize(
    ("of", "device", "dtype"),
    [
        (machine(), "cpu", "fp32"),
        (machine(cpu_bf16=True), "cpu", "bf16"),
        (WINDOWS, "cpu", "fp32"),
        (MAC, "mps", "fp32"),
        (machine(gpu=gpu("RTX 3090", capability=(8, 6))), "cuda", "bf16"),
        (machine(gpu=gpu("H100", capability=(9, 0))), "cuda", "bf16"),
        (machine(gpu=gpu("T4", capability=(7, 5))), "cuda", "fp16 with a gradient scaler"),
        (machine(system="Windows", gpu=gpu(capability=(8, 9))), "cuda", "bf16"),
        (machine(gpu=gpu("GTX 1080", capability=(6, 1), usable=False)), "cpu", "fp32"),
        (machine(gpu=gpu("P100", capability=(6, 0), usable=False), cpu_bf16=True), "cpu", "bf16"),
    ],
)
def test_device_and_type(of: Machine, device: str, dtype: str) -> None:
    assert device_of(of) == device
    assert check("device", of).value.startswith(device)
    found = check("dtype", of)
    assert found.value == dtype and found.reason
    assert all(c.reason and (c.fallback or c.name == "self-test") for c in all_checks(of, around(), device))
    assert all(c.status != "problem" for c in all_checks(of, around(), device))


def test_a_gpu_without_code_is_named() -> None:
    old = machine(gpu=gpu("GTX 1080", capability=(6, 1), usable=False))
    found = check("device", old)
    assert found.status == "note" and "GTX 1080" in found.reason and "no code for it" in found.reason
    new = check("device", machine(gpu=gpu("RTX 5090", capability=(12, 0), usable=False)))
    assert (found.command, new.command) == ("", "pip install --upgrade torch") and "CUDA 12.6" in found.fallback
    asked = all_checks(old, around(), "cuda")[0]
    assert asked.status == "problem" and asked.command == "niels-gpt doctor --device cpu"


@pytest.mark.parametrize(
    ("capability", "code", "usable"),
    [
        ((8, 6), ["sm_75", "sm_80", "sm_86", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # runs what was made for 8.0
        ((7, 5), ["sm_80", "sm_90"], False),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((8, 0), ["sm_86"], False),  # made for a newer one
        ((8, 6), ["sm_90", "compute_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # compiled on the spot
        ((12, 0), ["sm_100", "sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((8, 0), ["gfx90a"], True),  # AMD: no list of these
        ((8, 0), [], True),
    ],
)
def test_which_gpus_there_is_code_for(capability: tuple[int, int], code: list[str], usable: bool) -> None:
    assert has_code_for(capability, code) is usable


@pytest.mark.parametrize(
    ("of", "status", "value", "command"),
    [
        (machine(gpu=gpu()), "note", "not possible", "pip install triton"),
        (machine(gpu=gpu(), system="Windows", cxx=None), "note", "not possible", "pip install triton-windows"),
        (machine(gpu=gpu(), triton=True), "ok", "possible", ""),
        (machine(gpu=gpu(), triton=True, cxx=None), "note", "not possible", "sudo apt-get install g++"),
        (machine(gpu=gpu(capability=(6, 1)), triton=True), "note", "not possible", ""),
        (machine(), "ok", "possible", ""),
        (machine(cxx=None), "note", "not possible", ""),
        (WINDOWS, "note", "leave it off", ""),
        (MAC, "note", "leave it off", ""),
    ],
)
def test_torch_compile(of: Machine, status: str, value: str, command: str) -> None:
    found = check("torch.compile", of)
    assert (found.status, found.value, found.command) == (status, value, command)
    if not of.triton and not of.mps and of.system != "Windows":
        assert "Triton" in found.reason


MISSING = "no C++ compiler (c++, g++ or clang++) on the PATH"


@pytest.mark.parametrize(
    ("of", "facts", "command"),
    [
        (machine(cxx=None), {"kernels": MISSING}, "sudo apt-get install g++"),
        (machine(cxx=None), {"kernels": MISSING, "installer": "dnf"}, "sudo dnf install gcc-c++"),
        (machine(cxx=None), {"kernels": MISSING, "installer": None}, "sudo apt-get install g++"),
        (machine(system="Darwin", cxx=None), {"kernels": MISSING}, "xcode-select --install"),
        (WINDOWS, {"kernels": MISSING}, "wsl --install"),
        (machine(), {"kernels": "/bin/false failed: ", "cxx_variable": "/bin/false"}, "unset CXX"),
        (machine(), {"decoder": "c++ failed: x"}, "sudo apt-get install g++"),
    ],
)
def test_a_compiler_that_is_missing_or_broken_is_a_note(of: Machine, facts: dict[str, str], command: str) -> None:
    found = check("C++ compiler", of, **facts)
    assert found.status == "note" and found.command == command
    assert found.reason in facts.values() and "PyTorch only" in found.fallback


@pytest.mark.parametrize(
    ("of", "status", "said"),
    [
        (machine(), "ok", "16.0 GiB, 12.0 GiB free"),
        (machine(available=2 * GIB), "note", "2.0 GiB free"),
        (machine(available=GIB // 2), "problem", "0.5 GiB free"),
        (machine(available=GIB // 2, gpu=gpu(gib=8)), "ok", "8.0 GiB on the GPU"),
        (machine(gpu=gpu(gib=0.5)), "problem", "0.5 GiB on the GPU"),
    ],
)
def test_memory(of: Machine, status: str, said: str) -> None:
    found = check("memory", of)
    assert found.status == status and said in found.value
    assert bool(found.command) == (status != "ok")


def test_a_small_disk_is_a_problem() -> None:
    found = check("disk", machine(), free=100 * 10**6)
    assert found.status == "problem" and "100 MB free" in found.value and "400 MB" in found.reason
    assert found.command.startswith("niels-gpt quickstart --out")


def test_no_write_access_is_a_problem() -> None:
    found = check("write access", machine(), unwritable=(("/x/runs", "Permission denied"), ("/x", "Read-only")))
    assert found.status == "problem" and "/x/runs: Permission denied" in found.reason and found.command == "cd ~"


@pytest.mark.parametrize(
    ("texts", "config", "status", "command"),
    [
        ((Text("a", True), Text("b", False)), None, "ok", ""),
        ((Text("roam", False, "no notes", optional=True), Text("b", False)), None, "ok", ""),
        ((NO_TEXT,), None, "problem", "pip install chitchat-dataset"),
        (
            (Text("wikitext", False, "from the hub"),),
            "c.json",
            "problem",
            "niels-gpt cache build wikitext --config c.json",
        ),
    ],
)
def test_text(texts: tuple[Text, ...], config: str | None, status: str, command: str) -> None:
    found = check("data", machine(), texts=texts, config=config)
    assert (found.status, found.command) == (status, command)


def test_a_tokenizer_is_needed_by_other_configs_than_the_quickstarts() -> None:
    assert check("tokenizer", machine()).status == "ok"
    found = check("tokenizer", machine(), config="mine.json")
    assert found.status == "problem" and found.command == "niels-gpt tokenizer --config mine.json"
    assert check("tokenizer", machine(), config="mine.json", tokenizer="a/spm.model").status == "ok"
