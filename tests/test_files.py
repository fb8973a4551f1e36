"""Files and folders that are whole or not there: what lies in their place already, and who is at work there."""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from commands import error_of, train_flags

from qat.data.shards import Sequence, ShardFolder
from qat.quant.config import QuantConfig
from qat.runtime.checksums import appearing_with_checksum, damage
from qat.runtime.errors import UserError
from qat.runtime.files import appearing, appearing_folder, lock, locked, save_tensors, wait_until_free, write_atomically
from qat.train.teacher_cache import TeacherCache

ONE_SHARD = {"sequences": 1, "sequences_per_shard": 1}


def write(path: Path) -> None:
    with appearing(path) as partial:
        partial.write_text("new")


def write_shard(path: Path) -> None:
    folder = ShardFolder(path.parent)
    folder.begin(ONE_SHARD)
    folder.write(0, [Sequence([1, 2], 1, 0, "eos", None)])


WRITERS: dict[str, Callable[[Path], None]] = {
    "file": write,
    "text.partial-PID": lambda path: write_atomically(path.with_name("text"), "new"),
    "tensors": lambda path: save_tensors({"x": torch.zeros(2)}, path),
    "shard-00000.parquet": write_shard,
    "shard-00000.parquet.crc32": write_shard,
    "manifest.json": write_shard,
    "targets-00000.safetensors": lambda path: TeacherCache(path.parent).write(0, [{"hidden": torch.zeros(2, 3)}]),
    "targets-00000.safetensors.crc32": lambda path: TeacherCache(path.parent).write(0, [{"ids": torch.zeros(2, 3)}]),
}
"""What writes a file of that name."""


@pytest.mark.parametrize("name", WRITERS)
def test_a_planted_link_is_not_followed(name, tmp_path):
    """A link under the partial file's name leads to what somebody else holds dear."""
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("dear")
    folder.mkdir()
    planted = folder / (name.replace("PID", str(os.getpid())) if ".partial" in name else f"{name}.partial")
    planted.symlink_to(victim)
    WRITERS[name](folder / name)
    assert victim.read_text() == "dear"
    assert not planted.is_symlink()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_appears_for_whom_the_umask_allows(umask, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_write_that_fails_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    with suppress(KeyboardInterrupt), appearing(tmp_path / "file") as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_every_flipped_byte_is_found_and_the_name_too(tmp_path):
    with appearing_with_checksum(tmp_path / "file") as partial:
        partial.write_bytes(bytes(range(256)))
    assert not damage(tmp_path / "file")
    for place in range(256):
        (tmp_path / "file").write_bytes(bytes(byte ^ (place == number) for number, byte in enumerate(range(256))))
        assert damage(tmp_path / "file") == "it has another checksum than when it was written"
    (tmp_path / "file").write_bytes(bytes(range(255)))
    assert damage(tmp_path / "file") == "it has 255 bytes, not 256"
    (tmp_path / "other").write_bytes(bytes(range(256)))
    assert not damage(tmp_path / "other"), "an earlier version's file has no checksum"
    (tmp_path / "file.crc32").rename(tmp_path / "other.crc32")
    assert damage(tmp_path / "other") == "other.crc32 is that of file"


def test_a_folder_appears_without_what_an_earlier_start_left(tmp_path):
    with suppress(KeyError), appearing_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("dear")
    if not (killed := os.fork()):
        with appearing_folder(tmp_path / "out") as partial:
            (partial / "sub").mkdir()
            os._exit(9)
    os.waitpid(killed, 0)
    (tmp_path / "out.partial" / "link").symlink_to(tmp_path / "victim")
    with appearing_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert (tmp_path / "victim" / "file").read_text() == "dear"
    assert not (tmp_path / "out.partial").exists()


def a_users_folder(place: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("dear")


def an_unfinished_gptq_run(place: Path) -> None:
    place.mkdir()
    (place / "ptq.json").write_text("{}")


def a_link(place: Path) -> None:
    (place.parent / "victim").mkdir()
    place.symlink_to(place.parent / "victim")


def a_file(place: Path) -> None:
    place.write_text("dear")


@pytest.mark.parametrize("plant", [a_users_folder, an_unfinished_gptq_run, a_link, a_file])
def test_what_export_did_not_leave_is_refused_and_kept(plant, tmp_path, monkeypatch):
    place = tmp_path / "out.partial"
    plant(place)
    before = [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    flags = ["--checkpoint=anywhere", f"--output={tmp_path / 'out'}"]
    assert "out.partial, the temporary folder" in error_of(monkeypatch, "export", *flags)
    assert [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


def test_an_export_at_work_keeps_another_out(tiny_directory, tmp_path, monkeypatch):
    student = tmp_path / "student"
    student.mkdir()
    for file in tiny_directory.iterdir():
        (student / file.name).symlink_to(file)
    QuantConfig().save(student)
    flags = [f"--checkpoint={student}", f"--output={tmp_path / 'out'}", "--verify=false"]
    with appearing_folder(tmp_path / "out") as partial:
        (partial / "weights").write_text("half")
        assert "Another run is still using" in error_of(monkeypatch, "export", *flags)
        assert (partial / "weights").read_text() == "half"


def test_a_quantization_does_not_go_on_with_an_exports_folder(tiny_directory, tmp_path, monkeypatch):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "unfinished").touch()
    flags = [f"--model={tiny_directory}", f"--output={tmp_path / 'out'}"]
    assert "was not left by this command" in error_of(monkeypatch, "quantize", *flags)


def test_a_run_sees_at_its_start_that_its_final_folder_has_no_place(tiny_directory, tiny_data, tmp_path, monkeypatch):
    (tmp_path / "out" / "final.partial").mkdir(parents=True)
    (tmp_path / "out" / "final.partial" / "thesis.txt").write_text("dear")
    flags = train_flags(tiny_directory, tiny_data, tmp_path / "out")
    assert "final.partial, the temporary folder" in error_of(monkeypatch, "train", *flags)


def test_a_cache_that_another_process_writes_is_not_touched(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="Another run is still using"):
        TeacherCache(tmp_path).reserve({"top_k": 4})
    assert not (tmp_path / "manifest.json").exists()


def test_every_flipped_byte_of_a_teacher_cache_is_found(tmp_path):
    """Of both files, also of the checksums; on one of the ranks that share them."""
    cache = TeacherCache(tmp_path)
    (tmp_path / "manifest.json").write_text('{"top_k": 0}')
    cache.write(0, [{"hidden": torch.zeros(2, 3)}])
    cache.write_head(torch.zeros(4, 3))
    cache.check_complete(1)
    for file in sorted(tmp_path.glob("*.safetensors*")):
        content = file.read_bytes()
        for place in range(len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            found = 0
            for rank in range(3):
                try:
                    cache.check_complete(1, rank, 3)
                except UserError:
                    found += 1
            assert found == 1, f"{file.name}, byte {place}"
            assert cache.missing(1) == ([0] if file.name.startswith("targets") else [])
        file.write_bytes(content)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"incomplete or damaged \(head.safetensors: it is missing\)"):
        cache.check_complete(1)


@contextmanager
def no_locks(monkeypatch, code: int) -> Iterator[None]:
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fail)
        patch.setattr(fcntl, "lockf", fail)
        yield


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_everywhere(code, tmp_path, monkeypatch):
    ours = ShardFolder(tmp_path)
    ours.begin(ONE_SHARD)
    lockers = [
        lambda: lock(tmp_path),
        lambda: wait_until_free(tmp_path),
        lambda: appearing_folder(tmp_path / "out").__enter__(),
        lambda: TeacherCache(tmp_path).reserve({}),
        lambda: ShardFolder(tmp_path).begin(ONE_SHARD),
        lambda: ours.claimed(0).__enter__(),
        lambda: ours.alone().__enter__(),
    ]
    with no_locks(monkeypatch, code):
        for take in lockers:
            with pytest.raises(UserError, match=r"file system without file locks .*: give a folder on a local disk"):
                take()


def test_grids_that_are_named_must_be_there(tmp_path):
    """Also where nothing else says that GPTQ made the folder."""
    (tmp_path / "weight_grids.safetensors").touch()
    QuantConfig(w_bits=3).save(tmp_path)
    assert QuantConfig.load(tmp_path) == QuantConfig(w_bits=3)
    (tmp_path / "weight_grids.safetensors").unlink()
    with pytest.raises(UserError, match=r"incomplete: weight_grids.safetensors, which defines"):
        QuantConfig.load(tmp_path)
    QuantConfig(w_bits=3).save(tmp_path)
    assert json.loads((tmp_path / "quant_config.json").read_text()).keys() == QuantConfig().record().keys() | {
        "format_version"
    }
