"""Twenty people's adapters on one basis: trained together, 215 KB each, tested with wordings not trained on.

python examples/personal_adapters.py [STEPS [MODEL]]

mean loss 0.001
20 adapters, 215 KB each
40 of 40 answers right; user-3: The color that I like best is white.
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
people = {f"user-{i}": (f" {COLORS[i % 5]}.", f" {PETS[i % 4]}.") for i in range(20)}
TRAINED = ("My favorite color is", "At home I have"), ("The color that I love is", "The animal that I own is")
ASKED = "The color that I like best is", "The animal that I have is"

rows = [(name, *pair) for name, facts in people.items() for asked in TRAINED for pair in zip(asked, facts, strict=True)]
names = [name for name, _, _ in rows]
inputs = dict(tokenizer([question + fact for _, question, fact in rows], return_tensors="pt", padding=True))
labels = torch.full_like(inputs["input_ids"], -100)  # only the answers are learned
for row, (_, _, fact) in enumerate(rows):
    count = len(tokenizer(fact, add_special_tokens=False)["input_ids"])
    labels[row, -count:] = inputs["input_ids"][row, -count:]

model = lorasb.patch(model, r=16)
lorasb.initialize(model, [inputs | {"labels": labels}], lr=1e-2, progress=False)
lorasb.add_adapters(model, list(people))  # on the basis of "default"
optimizer = torch.optim.AdamW(lorasb.adapter_parameter_groups(model, list(people), lr=1e-2, weight_decay=0.0))
for _ in range(steps):
    losses = lorasb.adapter_losses(model.train()(**inputs, adapter_names=names).logits, labels, names)
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"mean loss {loss.item() / len(people):.3f}")

with tempfile.TemporaryDirectory() as saved:
    model.save_pretrained(saved, selected_adapters=list(people))
    model.set_adapter("default")
    for name in people:
        model.delete_adapter(name)
    bank = lorasb.AdapterBank(model.eval())
    print(f"{len(bank.load(saved).loaded)} adapters, {bank.adapter_bytes / 1e3:.0f} KB each")
prompts = tokenizer(list(ASKED) * len(people), return_tensors="pt", padding=True)
owners = [name for name in people for _ in ASKED]
out = model.generate(**prompts, adapter_names=owners, max_new_tokens=4, do_sample=False)
said = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
right = [text.startswith(fact) for text, fact in zip(said, sum(people.values(), ()), strict=True)]
print(f"{sum(right)} of {len(right)} answers right; user-3: {ASKED[0]}{said[6]}")
