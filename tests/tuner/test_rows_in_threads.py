"""Batches with adapters by row in several threads at once: each has its own, and one without names the active adapter."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from basis_models import with_users
from linear_groups import groups
from models import batches_for
from torch import Tensor

import lorasb

NAMES = ("ada", "emmy", "grace")
CALLS: tuple[list[str] | None, ...] = (["ada", "grace"], ["__base__", "emmy"], None, ["grace", "default"])


def call(model: Any, names: list[str] | None) -> Tensor:
    batch = {key: value for key, value in batches_for("llama")[0].items() if key != "labels"}
    with torch.no_grad():
        return model(**batch) if names is None else model(**batch, adapter_names=names)


@pytest.mark.parametrize("in_bank", [False, True])
def test_each_thread_has_its_own_rows(in_bank: bool) -> None:
    model = with_users(*NAMES, target_modules="all-linear")
    if in_bank:
        bank = lorasb.AdapterBank(model)
        cores = {name: bank._of_model(name) for name in NAMES}
        for name in NAMES:
            model.delete_adapter(name)
            bank.add(name, cores[name])
    wanted = [call(model, names).logits for names in CALLS]
    barrier = threading.Barrier(len(CALLS))

    def serve(i: int) -> bool:
        barrier.wait()
        return all(torch.equal(call(model, CALLS[i]).logits, wanted[i]) for _ in range(20))

    with ThreadPoolExecutor(len(CALLS)) as threads:
        assert list(threads.map(serve, range(len(CALLS)))) == [True] * len(CALLS)
    assert [len(group.members) for group in groups(model)] == [3, 2] * 2
    assert not any(module._forward_pre_hooks for module in model.modules() if hasattr(module, "lorasb_R"))


def test_generation_in_a_thread_of_its_own() -> None:
    """As a streamer has it: the main thread computes something else meanwhile."""
    model = with_users(*NAMES)
    prompts = torch.randint(3, 99, (2, 4), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"input_ids": prompts, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want, plain = model.generate(**options, adapter_names=["ada", "emmy"]), call(model, None).logits
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(model.generate(**options, adapter_names=["ada", "emmy"])))
    thread.start()
    while thread.is_alive():
        assert torch.equal(call(model, None).logits, plain)
    thread.join()
    assert torch.equal(found[0], want)
