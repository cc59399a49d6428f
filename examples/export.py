"""Export an adapter: a plain LoRA for vLLM and PEFT, and a GGUF for llama.cpp. Both are exact.

python examples/export.py [STEPS [MODEL]]

plain LoRA of rank 16 in runs/export/lora. Serve it with:
  vllm serve smollm2-135m --enable-lora --max-lora-rank 16 --lora-modules adapter=runs/export/lora
LoraModel gives the same logits within 1e-04
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = lorasb.patch(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), r=16)
ids = tokenizer("Once upon a time there was a small matrix that wanted to be trained.", return_tensors="pt")[
    "input_ids"
]
batch = {"input_ids": ids, "labels": ids}
lorasb.initialize(model, [batch], lr=1e-3, progress=False)
optimizer = torch.optim.AdamW(lorasb.parameter_groups(model, lr=2e-3))
for _ in range(steps):
    model.train()(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

lorasb.export_lora(model, "runs/export/lora")  # prints the command that serves it with vLLM
lorasb.export_lora(model, "runs/export/gguf", format="gguf", quiet=True)  # llama-cli -m base.gguf --lora adapter.gguf

plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "runs/export/lora")
with torch.no_grad():
    ours, theirs = model.eval()(ids).logits, plain.eval()(ids).logits
print(f"{type(plain.base_model).__name__} gives the same logits within {(ours - theirs).abs().max():.0e}")
