"""Signs of a matrix, one bit an entry: packed, unpacked, saved and loaded, and nothing else accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorasb.init.svd import SignBits


@given(m=st.integers(0, 9), n=st.integers(1, 70), zeros=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_and_unpacking_is_the_sign(m: int, n: int, zeros: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, n, generator=g)
    if zeros:
        matrix[torch.rand(m, n, generator=g) < 0.3] = 0.0
    bits = SignBits.pack(matrix)
    assert torch.equal(bits.unpack(), torch.sign(matrix))
    assert bits.squares == float(torch.count_nonzero(matrix))
    assert (bits.nonzero is None) == (not bool((matrix == 0).any()))
    assert bits.words.shape == (m, -(-n // 32))


def test_bits_take_a_thirty_second_of_the_gradient() -> None:
    assert SignBits.pack(torch.randn(64, 96)).nbytes * 32 == 64 * 96 * 4


def test_bits_are_saved_and_loaded_unchanged(tmp_path: Path) -> None:
    matrix = torch.randn(33, 45)
    for changed in (matrix, matrix.clone().fill_diagonal_(0.0)):
        SignBits.pack(changed).save(tmp_path / "bits.safetensors")
        found = SignBits.load(tmp_path / "bits.safetensors")
        assert torch.equal(found.unpack(), torch.sign(changed))
        assert found.shape == (33, 45)


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bits.safetensors"
    save_file({"other": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match=r"holds no signs: expected tensors 'words' and 'columns', got \['other'\]"):
        SignBits.load(path)
    SignBits.pack(torch.randn(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        SignBits.load(path)
