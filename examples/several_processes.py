"""The same script on one process or several: Trainer, the callback, and torchrun.

python examples/several_processes.py [STEPS [MODEL]]
torchrun --nproc-per-node 2 examples/several_processes.py [STEPS [MODEL]]

{'loss': '2.036', 'grad_norm': '2.25', 'learning_rate': '0.001778', 'epoch': '0.3125'}
...
{'loss': '1.241', 'grad_norm': '1.605', 'learning_rate': '0.0001111', 'epoch': '1.25'}
1 process(es); the norm of a layer's R is 0.2860
"""

import os
import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
processes = int(os.environ.get("WORLD_SIZE", "1"))
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = [tokenizer(f"{a} times {b} is {a * b}.") for a in range(2, 13) for b in range(2, 13)]
model = lorasb.patch(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), r=32)
trainer = Trainer(
    model,
    TrainingArguments(
        "runs/several_processes",
        max_steps=steps,
        per_device_train_batch_size=8 // processes,  # the same steps, whatever their number
        learning_rate=2e-3,
        warmup_steps=2,
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        seed=0,
    ),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[lorasb.InitCallback()],  # every process takes its share of the samples, and all get the same A, B and R
)
trainer.train()
if trainer.is_world_process_zero():
    first = next(iter(p for n, p in model.named_parameters() if "lorasb_R" in n))
    print(f"{processes} process(es); the norm of a layer's R is {first.norm():.4f}")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
