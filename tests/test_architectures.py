"""What a config.json may say of a model: our decoder computes it as transformers does, or it is refused."""

import json
import re
import shutil
from inspect import signature
from pathlib import Path

import pytest
import torch
from commands import error_of
from tiny import CONFIG, FAMILIES, LONGROPE, rope, tiny_model, tiny_tokenizer
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from datagen import attention
from datagen.decoder import Decoder
from datagen.generate import GenerateConfig, Vocabulary, write_sequences
from qat.ptq import METHODS
from qat.ptq.gptq import GPTQConfig
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError
from qat.store import gguf_files, models, student_folder

LENGTH = 24


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 6}

EVERYWHERE = [
    {"hidden_act": "gelu"},
    {"hidden_act": "prelu"},  # which has a weight of its own
    rope("linear", factor=4.0),
    rope("dynamic", factor=4.0),
    rope("yarn", factor=4.0, original_max_position_embeddings=64),
    rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    rope("proportional", partial_rotary_factor=0.5),
    rope("default", partial_rotary_factor=0.5),  # which all four ignore
    LONGROPE,  # short of the length from which it rotates otherwise
    {"rms_norm_eps": 0.1, "tie_word_embeddings": False, "attention_dropout": 0.5, "final_logit_softcapping": 0.1},
    {"head_dim": 32, "num_key_value_heads": 4},
]
SOME = [
    (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    (Qwen3Config, {"attention_bias": True}),
    (LlamaConfig, {"sliding_window": 6, "pretraining_tp": 2}),  # which it ignores
    (MistralConfig, {"sliding_window": 6}),
    (Qwen2Config, {**QWEN_WINDOW, "max_window_layers": 1}),
    (Qwen3Config, {**QWEN_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
]


HANDLED, IGNORED, REFUSED_THERE = "handled", "ignored", "refused"
FIELDS = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias",
         "max_position_embeddings", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers",
         "layer_types"),
        (HANDLED, HANDLED, HANDLED),
    ),
    **dict.fromkeys(
        ("transformers_version", "architectures", "output_hidden_states", "chunk_size_feed_forward",
         "id2label", "label2id", "problem_type", "initializer_range", "use_cache", "attention_dropout",
         "pretraining_tp"),
        (IGNORED, IGNORED, IGNORED),
    ),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (IGNORED, HANDLED, IGNORED)),
    "dtype": (IGNORED, HANDLED, IGNORED),
    "hidden_act": (HANDLED, REFUSED_THERE, HANDLED),
    **dict.fromkeys(("is_encoder_decoder", "return_dict"), (REFUSED_THERE, REFUSED_THERE, REFUSED_THERE)),
}  # fmt: skip
"""What becomes of each field of the families' configs in our decoder, in GGUF, and in post-training quantization. The
decoder gets dtype and the ends of texts from its caller."""


def name(said: object) -> str | None:
    if isinstance(said, dict):
        return "-".join([*(str(key) for key in said), *(v["rope_type"] for v in said.values() if isinstance(v, dict))])
    return None


CASES = [(family, said) for said in EVERYWHERE for family in FAMILIES] + SOME


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine two threads of so small a model wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("family", "said"), CASES, ids=name)
def test_greedy_tokens_are_those_of_the_full_forward(family, said):
    check_greedy_tokens(family, said)


@pytest.mark.parametrize(("family", "said"), [case for case in SOME if "sliding_window" in case[1]], ids=name)
def test_and_where_torch_attends(family, said, monkeypatch):
    """Attention has two implementations, and a window is what it is told of all this."""
    monkeypatch.setattr(attention, "kernel", lambda *sizes: None)
    check_greedy_tokens(family, said)


def check_greedy_tokens(family, said):
    model = tiny_model(family, **said)
    for parameter, values in model.named_parameters():
        if parameter.endswith("bias"):
            torch.nn.init.normal_(values)
    config = GenerateConfig(sequences=4, max_length=LENGTH, batch_size=4, strategy="top1")
    for sequence in write_sequences(model, Vocabulary(list(range(20, 300)), [], [1]), config, range(4)):
        predicted = model(torch.tensor([sequence.input_ids])).logits[0, :-1].argmax(-1)
        assert predicted.tolist() == sequence.input_ids[1:]


REFUSED = [
    (LlamaConfig, LONGROPE, "max_length=24: the model's rope_type='longrope' .* more than 16 .* --engine vllm"),
    (Qwen3Config, rope("linear", factor=4.0, partial_rotary_factor=0.5), "partial_rotary_factor=0.5 with .*'linear'"),
    (LlamaConfig, rope("axial"), "rope_type='axial', .* supported: default, linear"),
    (MistralConfig, {"hidden_act": "swoosh"}, "hidden_act='swoosh', .* supported: gelu"),
    (Qwen2Config, {"layer_types": ["chunked_attention"] * 2}, r"layer_types=\['chunked_attention'\]"),
    (Qwen2Config, {"layer_types": ["sliding_attention"] * 2}, "sliding_window=None"),
    (MistralConfig, {"sliding_window": 0}, "sliding_window=0"),
    (LlamaConfig, {"is_causal": False}, "is_causal=False"),
    (LlamaConfig, {"max_position_embeddings": 16}, "max_length=24 is longer than the 16 positions"),
]


@pytest.mark.parametrize(("family", "said", "message"), REFUSED, ids=name)
def test_what_cannot_be_computed_is_refused_before_weights_are_loaded(family, said, message, tmp_path, monkeypatch):
    config = CONFIG | {"model_type": family.model_type} | said
    if said is LONGROPE:
        config["rope_parameters"] = said["rope_parameters"] | {"original_max_position_embeddings": 16}
    tiny_tokenizer().save_pretrained(tmp_path)
    tiny_model(family).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(models, "load", None)
    flags = [f"--model={tmp_path}", f"--output={tmp_path / 'data'}", f"--max_length={LENGTH}"]
    assert re.search(message, error_of(monkeypatch, "generate", *flags))


OTHER = {
    "transformers_version": "4.0", "architectures": ["X"], "output_hidden_states": True, "return_dict": False,
    "chunk_size_feed_forward": 1, "id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": "regression",
    "initializer_range": 0.5, "use_cache": False, "attention_dropout": 0.5, "pretraining_tp": 2, "bos_token_id": 5,
    "eos_token_id": 6, "pad_token_id": 7, "dtype": "bfloat16", "hidden_act": "gelu", "is_encoder_decoder": True,
}  # fmt: skip


def decoded(folder: Path) -> bytes:
    models.resolve(str(folder))
    decoder = Decoder(models.load(str(folder), torch.float32), slots=1, max_length=LENGTH)
    return decoder.step(torch.tensor([30]), torch.tensor([0])).logits.numpy().tobytes()


def as_gguf(folder: Path) -> bytes:
    full = student_folder.full_precision(str(folder))
    gguf_files.check(full)
    gguf_files.write(full, folder)
    return (folder / gguf_files.FILE).read_bytes()


def rounded(folder: Path) -> bytes:
    """By GPTQ, which computes hidden states."""
    METHODS["gptq"](folder, GPTQConfig()).write(folder, QuantConfig(4, 8, 16), [torch.arange(30, 50)[None]])
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


def test_every_field_of_a_config_is_decided_on():
    """A new one of transformers is added here, with what becomes of it, and to the code where it is not ignored."""
    assert {name for family in FAMILIES for name in signature(family).parameters} - {"kwargs"} == FIELDS.keys()


@pytest.mark.parametrize("read", [decoded, as_gguf, rounded])
def test_what_is_ignored_changes_nothing_and_what_is_refused_is(read, tmp_path):
    place = [decoded, as_gguf, rounded].index(read)
    does = {field: decided[place] for field, decided in FIELDS.items()}

    def reads(changes: dict) -> bytes:
        folder = tmp_path / "model"  # whose name stands in a GGUF file
        shutil.rmtree(folder, ignore_errors=True)
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return read(folder)

    ignored = {field: OTHER[field] for field, what in does.items() if what == IGNORED}
    assert reads(ignored) == reads({})
    for field in (field for field, what in does.items() if what == REFUSED_THERE):
        with pytest.raises(UserError):
            reads({field: OTHER[field]})


def test_a_decoder_longer_than_its_frequencies_hold_is_refused():
    model = tiny_model(**rope("dynamic", factor=4.0))
    Decoder(model, 1, CONFIG["max_position_embeddings"])
    with pytest.raises(UserError, match="rope_type='dynamic'"):
        Decoder(model, 1, CONFIG["max_position_embeddings"] + 1)
