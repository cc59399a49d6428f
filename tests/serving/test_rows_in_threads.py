"""Batches with per-row adapters in several threads: each gets its own, and one without names the active adapter."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from basis_models import NAMES, moved_to_bank, out, with_users
from linear_groups import sizes
from models import batches_for
from peft import PeftModel
from tolerances import check_equal
from torch import Tensor

import lorasb
from lorasb.compat.transformers import CHECKPOINTING
from lorasb.serving.rows import adapters_by_row

pytestmark = pytest.mark.usefixtures("grouped")

CALLS: tuple[tuple[str, ...], ...] = (("ada", "grace"), ("__base__", "emmy"), (), ("grace", "default"))


@pytest.mark.parametrize(("in_bank", "interval"), [(False, 0.005), (True, 0.005), (False, 1e-5)])
def test_each_thread_has_its_own_rows(in_bank: bool, interval: float) -> None:
    """Also if threads switch every few instructions, so that other batches begin and end in between."""
    model = with_users(*NAMES, target_modules="all-linear")
    if in_bank:
        moved_to_bank(model)
    wanted = [out(model, *names) for names in CALLS]
    barrier = threading.Barrier(len(CALLS))

    def serve(i: int) -> bool:
        barrier.wait()
        return all(torch.equal(out(model, *CALLS[i]), wanted[i]) for _ in range(20))

    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(interval)
        with ThreadPoolExecutor(len(CALLS)) as threads:
            assert list(threads.map(serve, range(len(CALLS)))) == [True] * len(CALLS)
    finally:
        sys.setswitchinterval(before)
    assert sizes(model) == [3, 2] * 2
    assert not any(module._forward_pre_hooks for module in model.modules() if hasattr(module, "lorasb_R"))


def trained() -> PeftModel:
    model = with_users(*NAMES).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lorasb_R" in name)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def gradients(model: PeftModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_overlapping_blocks_of_a_checkpointed_model_keep_to_their_rows_and_leave_nothing() -> None:
    model, first, second = trained(), ["ada", "grace"], ["emmy", "emmy"]
    functions = [vars(m).get(CHECKPOINTING) for m in model.modules()]
    model(**batches_for("llama")[0], adapter_names=second).loss.backward()
    want = gradients(model)
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with adapters_by_row(model, first):
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    with adapters_by_row(model, second):
        left.set()
        thread.join()  # the first block ends inside the second
        loss = model.get_base_model()(**batches_for("llama")[0]).loss
    loss.backward()
    check_equal(gradients(model), want)
    assert not any(module._forward_pre_hooks for module in model.modules() if hasattr(module, "lorasb_R"))
    left_over = [vars(m).get(CHECKPOINTING) for m in model.modules()]  # wrapped once: a pass-through without rows
    assert [getattr(function, "function", function) for function in left_over] == functions


def test_backward_in_another_thread_has_the_rows_of_the_block_that_it_is_in() -> None:
    """As with autograd's own threads on a GPU, while the block is still open."""
    model, names = trained(), ["ada", "grace"]
    model(**batches_for("llama")[0], adapter_names=names).loss.backward()
    want = gradients(model)
    with adapters_by_row(model, names):
        loss = model.get_base_model()(**batches_for("llama")[0]).loss
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    check_equal(gradients(model), want)


def test_an_adapter_that_serves_a_batch_is_not_replaced() -> None:
    model = with_users("ada")
    bank = lorasb.AdapterBank(model)
    bank.add("emmy")
    with bank.serving(["emmy"]):
        for replaces in (bank.add, bank.remove):
            with pytest.raises(RuntimeError, match="'emmy' serves a batch at the moment"):
                replaces("emmy")
    bank.add("emmy", "ada")
