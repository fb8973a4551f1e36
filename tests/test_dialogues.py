"""Dialogues that the teacher writes, and what it predicts while it writes."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import ROOT, error_of, finish, run_python, start_training
from tiny import TEMPLATE, TEXT, talking, tiny_model

from datagen import card, plan, sampling
from datagen.dialogues import Dialogues
from datagen.generate import Beginnings, GenerateConfig, Vocabulary, write_sequences
from qat.data.sequences import Row, TrainingData
from qat.data.shards import SCHEMA, ShardFolder
from qat.runtime.errors import UserError
from qat.store import dialogues, models
from qat.train.distill import TeacherTargets
from qat.train.teacher_cache import Observed, TeacherCache, entry_of

CONFIG = GenerateConfig(sequences=11, max_length=70, batch_size=4, strategy="chat", turns=2)
STOP = [1, *range(20, 40)]
VOCABULARY = Vocabulary(start=list(range(40, 300)), prefix=[0], stop=STOP)
"""Many tokens end a turn, so that turns end at different times, also by another token than the template's."""


def given(config: GenerateConfig = CONFIG) -> Dialogues:
    return Dialogues.of(talking(), config.turns, config.system, config.max_length)


def write(config: GenerateConfig = CONFIG, indices=range(11), model=None):
    return write_sequences(model or tiny_model(), VOCABULARY, config, indices, dialogues=given(config))


def test_a_dialogue_is_what_the_chat_template_makes_of_its_turns():
    tokenizer, texts = talking(), given()
    whole = 0
    for sequence in write():
        ids, chosen = sequence.input_ids, sequence.chosen
        assert len(ids) == len(chosen)
        assert sequence.start_token is None
        expected, place = list(texts.openings[0]), len(texts.openings[0])
        assert not any(chosen[:place])
        contents = []
        for after in [*texts.between, []]:
            end = next((i for i in range(place, len(ids)) if ids[i] in STOP), len(ids))
            assert all(chosen[place:end])
            contents.append(tokenizer.decode(ids[place:end]))
            expected += ids[place:end] + after
            assert not any(chosen[end + 1 : end + len(after)]), "what is given is not chosen"
            place = end + len(after)
        if sequence.finish == "eos":
            whole += 1
            assert ids[:-1] == expected
            assert ids[-1] in STOP
            assert chosen[-1]
            roles = ("user", "assistant", "user", "assistant")
            said = [dialogues.message(role, content) for role, content in zip(roles, contents, strict=True)]
            assert tokenizer.decode(expected) + "</s>" == dialogues.rendered(tokenizer, said, answering=False)
        else:
            assert len(ids) == CONFIG.max_length
            assert ids == expected[: CONFIG.max_length]
    assert 0 < whole < 11


def test_every_chosen_token_is_drawn_from_the_full_forward_by_the_random_number_of_its_place():
    model, config = tiny_model(), replace(CONFIG, chat_share=0.5, temperature=0.8, top_k=100)
    ended_otherwise = 0
    for number, sequence in enumerate(write(config, model=model)):
        tokens = torch.tensor(sequence.input_ids)
        chosen = torch.tensor(sequence.chosen or [False] * 2 + [True] * (len(tokens) - 2))
        chosen[: 2 + sequence.greedy_tokens] &= sequence.start_token is None
        with torch.inference_mode():
            logits = model(tokens[None, :-1]).logits[0]
        at = torch.arange(1, len(tokens))
        draw = sampling.uniform(config.seed, torch.full_like(at, number), at)
        drawn, surprisal = sampling.choose(logits, at < 0, draw, config.truncation)
        assert torch.equal(drawn[chosen[1:]], tokens[1:][chosen[1:]])
        assert (sequence.surprisal or 0) == pytest.approx(surprisal[chosen[1:]].sum().item(), abs=1e-3)
        turns_end = ~chosen[1:-1] & chosen[:-2]  # the template's token, where the model chose another end
        ended_otherwise += int(torch.isin(drawn[:-1][turns_end], torch.tensor(STOP)).sum())
    assert ended_otherwise > 0


def test_batches_shards_and_neighbours_change_no_dialogue():
    config = replace(CONFIG, chat_share=0.4)
    together = write(config)
    assert [sequence.start_token is None for sequence in together].count(True) == int(0.4 * 11)
    assert together == write(replace(config, batch_size=1), range(5)) + write(config, range(5, 11))
    begun = [s.start_token for s in together if s.start_token is not None]
    assert begun == sampling.start_tokens(VOCABULARY.start, config.seed, 0, 7), "texts are numbered apart"
    only = Beginnings.of(VOCABULARY, replace(config, chat_share=1.0), range(3), given(config))
    assert only.prefix == given(config).openings * 3
    assert only.greedy == [0, 0, 0], "or all users would say the same"


@pytest.mark.parametrize(
    ("template", "refused"),
    [
        ("{% for m in messages %}{{ '<s>' if m.role == 'user' }}{{ m.content }}</s>{% endfor %}", ""),
        (TEMPLATE.replace("m['content']", "m['content'] | trim"), ""),
        (TEMPLATE.replace("</s>", "[/I]"), "ends a turn with ordinary text"),
        (TEMPLATE.replace("{{ m['content'] }}", "x"), "does not render messages in order"),
        (TEMPLATE.replace("{{ m['role'] }}", "{{ loop.length }}"), "changes earlier turns"),
        ("{{ raise_exception('no') }}", "refuses the messages: no"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", "puts nothing before the user's turn"),
        (None, "has no chat template"),
    ],
)
def test_templates_between_whose_texts_turns_can_be_written(template, refused):
    if refused:
        with pytest.raises(UserError, match=refused):
            Dialogues.of(talking(template), 2, "", 100)
        return
    found = Dialogues.of(talking(template), 2, "", 100)
    assert len(found.between) == 3
    assert all(text[0] == 1 for text in found.between)


def test_a_template_that_states_the_date_gives_the_same_tokens_on_every_day():
    dated = TEMPLATE + "{{ strftime_now('%d %b %Y') }}"
    assert dialogues.rendered(talking(dated), [dialogues.message("user", "")], False).endswith("26 Jul 2024")


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_prompts_of_a_file_are_answered(suffix, tmp_path):
    file, tokenizer = tmp_path / f"prompts.{suffix}", talking()
    long = "a very long prompt " * 40
    if suffix == "txt":
        file.write_text(f"Why?\n\n{long}\nHow is it done?\n")
    else:
        answered = [dialogues.message("user", "How is it done?"), dialogues.message("assistant", "So.")]
        lines = [{"prompt": "Why?"}, {"prompt": long}, {"messages": answered}]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = Dialogues.of_prompts(tokenizer, dialogues.read(file), 1, "", 60)
    asked = [tokenizer.decode(opening) for opening in texts.openings]
    assert asked == [f"<s>user\n{prompt}</s><s>assistant\n" for prompt in ("Why?", "How is it done?")]
    written = write_sequences(tiny_model(), VOCABULARY, replace(CONFIG, turns=1), range(4), dialogues=texts)
    begins = [next(i for i in (0, 1) if s.input_ids[: len(texts.openings[i])] == texts.openings[i]) for s in written]
    assert sorted(begins[:2]) == sorted(begins[2:]) == [0, 1], "each once before any twice"
    for sequence, which in zip(written, begins, strict=True):
        assert sequence.chosen.index(True) == len(texts.openings[which])
    with_system = Dialogues.of_prompts(tokenizer, dialogues.read(file), 2, "Be kind.", 60)
    assert tokenizer.decode(with_system.openings[0]) == "<s>system\nBe kind.</s><s>user\nWhy?</s><s>assistant\n"
    assert [tokenizer.decode(text) for text in with_system.between] == ["</s><s>user\n", "</s><s>assistant\n"]
    with pytest.raises(UserError, match="leaves room for an answer"):
        Dialogues.of_prompts(tokenizer, dialogues.read(file), 1, "", 8)


def test_what_is_no_file_of_dialogues_is_refused(tmp_path):
    bad = ["[]", "nothing", '{"prompt": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"text": "a"}']
    for line in bad:
        (tmp_path / "a.jsonl").write_text('{"prompt": "good"}\n' + line + "\n")
        with pytest.raises(UserError, match="line 2, is not a dialogue"):
            dialogues.read(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="contains no dialogues"):
        dialogues.read(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"is not a \.jsonl or \.txt file"):
        dialogues.read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"turns": 2}, "strategy=hybrid writes no dialogues"),
        ({"strategy": "chat", "turns": 0}, "turns=0"),
        ({"strategy": "chat", "chat_share": 0.0}, "share above 0"),
        ({"strategy": "chat", "engine": "vllm"}, "engine=vllm writes neither dialogues"),
        ({"teacher_cache": 4, "engine": "vllm"}, "nor a teacher_cache"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        GenerateConfig(**settings)


def test_settings_that_do_not_fit_are_refused(tiny_directory, tmp_path, monkeypatch):
    run = [f"--model={tiny_directory}", f"--output={tmp_path / 'data'}", "--max_length=64"]
    (text := tmp_path / "text.txt").write_text(TEXT)
    many = ["--sequences=600", "--sequences_per_shard=300", "--teacher_cache=4"]
    for flags, message in {
        ("--strategy=chat",): "has no chat template",
        ("--prompts=a.txt",): "give --strategy chat",
        ("--teacher_cache=301",): "more than the 300 tokens of the vocabulary",
        tuple(many): "sequences_per_shard=300 does not fit --teacher_cache",
        ("--teacher_cache=4", f"--corpus={text}"): "does not take teacher_cache",
    }.items():
        assert message in error_of(monkeypatch, "generate", *run, *flags)
    with pytest.raises(UserError, match="16 tokens: give 18 or more"):
        Dialogues.of(talking(), 1, "", 12)
    assert not (tmp_path / "data").exists()


def test_shards_without_dialogues_are_as_they_were(tiny_data):
    names = pq.read_schema(ShardFolder(tiny_data).path(0)).names
    assert names == ["input_ids", "start_token", "greedy_tokens", "finish", "surprisal"]
    settings = json.loads((tiny_data / "manifest.json").read_text())
    assert not settings.keys() & {"chat_share", "turns", "system", "teacher_cache", "dialogues"}
    assert ShardFolder(tiny_data).table(["chosen"]).column("chosen").null_count == 12


JSON = f"--deepspeed={ROOT / 'ds_configs' / 'zero3_cpu.json'}"


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that talks, and a folder with its predictions: two shards, three files of these."""
    folder = tmp_path_factory.mktemp("taught")
    tiny_model(tie_word_embeddings=False).save_pretrained(folder / "model")
    talking().save_pretrained(folder / "model")
    run_python("generate", *taught_flags(folder))
    return folder


def taught_flags(folder) -> list[str]:
    sizes = ["--sequences=520", "--max_length=32", "--batch_size=128", "--sequences_per_shard=512"]
    how = ["--strategy=chat", "--chat_share=0.5", "--temperature=0.7", "--teacher_cache=8"]
    return [f"--model={folder / 'model'}", f"--output={folder / 'data'}", *sizes, *how]


def test_what_the_teacher_predicted_while_it_wrote_is_what_it_predicts(taught):
    """fp32: cached decoding differs from a full forward by rounding, and both are kept as fp16."""
    folder = TrainingData(taught / "data", models.load_tokenizer(str(taught / "model")), seed=0)
    cache, teacher = TeacherCache(taught / "data" / "teacher_cache"), models.load(str(taught / "model"), torch.float32)
    made = {"teacher": models.weights_fingerprint(str(taught / "model")), "data": folder.fingerprint, "top_k": 8}
    assert cache.fingerprint() == made
    cache.check_complete(len(folder))
    for number in (0, 1, 2, 255, 256, 511, 512, 519):
        sample = folder.sequence(number)
        with torch.no_grad():
            expected = teacher(sample.input_ids).logits[0, :-1].log_softmax(-1)
        targets = cache(Row.of(sample))
        found, best = targets.log_probabilities.float(), expected.topk(8).values
        bound = {"rtol": 2**-10, "atol": 1e-4}
        torch.testing.assert_close(found, best, **bound)
        torch.testing.assert_close(found, expected.gather(1, targets.ids.long()), **bound)


def test_what_is_kept_of_the_predictions_is_planned():
    planned = plan.needs(tiny_model().config, GenerateConfig(sequences=10, max_length=33, teacher_cache=5), "cpu")
    kept = Observed(10, 33, 5)
    kept.keep(torch.zeros(10, 300), torch.arange(10), torch.full((10,), 31))
    held = sum(tensor.nbytes for entry in kept.entries([33] * 10) for tensor in entry.values())
    assert planned["teacher's predictions"] == held


def test_the_card_says_how_much_is_dialogue_and_how_much_of_it_was_given(taught):
    rows = ShardFolder(taught / "data").table(SCHEMA.names).to_pylist()
    figures = card.measure(pa.Table.from_pylist(rows, schema=SCHEMA))
    spoken = [row for row in rows if row["chosen"]]
    tokens = sum(len(row["input_ids"]) for row in spoken)
    assert figures["dialogues"] == len(spoken) == 260
    assert figures["tokens in dialogues"] == tokens / figures["tokens"]
    assert figures["given tokens in dialogues"] == pytest.approx(1 - sum(sum(row["chosen"]) for row in spoken) / tokens)
    drawn = [row for row in rows if row["surprisal"] is not None]
    count = sum(
        sum(row["chosen"]) if row["chosen"] else len(row["input_ids"]) - 2 - row["greedy_tokens"] for row in drawn
    )
    assert figures["token entropy"] == pytest.approx(sum(row["surprisal"] for row in drawn) / count)
    assert "260 of them dialogues" in (taught / "data" / card.CARD).read_text()


@pytest.mark.parametrize(("dtype", "same", "bound"), [(torch.float32, 0.999, 0.004), (torch.bfloat16, 0.2, 0.1)])
def test_predictions_kept_differ_from_a_full_forward_by_rounding(dtype, same, bound):
    """Beside what launch/cache_teacher.py keeps of the same sequence, in the dtype that the model computes in; 0.004 is
    one step of an fp16 number between 4 and 8."""
    model, kept = tiny_model().to(dtype), Observed(11, 70, 8)
    sequences = write_sequences(model, VOCABULARY, CONFIG, range(11), dialogues=given(), watch=kept.keep)
    entries = kept.entries([len(sequence.input_ids) for sequence in sequences])
    found = torch.cat([entry["log_probabilities"] for entry in entries])
    with torch.no_grad():
        expected = torch.cat([
            entry_of(TeacherTargets.of(model, torch.tensor([sequence.input_ids])), 8)["log_probabilities"]
            for sequence in sequences
        ])  # fmt: skip
    differences = (found - expected).float().abs()
    assert differences.max() <= bound
    assert differences.median() < bound / 10
    assert (found == expected).float().mean() > same


def test_what_is_missing_of_the_predictions_is_made_again_with_its_shard(taught):
    before = {
        path: path.read_bytes() for path in (taught / "data").rglob("*") if path.suffix in (".parquet", ".safetensors")
    }
    assert len(before) == 2 + 3
    first, second, _ = sorted(path for path in before if path.suffix == ".safetensors")
    first.unlink()
    second.write_bytes(before[second][:-1])
    (taught / "data" / "shard-00001.parquet").unlink()
    finish(start_training(2, *taught_flags(taught), script="generate"))
    assert {path: path.read_bytes() for path in before} == before


def test_training_takes_the_predictions_for_those_of_a_teacher(taught, tmp_path):
    run = [f"--model={taught / 'model'}", f"--data={taught / 'data'}", JSON, "--steps=3", "--batch_size=2"]
    finish(start_training(1, *run, f"--output={tmp_path}", f"--teacher_cache={taught / 'data' / 'teacher_cache'}"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)
