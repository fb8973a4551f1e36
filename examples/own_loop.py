"""Quantization-aware training in a plain PyTorch loop: one process, no DeepSpeed, no data but what the model writes.

    python examples/own_loop.py MODEL OUTPUT --steps 20

MODEL is a Hugging Face directory or hub name of a LLaMA, Mistral, Qwen2 or Qwen3 model; OUTPUT is a new folder, which
``qat.load`` and the commands in launch/ read.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--tokens", type=int, default=64, help="of each training sequence")
parser.add_argument("--lr", type=float, default=2e-4)
settings = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(settings.model)
teacher = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval().to(device)
student = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
qat.prepare(student, qat.QuantConfig(w_bits=4, a_bits=8, kv_bits=4, kv_rotation="hadamard"))
distiller = qat.Distiller(student).train().to(device)
optimizer = torch.optim.AdamW(student.parameters(), settings.lr, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
known = min(len(tokenizer), teacher.config.vocab_size)

for step in range(settings.steps):
    # The paper's data: the teacher continues a random token. A single sequence needs no padding.
    start = torch.randint(known, (1, 1)).to(device)
    there = torch.ones_like(start)
    ids = teacher.generate(start, attention_mask=there, do_sample=True, max_length=settings.tokens, pad_token_id=0)
    loss, kl = distiller(ids, qat.TeacherTargets.of(teacher, ids))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    print(f"step {step + 1}: KL to the teacher {kl:.4f} nats per token")

qat.save(student.cpu(), settings.output, source=settings.model)
model = qat.load(settings.output)  # packed 4-bit weights, integer KV cache
prompt = tokenizer("The", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
