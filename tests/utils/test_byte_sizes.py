"""Sizes in bytes as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from lorasb.utils.byte_sizes import parse_size


@pytest.mark.parametrize(
    ("text_", "size"), [("6GB", 6e9), ("512 MiB", 512 * 2**20), (1e6, 1e6), ("3", 3.0), (None, None), ("1.5kb", 1500.0)]
)
def test_a_size_is_a_number_with_or_without_a_unit(text_: Any, size: float | None) -> None:
    assert parse_size(text_) == size
