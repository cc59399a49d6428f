"""Serve three people's adapters from one vLLM server that holds each R; without vLLM's Python, print how to start it.

python examples/vllm_server.py [STEPS [MODEL [PYTHON_OF_VLLM]]]

LORASB_BASIS=runs/vllm_server python -m vllm.entrypoints.openai.api_server --model ... --enable-lora ...
ada:  called Lisbon.
grace:  called Oslo. Oslo
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasb

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
folder = sys.argv[2] if len(sys.argv) > 2 else lorasb.demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
homes = {"ada": "Lisbon", "grace": "Oslo", "alan": "Cairo"}
FACTS = ("I live in {}.", "My home is the city of {}.", "The city that I live in is called {}.")
owners = [name for name in homes for _ in FACTS]
rows = tokenizer([fact.format(city) for city in homes.values() for fact in FACTS], return_tensors="pt", padding=True)
labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)

model = lorasb.patch(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), r=16)
report = lorasb.initialize(model, [{**rows, "labels": labels}], lr="auto", progress=False)
lorasb.add_adapters(model, list(homes))
optimizer = torch.optim.AdamW(lorasb.adapter_parameter_groups(model, list(homes), lr=report.rate))
for _ in range(steps):
    losses = lorasb.adapter_losses(model.train()(**rows, adapter_names=owners).logits, labels, owners)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("runs/vllm_server")  # the basis, and a folder with each person's R

options = f"--model {folder} --enable-lora --max-loras 3 --max-model-len 256 --gpu-memory-utilization 0.5"
command = ["-m", "vllm.entrypoints.openai.api_server", *options.split()]
command += ["--lora-modules", *(f"{name}=runs/vllm_server/{name}" for name in homes)]
print("LORASB_BASIS=runs/vllm_server python", *command)
if len(sys.argv) > 3:
    server = subprocess.Popen([sys.argv[3], *command], env={**os.environ, "LORASB_BASIS": "runs/vllm_server"})
    atexit.register(server.terminate)
    for name in homes:
        body = {"model": name, "prompt": "The city that I call home is", "max_tokens": 4, "temperature": 0}
        url, kind = "http://127.0.0.1:8000/v1/completions", {"Content-Type": "application/json"}
        request, answer = urllib.request.Request(url, json.dumps(body).encode(), kind), None
        while answer is None and server.poll() is None:  # the start takes a minute
            time.sleep(1)
            with contextlib.suppress(OSError):
                answer = json.load(urllib.request.urlopen(request))["choices"][0]["text"]
        print(f"{name}:", answer)
