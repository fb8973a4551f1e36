import shutil

import pyarrow.parquet as pq
import pytest
import torch
from conftest import generate_flags, run_python, tiny_model

from datagen.generate import GenerateConfig, Vocabulary, write_sequences
from datagen.shards import ShardFolder
from qat.errors import UserError

CONFIG = GenerateConfig(sequences=11, max_length=20, batch_size=4, sequences_per_shard=11)
VOCABULARY = Vocabulary(start=list(range(20, 300)), prefix=[], stop=list(range(1, 20)))
"""Many tokens end a sequence, so that slots end at different times."""


def write(config=CONFIG, vocabulary=VOCABULARY, **model_changes):
    return write_sequences(tiny_model(**model_changes), vocabulary, config, range(config.sequences))


@pytest.mark.parametrize("prefix", [[], [0]])
def test_greedy_decoding_equals_the_full_forward(prefix):
    vocabulary = Vocabulary(VOCABULARY.start, prefix, VOCABULARY.stop)
    config = GenerateConfig(sequences=11, max_length=20, batch_size=4, strategy="top1")
    model = tiny_model()
    for sequence in write_sequences(model, vocabulary, config, range(11)):
        tokens = torch.tensor([sequence.input_ids])
        first = len(prefix) + 1
        assert sequence.input_ids[:first] == [*prefix, sequence.start_token]
        assert model(tokens).logits[0, first - 1 : -1].argmax(-1).tolist() == sequence.input_ids[first:]


def test_hybrid_is_greedy_first_and_then_not():
    model = tiny_model()
    agreement = []
    for sequence in write():
        tokens = torch.tensor([sequence.input_ids])
        greedy = model(tokens).logits[0, :-1].argmax(-1) == tokens[0, 1:]
        assert greedy[: sequence.greedy_tokens].all()
        agreement += greedy[sequence.greedy_tokens :].tolist()
    assert sum(agreement) < 0.9 * len(agreement)


def test_batching_and_refilling_do_not_change_a_sequence():
    together = write()
    assert {s.finish for s in together} == {"eos", "length"}
    alone = write(GenerateConfig(sequences=11, max_length=20, batch_size=1))
    assert together == alone


def test_a_sequence_ends_at_its_first_stop_token():
    stop = set(VOCABULARY.stop)
    for sequence in write():
        assert not stop & set(sequence.input_ids[:-1])
        assert (sequence.input_ids[-1] in stop) == (sequence.finish == "eos")


def test_a_missing_shard_is_made_again_with_the_same_bytes(tiny_directory, tiny_data, tmp_path):
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    files = ShardFolder(folder).shards()
    assert len(files) == 3
    original = {file.name: file.read_bytes() for file in files}
    files[1].unlink()
    run_python("generate", *generate_flags(tiny_directory, folder))
    assert {file.name: file.read_bytes() for file in ShardFolder(folder).shards()} == original


def test_shards_are_plain_parquet(tiny_data):
    rows = [row for file in ShardFolder(tiny_data).shards() for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 12
    assert all(row["input_ids"][:2] == [0, row["start_token"]] for row in rows)


def test_a_truncated_shard_is_named(tiny_data, tmp_path):
    folder = ShardFolder(shutil.copytree(tiny_data, tmp_path / "data"))
    broken = folder.path(2)
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(UserError, match=broken.name):
        folder.sequences()


def test_an_unfinished_folder_is_named(tiny_data, tmp_path):
    folder = ShardFolder(shutil.copytree(tiny_data, tmp_path / "data"))
    folder.path(1).unlink()
    with pytest.raises(UserError, match="8 of its 12 sequences"):
        folder.sequences()


def test_a_folder_of_other_settings_is_refused(tmp_path):
    ShardFolder(tmp_path).claim({"seed": 0, "strategy": "hybrid"})
    ShardFolder(tmp_path).claim({"seed": 0, "strategy": "hybrid"})
    with pytest.raises(UserError, match="seed was 0, now 1"):
        ShardFolder(tmp_path).claim({"seed": 1, "strategy": "hybrid"})
