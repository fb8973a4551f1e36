"""A quantized embedding and output layer: in the loss, sharded, on disk, and served."""

import json
import time
from pathlib import Path

import pytest
import torch
from commands import finish, kill, start_training
from safetensors.torch import load_file
from students import WINDOWS, write_student
from tiny import ids, tiny_model, tiny_tokenizer
from torch.func import functional_call
from training import CONFIG, flags, log_of
from transformers import AutoModelForCausalLM

import qat
from qat.data.sequences import TrainingData
from qat.evaluate.perplexity import perplexity
from qat.export import export, model_card
from qat.export.formats import EXPORT_FORMATS, FAKE, GGUF
from qat.infer import packed, simulated
from qat.ptq import gptq, writer
from qat.ptq.stream import Stream
from qat.quant.config import QuantConfig
from qat.quant.embedding import QuantEmbedding
from qat.quant.number_format import Format, inside, quantize, round_to_grid
from qat.quant.prepare import freeze, prepare
from qat.runtime.errors import UserError
from qat.store import models, student_folder
from qat.store.compressed_tensors import INT_QUANTIZED, LAYOUTS, PACK_QUANTIZED
from qat.store.model_folder import ModelFolder
from qat.store.sidecars import load_grids
from qat.train import distill
from qat.train.distill import Distiller, LabelTargets, TeacherTargets, TopKTargets

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ROWS = {EMBEDDING: {"w_bits": 8}, HEAD: {"w_bits": 8, "a_bits": 8}}
GROUPS = {EMBEDDING: {"w_bits": 4, "w_group_size": 32}, HEAD: {"w_bits": 4, "w_group_size": 32}}
CLIPS = {EMBEDDING: {"w_bits": 3, "w_quantizer": "statsq"}, HEAD: {"w_bits": 3, "w_quantizer": "statsq"}}
ZERO_POINTS = {
    EMBEDDING: {"w_bits": 4, "w_quantizer": "minmax_asymmetric"},
    HEAD: {"w_bits": 4, "w_quantizer": "minmax_asymmetric", "a_bits": 6, "a_quantizer": "minmax_asymmetric"},
}
Q4_0 = {"w_bits": 4, "w_quantizer": "ggml_q4_0"}
BLOCKS = {EMBEDDING: Q4_0, HEAD: Q4_0 | {"a_bits": 8, "a_quantizer": "ggml_q8_0"}}
INPUT = {HEAD: {"a_bits": 4}}
OF_INTEGERS = [form for form in EXPORT_FORMATS if form not in LAYOUTS or LAYOUTS[form].holds(Format(4))]
VOCABULARIES = {
    "rows": ROWS,
    "groups": GROUPS,
    "clips": CLIPS,
    "zero points": ZERO_POINTS,
    "input alone": INPUT,
    "blocks": BLOCKS,
}
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def test_patterns_are_for_the_decoder_and_16_bits_change_nothing(caplog):
    patterns = {"*": {"w_bits": 16, "a_bits": 16}, "model.*": {"w_bits": 16}, "*head": {"w_bits": 8}}
    for overrides in (patterns, {EMBEDDING: {"w_bits": 16}, HEAD: {"w_bits": 16, "a_bits": 16}}):
        model = prepare(tiny_model(), QuantConfig(16, 16, 16, overrides=overrides))
        assert not [module for module in model.modules() if type(module).__name__.startswith("Quant")]
        assert torch.equal(model(ids(model)).logits, tiny_model()(ids(model)).logits)
    assert caplog.messages == ["warning: overrides: '*head' matches no linear layer of the model, whose w_bits it sets"]


@TIED
@pytest.mark.parametrize("overrides", VOCABULARIES.values(), ids=VOCABULARIES)
def test_inference_needs_no_values_beside_codes(overrides, tied, tmp_path):
    """Logits stay; a weight of the embedding too keeps its values."""
    quant = QuantConfig(overrides=overrides)
    students = [prepare(tiny_model(tie_word_embeddings=tied), quant).eval() for _ in range(2)]
    freeze(students[0])
    freeze(students[1], keep_values=False)
    write_student(tmp_path, quant, tie_word_embeddings=tied)
    loaded = simulated.load(str(tmp_path), torch.float32, here=True)
    expected, *found = (model(ids(model)).logits for model in (*students, loaded))
    assert all(torch.equal(logits, expected) for logits in found)
    for model in (students[1], loaded):
        left = {name for name, weight in model.named_parameters() if weight.dim() > 1 and weight.numel()}
        assert left <= {f"{EMBEDDING}.weight", f"{HEAD}.weight"}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (ROWS | {HEAD: {"w_bits": 4}}, "are one weight, which cannot have two formats"),
        ({EMBEDDING: {"a_bits": 8}}, "a_bits does not apply to model.embed_tokens"),
        ({HEAD: {"w_bits": 8, "kv_bits": 8}}, "kv_bits does not apply to lm_head"),
        ({HEAD: {"w_group_size": 32}}, "without w_bits or a_bits lm_head is not quantized"),
        ({EMBEDDING: {"w_bits": 4, "w_group_size": 48}}, "w_group_size=48 does not divide the model's 64"),
    ],
)
def test_refusals(overrides, named):
    with pytest.raises(UserError, match=named):
        prepare(tiny_model(), QuantConfig(overrides=overrides))


def test_a_learned_step_is_refused():
    with pytest.raises(UserError, match="the input of lm_head cannot have a learned step: leave out its a_bits"):
        prepare(tiny_model(), QuantConfig(a_quantizer="lsq", overrides={HEAD: {"a_bits": 8}}))


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_shared_weight_has_the_format_that_either_name_is_given(name):
    overrides = {name: {"w_bits": 8}, "*": {"w_bits": 2}}
    tied, other = (prepare(tiny_model(), QuantConfig(overrides=both)) for both in (overrides, ROWS))
    assert tied.model.embed_tokens.weight_format == tied.lm_head.weight_format == Format(8)
    assert tied.lm_head.input_format == Format(16)
    assert tied.model.embed_tokens(ids(tied)).equal(other.model.embed_tokens(ids(tied)))
    untied = prepare(tiny_model(tie_word_embeddings=False), QuantConfig(overrides=overrides))
    assert isinstance(untied.model.embed_tokens, QuantEmbedding) == (name == EMBEDDING)
    assert hasattr(untied.lm_head, "weight_format") == (name == HEAD)


def straight_through(x, form):
    """x rounded, with its gradient: that of x where it was not clipped."""
    if not form.quantizes:
        return x
    rounded, grid = round_to_grid(x, form)
    passes = inside(x, form, grid) if form.clips else torch.ones_like(x, dtype=torch.bool)
    return torch.where(passes, x, x.detach()) + (rounded - x.detach())


def unfused(model, settings, tokens):
    """The logits of a plain model with explicitly rounded weights, and the input of its output layer too."""
    config = QuantConfig(16, 16, 16, overrides=settings)
    embedding, head = config.of_vocabulary(EMBEDDING), config.of_vocabulary(HEAD)
    weights = {
        f"{EMBEDDING}.weight": straight_through(model.model.embed_tokens.weight, embedding.weights),
        f"{HEAD}.weight": straight_through(model.lm_head.weight, head.weights),
    }
    hook = model.lm_head.register_forward_pre_hook(lambda _, x: straight_through(x[0], head.activations))
    logits = functional_call(model, weights, (tokens,), tie_weights=False).logits[0, :-1]
    hook.remove()
    return logits


def teacher_loss(logits, teacher, tokens):
    targets = TeacherTargets.of(teacher, tokens)
    p = teacher(tokens).logits[0, :-1].detach().softmax(-1)
    return targets, -(p * logits.log_softmax(-1)).sum(-1).mean()


def label_loss(logits, teacher, tokens):
    return LabelTargets(tokens[0, 1:]), torch.nn.functional.cross_entropy(logits, tokens[0, 1:])


def top_k_loss(logits, teacher, tokens):
    log_p, chosen = teacher(tokens).logits[0, :-1].detach().log_softmax(-1).topk(7)
    p, q = log_p.exp(), logits.softmax(-1).gather(1, chosen)
    rest = (1 - p.sum(-1)) * (1 - q.sum(-1)).log()
    return TopKTargets(chosen, log_p), -((p * q.log()).sum(-1) + rest).mean()


@TIED
@pytest.mark.parametrize("loss", [teacher_loss, label_loss, top_k_loss])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_fused_loss_and_its_gradients_are_those_of_explicitly_rounded_weights(tied, loss, vocabulary, monkeypatch):
    """In fp64, over several chunks of tokens and blocks of the vocabulary."""
    monkeypatch.setitem(distill.CHUNK_TOKENS, "cpu", 8)
    monkeypatch.setattr(distill, "VOCABULARY_BLOCK", 128)
    settings = VOCABULARIES[vocabulary]
    teacher = tiny_model(tie_word_embeddings=tied).double()
    student, plain = (tiny_model(tie_word_embeddings=tied).double() for _ in range(2))
    with torch.no_grad():
        for parameter in (*student.parameters(), *plain.parameters()):
            parameter.mul_(1.1)
    tokens = ids(teacher)
    targets, expected = loss(unfused(plain, settings, tokens), teacher, tokens)
    found, _ = Distiller(prepare(student, QuantConfig(16, 16, 16, overrides=settings)))(tokens, targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert (found - loss(plain(tokens).logits[0, :-1], teacher, tokens)[1]).abs() > 1e-5, "rounding is seen"
    expected.backward()
    found.backward()
    for (name, a), b in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-6 * b.grad.norm(), name


@TIED
def test_in_bf16_they_are_so_but_for_the_rounding_of_sums(tied):
    teacher, student, plain = (tiny_model(tie_word_embeddings=tied).bfloat16() for _ in range(3))
    tokens = ids(teacher)
    targets, expected = label_loss(unfused(plain, ROWS, tokens).float(), teacher, tokens)
    found, _ = Distiller(prepare(student, QuantConfig(16, 16, 16, overrides=ROWS)))(tokens, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)
    expected.backward()
    found.backward()
    for (name, a), b in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 0.03 * b.grad.norm(), name


@TIED
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_trained_measured_and_frozen_are_the_same(tied, vocabulary):
    """The fused loss on labels, the logits, and those of weights that were rounded once; a row is rounded as it is in
    the whole weight."""
    model = prepare(tiny_model(tie_word_embeddings=tied), QuantConfig(4, 8, 4, overrides=VOCABULARIES[vocabulary]))
    tokens, form = ids(model), getattr(model.model.embed_tokens, "weight_format", Format(16))
    if form.quantizes:
        whole = round_to_grid(model.model.embed_tokens.weight, form)[0]
        assert torch.equal(model.model.embed_tokens(tokens), whole[tokens])
    logits = model(tokens).logits
    with torch.no_grad():
        nll, _ = Distiller(model)(tokens, LabelTargets(tokens[0, 1:]))
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=0)
    freeze(model)
    assert torch.equal(model(tokens).logits, logits)
    assert perplexity(model, tokens).nll == pytest.approx(nll.item(), rel=1e-5)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_frozen_output_layer_computes_the_same_logits_in_the_loss(vocabulary):
    """In bf16, where products of codes and of values differ most."""
    model = prepare(tiny_model().bfloat16(), QuantConfig(16, 16, 16, overrides=VOCABULARIES[vocabulary]))
    Distiller(model)
    freeze(model)
    head, hidden = model.lm_head, torch.randn(9, model.config.hidden_size).bfloat16()
    assert torch.equal(distill._QuantProduct(hidden, head.weight, head).logits(slice(0, 9)), head(hidden))


@pytest.mark.parametrize("form", OF_INTEGERS)
@pytest.mark.parametrize("vocabulary", ["rows", "groups", "clips"])
@TIED
def test_stored_exported_and_packed_are_what_was_trained(form, vocabulary, tied, tmp_path):
    quant = QuantConfig(4, 8, 4, overrides=VOCABULARIES[vocabulary])
    student = write_student(tmp_path / "final", quant, tie_word_embeddings=tied)
    if form == INT_QUANTIZED and vocabulary == "groups":
        with pytest.raises(UserError, match="w_group_size=32"):
            export.check(student, form)
        return
    export.check(student, form)
    export.export(student, tmp_path / "export", form)
    verified = export.verify(student, tmp_path / "export", form, WINDOWS)
    trained = prepare(tiny_model(tie_word_embeddings=tied), quant)
    assert verified.trained == perplexity(trained, WINDOWS).perplexity
    if form == GGUF:
        assert verified.engine == ", and llama.cpp loads it"
    elif form in (PACK_QUANTIZED, INT_QUANTIZED):
        stored = load_file(tmp_path / "export" / "model.safetensors")
        heads = [name for name in stored if name.startswith(HEAD)]
        assert bool(heads) != tied, "a shared weight is stored once"
        assert all(tensor.dtype != torch.float32 for name, tensor in stored.items() if f"{EMBEDDING}.weight" == name)
        for place in ("final", "export"):
            model = qat.load(str(tmp_path / place))
            assert torch.equal(model(WINDOWS).logits, trained(WINDOWS).logits)
            how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            expected = trained.generate(WINDOWS[:, :6], use_cache=False, **how)
            assert torch.equal(model.generate(WINDOWS[:, :6], **how), expected)
            model.bfloat16()
            assert model(WINDOWS).logits.dtype == torch.bfloat16


@TIED
def test_memory_is_what_the_bits_promise(tied, tmp_path):
    """Codes of 8 bits and an fp32 scale for each row, once where both are one weight."""
    held = {}
    for name, overrides in (("plain", {}), ("rows", ROWS)):
        write_student(tmp_path / name, QuantConfig(overrides=overrides), tie_word_embeddings=tied)
        held[name] = packed.memory(qat.load(str(tmp_path / name))).weights
    rows = 300 * (1 if tied else 2)
    assert held["plain"] - held["rows"] == rows * (4 * 64) - rows * (64 + 4)


def test_transformers_reads_what_the_card_says_it_reads(tmp_path):
    """int-quantized, untied. What else is quantized there it does not load, in this version."""
    for form, tied in ((INT_QUANTIZED, False), (PACK_QUANTIZED, False), (INT_QUANTIZED, True), (PACK_QUANTIZED, True)):
        folder = tmp_path / f"{form}-{tied}"
        student = write_student(folder / "final", QuantConfig(4, 8, 16, overrides=ROWS), tie_word_embeddings=tied)
        export.export(student, folder / "export", form)
        said = " ".join(EXPORT_FORMATS[form].all_deviations(student))
        assert ("which transformers' own loader cannot read" in said) == tied
        if (form, tied) == (INT_QUANTIZED, False):
            theirs = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
            theirs(WINDOWS)  # it decompresses at the first call
            for name, weight in simulated.load(str(folder / "export"), torch.float32).named_parameters():
                assert torch.equal(theirs.get_parameter(name), weight), name
        else:
            with pytest.raises((AttributeError, RuntimeError)):
                AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)(WINDOWS)


def test_the_card_and_the_differences_name_them(tmp_path):
    student = write_student(tmp_path / "final", QuantConfig(overrides=ROWS), tie_word_embeddings=False)
    origin = model_card.Origin("", "")
    for form in OF_INTEGERS:
        (tmp_path / form).mkdir()
        model_card.write(student, form, origin, "", tmp_path / form)
        card = (tmp_path / form / "README.md").read_text()
        assert "Layers that match `lm_head`: w_bits 8, a_bits 8." in card
        assert "Norms are in float32." in card
        assert ("llama.cpp rounds it to 8 bits in blocks of 32" in card) == (form == GGUF)
        assert ("Output layer: its input was trained with 8 bits per token; here" in card) == (form == FAKE)


def test_post_training_methods_round_them_to_nearest(tmp_path):
    """GPTQ calibrates on the rounded embedding, and leaves both weights to be rounded on their own grids."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    quant, tokens = QuantConfig(4, 8, 16, overrides=GROUPS), [ids(tiny_model())]
    stream = Stream(tmp_path / "model", quant, tokens)
    rounded = round_to_grid(tiny_model().model.embed_tokens.weight, Format(4, group_size=32))[0]
    assert torch.equal(stream.hidden[0], rounded[tokens[0]])
    with writer.appearing(ModelFolder.read(tmp_path / "model"), tmp_path / "out", quant, {"method": "gptq"}) as folder:
        writer.write(stream, folder, lambda *layer: gptq.quantize_layer(*layer, gptq.GPTQConfig()))
    assert len(load_grids(tmp_path / "out")) == 14
    student = student_folder.find(tmp_path / "out")
    weight = dict(student.weights())[f"{EMBEDDING}.weight"]
    assert torch.equal(weight.codes, quantize(tiny_model().model.embed_tokens.weight, Format(4, group_size=32)).codes)
    export.export(student, tmp_path / "export", PACK_QUANTIZED)
    export.verify(student, tmp_path / "export", PACK_QUANTIZED, WINDOWS)


@pytest.fixture(scope="module")
def tied_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tied") / "model"
    tiny_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_two_ranks_and_one_that_resumes_equal_one_plain_process(tied_directory, tiny_data, tmp_path):
    """A shared 4-bit weight under ZeRO-3: killed on two ranks, resumed on one, exported from its checkpoint."""
    run = tmp_path / "run"
    command = [*flags(tied_directory, tiny_data, run), f"--overrides={json.dumps(GROUPS)}"]
    process = start_training(2, *command)
    while process.poll() is None and not (run / "checkpoints" / "latest").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    kill(process)
    assert not (run / "final").exists()
    assert "written by 2 ranks, for 1" in finish(start_training(1, *command))
    teacher = models.load(str(tied_directory), torch.float32)
    quant = QuantConfig(w_bits=3, overrides=GROUPS)
    student = Distiller(prepare(models.load(str(tied_directory), torch.float32), quant).train())
    data = TrainingData(tiny_data, models.load_tokenizer(str(tied_directory)), CONFIG.seed)
    optimizer = torch.optim.AdamW(student.parameters(), CONFIG.lr, weight_decay=0.0, fused=True)
    for step, record in enumerate(log_of(run)):
        optimizer.param_groups[0]["lr"] = CONFIG.lr * CONFIG.lr_factor(step)
        optimizer.zero_grad()
        total = 0.0
        for number in (2 * step, 2 * step + 1):
            tokens = data.sample(number).input_ids
            loss, _ = student(tokens, TeacherTargets.of(teacher, tokens))
            (loss / 2).backward()
            total += loss.item() / 2
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CONFIG.gradient_clipping)
        optimizer.step()
        assert record["loss"] == pytest.approx(total, rel=1e-5), f"step {step}"
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), f"step {step}"
    for name, weight in load_file(run / "final" / "model.safetensors").items():
        torch.testing.assert_close(student.student.get_parameter(name).data, weight, rtol=0, atol=2e-4, msg=name)
    for place in ("final", "checkpoints"):
        export.export(student_folder.find(run / place), tmp_path / place, PACK_QUANTIZED)
    expected, got = (load_file(tmp_path / place / "model.safetensors") for place in ("final", "checkpoints"))
    assert f"{EMBEDDING}.weight_packed" in expected
    assert f"{HEAD}.weight_packed" not in expected
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_format_without_activations_holds_no_input_of_the_output_layer():
    quant = QuantConfig(overrides={HEAD: {"a_bits": 8, "a_quantizer": "ggml_q8_0"}})
    held = EXPORT_FORMATS[FAKE].held(quant)
    assert not hasattr(prepare(tiny_model(), held).lm_head, "input_format")
