"""What a bank takes as R's: of one rank or of several, of any order in memory, as large as a dtype has, and finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from basis_models import with_basis
from torch import Tensor

import lorasb

RANKS: list[dict[str, Any]] = [{}, {"rank_pattern": {"q_proj": 2, "down_proj": 3}}]


def cores_of(bank: lorasb.AdapterBank) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(c.r, c.r, generator=g) for name, c in bank.columns.items()}


@pytest.mark.parametrize("pattern", RANKS)
def test_every_layer_has_its_own_entries_whatever_their_ranks(pattern: dict[str, Any]) -> None:
    bank = lorasb.AdapterBank(with_basis(**pattern))
    assert len({c.r for c in bank.columns.values()}) == (3 if pattern else 1)
    given = cores_of(bank)
    bank.add("ada", {name: core.T for name, core in given.items()})
    found = bank.cores("ada")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], core.T) for name, core in given.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_values_whose_sum_is_not_are_taken(dtype: torch.dtype) -> None:
    bank = lorasb.AdapterBank(with_basis(), dtype=dtype)
    largest = torch.finfo(dtype).max
    bank.add("ada", {name: torch.full_like(core, largest) for name, core in cores_of(bank).items()})
    assert all((core == largest).all() for core in bank.cores("ada").values())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("pattern", RANKS)
def test_one_entry_that_is_not_finite_is_enough(pattern: dict[str, Any], value: str) -> None:
    bank = lorasb.AdapterBank(with_basis(**pattern))
    given = cores_of(bank)
    next(reversed(given.values()))[-1, -1] = float(value)
    with pytest.raises(ValueError, match="adapter 'ada' has NaN or Inf values"):
        bank.add("ada", given)
    assert "ada" not in bank
