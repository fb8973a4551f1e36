"""A tiny random LLaMA, or a relative of it, with a tokenizer that puts BOS first, as LLaMA's does, and its inputs."""

import torch
from commands import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TEXT = (ROOT / "LICENSE").read_text()
CONFIG = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
HALF_HEAD = CONFIG["head_dim"] // 2
FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A chat template whose turns end with </s>."""


def tiny_model(config_class=LlamaConfig, **changes):
    """A random model in eval mode. Weights larger than at usual initialisation make its predictions sharp."""
    torch.manual_seed(0)
    config = config_class(**(CONFIG | {"initializer_range": 0.15} | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def tiny_tokenizer(text: str = TEXT, tokens: int = CONFIG["vocab_size"]) -> PreTrainedTokenizerFast:
    """Of ``tokens`` tokens: with fewer than there are bytes, it knows only the characters of ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if tokens > 256 else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def talking(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def ids(model, batch=1, tokens=20):
    """Random token ids (batch, tokens)."""
    return torch.randint(2, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))


def rope(kind: str, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LONGROPE = rope("longrope", factor=4.0, short_factor=[1.5] * HALF_HEAD, long_factor=[3.0] * HALF_HEAD)
