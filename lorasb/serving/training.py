"""Train several adapters with `transformers.Trainer`, each on its own rows of a batch, as if it were alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from ..constants import BASE_ROW, IGNORED
from ..distributed.process_group import Processes
from ..layers.lookup import layers_with
from ..utils.checks import check_lr


def adapter_losses(logits: Tensor, labels: Tensor, adapter_names: Sequence[str]) -> dict[str, Tensor]:
    """The mean loss of each adapter over the labeled tokens of its rows, for a language model.

    With respect to one adapter's R, the gradient of their sum depends on no other adapter's rows.

    Args:
        logits: [n, T, V].
        labels: [n, T], -100 where no loss is counted; the logits before a token predict it, as in transformers.
        adapter_names: one for each of the n rows; rows of `__base__` are left out.

    Returns:
        {name: loss [], fp32 (fp64 for fp64 logits)}, in the order of the adapters' first rows.

    Raises:
        ValueError: not one name for each row, logits that do not fit labels, or an adapter without a labeled token.
    """
    if len(adapter_names) != len(labels) or logits.shape[:2] != labels.shape:
        got = f"{list(logits.shape)}, {list(labels.shape)} and {len(adapter_names)}"
        raise ValueError(f"expected logits [n, T, V], labels [n, T] and n names, got {got}")
    targets, by_token = labels[:, 1:], token_losses(logits, labels)
    found = {}
    for name in dict.fromkeys(name for name in adapter_names if name != BASE_ROW):
        rows = torch.tensor([i for i, one in enumerate(adapter_names) if one == name], device=labels.device)
        count = (targets[rows] != IGNORED).sum()
        if not count:
            raise ValueError(f"adapter {name!r} has no labeled token in this batch: its labels are all {IGNORED}")
        found[name] = by_token[rows].sum() / count
    return found


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss [n, T - 1] of each label after the first, 0 where none is counted (logits [n, T, V], labels [n, T])."""
    targets = labels[:, 1:]
    # flat: torch takes several times as long over a view with the vocabulary transposed
    wide = logits[:, :-1].flatten(0, 1)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    by_token = functional.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return by_token.view(targets.shape)


def adapter_parameter_groups(
    model: nn.Module, adapters: Sequence[str], lr: float | Mapping[str, float], **options: Any
) -> list[dict[str, Any]]:
    """One parameter group per adapter with its R's, which are set to train; the R's of all others are frozen.

    Args:
        model: a PeftModel whose adapters share one basis.
        adapters: names of the adapters to train.
        lr: learning rate of all, or name -> learning rate.
        options: options of every group (`weight_decay=0.0`, ...).

    Returns:
        Groups with "params", "lr" and "name", for any torch optimizer.

    Raises:
        ValueError: an adapter is unknown, or has no learning rate.
    """
    found = []
    for name in adapters:
        layers = layers_with(model, name)
        rate = lr.get(name) if isinstance(lr, Mapping) else lr
        if not layers or rate is None:
            what = "is no adapter of this model" if not layers else "has no learning rate in lr"
            raise ValueError(f"adapter {name!r} {what}")
        check_lr(rate, zero=True)
        parameters = [layer.lorasb_R[name] for layer in layers.values()]
        found.append({"params": parameters, "lr": rate, "name": name, **options})
    trained = {id(parameter) for group in found for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if ".lorasb_R." in name:
            parameter.requires_grad_(id(parameter) in trained)
    return found


def clip_by_adapter(groups: Sequence[Mapping[str, Any]], max_norm: float) -> dict[str, float]:
    """Clip each group's gradients to `max_norm`, in place; return the norms before, for adapters that have gradients.

    Args:
        groups: `optimizer.param_groups`, made by `adapter_parameter_groups`.
        max_norm: largest norm of all gradients of one adapter together.
    """
    norms = {}
    for group in groups:
        if any(parameter.grad is not None for parameter in group["params"]):
            norms[group["name"]] = float(nn.utils.clip_grad_norm_(group["params"], max_norm))
    return norms


HOOKS, NORM = "_rows_callback_hooks", "_rows_callback_norm"  # attributes of the model and of the trainer's arguments
Batch = dict[str, Any]
Args = tuple[object, ...]  # of a forward, by position
NAMES = "adapter_names"  # key of the row names in a batch, as `PeftModel.forward` takes them


class AdapterRowsCollator:
    """A collator that adds `adapter_names` to batches, from a column of the examples.

    Args:
        collate: turns examples without the column into a batch.
        column: the column with an adapter's name, or `__base__`. A ValueError if an example lacks it.
    """

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]], column: str = NAMES) -> None:
        self.collate, self.column = collate, column

    def __call__(self, examples: Sequence[Mapping[str, object]]) -> Batch:
        without = next((example for example in examples if self.column not in example), None)
        if without is not None:
            raise ValueError(
                f"expected a column {self.column!r} in every example, got {', '.join(without) or 'none'}: Trainer "
                "keeps it with TrainingArguments(remove_unused_columns=False)"
            )
        rest = [{name: value for name, value in one.items() if name != self.column} for one in examples]
        return {**self.collate(rest), NAMES: [str(example[self.column]) for example in examples]}


class AdapterRowsCallback(TrainerCallback):
    """Trains the adapters that the optimizer's groups name, each on its own rows of a batch.

    Each adapter's gradient is that of its mean loss per labeled token in a step, over all accumulated batches and
    processes, without the rows that fill up an epoch's last batches; `max_grad_norm` clips each adapter alone. The
    logged loss is the mean over the tokens of all rows. An adapter without tokens in a step is neither updated nor
    decayed. A checkpoint has the basis and a folder for each adapter, and training resumes from it as from any other.

        trainer = Trainer(
            model,
            TrainingArguments(..., remove_unused_columns=False),
            data_collator=lorasb.AdapterRowsCollator(collator, column="user"),
            optimizers=(torch.optim.AdamW(lorasb.adapter_parameter_groups(model, names, lr=2e-3)), None),
            callbacks=[lorasb.AdapterRowsCallback()],
        )

    Raises:
        ValueError: when training begins, if the optimizer lacks the groups of `adapter_parameter_groups`, or gradients
            are not those of one plain backward (fp16 with loss scaling, DeepSpeed, FSDP), or the arguments have
            `label_smoothing_factor` or `load_best_model_at_end`, or one process reads a stream for all of them.
    """

    def __init__(self) -> None:
        self.max_norm = 0.0
        self._labeled: list[tuple[Sequence[str], Tensor]] = []  # a step's batches: their rows' names and tokens
        self._batch: tuple[Sequence[str], Tensor, Tensor | int | None] | None = None  # of the current forward

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: object,
        control: object,
        model: Any = None,
        optimizer: Optimizer | None = None,
        train_dataloader: object = None,
        **kwargs: object,
    ) -> None:
        """Replace the loss, and let all adapters train: loading a checkpoint, done by now, leaves only one to train."""
        _check(args, train_dataloader)
        _refuse_other_tasks(model)
        for parameter in (one for group in _groups(optimizer) for one in group["params"]):
            parameter.requires_grad_(True)
        # A run that an error ended has not restored what it replaced, which the arguments and the model still hold.
        self.on_train_end(args, state, control, model)
        self.max_norm = vars(args)[NORM] = args.max_grad_norm
        args.max_grad_norm = 0.0  # or the trainer would clip all adapters together
        self._labeled.clear()
        vars(model)[HOOKS] = (
            model.register_forward_pre_hook(self._take_labels, with_kwargs=True),
            model.register_forward_hook(self._put_loss),
        )

    def on_pre_optimizer_step(
        self, args: object, state: object, control: object, optimizer: Optimizer | None = None, **kwargs: object
    ) -> None:
        """Turn each adapter's gradient into that of its mean loss per token, and clip it."""
        groups, processes, tokens = _groups(optimizer), Processes(), Counter[str]()
        for names, labeled in self._labeled:
            for name, count in zip(names, labeled.tolist(), strict=True):
                tokens[name] += count
        self._labeled.clear()
        own = torch.tensor([tokens[group["name"]] for group in groups], dtype=torch.int64)
        for group, count in zip(groups, processes.all_reduce_sum(own).tolist(), strict=True):
            for parameter in group["params"]:
                if not count:
                    parameter.grad = None  # with zeros, the optimizer's moments would still move it
                elif parameter.grad is not None:
                    parameter.grad.mul_(processes.world_size / count)  # DDP has averaged over processes
        if self.max_norm:
            clip_by_adapter(groups, self.max_norm)

    def on_train_end(
        self, args: TrainingArguments, state: object, control: object, model: Any = None, **kwargs: object
    ) -> None:
        """Restore the model's loss and the trainer's clipping."""
        args.max_grad_norm = vars(args).pop(NORM, args.max_grad_norm)
        for hook in vars(model).pop(HOOKS, ()):
            hook.remove()

    def _take_labels(self, module: nn.Module, args: Args, kwargs: Batch) -> tuple[Args, Batch]:
        """Take the labels out of the batch: the model would compute another loss over all logits."""
        self._batch = None
        if module.training and NAMES in kwargs and kwargs.get("labels") is not None:
            labels = kwargs["labels"]
            self._batch = kwargs[NAMES], labels, kwargs.get("num_items_in_batch")
            kwargs = {name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")}
        elif module.training:
            raise ValueError(
                f"expected a batch with {NAMES} and labels, got {', '.join(kwargs)}: "
                "Trainer(data_collator=lorasb.AdapterRowsCollator(collator, column=...)) names the rows"
            )
        return args, kwargs

    def _put_loss(self, module: nn.Module, args: Args, output: Any) -> ModelOutput | None:
        if self._batch is None:
            return None
        (names, labels, items), self._batch = self._batch, None
        if output.logits.shape[:2] != labels.shape:
            raise ValueError(
                f"expected logits for each label, got {list(output.logits.shape)} for labels {list(labels.shape)}: "
                "AdapterRowsCallback trains causal language models, whose batches have labels for all logits"
            )
        rows = torch.tensor([name != BASE_ROW for name in names], device=labels.device)
        rows[_first_repeat(len(rows)) :] = False
        losses = token_losses(output.logits, labels) * rows[:, None]
        counted = (labels[:, 1:] != IGNORED).sum(1) * rows
        self._labeled.append((names, counted))
        total = losses.sum()
        if not rows.any():  # DDP waits for a gradient of every parameter
            total = total + sum(one.sum() * 0.0 for one in module.parameters() if one.requires_grad)
        mean = (total / (counted.sum().clamp(min=1) if items is None else items)).detach()
        # The value is the mean; the gradient is the sum's, whatever the trainer divides the loss by.
        loss = mean + (total - total.detach())
        loss.register_hook(torch.ones_like)
        output["loss"] = loss
        return output


def _first_repeat(count: int) -> int:
    """The first of this process's rows that repeats one of the epoch: accelerate fills its last batches with them."""
    state, processes = GradientState(), Processes()
    is_last = state.end_of_dataloader and state.sync_gradients  # several batches of a step are read ahead
    if not processes.is_distributed or not is_last or state.remainder <= 0:  # -1: the length is unknown
        return count
    return min(max(state.remainder - processes.rank * count, 0), count)


def _refuse_other_tasks(model: Any) -> None:
    """Raise a ValueError for a model whose loss does not compare each logit with the next label."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, config = type(base).__name__, getattr(base, "config", None)
    others = ("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")
    if name.endswith(others) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"AdapterRowsCallback trains causal language models, whose labels are shifted by one, got {name}: train "
            "its adapters one after another"
        )


def _groups(optimizer: Optimizer | None) -> list[dict[str, Any]]:
    groups = [] if optimizer is None else optimizer.param_groups
    if not groups or any("name" not in group for group in groups):
        raise ValueError(
            f"expected an optimizer with a group for each adapter, got {len(groups)} without names: "
            "Trainer(optimizers=(torch.optim.AdamW(lorasb.adapter_parameter_groups(model, names, lr=...)), None))"
        )
    return list(groups)


def _check(args: TrainingArguments, loader: object) -> None:
    """Raise if gradients or batches cannot be divided by row, or the trainer would restore only one adapter."""
    refused = {  # `accelerate launch` chooses some of them
        "fp16": args.fp16 or getattr(args, "mixed_precision", None) == "fp16",
        "deepspeed": args.deepspeed or getattr(args, "deepspeed_plugin", None),
        "fsdp": args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true",
        "label_smoothing_factor": args.label_smoothing_factor,
    }
    found = [name for name, chosen in refused.items() if chosen]
    if found:
        raise ValueError(f"expected training in fp32 or bf16, by one process or DDP, got {found[0]}: leave it out")
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end loads the active adapter alone: leave it out, and load the best checkpoint's "
            "folders with model.load_adapter"
        )
    if Processes().is_distributed and isinstance(loader, DataLoaderDispatcher):
        raise ValueError(
            "expected each process to read its own batches, as names of rows cannot be sent between processes, got a "
            'stream that one process reads: TrainingArguments(accelerator_config={"dispatch_batches": False})'
        )
