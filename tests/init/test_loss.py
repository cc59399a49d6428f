"""The initialization loss: a sum over samples, however they are batched, padded or labeled; gradient sums by hooks."""

from typing import Any

import pytest
import torch
from gradients import autograd_sums, check_sums, padded
from models import Batch, batches_for, make, started, text
from tolerances import BATCHING, check, check_equal, fp32
from torch import Tensor, nn

from lorasb.init.accumulator import GradientSums
from lorasb.init.loss import backward_over_samples

SAMPLES = [text(1, tokens, seed) for seed, tokens in enumerate((5, 12, 8, 9, 7, 10))]


def hooked_sums(model: nn.Module | str, batches: list[Batch], without: str = "head") -> dict[str, Tensor]:
    """ΣG by the library's hooks, with all weights frozen, of linears whose names do not contain `without`."""
    model = (make(model) if isinstance(model, str) else model).requires_grad_(False)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and without not in n}
    with GradientSums(layers) as found:
        for batch in batches:
            backward_over_samples(model, batch, None)
    return {name: one.value() for name, one in found.sums.items()}


def test_padding_and_unequal_lengths_do_not_matter() -> None:
    want = autograd_sums("llama", SAMPLES[:4])
    for batches in ([padded(SAMPLES[:4], 12)], [padded(SAMPLES[:3], 20), padded(SAMPLES[3:4], 11)]):
        check_sums(hooked_sums("llama", batches), want, BATCHING)


def test_the_head_itself_may_be_a_target() -> None:
    model = make("llama")
    alone, together = (hooked_sums(model, each, "layers") for each in (SAMPLES[:3], [padded(SAMPLES[:3], 12)]))
    assert list(together) == ["lm_head"]
    check_sums(together, alone, BATCHING)


def test_a_loss_that_is_not_recognized_is_taken_sample_by_sample() -> None:
    calls: list[int] = []

    def smoothed(model: nn.Module, args: object, given: Batch, outputs: Any) -> dict[str, Tensor]:
        """Label smoothing, which is not a plain cross entropy of the logits."""
        calls.append(1)
        loss = nn.functional.cross_entropy(outputs.logits, given["labels"], label_smoothing=0.3)
        return {"loss": loss, "logits": outputs.logits}

    model, batch = make("roberta"), batches_for("roberta", 1, 3)[0]
    model.register_forward_hook(smoothed, with_kwargs=True)
    alone = hooked_sums(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)])
    assert len(calls) == 3
    check_equal(hooked_sums(model, [batch]), alone)
    assert len(calls) == 3 + 4


def test_logits_that_are_a_copy_are_not_trusted() -> None:
    """accelerate's mixed precision returns an fp32 copy of the logits that the loss was computed from."""
    model = make("llama", dtype=torch.bfloat16)
    model.register_forward_hook(lambda _, given, out: {"loss": out.loss, "logits": out.logits.float() * 1.0})
    found = (hooked_sums(model, batches) for batches in (SAMPLES[:2], [padded(SAMPLES[:2], 12)]))
    alone, together = (sums["model.layers.0.self_attn.q_proj"] for sums in found)
    assert (together - alone).norm() < 2e-2 * alone.norm()  # bf16 rounding; a plain mean would be off by half


def test_loss_fn_counts_times_the_batchs_samples() -> None:
    batches = batches_for("llama", count=2, rows=3)
    seen = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(len(batch["input_ids"]))
        return model(**batch).loss

    _, report = started(batches=batches, loss_fn=loss_fn)
    assert seen == [3, 3]
    own = sum(float(make("llama")(**batch).loss.detach()) * 3 for batch in batches) / 6
    assert report.loss == pytest.approx(own, rel=1e-5)


def test_samples_with_nothing_to_predict_count_nothing() -> None:
    """These are causal samples with a label at the first token only, or none; the mean loss is over the others."""
    labels = torch.full((1, 12), -100)
    nothing = [
        text(1, 12, 9) | {"labels": labels},
        text(1, 12, 8) | {"labels": labels.index_fill(1, torch.tensor([0]), 5)},
    ]
    want = autograd_sums("llama", SAMPLES)
    for batches in ([*SAMPLES, *nothing], [padded([*SAMPLES, *nothing], 12)]):
        check_sums(hooked_sums("llama", batches), want, BATCHING)
    (_, some), (_, more) = started(batches=SAMPLES), started(batches=[*SAMPLES, nothing[0]])
    assert more.loss == pytest.approx(some.loss, rel=1e-6)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    layer = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    want = torch.zeros(6, 8, dtype=torch.float64)
    with GradientSums({"layer": layer}) as found:
        for _ in range(20):
            x, dy = (torch.randn(5, size, generator=g).bfloat16() for size in (8, 6))
            layer(x).backward(dy)
            want += dy.double().t() @ x.double()
    assert found.sums["layer"].value().dtype == torch.float32
    check(found.sums["layer"].value(), want, fp32(100))


def test_a_model_without_a_loss_is_named_whatever_its_labels() -> None:
    """The error is raised even if the only label is at the first position, which has no loss anyway."""
    model, labels = make("llama"), torch.full((1, 4), -100)
    model.register_forward_hook(lambda _, given, out: {"loss": None, "logits": out.logits})
    labels[0, 0] = 3
    with pytest.raises(ValueError, match="the model returned no loss for a batch with input_ids, labels"):
        backward_over_samples(model, {"input_ids": torch.ones(1, 4).long(), "labels": labels}, None)


@pytest.mark.parametrize("problem", ["tokens", "classes", "regression", "multi_label_classification"])
def test_a_batch_takes_one_forward(problem: str) -> None:
    """This holds if the loss can be reproduced from the logits."""
    family, calls = "llama" if problem == "tokens" else "roberta", []
    model, wanted = make(family), make(family)
    batch = batches_for(family)[0]
    if problem not in ("tokens", "classes"):
        model.config.problem_type = wanted.config.problem_type = problem
        batch["labels"] = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    model.register_forward_hook(lambda *_: calls.append(1))
    check_sums(hooked_sums(model, [batch]), autograd_sums(wanted, [batch]), BATCHING)
    assert len(calls) == 1
