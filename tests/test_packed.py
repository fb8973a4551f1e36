"""qat.load: what is deployed computes what was trained, in the memory that the bits promise."""

import re
import sys
from io import BytesIO, TextIOWrapper

import pytest
import torch
from commands import run_python
from students import SETTINGS, write_student
from tiny import ids, tiny_model
from transformers.cache_utils import DynamicCache

import qat
from launch import chat
from qat.export import export
from qat.infer import packed, simulated
from qat.quant.config import QuantConfig
from qat.runtime import machine
from qat.runtime.errors import UserError
from qat.store import models
from qat.store.compressed_tensors import PACK_QUANTIZED


@pytest.mark.parametrize("quant", [*SETTINGS, QuantConfig(w_quantizer="minmax_asymmetric")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_the_simulation(quant, dtype, monkeypatch, tmp_path):
    write_student(tmp_path, quant, dtype)
    for computed in (torch.bfloat16, torch.float32):  # as on GPUs, as on CPUs
        monkeypatch.setattr(machine, "inference_dtype", lambda: computed)  # noqa: B023
        model, simulation = qat.load(str(tmp_path)), simulated.load(str(tmp_path), computed)
        tokens = ids(model, batch=2)
        logits = model(tokens).logits
        assert logits.dtype == computed
        assert torch.equal(logits, simulation(tokens).logits)
    settings = {"attention_mask": torch.ones(2, 6, dtype=torch.long), "max_new_tokens": 8, "do_sample": False}
    expected = simulation.generate(tokens[:, :6], use_cache=False, pad_token_id=0, **settings)
    assert torch.equal(model.generate(tokens[:, :6], pad_token_id=0, **settings), expected)


def test_an_export_and_the_student_that_it_was_made_from_are_the_same(tmp_path):
    student = write_student(tmp_path / "final", QuantConfig())
    export.export(student, tmp_path / "export", PACK_QUANTIZED)
    model, exported = qat.load(str(tmp_path / "final")), qat.load(str(tmp_path / "export"))
    assert torch.equal(model(ids(model)).logits, exported(ids(model)).logits)
    assert exported.generation_config.eos_token_id == 1


def test_memory_is_what_the_bits_promise(tmp_path):
    write_student(tmp_path, QuantConfig(4, 8, 4))
    held = packed.memory(qat.load(str(tmp_path)))
    full = tiny_model()
    linears = [m for name, m in full.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    low = sum(linear.weight.numel() // 2 + 4 * linear.out_features for linear in linears)
    rest = sum(p.nbytes for p in full.parameters()) - sum(linear.weight.nbytes for linear in linears)
    rotary = full.model.rotary_emb
    assert held.weights == low + rest + rotary.inv_freq.nbytes + rotary.original_inv_freq.nbytes
    assert held.cache_per_token == 2 * 2 * 2 * (16 // 2 + 4), "layers, K and V, heads: codes and an fp32 scale"


def test_generate_caches_integers_and_nothing_else(tmp_path):
    write_student(tmp_path, QuantConfig(4, 8, 4))
    model = qat.load(str(tmp_path))
    tokens = ids(model)
    cache = model.generate(tokens, max_new_tokens=4, return_dict_in_generate=True).past_key_values
    assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8}
    own = DynamicCache()
    model.generate(tokens, max_new_tokens=4, past_key_values=own)
    assert own.layers[0].keys.dtype == torch.float32, "a cache that is given is used"


def test_full_precision_models_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="give an integer export"):
        qat.load(str(tmp_path))


def test_chat_remembers_the_turns_before(tmp_path, monkeypatch):
    """By the tokenizer's template, until an empty line or the end of the input."""
    write_student(tmp_path, QuantConfig())
    tokenizer = models.load_tokenizer(str(tmp_path))
    tokenizer.chat_template = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    prompts = []
    model = qat.load(str(tmp_path))
    own = model.generate

    def generate(input_ids, **how):
        prompts.append(tokenizer.decode(input_ids[0]))
        assert how["do_sample"]
        return own(input_ids=input_ids, **how)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(qat, "load", lambda _: model)
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"Licensed\nWork\n")))
    flags = [f"--model={tmp_path}", "--max_new_tokens=3", "--temperature=0.7"]
    monkeypatch.setattr(sys, "argv", ["chat.py", *flags])
    chat.main()
    assert prompts[0] == "[user]Licensed"
    assert prompts[1].startswith("[user]Licensed[assistant]")
    assert prompts[1].endswith("[user]Work")


def test_chat_goes_on_where_a_message_is_too_long_or_the_talk_has_become_so(tmp_path, monkeypatch, capsys):
    """The oldest turns are dropped; a message that has no room is not answered. The tokenizer's other outputs, as
    token_type_ids, are not the model's."""
    write_student(tmp_path, QuantConfig(), max_position_embeddings=64)
    tokenizer = models.load_tokenizer(str(tmp_path))
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.chat_template = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    lines = ["Licensed", "Work " * 100, "Redistribution " * 2, "the", "", "never read"]
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO("\n".join(lines).encode())))
    monkeypatch.setattr(sys, "argv", ["chat.py", f"--model={tmp_path}", "--max_new_tokens=16"])
    chat.main()
    said = capsys.readouterr().err
    assert re.search(
        r"not answered: The message is \d{3} tokens long, and the answer may have max_new_tokens=16; ", said
    )
    assert said.count("not answered") == 1
    assert "context full: dropped the first 2 turns" in said


def test_chat_says_what_generate_says(tmp_path):
    write_student(tmp_path, QuantConfig())
    said = run_python("chat", f"--model={tmp_path}", "--prompt=Redistribution and use", "--max_new_tokens=12")
    tokenizer, model = models.load_tokenizer(str(tmp_path)), qat.load(str(tmp_path))
    prompt = tokenizer("Redistribution and use", return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert said.stdout.strip() == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert "MB of KV cache per 1000 tokens" in said.stderr
