"""What a folder can meet that other stores cannot: dying writers, full and read-only disks, other people's files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sealed_parts import PART_BYTES, is_whole, key_of, part_of

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.tiers import disk_store
from kvrelay_transfer.tiers.disk_store import DiskStore
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import StoreError

WRITER = Path(__file__).parents[2] / "support" / "disk_writer.py"
ROOM_BYTES = 8192  # what a part of PART_BYTES takes
LARGE_BYTES = 4 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(tmp_path, 1 << 30)
    yield store
    store.close()


@contextlib.contextmanager
def opened(folder: Path, capacity_bytes: int = 1 << 30) -> Iterator[DiskStore]:
    store = DiskStore(folder, capacity_bytes)
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def writer(*words: str | int | Path) -> Iterator[subprocess.Popen[str]]:
    """It is dead at the end."""
    command = [sys.executable, str(WRITER), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(WRITER.parent), os.environ.get("PYTHONPATH", "")))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def put(store: DiskStore, *numbers: int) -> bool:
    return all(store.put(key_of(number), memoryview(part_of(key_of(number)))) for number in numbers)


def is_there(store: DiskStore, key: PartKey, room_bytes: int = PART_BYTES) -> bool:
    """And whole."""
    into = memoryview(bytearray(room_bytes))
    length = store.get(key, into)
    assert length is None or is_whole(key, into[:length])
    return length is not None


def used_bytes(folder: Path) -> int:
    """As the file system has it, by size."""
    files = [path for name in ("parts", "incoming") for path in (folder / name).rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def path_of(folder: Path, key: PartKey) -> Path:
    (path,) = (folder / "parts").rglob(key.text)
    return path


def test_what_a_writer_leaves_in_the_middle_of_a_part_is_no_part(tmp_path: Path) -> None:
    with writer("half", tmp_path, 1 << 30, 0, 1, LARGE_BYTES) as process:
        assert [said(process), said(process)] == ["begun", "half"]
        with opened(tmp_path) as store:
            assert len(os.listdir(tmp_path / "incoming")) == 1, "its writer is alive"
            assert store.usage().num_parts == 0 and store.usage().used_bytes > LARGE_BYTES, "the room is taken"
        process.kill()
        process.wait(timeout=10)
        with opened(tmp_path) as store:
            assert os.listdir(tmp_path / "incoming") == []
            assert store.usage().num_parts == store.usage().used_bytes == 0
            assert not is_there(store, key_of(0), LARGE_BYTES + PART_BYTES)


def test_after_kills_at_any_moment_every_part_is_whole_and_the_account_true(tmp_path: Path) -> None:
    generator = random.Random(11)
    for _ in range(4):
        with writer("forever", tmp_path, 4 * LARGE_BYTES, 0, 3, LARGE_BYTES - 4096) as process:
            assert said(process) == "begun"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=generator.uniform(0.0, 0.05))
            assert process.poll() is None, "it was alive until we killed it"
            process.kill()
            process.wait(timeout=10)
        with opened(tmp_path, 4 * LARGE_BYTES) as store:
            assert store.usage().used_bytes == used_bytes(tmp_path)
            assert all(is_there(store, key, LARGE_BYTES) for key in list(store.keys()))
            assert os.listdir(tmp_path / "incoming") == []
            assert put(store, 7) and is_there(store, key_of(7))
            store.remove(key_of(7))


def test_two_processes_keep_one_bound(tmp_path: Path) -> None:
    """Each checks after every part that the bound holds."""
    with (
        writer("all", tmp_path, 8 * ROOM_BYTES, 0, 60, 4000) as one,
        writer("all", tmp_path, 8 * ROOM_BYTES, 1000, 60, 4000) as two,
    ):
        assert said(one) == said(two) == "begun"
        num_evicted = [int(said(process).removeprefix("evicted ")) for process in (one, two)]
        assert [one.wait(timeout=10), two.wait(timeout=10)] == [0, 0]
    assert sum(num_evicted) == 120 - 8
    with opened(tmp_path, 8 * ROOM_BYTES) as store:
        assert store.usage().num_parts == len(list(store.keys())) == 8
        assert store.usage().used_bytes == used_bytes(tmp_path) == 8 * ROOM_BYTES
        assert all(is_there(store, key) for key in list(store.keys()))


def test_a_full_folder_is_walked_now_and_then_and_still_gives_up_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_store, "_NUM_REMEMBERED", 3)
    with opened(tmp_path, 10 * ROOM_BYTES) as store:
        assert put(store, *range(10))
        assert is_there(store, key_of(1)) and is_there(store, key_of(0))
        assert put(store, *range(10, 18))
        assert sorted(store.keys()) == sorted(key_of(number) for number in (1, 0, *range(10, 18)))
        assert is_there(store, key_of(1))
        assert put(store, 18, 19)
        assert sorted(store.keys()) == sorted(key_of(number) for number in (1, *range(11, 20)))


def test_the_second_of_two_writers_keeps_what_the_first_put(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = disk_store._write

    def write_late(fd: int, part: memoryview) -> None:
        monkeypatch.setattr(disk_store, "_write", write)
        assert put(store, 1)
        write(fd, part)

    monkeypatch.setattr(disk_store, "_write", write_late)
    assert put(store, 1)
    assert store.usage().num_parts == 1 and store.usage().used_bytes == ROOM_BYTES == used_bytes(tmp_path)
    assert is_there(store, key_of(1))


FULL_DISK = """
import sys
from pathlib import Path
from sealed_parts import PART_BYTES, is_whole, key_of, part_of
from kvrelay_transfer.tiers.disk_store import DiskStore
folder = Path(sys.argv[1])
store = DiskStore(folder / "cache", 1 << 30)
put = lambda number: store.put(key_of(number), memoryview(part_of(key_of(number))))
answers = [put(number) for number in range(40)]
first = answers.index(False)
assert first > 4 and answers[first:].count(True) >= (40 - first) // 2, answers
assert not any(not one and not two for one, two in zip(answers, answers[1:])), "the next finds room"
into = memoryview(bytearray(PART_BYTES))
for key in store.keys():
    assert is_whole(key, into[: store.get(key, into)])
assert not list((folder / "cache" / "incoming").iterdir())
store.clear()
try:
    (folder / "other").write_bytes(bytes(1 << 20))
except OSError:
    pass
assert not put(100) and not put(101), "others have it all"
(folder / "other").unlink()
assert put(102)
store.close()
print("passed")
"""


def test_a_full_disk_refuses_one_part_and_makes_room_for_the_next(tmp_path: Path) -> None:
    """On a small file system of its own; in a namespace, so that nobody else sees it."""
    shell = 'mount -t tmpfs -o size=128k none "$1" && shift && exec "$@"'
    command = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.getuid() else []), "sh", "-c", shell, "sh"]
    if subprocess.run([*command, str(tmp_path), "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets us mount no file system, not even in a namespace of our own")
    path = os.pathsep.join((str(WRITER.parent), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [*command, str(tmp_path), sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}, timeout=60,
    )  # fmt: skip
    assert done.stdout == "passed\n", done.stderr


def test_a_write_that_fails_leaves_nothing(store: DiskStore, tmp_path: Path) -> None:
    """Here by the limit of this process for the size of files."""
    assert put(store, 1)
    descriptors = os.listdir("/proc/self/fd")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PART_BYTES, hard))
    try:
        with pytest.raises(StoreError, match="large"):
            store.put(key_of(2), memoryview(part_of(key_of(2), 5000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "incoming") == [] and len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert store.usage().used_bytes == used_bytes(tmp_path) == ROOM_BYTES
    assert put(store, 2)


def test_an_error_half_way_leaves_nothing(store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, part: memoryview) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk_store, "_write", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            put(store, 1)
    assert os.listdir(tmp_path / "incoming") == [] and store.usage().used_bytes == 0
    assert put(store, 1) and is_there(store, key_of(1))


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder of a user whom permissions hold back, which they do not root."""
    folder = Path(tempfile.mkdtemp(prefix="kvrelay-disk-"))
    user = os.geteuid()
    try:
        if user == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


def test_a_folder_that_became_read_only_can_be_read() -> None:
    with as_nobody() as folder, opened(folder) as store:
        assert put(store, 1)
        folders = [folder / "incoming", *(folder / "parts").iterdir(), folder / "parts", folder]
        try:
            path_of(folder, key_of(1)).chmod(0o400)
            for path in folders:
                path.chmod(0o500)
            assert is_there(store, key_of(1)) and store.count_prefix([key_of(1)]) == 1
            for call in (lambda: put(store, 2), lambda: store.remove(key_of(1)), store.clear):
                with pytest.raises(StoreError, match="Permission denied"):
                    call()
            assert is_there(store, key_of(1))
        finally:
            for path in folders:
                path.chmod(0o700)
        assert put(store, 2) and is_there(store, key_of(2))


def test_a_folder_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="give a folder that this user may write"):
        DiskStore(tmp_path / "file", 1 << 30)
    with as_nobody() as folder:
        folder.chmod(0o500)
        with pytest.raises(ConfigError, match="Permission denied"):
            DiskStore(folder / "cache", 1 << 30)
        folder.chmod(0o700)


def test_files_of_others_are_neither_counted_nor_touched(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert put(store, 1)
        folder = path_of(tmp_path, key_of(1)).parent
    strangers = [
        tmp_path / "notes.txt", tmp_path / "incoming" / "notes.txt", tmp_path / "parts" / "notes.txt",
        folder / "notes.txt", folder / key_of(1).text.upper(), folder / (key_of(1).text + ".bak"),
    ]  # fmt: skip
    for path in strangers:
        path.write_bytes(bytes(100_000))
    with opened(tmp_path, 2 * ROOM_BYTES) as store:
        assert list(store.keys()) == [key_of(1)] and store.usage().used_bytes == ROOM_BYTES
        assert put(store, 2, 3, 4) and store.usage().num_parts == 2
        assert store.clear() == 2
    assert all(path.stat().st_size == 100_000 for path in strangers)


def test_what_is_no_file_is_no_part(store: DiskStore, tmp_path: Path) -> None:
    assert put(store, 1)
    path = path_of(tmp_path, key_of(1))
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(StoreError):
        is_there(store, key_of(1))
    path.unlink()
    os.mkfifo(path)
    assert not is_there(store, key_of(1))
    path.unlink()
    path.mkdir()
    assert not is_there(store, key_of(1))
    assert list(store.keys()) == []
    path.rmdir()
    assert put(store, 1) and is_there(store, key_of(1))


def test_a_part_that_is_cut_under_a_reader_is_short(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert put(store, 1)
    path, read = path_of(tmp_path, key_of(1)), disk_store._read

    def read_late(fd: int, into: memoryview) -> int:
        os.truncate(path, 1000)
        return read(fd, into)

    monkeypatch.setattr(disk_store, "_read", read_late)
    assert store.get(key_of(1), memoryview(bytearray(PART_BYTES))) == 1000


def test_who_never_lets_go_of_the_account_is_not_waited_for(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, 1 << 30, lock_timeout_s=0.05)
    assert put(store, 1)
    with open(tmp_path / "account") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process holds"):
            put(store, 2)
        assert is_there(store, key_of(1)), "reads need no account"
        with pytest.raises(ConfigError, match="another process holds"):
            DiskStore(tmp_path, 1 << 30, lock_timeout_s=0.05)
    assert put(store, 2)
    store.close()


def test_a_folder_that_somebody_emptied_is_made_anew(tmp_path: Path) -> None:
    """And all keep one account again, whoever opens it when."""
    with opened(tmp_path, 3 * ROOM_BYTES) as store, opened(tmp_path, 3 * ROOM_BYTES) as other:
        assert put(store, 1, 2, 3)
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert not is_there(store, key_of(1)) and list(store.keys()) == []
        with opened(tmp_path, 3 * ROOM_BYTES) as newest:
            assert put(store, 4, 5) and put(newest, 6) and put(other, 7)
            assert {each.usage().num_parts for each in (store, other, newest)} == {3}
            assert sorted(store.keys()) == sorted(map(key_of, (5, 6, 7)))


def test_room_that_was_freed_behind_our_back_is_found(tmp_path: Path) -> None:
    with opened(tmp_path, 3 * ROOM_BYTES) as store:
        assert put(store, 1, 2, 3)
        for number in (1, 2, 3):
            path_of(tmp_path, key_of(number)).unlink()
        assert put(store, 4, 5, 6)
        assert sorted(store.keys()) == sorted(map(key_of, (4, 5, 6))) and store.usage().num_evicted == 0
