"""A student of llama.cpp's own formats, layer by layer from the engine's own hidden states, and from token to token.

End to end, one flipped code grows through the layers until two correct implementations differ as much as two settings:
the law is that of each layer, and the distance from one end to the other is compared with the simulation's own.
"""

import statistics
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from qat.evaluate import heldout
from qat.evaluate.llama_cpp import CachedLayer, Engine, score_windows
from qat.evaluate.perplexity import Windows, standard_error, text_windows
from qat.evaluate.perplexity import score_windows as simulated_scores
from qat.export import export
from qat.export.formats import GGUF
from qat.infer import simulated
from qat.infer.integer_cache import IntegerCache
from qat.quant.architecture import decoder_layers, head_dim
from qat.quant.config import QuantConfig
from qat.quant.kv_cache import KVQuantizer
from qat.quant.number_format import quantize
from qat.store import gguf_files, models, smollm2, student_folder

SERVED = QuantConfig(
    4, 8, 8, w_quantizer="ggml_q4_0", a_quantizer="ggml_q8_0", kv_format="ggml_q8_0/ggml_q4_0",
    overrides={"lm_head": {"w_bits": 8, "w_quantizer": "ggml_q8_0", "a_bits": 8}},
)  # fmt: skip
ENOUGH = 0.999
"""The share of codes that must be equal: sums in another order move a number across the boundary of two codes."""

LINEARS = {"self_attn.q_proj": "attn_norm", "mlp.gate_proj": "ffn_norm", "mlp.down_proj": "ffn_swiglu"}
"""Linear layers that read the activations of a decoder layer, and llama.cpp's names of these."""

STEPS = {"": "l_out", "post_attention_layernorm": "ffn_inp"}
PRODUCTS = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
LAST_PRODUCTS = ("attn_out", "ffn_out")
"""The outputs of o_proj and down_proj, before the residual is added; only LLaMA's graph names the first."""
ATTENTION = ("Qcur", "Kcur", "Vcur", "kqv_out")
"""What our own model is given of the engine's: the inputs of modules, the outputs of products, and what attention
reads and gives. Without it a code that flips early in a layer would flip others later in it."""


class Seen:
    """What the engine and our own model have in each layer, for the engine's hidden states."""

    def __init__(self, engine: Engine, model: PreTrainedModel, tokens: Tensor):
        self.model = model
        layers = decoder_layers(model)
        kinds = (*STEPS.values(), *PRODUCTS.values(), *LINEARS.values(), *ATTENTION, *LAST_PRODUCTS)
        names = [f"{name}-{layer}" for layer in range(len(layers)) for name in kinds]
        seen = engine.tensors(tokens, [*names, "result_norm", "result_output"])
        self.engines = {name: tensor.reshape(len(tokens), -1) for name, tensor in seen.items()}
        self.cache: list[CachedLayer] = engine.cache()
        self.ours: dict[str, Tensor] = {}
        hooks = []
        for number, layer in enumerate(layers):
            for module, name in STEPS.items():
                theirs = self.engines.get(f"{name}-{number - (name == 'l_out')}")
                hooks.append(layer.get_submodule(module).register_forward_pre_hook(self._begin(theirs)))
            for linear, name in LINEARS.items():
                hooks.append(layer.get_submodule(linear).register_forward_pre_hook(self._keep(f"{name}-{number}")))
            for linear, name in PRODUCTS.items():
                hooks.append(layer.get_submodule(linear).register_forward_hook(self._replace(f"{name}-{number}")))
        self.own_cache = IntegerCache(model)
        with torch.inference_mode():
            model(tokens[None], past_key_values=self.own_cache)
        for hook in hooks:
            hook.remove()

    def _begin(self, theirs: Tensor | None):
        """The first layer reads the embedding, which is ours."""
        return lambda module, args: args if theirs is None else (theirs[None], *args[1:])

    def _replace(self, name: str):
        return lambda module, args, output: self.engines[name][None]

    def _keep(self, name: str):
        def keep(module, args) -> None:
            self.ours[name] = args[0][0]

        return keep

    def attention(self, layer: int) -> tuple[Tensor, Tensor]:
        """Ours, from the engine's queries, keys and values, and the engine's: [1, tokens, heads, head_dim]. Their
        channels are in the engine's order already."""
        own = self.own_cache.layers[layer].quantizer
        kv = KVQuantizer(own.keys, own.values)
        size = head_dim(self.model.config)
        query, key, value, theirs = (
            self.engines[f"{name}-{layer}"].unflatten(1, (-1, size))[None] for name in ATTENTION
        )
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        ours = scaled_dot_product_attention(
            kv.query(query), kv.key(key), kv.value(value), is_causal=True, enable_gqa=True
        )
        return ours.transpose(1, 2), theirs

    def shares(self) -> dict[str, float]:
        """The share of equal codes of activations, and of equal bytes of the cache, over all layers."""
        found: dict[str, list[float]] = {}

        def compare(name: str, *pair: Tensor) -> None:
            codes = [quantize(x.float(), SERVED.activations).codes for x in pair]
            found.setdefault(name, []).append((codes[0] == codes[1]).float().mean().item())

        for number, (own, stored) in enumerate(zip(self.own_cache.layers, self.cache, strict=True)):
            for name in LINEARS.values():
                compare(name, self.ours[f"{name}-{number}"], self.engines[f"{name}-{number}"])
            compare("kqv_out", *(own.quantizer.output(part).flatten(2) for part in self.attention(number)))
            for part in ("keys", "values"):
                equal = getattr(own, part)[0].transpose(0, 1).flatten(1) == getattr(stored, part)
                found.setdefault(part, []).append(equal.float().mean().item())
        return {name: statistics.fmean(values) for name, values in found.items()}

    def products(self) -> dict[str, float]:
        """The largest differences of attention and linear layers, from the engine's own inputs, in parts of the largest
        output."""
        found: dict[str, float] = {}
        for number, layer in enumerate(decoder_layers(self.model)):
            attention, theirs = self.attention(number)
            self._compare(found, "kqv_out", attention, theirs)
            read = self.own_cache.layers[number].quantizer.output(theirs).flatten(2)[0]
            added = self.engines.get(f"attn_out-{number}")
            if added is None and number:
                added = self.engines[f"ffn_inp-{number}"] - self.engines[f"l_out-{number - 1}"]
            if added is not None:
                self._compare(found, "attn_out", layer.self_attn.o_proj(read), added)
            self._compare(found, "Qcur", *self._lengths_of_queries(number, layer.self_attn))
            mlp = layer.mlp.down_proj(self.engines[f"ffn_swiglu-{number}"])
            self._compare(found, "ffn_out", mlp, self.engines[f"ffn_out-{number}"])
            for linear, name in PRODUCTS.items():
                ours = layer.get_submodule(linear)(self.engines[f"ffn_norm-{number}"])
                self._compare(found, name, ours, self.engines[f"{name}-{number}"])
        output = self.model.get_output_embeddings()(self.engines["result_norm"])
        self._compare(found, "result_output", output, self.engines["result_output"])
        return found

    def _lengths_of_queries(self, layer: int, attention: nn.Module) -> tuple[Tensor, Tensor]:
        """Ours, from the engine's input, and the engine's, [tokens, heads]: neither RoPE nor the cache's rotation
        changes them."""
        heads = (-1, head_dim(self.model.config))
        ours = attention.q_proj(self.engines[f"attn_norm-{layer}"]).unflatten(1, heads)
        ours = attention.q_norm(ours) if hasattr(attention, "q_norm") else ours
        return ours.norm(dim=-1), self.engines[f"Qcur-{layer}"].unflatten(1, heads).norm(dim=-1)

    @staticmethod
    def _compare(found: dict[str, float], name: str, ours: Tensor, theirs: Tensor) -> None:
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        found[name] = max(found.get(name, 0.0), difference)


def check(seen: Seen) -> None:
    shares, products = seen.shares(), seen.products()
    print({name: round(share, 5) for name, share in shares.items()}, products)
    assert all(share >= ENOUGH for share in shares.values()), shares
    assert all(difference < 1e-5 for difference in products.values()), products


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_each_layer_is_llama_cpps_from_its_own_hidden_states(family, tmp_path):
    how = {"config_class": family, "head_dim": 64, "hidden_size": 256, "intermediate_size": 256}
    tiny_model(**how).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    SERVED.save(tmp_path)
    export.export(student_folder.find(tmp_path), tmp_path / "export", GGUF)
    tokens = torch.randint(2, 300, (64,), generator=torch.Generator().manual_seed(0))
    with (
        torch.inference_mode(),
        Engine(tmp_path / "export" / gguf_files.FILE, 64, "q8_0", "q4_0", watched=True) as engine,
    ):
        check(Seen(engine, simulated.load(str(tmp_path), torch.float32), tokens))


@pytest.mark.slow
def test_a_real_student_is_served_as_it_is_simulated(tmp_path):
    """SmolLM2, rounded to nearest: every layer; and the log-perplexity of 4,088 tokens, by pairs of windows."""
    source = Path(models.resolve(smollm2.EMBEDDED)).absolute()
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    SERVED.save(tmp_path)
    export.export(student_folder.find(tmp_path), tmp_path / "export", GGUF)
    tokenizer = models.load_tokenizer(str(source))
    windows = text_windows(heldout.paragraphs(heldout.ENCYCLOPEDIA), tokenizer, 512, 8)
    model = simulated.load(str(tmp_path), torch.float32)
    nll = {"simulated": [score.nll for score in simulated_scores(model, windows)]}
    print(nll)
    with (
        torch.inference_mode(),
        Engine(tmp_path / "export" / gguf_files.FILE, 512, "q8_0", "q4_0", watched=True) as engine,
    ):
        check(Seen(engine, model, windows[0, :256]))
        nll["served"] = [score.nll for score in score_windows([engine], Windows(windows))[0]]
    del model
    nll["in fp64"] = [score.nll for score in simulated_scores(simulated.load(str(tmp_path), torch.float64), windows)]
    mean = {name: statistics.fmean(values) for name, values in nll.items()}
    pairs = [a - b for a, b in zip(nll["served"], nll["simulated"], strict=True)]
    print(mean, f"served - simulated {statistics.fmean(pairs):+.5f} ± {standard_error(pairs):.5f}")
    spread = abs(mean["in fp64"] - mean["simulated"])
    assert abs(statistics.fmean(pairs)) <= spread + 2 * standard_error(pairs)
