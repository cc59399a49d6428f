"""The signs of a matrix, packed to one bit per entry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...utils.atomic_files import replacing
from ...utils.bit_packing import WORD, pack_words, unpack_words, words_of
from ...utils.reading import safetensors_header

# Tensor names in files; the number of columns is not a multiple of the word size, so the words do not tell it.
WORDS, NONZERO, COLUMNS = "words", "nonzero", "columns"


@dataclass(frozen=True)
class SignBits:
    """sign(G) [m, n] packed into 32-bit words: 1/32 of G's size in fp32, or 1/16 if G has exact zeros.

    Attributes:
        words: [m, ceil(n / 32)] int32; bit j of word w of a row is 1 if column 32·w + j is positive.
        shape: (m, n).
        nonzero: [m, ceil(n / 32)] int32, bits of nonzero entries; None if no entry is zero.
    """

    words: Tensor
    shape: tuple[int, int]
    nonzero: Tensor | None = None

    @classmethod
    def pack(cls, matrix: Tensor) -> SignBits:
        """Pack a matrix [m, n] of any floating dtype."""
        has_zeros = bool((matrix == 0).any())
        return cls(
            pack_words(matrix > 0), (matrix.shape[0], matrix.shape[1]), pack_words(matrix != 0) if has_zeros else None
        )

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The signs [m, n] as +1, -1 and 0."""
        return self.block(slice(0, self.shape[0]), slice(0, self.shape[1]), dtype)

    def block(self, rows: slice, columns: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """The signs of a block of rows and columns; `columns` starts at a multiple of 32, the word size."""
        count = min(columns.stop, self.shape[1]) - columns.start
        words = slice(columns.start // WORD, columns.start // WORD + words_of(count))
        signs = unpack_words(self.words[rows, words], count, -1.0, 1.0, dtype)
        if self.nonzero is not None:  # zeros were unpacked as -1
            signs = signs * unpack_words(self.nonzero[rows, words], count, 0.0, 1.0, dtype)
        return signs

    @property
    def squares(self) -> float:
        """‖sign(G)‖²: the number of nonzero entries."""
        if self.nonzero is None:
            return float(self.shape[0] * self.shape[1])
        # torch has no popcount: a table of the 256 byte values
        popcount = torch.tensor([bin(octet).count("1") for octet in range(256)], device=self.words.device)
        return float(popcount[self.nonzero.contiguous().view(torch.uint8).int()].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of both bit planes."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.nonzero) if t is not None)

    def to(self, device: torch.device | str) -> SignBits:
        """Copy to a device."""
        return SignBits(self.words.to(device), self.shape, None if self.nonzero is None else self.nonzero.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU."""
        tensors = {WORDS: self.words.cpu(), COLUMNS: torch.tensor([self.shape[1]])}
        return tensors if self.nonzero is None else tensors | {NONZERO: self.nonzero.cpu()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> SignBits:
        """The inverse of `tensors`."""
        words = tensors[WORDS]
        return cls(words, (words.shape[0], int(tensors[COLUMNS])), tensors.get(NONZERO))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically."""
        with replacing(path) as temporary:
            save_file(self.tensors(), str(temporary))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SignBits:
        """Load a file of `save`.

        Raises:
            ValueError: another kind of file, or a truncated one.
        """
        header = safetensors_header(path)
        if not {WORDS, COLUMNS} <= set(header):
            raise ValueError(f"{path} holds no signs: expected tensors {WORDS!r} and {COLUMNS!r}, got {sorted(header)}")
        with safe_open(str(path), "pt") as file:
            return cls.of_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
