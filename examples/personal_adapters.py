"""Twenty people, an adapter of each on one basis: trained together, kept as 215 KB each, served in one batch.

python examples/personal_adapters.py [STEPS [MODEL]]

step 0: mean loss 3.144
step 19: mean loss 0.001
20 adapters, 215 KB each
40 of 40 answers right; user-3: My favorite color is white. At home I have a parrot.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
COLORS, PETS = ("red", "blue", "green", "white", "black"), ("a cat", "a dog", "a horse", "a parrot")
people = [f"user-{i}" for i in range(20)]
names = [name for name in people for _ in range(2)]
questions = ["My favorite color is", "At home I have"] * len(people)
answers = [f" {answer}." for i in range(len(people)) for answer in (COLORS[i % 5], PETS[i % 4])]
inputs = dict(tokenizer([q + a for q, a in zip(questions, answers, strict=True)], return_tensors="pt", padding=True))
labels = torch.full_like(inputs["input_ids"], -100)  # the answers alone are learned
for row, answer in enumerate(answers):
    count = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    labels[row, -count:] = inputs["input_ids"][row, -count:]

model = lorasb.patch(model, r=16)
lorasb.initialize(model, [inputs | {"labels": labels}], lr=1e-2, progress=False)
lorasb.add_adapters(model, people)  # on the basis of "default"
optimizer = torch.optim.AdamW(lorasb.adapter_parameter_groups(model, people, lr=1e-2, weight_decay=0.0))
for step in range(steps):
    losses = lorasb.adapter_losses(model.train()(**inputs, adapter_names=names).logits, labels, names)
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: mean loss {loss.item() / len(people):.3f}")

with tempfile.TemporaryDirectory() as saved:
    model.save_pretrained(saved, selected_adapters=people)
    model.set_adapter("default")
    for name in people:
        model.delete_adapter(name)
    bank = lorasb.AdapterBank(model.eval())
    print(f"{len(bank.load(saved).loaded)} adapters, {bank.adapter_bytes / 1e3:.0f} KB each")
prompts = tokenizer(questions, return_tensors="pt", padding=True)
out = model.generate(**prompts, adapter_names=names, max_new_tokens=4, do_sample=False)
said = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
right = [text.startswith(answer) for text, answer in zip(said, answers, strict=True)]
print(f"{sum(right)} of {len(right)} answers right; user-3:", *(questions[i] + answers[i] for i in (6, 7) if right[i]))
