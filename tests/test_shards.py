"""Shards, corpora and the data card."""

import json
import os
import re
import resource
import shutil
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import error_of, generate_flags, run_python, run_ranks
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXT, tiny_tokenizer

from datagen import card, corpus
from datagen.corpus import Corpus
from datagen.generate import GenerateConfig
from launch.generate import write_corpus
from qat.data.shards import SCHEMA, Sequence, ShardFolder
from qat.runtime.errors import UserError

SEQUENCES = st.lists(
    st.builds(
        Sequence,
        input_ids=st.lists(st.integers(0, 5), min_size=1, max_size=30),
        start_token=st.integers(0, 5),
        greedy_tokens=st.just(0),
        finish=st.sampled_from(["eos", "length"]),
        surprisal=st.none() | st.floats(0, 100, width=32),
    ),
    min_size=1,
    max_size=8,
)


@given(SEQUENCES)
def test_what_is_written_is_read(sequences):
    with tempfile.TemporaryDirectory() as directory:
        folder = ShardFolder(Path(directory))
        folder.begin({"sequences": len(sequences), "sequences_per_shard": len(sequences)})
        folder.write(0, sequences)
        rows = [Sequence(**row) for row in folder.table(SCHEMA.names).to_pylist()]
        assert rows == sequences
        assert [row.surprisal for row in rows] == [sequence.surprisal for sequence in sequences]


@given(SEQUENCES, st.data())
def test_a_damaged_shard_is_missing(sequences, data):
    """Truncated anywhere, or with other bytes in its pages."""
    with tempfile.TemporaryDirectory() as directory:
        folder = ShardFolder(Path(directory))
        folder.begin({"sequences": len(sequences), "sequences_per_shard": len(sequences)})
        folder.write(0, sequences)
        assert not folder.missing(0)
        content = folder.path(0).read_bytes()
        folder.path(0).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        assert folder.missing(0)
        group = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0)
        pages = group.column(data.draw(st.integers(0, group.num_columns - 1)))
        start = pages.dictionary_page_offset or pages.data_page_offset
        place = start + pages.total_compressed_size - 1
        folder.path(0).write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        assert folder.missing(0)


def two_shards(directory: Path) -> ShardFolder:
    folder = ShardFolder(directory)
    folder.begin({"sequences": 3, "sequences_per_shard": 2})
    folder.write(0, [Sequence([1, 2, 3], 1, 0, "eos", None), Sequence([1, 4], 1, 1, "length", 0.5)])
    folder.write(1, [Sequence([5, 6, 7, 8], 5, 0, "eos", 2.5)])
    return folder


def test_every_flipped_byte_of_a_shard_is_found(tmp_path):
    """Of its checksum's file too. Parquet's own checksums cover the pages alone."""
    folder = two_shards(tmp_path)
    for file in (folder.path(1), folder.path(1).with_name(f"{folder.path(1).name}.crc32")):
        content = file.read_bytes()
        for place in range(len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
            assert folder.missing(1), f"{file.name}, byte {place}"
        with pytest.raises(UserError, match=r"shard-00001.parquet is damaged .* recreates it"):
            folder.sequences()
        file.write_bytes(content)
    assert not folder.missing(1)


@pytest.mark.parametrize("misplace", [shutil.copy, Path.rename], ids=["copied", "renamed"])
@pytest.mark.parametrize("names", [["parquet"], ["parquet", "parquet.crc32"]], ids=["alone", "with its checksum"])
def test_a_shard_is_not_taken_for_another(misplace, names, tmp_path):
    folder = two_shards(tmp_path)
    for name in names:
        misplace(tmp_path / f"shard-00000.{name}", tmp_path / f"shard-00001.{name}")
    assert folder.missing(1)
    with pytest.raises(UserError, match=r"shard-00001.parquet is damaged .*run launch/generate.py again"):
        folder.sequences()


def test_a_shard_of_an_earlier_version_is_read_and_its_place_is_checked_by_its_size(tmp_path):
    folder = two_shards(tmp_path)
    for file in tmp_path.glob("*.crc32"):
        file.unlink()
    assert not folder.missing(0)
    assert len(folder.sequences()) == 3
    shutil.copy(folder.path(0), folder.path(1))
    assert folder.missing(1)
    with pytest.raises(UserError, match="it holds 2 sequences, not 1"):
        folder.sequences()


def test_a_users_files_among_the_shards_are_not_counted(tmp_path):
    folder = two_shards(tmp_path)
    expected = folder.sequences()
    for name in ("shard-backup.parquet", "shard-00002.parquet", "shard-00099.parquet", "shard-00001 (copy).parquet"):
        shutil.copy(folder.path(1), tmp_path / name)
    (tmp_path / "shard-notes.parquet").write_text("not Parquet")
    assert folder.sequences() == expected
    assert folder.shards() == [folder.path(0), folder.path(1)]
    folder.path(1).unlink()
    folder.path(1).mkdir()
    assert folder.missing(1)


def test_a_full_disk_is_named_and_loses_nothing(tmp_path):
    """The limit on the size of files stands for the disk's: the write fails in the middle of the shard."""
    folder = ShardFolder(tmp_path)
    folder.begin({"sequences": 2000, "sequences_per_shard": 1000})
    folder.write(0, [Sequence([1, 2, 3], 1, 0, "eos", None)] * 1000)
    many = [Sequence(list(range(i, i + 50)), 1, 0, "eos", float(i)) for i in range(1000)]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written to .*make room"):
            folder.write(1, many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    folder.write(1, many)
    assert len(folder.table(["finish"])) == 2000


def test_a_read_only_folder_is_named():
    directory = Path(tempfile.mkdtemp())  # not below pytest's, which only its owner may enter
    try:
        folder = ShardFolder(directory)
        folder.begin({"sequences": 1})
        directory.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # permissions do not bind root
        try:
            for attempt in (lambda: folder.write(0, []), lambda: ShardFolder(directory / "new").begin({})):
                with pytest.raises(UserError, match=r"cannot be written to .*writable"):
                    attempt()
        finally:
            os.seteuid(user)
    finally:
        directory.chmod(0o755)
        shutil.rmtree(directory)


def test_datasets_reads_the_folder(tiny_data, tmp_path):
    files = str(tiny_data / "shard-*.parquet")
    data = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert data["input_ids"] == ShardFolder(tiny_data).sequences().to_pylist()
    by_card = load_dataset(str(tiny_data), split="train", cache_dir=str(tmp_path))
    assert by_card["input_ids"] == data["input_ids"]


def test_the_cards_snippet_runs_as_it_stands(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(tiny_data)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tiny_data / card.CARD).read_text(), re.DOTALL)
    defined = {}
    exec(snippet, defined)
    assert len(defined["data"]) == 12


@given(SEQUENCES)
def test_the_cards_figures_are_those_of_plain_counting(sequences):
    rows = [vars(sequence) | {"start_token": sequence.input_ids[0]} for sequence in sequences]
    table = pa.Table.from_pylist(
        [row if len(row["input_ids"]) > 1 else row | {"surprisal": None} for row in rows], schema=SCHEMA
    )
    figures = card.measure(table)
    assert figures["sequences"] == len(sequences)
    assert figures["tokens"] == sum(len(s.input_ids) for s in sequences)
    assert figures["ended by EOS"] == sum(s.finish == "eos" for s in sequences) / len(sequences)
    for n in (1, 2, 3):
        grams = [gram for s in sequences for gram in ngrams(s.input_ids, n)]
        assert figures[f"distinct-{n}"] == len(set(grams)) / max(len(grams), 1)
    fours = [list(ngrams(s.input_ids, 4)) for s in sequences]
    repeated = sum(count - 1 for grams in fours for count in Counter(grams).values())
    assert figures["repeated 4-grams"] == pytest.approx(repeated / max(sum(map(len, fours)), 1))
    sampled = [s for s in sequences if s.surprisal is not None and len(s.input_ids) > 1]
    entropy = sum(s.surprisal for s in sampled) / sum(len(s.input_ids) - 1 for s in sampled) if sampled else None
    assert figures.get("token entropy") == pytest.approx(entropy)
    _, counts = card.histogram(table, 30)
    assert counts.sum() == len(sequences)


def ngrams(ids: list[int], n: int):
    return zip(*(ids[i:] for i in range(n)), strict=False)


def test_the_card_describes_the_folder(tiny_data):
    text = (tiny_data / card.CARD).read_text()
    tokens = sum(len(ids) for ids in ShardFolder(tiny_data).sequences().to_pylist())
    assert f"| tokens | {tokens:,} |" in text
    assert "| token entropy |" in text
    assert text.count("```text") == 3
    assert (tiny_data / card.PLOT).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_card_has_no_plot(tiny_data, tokenizer, tmp_path, monkeypatch):
    shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns(card.CARD, card.PLOT))
    folder = ShardFolder(tmp_path / "data")
    folder.begin(folder.manifest())
    monkeypatch.setattr(card, "find_spec", lambda name: None)
    assert card.write(folder, tokenizer, "model")
    assert not (folder.directory / card.PLOT).exists()
    assert card.PLOT not in (folder.directory / card.CARD).read_text()


DOCUMENTS = [TEXT[:3000], "", "short", TEXT[3000:9000]]


def corpora(directory: Path) -> dict[str, Path]:
    """The same documents in every format."""
    lines = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS)
    (directory / "corpus.jsonl").write_text(lines)
    pq.write_table(pa.table({"text": DOCUMENTS, "id": [1, 2, 3, 4]}), directory / "corpus.parquet")
    folder = directory / "folder"
    folder.mkdir()
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number}.txt").write_text(document)
    return {"jsonl": directory / "corpus.jsonl", "parquet": directory / "corpus.parquet", "txt": folder}


def test_a_corpus_becomes_its_own_tokens(tokenizer, tmp_path):
    ids = tokenizer(DOCUMENTS, add_special_tokens=False).input_ids
    stream = [token for document in ids if document for token in [*document, tokenizer.eos_token_id]]
    for path in corpora(tmp_path).values():
        rows = Corpus(str(path)).rows(tokenizer, [0], len(stream) // 31, 32)
        assert rows[:, 1:].flatten().tolist() == stream[: len(stream) // 31 * 31]
        assert not rows[:, 0].any()
        with pytest.raises(UserError, match=f"give --sequences {len(stream) // 31} or less"):
            Corpus(str(path)).rows(tokenizer, [0], 10**6, 32)


def test_documents_are_joined_without_a_token_where_none_ends_a_text(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    ids = [i for document in DOCUMENTS for i in tokenizer(document, add_special_tokens=False).input_ids]
    rows = Corpus(str(corpora(tmp_path)["jsonl"])).rows(tokenizer, [0], 1, len(ids))
    assert rows.tolist() == [[0, *ids[:-1]]]


def test_a_corpus_takes_no_memory_for_its_length(tokenizer, tmp_path, capsys, monkeypatch):
    """What Python holds at most is the tokens of a few pieces, whatever the number of sequences. A bar shows how far it
    is."""
    monkeypatch.setattr(corpus, "_BLOCK", 1000)
    (tmp_path / "corpus.jsonl").write_text(f"{json.dumps({'text': TEXT[:1000]})}\n" * 200)
    peaks = []
    for count in (2000, 500):
        tracemalloc.start()
        assert len(Corpus(str(tmp_path / "corpus.jsonl")).rows(tokenizer, [0], count, 32)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert f"{count}/{count}" in capsys.readouterr().err
    assert peaks[0] < 1.1 * peaks[1]


def test_generate_makes_shards_of_a_corpus(tiny_directory, tmp_path):
    source = corpora(tmp_path)["jsonl"]
    flags = [flag for flag in generate_flags(tiny_directory, tmp_path / "data") if "batch_size" not in flag]
    run_python("generate", *flags, f"--corpus={source}")
    assert [len(ids) for ids in ShardFolder(tmp_path / "data").sequences().to_pylist()] == [24] * 12
    assert "corpus.jsonl" in (tmp_path / "data" / card.CARD).read_text()


def test_only_the_first_rank_makes_shards_of_a_corpus_also_after_a_kill_before_the_card(
    tiny_directory, tmp_path, monkeypatch
):
    source = corpora(tmp_path)["jsonl"]
    flags = [flag for flag in generate_flags(tiny_directory, tmp_path / "data") if "batch_size" not in flag]
    run_python("generate", *flags, f"--corpus={source}")
    (tmp_path / "data" / card.CARD).unlink()
    run_ranks("generate", *flags, f"--corpus={source}")
    assert (tmp_path / "data" / card.CARD).exists()
    monkeypatch.setenv("RANK", "1")
    run_python("generate", *flags, f"--corpus={source}", f"--output={tmp_path / 'second'}")
    assert not (tmp_path / "second").exists()


def test_a_corpus_longer_than_the_model_attends_over_is_refused(tiny_directory, tmp_path, monkeypatch):
    source = corpora(tmp_path)["jsonl"]
    flags = [f"--model={tiny_directory}", f"--output={tmp_path / 'data'}", f"--corpus={source}", "--max_length=257"]
    assert "longer than the 256 positions" in error_of(monkeypatch, "generate", *flags)


def test_what_is_no_corpus_is_refused(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"content": "bad"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "d.csv").write_text("text\n")
    (tmp_path / "e.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "f.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source, message in {
        tmp_path / "nowhere.txt": "There is no corpus at",
        tmp_path / "a.jsonl": 'line 2, is not an object with the field "text"',
        tmp_path / "b.txt": "not UTF-8",
        tmp_path / "c.parquet": "cannot be read as Parquet",
        tmp_path / "d.csv": "contains no readable text",
        tmp_path / "e.jsonl": "not UTF-8",
        tmp_path / "f.parquet": "text is no string",
        "wikitext": "Cannot fetch Salesforce/wikitext from the hub",
    }.items():
        with pytest.raises(UserError, match=message):
            Corpus(str(source)).rows(tokenizer, [0], 4, 24)


def test_a_corpus_takes_no_settings_of_a_writer(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    settings = GenerateConfig(temperature=0.5, batch_size=8)
    with pytest.raises(UserError, match="does not take temperature or batch_size"):
        write_corpus(Corpus(str(tmp_path / "a.txt")), ShardFolder(tmp_path / "data"), "", None, settings)
