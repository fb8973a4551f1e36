"""Quantization-aware training by Hugging Face's Trainer, on a text of your own.

    python examples/hf_trainer.py MODEL TEXT OUTPUT --steps 20

The loss is the only thing that differs from any other training: ``qat.Distiller`` computes it with the output layer.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import qat


class Distillation(Trainer):
    """Trains a Distiller to predict what ``teacher`` predicts; a batch is one sequence, as in the paper."""

    def __init__(self, teacher, **settings):
        super().__init__(**settings)
        self.teacher = teacher.eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        loss, _ = model(ids, qat.TeacherTargets.of(self.teacher.to(ids.device), ids))
        return loss


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text", type=Path)
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--tokens", type=int, default=64, help="of each training sequence")
settings = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(settings.model)
ids = tokenizer(settings.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
pieces = [{"input_ids": piece} for piece in ids.split(settings.tokens) if len(piece) == settings.tokens]
teacher, student = (AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32) for _ in range(2))
qat.prepare(student, qat.QuantConfig(w_bits=4, a_bits=8, kv_bits=4, kv_rotation="hadamard"))
arguments = TrainingArguments(
    output_dir=f"{settings.output}-trainer",
    max_steps=settings.steps,
    per_device_train_batch_size=1,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    weight_decay=0.0,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
if arguments.n_gpu > 1:
    parser.error("start it with torchrun, or with one GPU in CUDA_VISIBLE_DEVICES")
trainer = Distillation(teacher, model=qat.Distiller(student), args=arguments, train_dataset=pieces)
trainer.train()
if trainer.is_world_process_zero():
    qat.save(student.cpu(), settings.output, source=settings.model)
