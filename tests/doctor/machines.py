"""Machines that are not here, as facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from niels_gpt.doctor.checks import Surroundings, Text
from niels_gpt.machine import Gpu, Machine

GIB = 2**30
LAPTOP = Machine(
    system="Linux",
    processor="Some CPU",
    cores=4,
    memory=16 * GIB,
    available=12 * GIB,
    cpu_bf16=False,
    gpu=None,
    mps=False,
    cxx="/usr/bin/c++",
    triton=False,
    torch="2.13.0",
    python="3.11.7",
)
FINE = Surroundings(
    folder="/home/me/niels",
    free=50 * 10**9,
    needed=400 * 10**6,
    unwritable=(),
    kernels=None,
    decoder=None,
    cxx_variable=None,
    installer="apt-get",
    texts=(Text("chitchat", cached=False), Text("primer", cached=True)),
    tokenizer=None,
)


def machine(**changes: Any) -> Machine:
    return replace(LAPTOP, **changes)


def around(**changes: Any) -> Surroundings:
    return replace(FINE, **changes)


def gpu(name: str = "A GPU", gib: float = 24.0, capability: tuple[int, int] = (8, 6), usable: bool = True) -> Gpu:
    return Gpu(name, int(gib * GIB), int(gib * GIB), capability, usable)
