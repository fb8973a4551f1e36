import json
import math
import shutil
import sys

import pytest
import torch
from commands import ROOT, error_of, finish, start_training
from tiny import TEXT, talking, tiny_model, tiny_tokenizer
from torch.nn.functional import kl_div

import launch.evaluate
from qat.evaluate import heldout
from qat.evaluate.perplexity import TextScore, WindowScore, dialogue_windows, score_windows, text_windows
from qat.runtime.errors import UserError
from qat.store import dialogues, models, smollm2
from qat.store.sidecars import STEPS_FILE
from qat.store.weight_files import weight_files

WINDOWS = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(0))


def test_perplexity_is_that_of_the_models_own_loss():
    model = tiny_model()
    measured = TextScore.of(score_windows(model, WINDOWS))
    loss = model(WINDOWS, labels=WINDOWS).loss.item()
    assert measured.nll == pytest.approx(loss, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert measured.tokens == 3 * 39
    assert measured.kl is None


def test_kl_is_that_of_the_whole_distributions():
    model, teacher = tiny_model(), tiny_model()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    measured = TextScore.of(score_windows(model, WINDOWS, teacher))
    own, other = (m(WINDOWS).logits[:, :-1].double().log_softmax(-1) for m in (model, teacher))
    expected = kl_div(own, other, reduction="sum", log_target=True).item() / own[..., 0].numel()
    assert measured.kl == pytest.approx(expected, rel=1e-3)
    assert TextScore.of(score_windows(teacher, WINDOWS, teacher)).kl == pytest.approx(0, abs=1e-7)


def test_agreement_and_the_worst_kl_are_those_of_the_tokens():
    model, teacher = tiny_model(), tiny_model()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    measured = TextScore.of(score_windows(model, WINDOWS, teacher))
    own, other = (m(WINDOWS).logits[:, :-1].double().log_softmax(-1) for m in (model, teacher))
    same = (own.argmax(-1) == other.argmax(-1)).double().mean(1)
    assert 0 < same.mean() < 1
    assert measured.window_top1 == pytest.approx(same.tolist(), abs=1e-6)
    assert measured.top1 == pytest.approx(same.mean().item())
    token_kl = (other.exp() * (other - own)).sum(-1)
    assert measured.kl_p99 == pytest.approx(token_kl.flatten().quantile(0.99).item(), rel=1e-3)
    assert TextScore.of(score_windows(teacher, WINDOWS, teacher)).top1 == 1


def test_of_dialogues_the_answers_are_measured_and_each_is_what_the_template_ends_it_with():
    tokenizer, model, teacher = talking(), tiny_model(), tiny_model()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    said = [["Why?", "So.", "How?", "By itself."], ["A question", "An answer of many words"], ["long " * 99, "cut"]]
    messages = [
        [dialogues.message(role, text) for role, text in zip(("user", "assistant") * 2, turns, strict=False)]
        for turns in said
    ]
    windows = dialogue_windows(messages, tokenizer, 64, most=0)
    assert len(windows.ids) == 2, "nothing is left of an answer beyond the window"
    for ids, counted, turns, dialogue in zip(windows.ids, windows.counted, said, messages, strict=False):
        assert tokenizer.decode(ids) == dialogues.rendered(tokenizer, dialogue, answering=False)
        assert tokenizer.decode(ids[1:][counted]) == "".join(f"{answer}</s>" for answer in turns[1::2])
    scores = score_windows(model, windows.ids, teacher, counted=windows.counted)
    for score, ids, counted in zip(scores, windows.ids, windows.counted, strict=True):
        own, other = (m(ids[None]).logits[0, :-1].log_softmax(-1)[counted] for m in (model, teacher))
        assert score.tokens == int(counted.sum())
        assert score.nll == pytest.approx(-own.gather(1, ids[1:][counted][:, None]).mean().item(), rel=1e-4)
        assert score.kl == pytest.approx(kl_div(own, other, reduction="batchmean", log_target=True).item(), rel=1e-3)
    assert TextScore.of(scores).tokens == sum(score.tokens for score in scores)
    with pytest.raises(UserError, match="has an answer"):
        dialogue_windows([[dialogues.message("user", "Why?")]], tokenizer, 64, 0)


def test_the_built_in_dialogues_are_questions_with_answers():
    found = heldout.dialogues("dialogues")
    assert len(found) == 1000
    assert all([turn["role"] for turn in dialogue] == ["user", "assistant"] for dialogue in found)
    answers = [dialogue[1]["content"] for dialogue in found]
    assert all("The answer is" in answer and "<<" not in answer and "####" not in answer for answer in answers[::2])
    assert all(answer.startswith("```python\n") and "\r" not in answer for answer in answers[1::2])
    assert heldout.dialogues("encyclopedia") is None


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_engines_that_start_processes_of_their_own_need_no_launcher(engine, tiny_directory, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch.evaluate.ranks, "join", lambda *_: None)
    message = error_of(monkeypatch, "evaluate", f"--model={tiny_directory}", f"--engine={engine}")
    assert "start it without a launcher" in message


def test_a_file_of_dialogues_is_evaluated(tmp_path, monkeypatch):
    """vLLM is asked for running text alone."""
    talks = tmp_path / "model"
    tiny_model().save_pretrained(talks)
    talking().save_pretrained(talks)
    file = tmp_path / "held_out.jsonl"
    turns = [dialogues.message("user", "Why?"), dialogues.message("assistant", "For no reason that I know of.")]
    file.write_text(f"{json.dumps({'messages': turns})}\n" * 3)
    flags = [f"--model={talks}", f"--text={file}", "--window=64"]
    assert "leave it out, or give engine=torch" in error_of(monkeypatch, "evaluate", *flags, "--engine=vllm")
    flags += [f"--teacher={talks}", f"--output={tmp_path / 'out.json'}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags, "--method=rtn", "--w_bits=2"])
    launch.evaluate.main()
    score = json.loads((tmp_path / "out.json").read_text())["texts"][str(file)]
    assert len(score["window_top1"]) == 3
    answer = talking()("For no reason that I know of.</s>", add_special_tokens=False).input_ids
    assert score["tokens"] == 3 * len(answer)
    assert score["kl_p99"] >= score["kl"] > 0


def test_standard_errors_are_those_of_the_windows():
    score = TextScore.of([WindowScore(1.0, 0.1, 9), WindowScore(3.0, 0.1, 9)])
    assert score.nll == 2
    assert score.nll_stderr == pytest.approx(1.0)
    assert score.kl_stderr == pytest.approx(0.0)


def test_windows_are_the_text_in_order(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one two three four five six seven eight nine ten " * 5)
    windows = text_windows(heldout.paragraphs(str(file)), tokenizer, window=8, most=0)
    ids = tokenizer(file.read_text() + "\n\n", add_special_tokens=False).input_ids
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert len(ids) - windows.numel() < 8
    assert torch.equal(text_windows(heldout.paragraphs(str(file)), tokenizer, 8, most=2), windows[:2])


@pytest.mark.parametrize("text", ["encyclopedia", "howto"])
def test_the_built_in_texts_are_prose_and_apart_from_what_may_be_trained_on(text):
    held_out, training = (list(heldout.paragraphs(name)) for name in (text, f"{text}-train"))
    joined = "\n".join(held_out)
    assert joined.count(" the ") > 5000
    assert not any(markup in joined for markup in ("<ref", "thumb|", "[step]", "[title]"))
    assert 0.7 < len(training) / len(held_out) < 1.4
    assert not set(held_out) & set(training)


def test_c4_is_cut_where_the_gptq_protocol_cuts_it():
    assert heldout.most_windows("c4", 2048) == 256
    assert heldout.most_windows("c4", 512) == 1024
    assert heldout.most_windows("wikitext2", 2048) == 0


def test_missing_and_short_texts_are_refused(tokenizer):
    with pytest.raises(UserError, match="no text at"):
        heldout.paragraphs("nowhere.txt")
    with pytest.raises(UserError, match="less than one window"):
        text_windows(["one"], tokenizer, 100, 0)


def test_two_ranks_find_what_one_finds_and_nothing_is_measured_twice(tiny_directory, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    where = [f"--model={tiny_directory}", f"--teacher={tiny_directory}", "--method=rtn", "--window=64", "--windows=5"]
    all_of_it = [f"--text={text}", "--tasks=arc_easy,openbookqa", "--limit=5"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"

    def evaluate(*flags) -> dict:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *where, f"--output={one}", *flags])
        launch.evaluate.main()
        return json.loads(one.read_text())

    found = evaluate(*all_of_it)
    finish(start_training(2, *where, *all_of_it, f"--output={two}", script="evaluate"))
    shared = json.loads(two.read_text())
    assert shared["ranks"] == 2
    scores, others = found["texts"][str(text)], shared["texts"][str(text)]
    assert others["window_nll"] == pytest.approx(scores["window_nll"], rel=1e-5)
    assert others["window_kl"] == pytest.approx(scores["window_kl"], rel=1e-3)
    assert shared["tasks"] == found["tasks"]
    assert [len(score["correct"]) for score in found["tasks"].values()] == [5, 5]

    capsys.readouterr()
    assert evaluate(*all_of_it) == found
    assert "These results are already in" in capsys.readouterr().out
    more = evaluate("--text=none", "--tasks=arc_easy,piqa", "--limit=5", f"--baseline={two}")
    assert f"arc_easy: 0 of 5 flip (0 become wrong, 0 right), 0 answers change, from {two}" in capsys.readouterr().out
    assert more["texts"] == found["texts"]
    assert more["tasks"].keys() == {"arc_easy", "openbookqa", "piqa"}
    message = error_of(monkeypatch, "evaluate", *where, f"--output={one}", f"--text={text}", "--limit=6", "--w_bits=5")
    assert "results of other settings (limit was 5, now 6, w_bits was 4, now 5)" in message
    assert json.loads(one.read_text()) == more, "nothing is lost"
    for flags, refusal in (
        (["--tasks=piqa", "--limit=5"], "has no results for piqa: give --tasks that it has (arc_easy, openbookqa)"),
        (["--tasks=arc_easy"], "was measured on other documents (limit was 5, now 0)"),
        ([], "needs --tasks"),
        (
            ["--tasks=arc_easy", "--limit=5", f"--baseline={text}"],
            "not a result of launch/evaluate.py: give another --b",
        ),
    ):
        assert refusal in error_of(monkeypatch, "evaluate", *where, f"--text={text}", f"--baseline={two}", *flags)
    of_triviaqa = json.loads(two.read_text())
    of_triviaqa["tasks"]["triviaqa"] = of_triviaqa["tasks"]["arc_easy"]
    (tmp_path / "triviaqa.json").write_text(json.dumps(of_triviaqa))
    message = error_of(
        monkeypatch, "evaluate", *where, "--text=none", "--tasks=triviaqa", "--limit=5",
        f"--baseline={tmp_path / 'triviaqa.json'}",
    )  # fmt: skip
    assert "by 2 ranks, which give triviaqa other examples than 1 do" in message
    text.write_text(TEXT[::-1])  # under the same name
    digests = [result["texts"][str(text)]["digest"] for result in (found, evaluate(f"--text={text}", "--limit=5"))]
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_perplexity_of_the_real_model():
    """As in README.md, whatever the code that finds it."""
    directory = models.resolve(smollm2.EMBEDDED)
    windows = text_windows(heldout.paragraphs("encyclopedia"), models.load_tokenizer(directory), 512, 32)
    measured = TextScore.of(score_windows(models.load(directory, torch.float32), windows))
    assert measured.perplexity == pytest.approx(23.32, abs=0.01)


def test_flags_that_would_be_ignored_are_refused(tiny_directory, monkeypatch):
    message = error_of(monkeypatch, "evaluate", f"--model={tiny_directory}", "--kv_rotation=hadamard")
    assert "is measured as it is (in full precision)" in message
    message = error_of(monkeypatch, "evaluate", f"--model={tiny_directory}", "--method=rtn", "--a_quantizer=lsq")
    assert "rounds without training" in message
    cache = ["--kv_format=vllm_fp8_scaled", "--kv_bits=8"]
    message = error_of(monkeypatch, "evaluate", f"--model={tiny_directory}", "--method=rtn", *cache)
    assert "has no calibration text, which kv_format=vllm_fp8_scaled needs" in message
    message = error_of(monkeypatch, "evaluate", f"--model={tiny_directory}", "--text=none")
    assert "nothing to measure" in message


def test_damaged_and_foreign_files_are_named(tiny_directory, tmp_path, monkeypatch):
    damaged = shutil.copytree(tiny_directory, tmp_path / "model")
    (damaged / "quant_config.json").write_text("{")
    assert "is damaged" in error_of(monkeypatch, "evaluate", f"--model={damaged}")
    text = [f"--model={tiny_directory}", f"--text={ROOT / 'LICENSE'}", "--window=64"]
    (tmp_path / "foreign.json").write_text("[]")
    for output in (tmp_path, tmp_path / "foreign.json"):
        assert "is not a result of" in error_of(monkeypatch, "evaluate", *text, f"--output={output}")


def test_weights_are_known_by_the_files_that_are_the_models(tiny_directory, tmp_path):
    copy = shutil.copytree(tiny_directory, tmp_path / "model")
    weights = weight_files(copy)[-1]
    first = models.weights_fingerprint(str(copy))
    assert first == models.weights_fingerprint(str(tiny_directory))
    shutil.copy(weights, copy / "consolidated.safetensors")  # as Mistral's directories have it
    assert models.weights_fingerprint(str(copy)) == first
    shutil.copy(weights, copy / STEPS_FILE)
    assert models.weights_fingerprint(str(copy)) != first
    (copy / STEPS_FILE).unlink()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert models.weights_fingerprint(str(copy)) != first


def test_a_teacher_that_predicts_other_tokens_is_refused(tiny_directory, tmp_path, monkeypatch):
    """More tokens that the text never has are no other tokens."""
    flags = [f"--model={tiny_directory}", f"--text={ROOT / 'LICENSE'}", "--window=64", "--windows=2"]
    other = shutil.copytree(tiny_directory, tmp_path / "other")
    tiny_tokenizer("quite another text, of a few words only").save_pretrained(other)
    assert "different tokenizers" in error_of(monkeypatch, "evaluate", *flags, f"--teacher={other}")
    tiny_model(vocab_size=304).save_pretrained(tmp_path / "larger")
    models.load_tokenizer(str(tiny_directory)).save_pretrained(tmp_path / "larger")
    message = error_of(monkeypatch, "evaluate", *flags, f"--teacher={tmp_path / 'larger'}")
    assert f"has a vocabulary of 304 tokens, {tiny_directory} of 300" in message
    tokenizer = models.load_tokenizer(str(tiny_directory))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    launch.evaluate.check_teacher(str(tiny_directory), str(tiny_directory), tokenizer)
