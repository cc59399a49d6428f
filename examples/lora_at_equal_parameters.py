"""Compare LoRA with LoRA-SB at similar parameter counts, in bf16, 4 x 128 tokens per step; for one adapter take LoRA.

python examples/lora_at_equal_parameters.py [STEPS [MODEL]]

LoRA r=3: 915,840 trained, file 3.7 MB, 3.04 s per step, held-out loss 0.0002
LoRA-SB r=64: 860,160 trained, file 42.6 MB, 2.52 s per step, held-out loss 0.0036
"""

import itertools
import random
import sys
import time
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb
from lorasb.utils.precision import native

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
torch.manual_seed(0)
lists = list(itertools.permutations(("red", "blue", "green", "white", "cat", "dog", "horse", "parrot"), 3))
random.Random(0).shuffle(lists)
rows = []  # 128 tokens with twelve lists each; only what follows "Answer:" counts in the loss
for i in range(0, len(lists), 12):
    ids, labels = [], []
    for words in lists[i : i + 12]:
        question = tokenizer(f"Reverse: {' '.join(words)}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {' '.join(reversed(words))}\n")["input_ids"]
        ids += question + answer
        labels += [-100] * len(question) + answer
    rows.append([ids[:128], labels[:128]])
held_out, *batches = ({"input_ids": x[:, 0], "labels": x[:, 1]} for x in torch.tensor(rows).split(4))

dtype = native().dtype  # bf16 if the processor has instructions for it, else fp32
bases = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(2)]  # patch takes r=64 by default
config = peft.LoraConfig(r=3, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
models = {"LoRA r=3": peft.get_peft_model(bases[0], config), "LoRA-SB r=64": lorasb.patch(bases[1])}
rates = [8e-3, lorasb.initialize(models["LoRA-SB r=64"], batches[:4], lr="auto", progress=False).rate]
optimizers, times = {}, {name: [] for name in models}
for (name, model), rate in zip(models.items(), rates, strict=True):
    optimizers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
for step, name in itertools.product(range(steps), models):  # alternating
    started = time.perf_counter()
    models[name].train()(**batches[step % len(batches)]).loss.backward()
    optimizers[name].step()
    optimizers[name].zero_grad()
    times[name].append(time.perf_counter() - started)
for name, model in models.items():
    with torch.no_grad():
        loss = model.eval()(**held_out).loss.item()
    model.save_pretrained(f"runs/equal/{name}")
    size = Path(f"runs/equal/{name}/adapter_model.safetensors").stat().st_size / 1e6
    numbers, seconds = model.num_parameters(only_trainable=True), sorted(times[name])[steps // 2]
    print(f"{name}: {numbers:,} trained, file {size:.1f} MB, {seconds:.2f} s per step, held-out loss {loss:.4f}")
