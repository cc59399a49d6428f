"""The signs of a matrix, one bit an entry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...utils.atomic_files import replacing, safetensors_header
from ...utils.bit_packing import WORD, pack_words, unpack_words, words_of

WORDS, NONZERO, COLUMNS = "words", "nonzero", "columns"


@dataclass(frozen=True)
class SignBits:
    """sign(G) [m, n] in words of 32: 1/32 of G in fp32, twice that where G has exact zeros.

    Attributes:
        words: [m, ceil(n / 32)], int32; bit j of word w of a row is 1 where column 32·w + j is positive.
        shape: (m, n).
        nonzero: the same for entries that are not zero; None where none is zero.
    """

    words: Tensor
    shape: tuple[int, int]
    nonzero: Tensor | None = None

    @classmethod
    def pack(cls, matrix: Tensor) -> SignBits:
        """From a matrix [m, n] of any floating dtype."""
        zero = bool((matrix == 0).any())
        return cls(
            pack_words(matrix > 0), (matrix.shape[0], matrix.shape[1]), pack_words(matrix != 0) if zero else None
        )

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """+1, -1 and 0 [m, n]."""
        return self.block(slice(0, self.shape[0]), slice(0, self.shape[1]), dtype)

    def block(self, rows: slice, columns: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Part of the signs; `columns` begins at a multiple of 32."""
        count = min(columns.stop, self.shape[1]) - columns.start
        place = slice(columns.start // WORD, columns.start // WORD + words_of(count))
        signs = unpack_words(self.words[rows, place], count, -1.0, 1.0, dtype)
        if self.nonzero is not None:
            signs = signs * unpack_words(self.nonzero[rows, place], count, 0.0, 1.0, dtype)
        return signs

    @property
    def squares(self) -> float:
        """‖sign(G)‖²: the number of entries that are not zero."""
        if self.nonzero is None:
            return float(self.shape[0] * self.shape[1])
        table = torch.tensor([bin(octet).count("1") for octet in range(256)], device=self.words.device)
        return float(table[self.nonzero.contiguous().view(torch.uint8).int()].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the words."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.nonzero) if t is not None)

    def to(self, device: torch.device | str) -> SignBits:
        """The same on another device."""
        return SignBits(self.words.to(device), self.shape, None if self.nonzero is None else self.nonzero.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """As tensors on the CPU, for a file."""
        found = {WORDS: self.words.cpu(), COLUMNS: torch.tensor([self.shape[1]])}
        return found if self.nonzero is None else found | {NONZERO: self.nonzero.cpu()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> SignBits:
        """From what `tensors` gave."""
        words = tensors[WORDS]
        return cls(words, (words.shape[0], int(tensors[COLUMNS])), tensors.get(NONZERO))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        with replacing(path) as temporary:
            save_file(self.tensors(), str(temporary))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SignBits:
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file, or a truncated one.
        """
        header = safetensors_header(path)
        if not {WORDS, COLUMNS} <= set(header):
            raise ValueError(f"{path} holds no signs: expected tensors {WORDS!r} and {COLUMNS!r}, got {sorted(header)}")
        with safe_open(str(path), "pt") as file:
            return cls.of_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
