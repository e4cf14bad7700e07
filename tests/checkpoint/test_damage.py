"""Nothing comes out of a damaged or hostile checkpoint file: bits flipped, ends cut, code pickled, sizes made up."""

import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from niels_gpt.checkpoint import is_good, load_checkpoint
from niels_gpt.config import to_dict
from tests.checkpoint.samples import TINY, equal, save, trained


def test_random_bit_flips_never_load_wrong_data(tmp_path):
    path = tmp_path / "a.pt"
    save(path, resume={"a": 1})
    good, intact = load_checkpoint(path, device="cpu"), path.read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(400):
        bit = draw.randrange(8 * len(intact))
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert equal(load_checkpoint(path, device="cpu"), good), f"flipping bit {bit} loads other data"
        except ValueError:
            refused += 1
    assert refused > 320  # the rest hit padding


def test_a_flipped_weight_is_named_as_damage_although_torch_load_takes_it(tmp_path):
    path = tmp_path / "a.pt"
    model = save(path)
    content = bytearray(path.read_bytes())
    content[content.find(model.blocks[0].attn.qkv.weight.detach().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    assert not is_good(path)
    with pytest.raises(ValueError, match=r"damaged: \S+/data/\d+ does not match"):
        load_checkpoint(path, device="cpu")


def test_cut_files_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    save(path)
    intact, draw = path.read_bytes(), random.Random(1)
    for length in [0, 1, len(intact) - 1, *(draw.randrange(len(intact)) for _ in range(197))]:
        path.write_bytes(intact[:length])
        assert not is_good(path)
        with pytest.raises(ValueError, match=r"damaged|not a checkpoint"):
            load_checkpoint(path, device="cpu")


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def test_no_form_of_pickled_code_runs(tmp_path):
    sentinel = tmp_path / "ran"
    code = Malicious(sentinel)
    model, _ = trained()
    content = {"model_cfg": to_dict(TINY), "train_cfg": {"x": code}, "model_state": model.state_dict(), "step": 1}
    inner = io.BytesIO()
    torch.save(code, inner, _use_new_zipfile_serialization=False)

    class Nested:  # torch's own loader of embedded storages, as a gadget
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    forms = {
        "zip": lambda f: torch.save(content, f),
        "bare": lambda f: torch.save(code, f),
        "nested": lambda f: torch.save({**content, "train_cfg": {"x": Nested()}}, f),
        "legacy": lambda f: torch.save(content, f, _use_new_zipfile_serialization=False),
        "raw": lambda f: Path(f).write_bytes(pickle.dumps(content)),
        "numpy": lambda f: torch.save({**content, "train_cfg": {"x": np.zeros(2)}}, f),
    }
    for name, write in forms.items():
        path = tmp_path / f"{name}.pt"
        write(path)
        with pytest.raises(ValueError) as caught:
            load_checkpoint(path, device="cpu")
        zipped = name in ("zip", "bare", "nested", "numpy")
        assert ("contains pickled code" if zipped else "not a checkpoint") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not sentinel.exists(), f"the {name} form ran"
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert sentinel.is_dir(), "the code above is harmless, the test proves nothing"


def rewritten(source: Path, target: Path, change) -> None:
    """Copy a zip with every member changed and its checksums made right again."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_small_files_that_claim_to_be_huge_are_refused(tmp_path):
    model, _ = trained()
    content = {"model_cfg": to_dict(TINY), "train_cfg": {}, "model_state": model.state_dict(), "step": 1}
    stretched = {**content, "train_cfg": {"x": torch.zeros(1).expand(10**13)}}
    torch.save(stretched, tmp_path / "stretched.pt")
    torch.save({**content, "train_cfg": {"x": torch.zeros(2000)}}, tmp_path / "small.pt")
    numbers = {b"M\xd0\x07": b"J\xff\xff\xff\x7f"}  # 2000 -> 2**31 - 1, in storage and shape

    def enlarge(name: str, member: bytes) -> bytes:
        for old, new in numbers.items() if name.endswith("data.pkl") else ():
            assert old in member
            member = member.replace(old, new)
        return member

    rewritten(tmp_path / "small.pt", tmp_path / "enlarged.pt", enlarge)
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50_000_000))
    with zipfile.ZipFile(tmp_path / "overlap.pt", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", bytes(10_000))
        archive.filelist += archive.filelist * 9  # the directory lists one member ten times
    for name in ("stretched", "enlarged", "bomb", "overlap"):
        with pytest.raises(ValueError) as caught:
            load_checkpoint(tmp_path / f"{name}.pt", device="cpu")
        if name in ("bomb", "overlap"):
            assert "not one that torch.save writes" in str(caught.value)
