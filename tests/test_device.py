"""Device and precision choices, as tables."""

import os
import platform
import subprocess
import sys

import psutil
import pytest
import torch

from niels_gpt import device
from niels_gpt.device import (
    choose_precision,
    get_device,
    memory_in_use,
    resolve_device,
    synchronize,
    use_deterministic_kernels,
)

BF16, FP16 = torch.bfloat16, torch.float16


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cuda: bool = False,
    mps: bool = False,
    built: bool = True,
    capability: int = 8,
    cpu_bf16: bool = False,
) -> None:
    """Pretend to have this hardware."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: cpu_bf16)


@pytest.mark.parametrize(
    ("cuda", "mps", "built", "expected"),
    [
        (True, True, True, "cuda"),
        (True, False, False, "cuda"),
        (False, True, True, "mps"),
        (False, True, False, "cpu"),
        (False, False, True, "cpu"),
    ],
)
def test_cuda_before_mps_before_cpu(monkeypatch, cuda, mps, built, expected):
    machine(monkeypatch, cuda=cuda, mps=mps, built=built)
    assert get_device() == resolve_device(None) == resolve_device("auto") == expected


def test_a_named_device_must_exist(monkeypatch):
    machine(monkeypatch)
    assert resolve_device("cpu") == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"'{name}' was asked for"):
            resolve_device(name)
    with pytest.raises(ValueError, match=r"'tpu'.*cpu, mps, cuda"):
        resolve_device("tpu")
    machine(monkeypatch, cuda=True, mps=True)
    assert [resolve_device(name) for name in device.DEVICES] == list(device.DEVICES)


@pytest.mark.parametrize(
    ("name", "amp", "amp_dtype", "has", "dtype", "scaler", "said"),
    [
        ("cuda", "auto", "fp16", {"capability": 8}, BF16, False, "amp=true (bf16)"),
        ("cuda", "auto", "bf16", {"capability": 7}, FP16, True, "amp=true (fp16)"),
        ("mps", "auto", "fp16", {}, None, False, "amp=false"),
        ("cpu", "auto", "fp16", {}, None, False, "amp=false"),
        ("cpu", "auto", "fp16", {"cpu_bf16": True}, BF16, False, "amp=true (bf16)"),
        ("cuda", True, "fp16", {}, FP16, True, "amp=true (fp16)"),
        ("cuda", True, "bf16", {}, BF16, False, "amp=true (bf16)"),
        ("mps", True, "fp16", {}, FP16, False, "amp=true (fp16)"),
        ("cpu", True, "fp16", {}, None, False, "amp=false"),
        ("cpu", True, "bf16", {}, BF16, False, "amp=true (bf16)"),
        ("cuda", False, "fp16", {}, None, False, "amp=false"),
        ("cuda", False, "fp32", {}, None, False, "amp=false"),
    ],
)
def test_precision_table(monkeypatch, capsys, name, amp, amp_dtype, has, dtype, scaler, said):
    machine(monkeypatch, **has)
    chosen = choose_precision(name, amp, amp_dtype)
    assert (chosen.dtype, chosen.needs_scaler, chosen.describe()) == (dtype, scaler, said)
    assert chosen.reason
    assert ("warning" in capsys.readouterr().err) == (name == "mps" and amp is True)


@pytest.mark.parametrize("amp_dtype", ["fp32", "float16", ""])
def test_what_autocast_cannot_use_is_refused(amp_dtype):
    with pytest.raises(ValueError, match="unsupported amp_dtype"):
        choose_precision("cuda", True, amp_dtype)


@pytest.mark.parametrize("amp", ["yes", None, 2])
def test_amp_is_true_false_or_auto(amp):
    with pytest.raises(ValueError, match="'auto'"):
        choose_precision("cpu", amp, "bf16")


def test_autocast_changes_the_products_and_nothing_else():
    a = torch.randn(4, 4)
    with choose_precision("cpu", False, "bf16").autocast():
        assert (a @ a).dtype == torch.float32
    with choose_precision("cpu", True, "bf16").autocast():
        assert (a @ a).dtype == BF16
    assert a.dtype == torch.float32


def test_cpu_needs_no_waiting_and_reports_its_resident_memory():
    synchronize("cpu")
    assert abs(memory_in_use("cpu") - psutil.Process().memory_info().rss) < 2**26


def test_glibc_agrees_to_keep_freed_memory() -> None:
    """What it gains is in docs/log.md: whether a page is faulted in again depends on too much for a test."""
    ask = "from niels_gpt.device import keep_freed_memory; print(keep_freed_memory(), keep_freed_memory())"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, check=True, text=True).stdout
    assert said.split() == [str(platform.libc_ver()[0] == "glibc")] * 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere the allocator decides")
def test_freed_memory_goes_back_when_asked() -> None:
    work = (
        "from niels_gpt.device import keep_freed_memory, memory_in_use, return_freed_memory\n"
        "keep_freed_memory()\n"
        "before = memory_in_use('cpu')\n"
        "taken = [b'x' * 100_000 for _ in range(2000)]\n"
        "del taken[:-1]\n"  # the last keeps the heap from shrinking by itself
        "kept = memory_in_use('cpu')\n"
        "return_freed_memory()\n"
        "print(kept - before, memory_in_use('cpu') - before)"
    )
    said = subprocess.run([sys.executable, "-c", work], capture_output=True, check=True, text=True).stdout
    kept, left = map(int, said.split())
    assert kept > 150e6 and left < 50e6


def test_deterministic_kernels_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_forcing_amp_on_mps_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert not choose_precision("mps", "auto", "fp16").needs_scaler
    assert capsys.readouterr().err == ""
    assert choose_precision("mps", True, "fp16").name == "fp16"
    assert "AMP on MPS is known to make losses diverge; set amp to false" in capsys.readouterr().err
