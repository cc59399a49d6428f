"""The vLLM plugin's computations and file reading, without vLLM: products by slot, the basis, refused adapters."""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from basis_models import base, reconfigure, rewrite, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import python
from safetensors.torch import load_file, save_file
from tolerances import BF16_FEW, EXACT, FP64, MERGE, check
from torch import Tensor

from lorasb.compat import vllm as private
from lorasb.constants import WEIGHTS_NAME
from lorasb.kernels import row_cores
from lorasb.kernels.block_sizes import padded_rank
from lorasb.vllm import plugin
from lorasb.vllm.plugin import CoreSlots


def reference(
    y: Tensor, x: Tensor, factors: list[tuple[Tensor, Tensor] | None], cores: list[list[Tensor | None]], index: Tensor
) -> Tensor:
    """y_i + B R_k A x_i by a loop over tokens, in fp64."""
    y = y.double().clone()
    sizes = [pair[1].shape[0] if pair is not None else 3 for pair in factors]
    for row, token, slot in zip(y, x.double(), index.tolist(), strict=True):
        for part, pair, core in zip(row.split(sizes), factors, cores[slot], strict=True):
            if slot >= 0 and pair is not None and core is not None:
                a, b = pair[0].double(), pair[1].double()
                part += b[:, : len(core)] @ (core.double() @ (a[: len(core)] @ token))
    return y


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    parts=st.lists(st.sampled_from(["whole", "smaller", "none"]), min_size=1, max_size=3).filter(
        lambda parts: "whole" in parts
    ),
    r=st.integers(2, 9),
    index=st.lists(st.integers(-1, 3), min_size=1, max_size=7),
    extension=st.booleans(),
)
def test_every_token_has_the_adapter_of_its_slot(
    seed: int, parts: list[str], r: int, index: list[int], extension: bool
) -> None:

    def normal(*shape: int) -> Tensor:  # scaled so that sums of nine products are about 1, as the bound below assumes
        return torch.randn(shape, dtype=torch.float64) / 3

    torch.manual_seed(seed)
    ranks = [{"whole": r, "smaller": r - 1, "none": 0}[part] for part in parts]
    factors = [(normal(rank, 5), normal(3, rank)) if rank else None for rank in ranks]
    dtype = torch.float32 if extension else torch.float64  # the extension has no fp64
    made = CoreSlots(factors, [3] * len(parts), 5, 4, dtype, torch.device("cpu"))
    cores: list[list[Tensor | None]] = [[normal(k, k) if k else None for k in ranks] for _ in range(4)]
    cores[1][0] = None
    for slot, of_slot in enumerate(cores):
        made.write(slot, [torch.ones(r, r)] * len(parts))  # overwritten entirely by the next line
        made.write(slot, of_slot)
    made.clear(2)
    cores[2] = [None] * len(parts)
    x, y = torch.randn(len(index), 5, dtype=dtype), torch.randn(len(index), 3 * len(parts), dtype=dtype)
    want = reference(y, x, factors, cores, torch.tensor(index))
    with patch.object(plugin, "GATHERED", 4):
        made.add_to(y, x, torch.tensor(index))
    check(y.double(), want, MERGE if extension else FP64)


@pytest.mark.parametrize("tokens", [1, 17, 64, 200])
def test_in_bf16_it_is_the_sum_of_rounded_products(tokens: int) -> None:
    torch.manual_seed(tokens)
    factors = [(torch.randn(16, 96) / 10, torch.randn(size, 16) / 4) for size in (80, 48)]
    made = CoreSlots(factors, [80, 48], 96, 3, torch.bfloat16, torch.device("cpu"))
    cores: list[list[Tensor | None]] = [[torch.randn(16, 16) / 4 for _ in factors] for _ in range(3)]
    for slot, of_slot in enumerate(cores):
        made.write(slot, of_slot)
    index = torch.randint(-1, 3, (tokens,))
    x, y = torch.randn(tokens, 96).bfloat16(), torch.randn(tokens, 128).bfloat16()
    want = reference(y, x, factors, cores, index)
    before = y.clone()
    made.add_to(y, x, index)
    check(y.double(), want, BF16_FEW)
    check(y[index < 0], before[index < 0], EXACT)


def test_the_kernel_reads_an_index_of_64_bits_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cores, "_places", lambda index, device: index)  # as on a GPU
    torch.manual_seed(0)
    u, cores, index = torch.randn(5, 16), torch.randn(3, 16, 16), torch.tensor([2, -1, 0, 0, 1])
    out = row_cores.RowProducts(cores, index, 1.0).times(u, True, torch.empty(5, padded_rank(16)))
    check(out[:, :16], plugin.times_cores(u, cores, index), MERGE)


@pytest.mark.parametrize("shape", [(4, 6), (4, 5)])
def test_the_basis_of_another_model_is_refused(shape: tuple[int, int]) -> None:
    b = torch.randn(3 if shape[1] == 6 else 7, 4)
    with pytest.raises(ValueError, match=r"expected A \[r, 5\] and B \[3, r\], got A \[4, \d\] and B .*another base"):
        CoreSlots([(torch.randn(shape), b)], [3], 5, 1, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A basis, and two adapters on it in subfolders."""
    path = tmp_path_factory.mktemp("people")
    saved(path, "ada", "emmy")
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of an adapter, for tests to damage."""
    return shutil.copytree(folder / "ada", tmp_path / "copy")


def read(path: Path, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return plugin._cores(path, plugin.read_basis(folder), dtype)


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_cores_are_those_of_the_file_times_the_scaling(scaling: float, folder: Path, copied: Path) -> None:
    reconfigure(copied, scaling=scaling)
    found, file = read(copied, folder), load_file(copied / WEIGHTS_NAME)
    assert set(found) == set(plugin.read_basis(folder).factors)
    for name, core in found.items():
        check(core, scaling * file[f"base_model.model.{name}.lorasb_R"], EXACT)


CHANGES: dict[str, tuple[Callable[[str, Tensor], dict[str, Tensor | None]], str]] = {
    "not finite": (lambda key, core: {key: core * torch.nan}, "NaN or Inf values in torch.float16"),
    "too large": (lambda key, core: {key: torch.full_like(core, 1e6)}, "NaN or Inf values in torch.float16"),
    "other rank": (lambda key, _: {key: torch.zeros(3, 3)}, r"is \[3, 3\], expected \[4, 4\], the rank of the basis"),
    "oblong": (lambda key, core: {key: torch.zeros(len(core), 1)}, r"is \[4, 1\], expected \[4, 4\]"),
    "one layer less": (lambda key, _: {key: None}, "has no R for layer"),
    "one layer more": (lambda *_: {"base_model.model.other.lorasb_R": torch.zeros(4, 4)}, "R for layer 'other', unlike the basis"),
    "other basis": (lambda *_: {"lorasb_factors_digest": torch.zeros(32, dtype=torch.uint8)}, "has other A and B than the basis"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_r_that_does_not_fit_is_refused(name: str, folder: Path, copied: Path) -> None:
    change, message = CHANGES[name]
    rewrite(copied, change)
    with pytest.raises(ValueError, match=message):
        read(copied, folder, torch.float16)


def test_a_folder_without_a_and_b_is_no_basis(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds R alone"):
        plugin.read_basis(shutil.copytree(folder / "ada", folder.parent / "alone"))


def test_another_base_model_is_recognized_by_its_weights(folder: Path, tmp_path: Path) -> None:
    basis = plugin.read_basis(folder)
    assert basis.fingerprint
    weights = {f"{n}.weight": base().get_submodule(n).weight.detach() for n in basis.fingerprint}
    save_file(weights, tmp_path / "model.safetensors")
    plugin.check_base(basis, tmp_path)
    plugin.check_base(basis, tmp_path / "a hub id")
    save_file({name: weight + 0.1 for name, weight in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"made on another base model .*sampled weights"):
        plugin.check_base(basis, tmp_path)


def test_the_plugin_does_nothing_without_a_basis_and_names_another_vllm_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.delenv(plugin.BASIS, raising=False)
    monkeypatch.setattr(private, "install", None)
    plugin.register()
    monkeypatch.setenv(plugin.BASIS, str(folder))
    assert len(private.missing()) == len(private.PRIVATE) + len(private.SIGNATURES)  # vLLM is not installed here
    monkeypatch.setattr(private, "missing", lambda: ["vllm.lora.utils.gone"])
    with pytest.raises(ImportError, match=r"has no vllm.lora.utils.gone: install vllm>=0.31,<0.33, or export"):
        plugin.register()


def test_it_imports_torch_and_safetensors_alone() -> None:
    others = ("peft", "transformers", "accelerate", "typer", "rich", "triton", "vllm")
    code = f"import sys, lorasb.vllm.plugin as one\none.register()\nassert not set(sys.modules) & set({others})"
    python("-c", code)
