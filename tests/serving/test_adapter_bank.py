"""A bank of adapters: results equal those of the model's own adapters; names, files, threads, memory, values of R."""

import copy
import gc
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from basis_models import (
    NAMES,
    a_layer,
    answer,
    base,
    cores_of,
    moved_to_bank,
    out,
    reconfigure,
    rewrite,
    saved,
    with_basis,
    with_users,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batches_for, generated, make
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from quantized_models import quantized
from tolerances import BF16_FEW, EXACT, MERGE, Tolerance, check, check_equal
from transformers import GenerationConfig

import lorasb
from lorasb.layers.lookup import layers_with
from lorasb.serving.bank import zeros_in_huge_pages


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, MERGE), (torch.bfloat16, BF16_FEW)])
def test_rows_are_those_of_the_models_own_adapters(dtype: torch.dtype, tolerance: Tolerance) -> None:
    model = with_users(*NAMES)
    pairs = [("ada", "grace"), ("emmy", "__base__"), ("grace", "grace"), ("__base__", "ada"), ("default", "emmy")]
    wanted = [out(model, *pair) for pair in pairs]
    bank = moved_to_bank(model, dtype=dtype)
    for pair, want in zip(pairs, wanted, strict=True):
        check(out(model, *pair), want, tolerance)
    assert bank.adapter_bytes == dtype.itemsize * sum(c.r**2 for c in bank.columns.values())


def test_generation_by_beams_is_that_of_the_models_own_adapters() -> None:
    model, prompts = with_users(*NAMES), batches_for("llama")[0]["input_ids"]
    options = {"adapter_names": ["grace", "ada"], "num_beams": 3}
    want = generated(model, prompts, **options)
    moved_to_bank(model, block=1)
    assert torch.equal(generated(model, prompts, **options), want)


@pytest.mark.parametrize("kind", ["own", "nf4", "int8", "unknown"])
def test_a_quantized_base_serves_rows_too(kind: str) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = lorasb.patch(quantized(kind), r=4, init="random", target_modules=targets).eval()
    bank = lorasb.AdapterBank(model)
    for seed, name in enumerate(("ada", "grace")):
        bank.add(name, cores_of(bank, seed))
    mixed = out(model, "ada", "grace")
    for row, name in enumerate(("ada", "grace")):
        for n, core in bank.cores(name).items():
            bank.layers[n].lorasb_R["default"].data.copy_(core)
        check(mixed[row], out(model)[row], MERGE)
    assert not torch.equal(mixed[0], out(model, "__base__", "grace")[0])


def test_loading_reads_folders_and_names_what_is_wrong(tmp_path: Path) -> None:
    model = saved(tmp_path / "good", *NAMES)
    want = out(model, "ada", "grace")
    shutil.copytree(tmp_path / "good" / "ada", tmp_path / "good" / "cut")
    file = tmp_path / "good" / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (tmp_path / "good" / "poor").mkdir()
    with_basis(init_seed=9).save_pretrained(tmp_path / "good" / "other")
    served = PeftModel.from_pretrained(base(), tmp_path / "good").eval()
    bank = lorasb.AdapterBank(served)
    report = bank.load(*(tmp_path / "good" / name for name in (*NAMES, "cut", "poor", "other")))
    assert report.loaded == list(NAMES)
    assert set(report.failed) == {"cut", "poor", "other"}
    assert "has other A and B than the basis" in report.failed["other"]
    check(out(served, "ada", "grace"), want, MERGE)
    with pytest.raises(
        ValueError, match=r"two adapters are called 'ada', .*ada and .*other: load\(other_name=folder\)"
    ):
        bank.load(tmp_path / "good" / "ada", ada=tmp_path / "good" / "other")


def test_memory_is_r_squared_times_layers_and_grows_by_blocks() -> None:
    model = with_basis()
    bank = lorasb.AdapterBank(model, block=4)
    for i in range(5):
        bank.add(f"user-{i}")
    assert bank.storage.nbytes == 8 * bank.adapter_bytes
    for i in range(5):
        bank.remove(f"user-{i}")
    bank.add("another")
    assert bank.storage.nbytes == 8 * bank.adapter_bytes
    assert len(bank) == 1


def test_those_used_least_recently_wait_in_host_memory_and_come_back() -> None:
    model = with_users(*NAMES)
    wanted = {pair: out(model, *pair) for pair in (("ada", "emmy"), ("grace", "ada"), ("emmy", "grace"))}
    bank = moved_to_bank(model, block=1, resident=2)
    for pair in (*wanted, *reversed(wanted)):
        check(out(model, *pair), wanted[pair], MERGE)
        assert len(bank.storage) == 2
        assert len(bank) == 3
    with pytest.raises(
        ValueError, match=r"all 2 resident adapters are in use: expected AdapterBank\(resident=\.\.\.\) of at least"
    ):
        bank.serving(NAMES).__enter__()
    check(out(model, "ada", "emmy"), wanted["ada", "emmy"], MERGE)  # the failed call reserves nothing


@given(
    steps=st.lists(st.tuples(st.sampled_from(["add", "remove", "serve"]), st.integers(0, 5)), max_size=30),
    resident=st.sampled_from([None, 1, 3]),
)
@settings(max_examples=30, deadline=None)
def test_any_order_of_coming_and_going_keeps_values(steps: list[tuple[str, int]], resident: int | None) -> None:
    bank = lorasb.AdapterBank(with_basis(), block=2, resident=resident)
    expected: dict[str, float] = {}
    for step, (kind, i) in enumerate(steps):
        name = f"user-{i}"
        if kind == "add":
            bank.add(name, {n: torch.full((c.r, c.r), float(step)) for n, c in bank.columns.items()})
            expected[name] = float(step)
        elif name not in expected:
            with pytest.raises(KeyError, match=f"no adapter '{name}' in the bank"):
                bank.remove(name) if kind == "remove" else bank.serving([name]).__enter__()
        elif kind == "remove":
            bank.remove(name)
            del expected[name]
        else:
            with bank.serving([name, "__base__"]) as (slot, none):
                assert none == -1
                assert bank.storage[slot].eq(expected[name]).all()
    assert bank.names == sorted(expected)
    for name, value in expected.items():
        assert all(core.eq(value).all() for core in bank.cores(name).values())


def test_threads_serve_while_others_add() -> None:
    model = with_users(*NAMES)
    want = out(model, "ada", "grace")
    bank = moved_to_bank(model, block=1, resident=8)

    def come_and_go() -> None:
        for i in range(200):
            bank.add(f"user-{i}")
            if i >= 4:
                bank.remove(f"user-{i - 4}")

    check(out(model, "ada", "grace"), want, MERGE)
    with ThreadPoolExecutor(1) as thread:
        others = thread.submit(come_and_go)
        while not others.done():
            check(out(model, "ada", "grace"), want, MERGE)
    others.result()  # raises the thread's error, if any
    check(out(model, "ada", "grace"), want, MERGE)


def test_an_adapter_of_the_model_is_copied_with_its_scale_and_saved_ones_are_what_they_were() -> None:
    model = with_users("ada")
    for layer in layers_with(model, "ada").values():
        layer.set_scale("ada", 2.0)
    want = out(model, "ada", "ada")
    bank = lorasb.AdapterBank(model)
    bank.add("copy", "ada")
    check(out(model, "copy", "copy"), want, MERGE)
    bank.detach()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): copy\. The model has ada, default"):
        out(model, "copy", "copy")


def test_the_scale_of_the_basis_is_not_that_of_the_bank(tmp_path: Path) -> None:
    want = out(saved(tmp_path, "ada").eval(), "ada", "ada")
    model = with_users()
    bank = lorasb.AdapterBank(model)
    bank.load(before=tmp_path / "ada")
    for layer in layers_with(model, "default").values():
        layer.set_scale("default", 0.0)
    bank.load(later=tmp_path / "ada")
    for name in ("before", "later"):
        check(out(model, name, name), want, MERGE)


def test_a_bank_follows_its_model_to_another_device() -> None:
    model = with_users("ada")
    bank = moved_to_bank(model)
    model.to("meta")
    with torch.no_grad():
        logits = model(torch.zeros((1, 3), dtype=torch.int64, device="meta"), adapter_names=["ada"]).logits
    assert logits.device == bank.storage.device == torch.device("meta")
    assert bank.names == ["ada"]


def test_names_and_values_that_cannot_be_are_refused() -> None:
    model = with_users("ada")
    bank = lorasb.AdapterBank(model)
    name, whole = next(iter(bank.columns)), cores_of(bank)
    for cores, message in (
        ({}, rf"expected R \[4, 4\] of layer '{name}', got nothing"),
        (whole | {name: torch.zeros(3, 3)}, r"got \[3, 3\] in torch\.float32"),
        ("nobody", "expected an adapter of the model on the A and B of 'default', got 'nobody'"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.add("new", cores)
        assert "new" not in bank
    for call, error, message in (
        (lambda: bank.add("ada"), ValueError, "the model itself has an adapter 'ada'"),
        (lambda: bank.add(3), ValueError, "expected a string as the adapter's name, got 3"),
        (lambda: out(model, "nobody", "ada"), ValueError, r"nobody\. The model has ada, default, and its bank 0"),
        (lambda: lorasb.AdapterBank(model), ValueError, r"bank\.detach\(\) first"),
        (lambda: lorasb.AdapterBank(lorasb.patch(base(), r=4)), ValueError, "has not been initialized"),
        (lambda: lorasb.AdapterBank(with_basis(), dtype=torch.float64), TypeError, "expected dtype fp32, bf16 or fp16"),
        (lambda: lorasb.AdapterBank(with_basis(), resident=0), ValueError, "expected block and resident of 1 or more"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_bank_is_detached_between_batches_and_takes_no_other_away() -> None:
    model = with_users()
    first = moved_to_bank(model)
    first.add("ada", cores_of(first))
    with first.serving(["ada"]), pytest.raises(RuntimeError, match="the bank serves a batch at the moment"):
        first.detach()
    assert not first._in_use
    first.detach()
    second = lorasb.AdapterBank(model)
    second.add("emmy", cores_of(second))
    want = out(model, "emmy", "emmy")
    first.detach()
    check(out(model, "emmy", "emmy"), want, MERGE)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="the bank's model, or its basis, is gone"):
        second.load()


def test_a_copied_model_keeps_its_bank() -> None:
    model = with_users(*NAMES)
    want = out(model, "ada", "grace")
    moved_to_bank(model)
    again = copy.deepcopy(model)
    check(out(again, "ada", "grace"), want, MERGE)
    assert a_layer(again).stored_cores.bank is not a_layer(model).stored_cores.bank
    check(out(model, "ada", "grace"), out(again, "ada", "grace"), EXACT)


def test_the_basis_of_a_bank_is_neither_deleted_nor_replaced(tmp_path: Path) -> None:
    model = with_users(*NAMES)
    want = out(model, "ada", "grace")
    moved_to_bank(model)
    with_basis(init_seed=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the basis of the model's bank \(bank\.detach\(\)\), whose"):
        model.delete_adapter("default")
    for act in (
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: hotswap_adapter(model, str(tmp_path), "default"),
        lambda: lorasb.initialize(model, batches_for("llama"), lr=1e-3, progress=False),
    ):
        with pytest.raises(
            ValueError, match=r"'default' is the basis of the model's bank .*, whose R would mean nothing"
        ):
            act()
    check(out(model, "ada", "grace"), want, MERGE)


def test_files_with_more_than_r_are_left_out_and_another_scaling_is_taken_along(tmp_path: Path) -> None:
    model = with_users("ada")
    model.save_pretrained(tmp_path)
    want = out(model, "ada", "ada")
    for name in ("more", "odd", "null"):
        shutil.copytree(tmp_path / "ada", tmp_path / name)
    reconfigure(tmp_path / "ada", scaling=3.0)
    reconfigure(tmp_path / "null", scaling=None)
    rewrite(tmp_path / "more", lambda *_: {"score.weight": torch.ones(2)})
    header = b'{"a":{"dtype":"X32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "odd" / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    model.set_adapter("default")
    model.delete_adapter("ada")
    bank = lorasb.AdapterBank(model)
    report = bank.load(tmp_path)  # a saved model's folder: its other adapters
    assert report.loaded == ["ada"]
    assert set(report.failed) == {"more", "odd", "null"}
    assert "has more than R (score.weight, ...)" in report.failed["more"]
    for n, core in bank.cores("ada").items():
        bank.layers[n].lorasb_R["default"].data.copy_(core / 3)
    check(out(model, "default", "default"), want, MERGE)


def test_a_name_of_both_the_model_and_the_bank_is_refused() -> None:
    model = with_users(*NAMES)
    bank = moved_to_bank(model)
    model.add_adapter("ada", lorasb.LoRASBConfig(basis="default"))
    with pytest.raises(ValueError, match=r"both the model and its bank have an adapter 'ada': bank\.remove\('ada'\)"):
        out(model, "ada", "grace")
    bank.remove("ada")
    assert torch.isfinite(out(model, "ada", "grace")).all()


def test_a_bank_grows_in_inference_mode_and_outside() -> None:
    with torch.inference_mode():
        bank = lorasb.AdapterBank(with_basis(), block=1)
        bank.add("ada")
    bank.add("ada", {n: torch.ones(c.r, c.r) for n, c in bank.columns.items()})
    bank.add("grace")
    assert all(core.eq(1).all() for core in bank.cores("ada").values())
    assert lorasb.AdapterBank(torch.compile(with_basis(), backend="eager")).layers


RANKS = {"q_proj": 2, "down_proj": 3}


def test_every_layer_has_its_own_entries_whatever_their_ranks() -> None:
    bank = lorasb.AdapterBank(with_basis(rank_pattern=RANKS))
    assert len({c.r for c in bank.columns.values()}) == 3
    given = cores_of(bank)
    bank.add("ada", {name: core.T for name, core in given.items()})
    check_equal(bank.cores("ada"), {name: core.T for name, core in given.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_values_whose_sum_is_not_are_taken(dtype: torch.dtype) -> None:
    bank = lorasb.AdapterBank(with_basis(), dtype=dtype)
    largest = torch.finfo(dtype).max
    bank.add("ada", {name: torch.full_like(core, largest) for name, core in cores_of(bank).items()})
    assert all((core == largest).all() for core in bank.cores("ada").values())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_one_entry_that_is_not_finite_is_enough(value: str) -> None:
    bank = lorasb.AdapterBank(with_basis(rank_pattern=RANKS))
    given = cores_of(bank)
    next(reversed(given.values()))[-1, -1] = float(value)
    with pytest.raises(ValueError, match="adapter 'ada' has NaN or Inf values"):
        bank.add("ada", given)
    assert "ada" not in bank


def mapping_of(address: int) -> tuple[str, str]:
    """Permissions and flags of the memory mapping that holds an address."""
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        places, permissions, *_ = mapping.split()
        start, end = (int(place, 16) for place in places.split("-"))
        if start <= address < end:
            return permissions, mapping.partition("VmFlags:")[2]
    raise LookupError(hex(address))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the kernel has no huge pages")
def test_large_memory_is_zero_and_private_and_asks_for_huge_pages() -> None:
    found = zeros_in_huge_pages(1024, 4096, torch.bfloat16, torch.device("cpu"))
    assert (found.shape, found.dtype) == ((1024, 4096), torch.bfloat16)
    assert not found.any()
    found += 1
    assert found.sum(dtype=torch.float64) == 1024 * 4096
    permissions, flags = mapping_of(found.data_ptr())
    assert permissions == "rw-p"  # shared memory has no huge pages unless the system's shmem_enabled says so
    assert "hg" in flags.split()


def test_an_adapter_with_a_head_is_not_copied_into_a_bank() -> None:
    model = lorasb.patch(make("roberta"), r=4, init="kaiming").eval()
    lorasb.add_adapters(model, ["ada"])
    bank = lorasb.AdapterBank(model)
    with pytest.raises(
        ValueError, match=r"adapter 'ada' has more than R \(trained modules or token rows\): serve it by"
    ):
        bank.add("copy", "ada")


def test_capacity_is_no_larger_than_what_is_resident_and_loading_again_takes_none(tmp_path: Path) -> None:
    saved(tmp_path, *NAMES)
    model = PeftModel.from_pretrained(base(), tmp_path)
    bank = lorasb.AdapterBank(model, resident=2)
    bank.load(tmp_path)
    assert len(bank.storage) == 2
    bank.detach()
    bank = lorasb.AdapterBank(model, block=2)
    for _ in range(3):
        bank.load(tmp_path)
    assert len(bank.storage) == 4


def test_a_folder_that_is_the_current_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "ada")
    monkeypatch.chdir(tmp_path / "ada")
    assert lorasb.AdapterBank(PeftModel.from_pretrained(base(), tmp_path)).load(".").loaded == ["ada"]


def test_a_pickled_model_has_no_bank() -> None:
    model = with_users("ada")
    lorasb.AdapterBank(model)
    again = pickle.loads(pickle.dumps(model))
    assert a_layer(again).stored_cores is None
    check(answer(again, "ada"), answer(model, "ada"), EXACT)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
def test_copies_of_rows_follow_a_generation_config(options: dict[str, object]) -> None:
    model, prompts = with_users("ada"), batches_for("llama")[0]["input_ids"]
    given = GenerationConfig(max_new_tokens=4, pad_token_id=0, **options)
    names, copies = ["ada", "default"], options.get("num_return_sequences", 1)
    found = model.generate(prompts, adapter_names=names, generation_config=given).view(2, copies, -1)
    positional = model.generate(prompts, given, adapter_names=names).view(2, copies, -1)
    for row, name in enumerate(names):
        model.set_adapter(name)
        want = model.generate(prompts[row : row + 1], generation_config=given)
        assert torch.equal(found[row], want)
        assert torch.equal(positional[row], want)


def test_a_bank_of_a_cast_model_takes_what_it_saves(tmp_path: Path) -> None:
    model = with_users("ada")
    model.save_pretrained(tmp_path / "wide")
    bank = lorasb.AdapterBank(model)
    model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "cast")
    report = bank.load(one=tmp_path / "wide" / "ada", two=tmp_path / "cast" / "ada")
    assert report.failed == {}
