"""Places in a store: they join as paths do, what is written arrives whole, and what is read comes through a cache."""

from __future__ import annotations

import errno
import ftplib
import hashlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec.config
import numpy as np
import pytest
from fsspec.registry import _registry

from synthgen.datasets.samples import sample_errors
from synthgen.errors import ConfigError, CorruptFile, MissingArtifact, MissingDependency, StorageError
from synthgen.image import encode_png
from synthgen.log import logged_to
from synthgen.run import Run
from synthgen.stores import (
    AppendFile,
    is_in_memory,
    listing,
    open_binary,
    parse_location,
    read_many,
    staging_folder,
    uncached,
    walk_files,
)
from synthgen.stores import remote as module
from synthgen.stores._lock import locked, note_of
from synthgen.stores.cache import cache_bytes, cache_folder, local_copy
from synthgen.stores.remote import RemotePath
from synthgen.stores.tar import TarWriter, create_bytes, index_tar, read_tar, write_bytes
from tests.factories import make_run
from tests.store_server import Store, forget_connections

SAMPLES = [(f"{number:010d}", {"txt": b"a disc", "json": b"{}", "bin": bytes(number * 100)}) for number in range(5)]


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest, store: Store, tmp_path: Path) -> Path:
    return parse_location(store.url("run") if request.param == "s3" else f"memory://{tmp_path.name}-run")


def write_tar(path: Path, size: int = 0) -> TarWriter:
    with TarWriter(path) as tar:
        for key, members in SAMPLES:
            tar.add(key, {**members, "bin": members["bin"] + bytes(size)})
    return tar


def copies() -> list[Path]:
    return list((cache_folder() / "files").iterdir())


# -- names


def test_urls_are_told_from_paths() -> None:
    assert parse_location("runs/demo") == Path("runs/demo")
    assert type(parse_location("runs/demo")) is type(Path())
    assert parse_location("file:///runs/demo") == parse_location(Path("file:///runs/demo")) == Path("/runs/demo")
    for given in (
        "s3://bucket/a/run",
        Path("s3://bucket/a/run"),
        parse_location("s3://bucket/a/run"),
    ):  # a slash is lost
        assert isinstance(parse_location(given), RemotePath)
        assert str(parse_location(given)) == "s3://bucket/a/run"
    assert str(parse_location("S3://Bucket/A")) == "s3://Bucket/A"
    assert is_in_memory(parse_location("memory://run"))
    assert not is_in_memory(parse_location("s3://bucket/run"))


def test_it_joins_and_splits_as_a_path_does() -> None:
    run = parse_location("s3://bucket/a/run")
    tar = run / "images" / "000012.tar"
    assert f"{tar}" == "s3://bucket/a/run/images/000012.tar"
    assert (tar.name, tar.stem, tar.suffix, str(tar.parent)) == ("000012.tar", "000012", ".tar", f"{run}/images")
    assert str(tar.with_suffix(".json")) == f"{run}/images/000012.json"
    assert tar.relative_to(run).as_posix() == "images/000012.tar"
    assert run.resolve().name == "run"
    again = pickle.loads(pickle.dumps(tar))
    assert (type(again), again, hash(again), str(again)) == (RemotePath, tar, hash(tar), str(tar))


@pytest.mark.parametrize("text", ["s3://key:secret-word@bucket/run", "s3://:secret-word@bucket/run"])
def test_a_password_in_a_url_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match="there is a password in") as caught:
        Run.open(text)
    assert "secret-word" not in str(caught.value)


def test_a_kind_of_store_that_is_none_and_one_whose_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no kind of store called nothing://"):
        parse_location("nothing://bucket/run")
    with pytest.raises(ConfigError, match=r"names no bucket"):
        parse_location("s3://")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(MissingDependency, match="pip install s3fs"):
        parse_location("s3://bucket/run")


def test_local_runs_import_no_client() -> None:
    code = "import sys, synthgen.run, synthgen.runner; assert not {'fsspec', 's3fs'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- writing and reading


def test_what_is_written_is_read_listed_and_taken_away(place: Path) -> None:
    assert not place.exists()
    assert listing(place / "a") == {}
    write_bytes(place / "a" / "one.json", b"12")
    write_bytes(place / "a" / "one.json", b"123")
    write_bytes(place / "a" / "deep" / "two.json", b"4")
    assert (place / "a" / "one.json").read_bytes() == b"123"
    assert (place / "a" / "one.json").stat().st_size == 3
    assert (place / "a" / "one.json").stat().st_mtime_ns > 0
    assert (place / "a").is_dir()
    assert not (place / "a").is_file()
    assert listing(place / "a") == {"one.json": 3}
    assert sorted(path.relative_to(place).as_posix() for path in place.glob("a/*")) == ["a/deep", "a/one.json"]
    assert [path.name for path in place.glob("*/*.json")] == ["one.json"]
    assert [path.name for path in place.glob("*/*/two.json")] == ["two.json"]
    assert [path.name for path in (place / "a").glob("*/")] == ["deep"]
    assert sorted(path.name for path in place.rglob("*.json")) == ["one.json", "two.json"]
    (place / "a" / "one.json").unlink()
    (place / "a" / "one.json").unlink(missing_ok=True)
    assert not (place / "a" / "one.json").exists()
    with pytest.raises(FileNotFoundError):
        (place / "a" / "one.json").read_bytes()


def test_only_the_first_creates(place: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda number: create_bytes(place / "run.yaml", b"%d" % number), range(8)))
    assert sum(made) == 1 or place.protocol == "memory"  # type: ignore[attr-defined]  # whose dictionary is not atomic
    assert not create_bytes(place / "run.yaml", b"late")
    assert (place / "run.yaml").read_bytes() != b"late"


def test_a_tar_has_the_bytes_of_a_local_one(place: Path, tmp_path: Path) -> None:
    here, there = write_tar(tmp_path / "000000.tar"), write_tar(place / "images" / "000000.tar")
    assert (here.sha256, here.size, here.count) == (there.sha256, there.size, there.count)
    assert there.path.read_bytes() == here.path.read_bytes()
    assert list(read_tar(there.path)) == SAMPLES
    assert index_tar(there.path) == index_tar(here.path)
    with open_binary(there.path) as file:
        assert file.read() == here.path.read_bytes()
    assert not list((cache_folder() / "work").iterdir())


def test_a_tar_that_is_given_up_leaves_nothing(place: Path) -> None:
    with suppress(RuntimeError), TarWriter(place / "a.tar") as tar:
        tar.add("0", {"txt": b"1"})
        raise RuntimeError
    assert not place.exists()
    assert not list((cache_folder() / "work").iterdir())
    with pytest.raises(MissingArtifact, match=r"there is no file .*a\.tar"):
        index_tar(place / "a.tar")


def test_a_tar_that_is_cut_off_in_the_store(place: Path) -> None:
    data = write_tar(place / "a.tar").path.read_bytes()
    write_bytes(place / "a.tar", data[:3000])
    with pytest.raises(CorruptFile, match=r"://.*a\.tar cannot be read"):
        index_tar(place / "a.tar")


def test_what_is_large_goes_in_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 5 * 2**20)
    tar = write_tar(parse_location(store.url("large.tar")), size=2**21 + 2**19)
    parts = [line for line in store.lines if "partNumber=" in line]
    assert len(parts) == 3
    assert tar.size > 2 * module.PART
    assert hashlib.sha256(store.objects()["large.tar"]).hexdigest() == tar.sha256
    assert store.unfinished_uploads() == 0
    assert hashlib.sha256(Path(local_copy(tar.path)).read_bytes()).hexdigest() == tar.sha256  # type: ignore[arg-type]


def test_many_small_files_are_read_together(place: Path) -> None:
    for number in range(5):
        write_bytes(place / f"{number}.json", b"x" * number)
    found = dict(read_many(place, [*(f"{number}.json" for number in range(5)), "gone.json"], most=3))
    assert found == {f"{number}.json": b"x" * number for number in range(5)}  # one more than 3, to be told from 3


def test_folders_of_this_machine_are_sent_when_they_are_full(place: Path, tmp_path: Path) -> None:
    with staging_folder(place / "model") as here:
        (here / "deep").mkdir()
        (here / "deep" / "a.json").write_text("{}")
    assert (place / "model" / "deep" / "a.json").read_bytes() == b"{}"
    with suppress(RuntimeError), staging_folder(place / "other") as here:
        (here / "a.json").write_text("{}")
        raise RuntimeError
    assert not (place / "other").exists()
    with staging_folder(tmp_path) as here:
        assert here == tmp_path


def test_lines_are_added_and_sent(place: Path, tmp_path: Path) -> None:
    for path in (place / "metrics.jsonl", tmp_path / "metrics.jsonl"):
        for line in ("1", "2"):
            file = AppendFile(path)
            file.add(line)
            file.flush()
        assert path.read_text() == "1\n2\n"


def test_logs_of_several_processes_do_not_meet(store: Store) -> None:
    import logging

    with logged_to(parse_location(store.url("run/logs/masks-0.jsonl"))):
        logging.getLogger("synthgen").info("done", extra={"token": "a-secret-word"})
    ((name, data),) = store.objects("run/logs").items()
    assert name.startswith("run/logs/masks-0-")
    assert name.endswith(f"-{os.getpid()}.jsonl")
    assert b'"message": "done"' in data
    assert b"a-secret-word" not in data


# -- the cache


def test_a_copy_is_made_once_for_each_content(store: Store) -> None:
    path = parse_location(store.url("a.bin"))
    write_bytes(path, b"one")
    assert [open_binary(path).read() for _ in range(3)] == [b"one"] * 3
    assert sum(line.startswith("GET /bucket/a.bin") for line in store.lines) == 1
    store.put("a.bin", b"two")  # as long, by another
    assert open_binary(path).read() == b"two"
    assert len(copies()) == 2


def test_the_cache_is_bounded_and_drops_what_was_used_longest_ago(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHGEN_CACHE_BYTES", "2.5kB")
    paths = [parse_location(store.url(f"{number}.bin")) for number in range(3)]
    for path in paths:
        write_bytes(path, path.name.encode() * 200)
    for number in (0, 1, 0, 2):
        assert open_binary(paths[number]).read() == paths[number].name.encode() * 200
    store.lines.clear()
    for number in (0, 2, 1):
        open_binary(paths[number]).close()
    assert [line for line in store.lines if line.startswith("GET")] == ["GET /bucket/1.bin"]
    assert sum(file.stat().st_size for file in copies()) <= 2500


def test_threads_share_a_cache_that_is_too_small(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHGEN_CACHE_BYTES", "3000")
    paths = [parse_location(store.url(f"{number}.bin")) for number in range(6)]
    for path in paths:
        write_bytes(path, path.name.encode() * 200)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: open_binary(paths[number % 6]).read(), range(48)))
    assert found == [paths[number % 6].name.encode() * 200 for number in range(48)]


def test_sizes_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, size in (("20GB", 2 * 10**10), ("1.5 M", 1_500_000), ("1000", 1000)):
        monkeypatch.setenv("SYNTHGEN_CACHE_BYTES", text)
        assert cache_bytes() == size
    monkeypatch.setenv("SYNTHGEN_CACHE_BYTES", "much")
    with pytest.raises(ConfigError, match="SYNTHGEN_CACHE_BYTES must be a size"):
        cache_bytes()


def test_a_cache_that_cannot_be_written(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SYNTHGEN_CACHE", str(tmp_path / "file"))
    path = parse_location(store.url("a.bin"))
    write_bytes(path, b"1")
    with pytest.raises(StorageError, match="SYNTHGEN_CACHE"):
        open_binary(path)


def test_a_disk_that_is_full_is_not_the_fault_of_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = parse_location(store.url("a.bin"))
    write_bytes(path, b"1")
    assert isinstance(path, RemotePath)
    monkeypatch.setattr(path._system(), "get_file", full)
    with pytest.raises(StorageError, match=r"cannot write the copy of s3://bucket/a.bin .*No space left on device"):
        open_binary(path)
    assert not copies()


def test_samples_of_tars_that_the_cache_cannot_hold_are_asked_for_one_by_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthgen.datasets import ShardDataset

    rng = np.random.default_rng(0)
    paths = []
    for number in range(3):
        image = encode_png(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8))
        for folder in (tmp_path, parse_location(store.url("shards"))):
            with TarWriter(folder / f"{number:06d}.tar") as tar:
                for row in range(4):
                    members = {"png": image, "txt": f"text {row}".encode(), "json": b'{"words": []}', "cls": b"3"}
                    tar.add(f"{number:06d}{row:04d}", members)
        paths.append(tmp_path / f"{number:06d}.tar")
    size = paths[0].stat().st_size
    monkeypatch.setenv("SYNTHGEN_CACHE_BYTES", str(3 * size))
    remote = [parse_location(store.url(f"shards/{path.name}")) for path in paths]
    assert uncached(remote) == set(remote[1:])
    here, there = ShardDataset(paths), pickle.loads(pickle.dumps(ShardDataset(remote)))
    store.lines.clear()
    for index in rng.permutation(12):
        one, other = here[int(index)], there[int(index)]
        assert (one.key, one.text, one.label) == (other.key, other.text, other.label)
        np.testing.assert_array_equal(one.image, other.image)
    assert sum(line.startswith("GET") for line in store.lines) == 8  # a request for each sample of two tars
    assert sum(file.stat().st_size for file in copies()) <= 3 * size


# -- faults


@pytest.fixture
def hasty(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store whose clients leave out botocore's own repeats, which wait for seconds, and wait less for an answer."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setitem(fsspec.config.conf["s3"]["config_kwargs"], "read_timeout", 0.4)
    forget_connections()
    yield store
    forget_connections()


def test_requests_that_fail_in_passing_are_repeated(hasty: Store) -> None:
    hasty.fault_rate = 0.15
    run = parse_location(hasty.url("run"))
    for number in range(8):
        path = run / f"{number}.json"
        write_bytes(path, b"%d" % number)
        assert path.read_bytes() == b"%d" % number
        assert (
            write_tar(run / f"{number}.tar").sha256
            == hashlib.sha256(open_binary(run / f"{number}.tar").read()).hexdigest()
        )
    assert len(listing(run)) == 16
    assert {name: int(data) for name, data in read_many(run, [f"{n}.json" for n in range(8)], 10)} == {
        f"{number}.json": number for number in range(8)
    }
    assert sum(hasty.faults.values()) > 5


def test_an_answer_that_never_comes_is_not_waited_for(hasty: Store) -> None:
    hasty.kinds, hasty.fault_rate = ("timeout",), 0.5
    path = parse_location(hasty.url("a.json"))
    write_bytes(path, b"1")
    assert path.read_bytes() == b"1"
    assert hasty.faults["timeout"]


def test_parts_that_fail_are_sent_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 5 * 2**20)
    store.kinds, store.fault_rate = ("500", "cut"), 0.3
    tar = write_tar(parse_location(store.url("large.tar")), size=2**21 + 2**19)
    assert hashlib.sha256(store.objects()["large.tar"]).hexdigest() == tar.sha256


# -- what cannot be put right by waiting is told in one line


def test_no_such_bucket(store: Store) -> None:
    for text in ("s3://nowhere/run", "s3://nowhere/a/deep/run"):
        with pytest.raises(StorageError, match="there is no bucket 'nowhere'") as caught:
            Run.create(text)
        assert "\n" not in str(caught.value)


def test_no_run_in_a_bucket(store: Store) -> None:
    with pytest.raises(MissingArtifact, match=r"there is no run at s3://bucket/none; make one with"):
        Run.open(store.url("none"))


@pytest.fixture
def impatient(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Clients that are made anew from the environment, and repeat nothing."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_connections()
    yield monkeypatch
    forget_connections()


def test_no_credentials(impatient: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impatient.delenv("AWS_ACCESS_KEY_ID")
    impatient.delenv("AWS_SECRET_ACCESS_KEY")
    impatient.setenv("HOME", str(tmp_path))
    with pytest.raises(
        StorageError, match=r"there are no credentials for s3://bucket/run/run.yaml .*AWS_ACCESS_KEY_ID"
    ):
        Run.open("s3://bucket/run")


def test_a_server_that_is_not_there(impatient: pytest.MonkeyPatch) -> None:
    impatient.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"the store does not answer for s3://bucket/run/run.yaml") as caught:
        Run.open("s3://bucket/run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_an_address_at_which_nobody_ever_answered_is_not_asked_again(
    impatient: pytest.MonkeyPatch, endpoint: str
) -> None:
    waits: list[float] = []
    impatient.setattr(module, "ATTEMPTS", 4)
    impatient.setattr(module.time, "sleep", waits.append)
    if "host" in endpoint:  # as a name server says it
        impatient.setattr(socket, "getaddrinfo", unknown_host)
    impatient.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError, match=r"s3://bucket/run/run.yaml .*AWS_ENDPOINT_URL"):
        Run.open("s3://bucket/run")
    assert waits == []


def unknown_host(*arguments: object, **options: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("before", ["a value", "a missing object", "nothing"])
def test_a_store_that_has_answered_once_is_asked_again_when_it_refuses(
    store: Store, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    forget_connections()
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    path = parse_location(store.url("a.json"))
    assert isinstance(path, RemotePath)
    if before != "nothing":
        answers = {"a value": lambda system, key: key, "a missing object": lambda system, key: system.info(key)}
        with suppress(FileNotFoundError):
            path.ask(answers[before])
    refusals = (
        [ConnectionRefusedError("restarting")] * 2
        if before != "nothing"
        else [socket.gaierror(socket.EAI_AGAIN, "again")]
    )

    def restarting(system: object, key: str) -> str:
        if refusals:
            raise refusals.pop()
        return "up"

    assert path.ask(restarting) == "up"
    assert len(waits) == (1 if before == "nothing" else 2)  # a name server that fails in passing is asked again too


def test_what_a_store_says_of_secrets_is_not_repeated(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parse_location(store.url("a.json"))
    assert isinstance(path, RemotePath)

    def refused(system: object, key: str) -> None:
        raise PermissionError("access denied for no-secret-but-the-loopback")

    with pytest.raises(StorageError, match=r"the store refuses s3://bucket/a\.json") as caught:
        path.ask(refused)
    assert "no-secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("error", "asked", "says"),
    [
        (OSError(errno.EINVAL, "Bad Request"), 1, "the credentials may have expired"),  # what a HEAD is answered
        (OSError(errno.EINVAL, "the body is incomplete"), 4, "the store does not answer"),
    ],
)
def test_an_answer_of_bad_request_without_a_reason_is_final(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: OSError, asked: int, says: str
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    path, calls = parse_location(store.url("a.json")), []
    assert isinstance(path, RemotePath)

    def rejected(system: object, key: str) -> None:
        calls.append(key)
        raise error

    with pytest.raises(StorageError, match=says):
        path.ask(rejected)
    assert len(calls) == asked


# -- stores with real folders


@pytest.fixture(params=["folders", "ftp"])
def folders(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store that makes no folder when a file is put; fsspec's client of ftp does not even say that it is missing."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class Folders(LocalFileSystem):
        protocol = request.param
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(path).replace(f"{request.param}://", f"{tmp_path}/", 1)

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
            try:
                super().pipe_file(path, value, mode=mode)
            except FileNotFoundError as error:
                raise (ftplib.error_perm("553 Could not create file.") if request.param == "ftp" else error) from None

    (tmp_path / "host").mkdir()
    monkeypatch.setenv("SYNTHGEN_CACHE", str(tmp_path / "cache"))
    before = dict(_registry)
    fsspec.register_implementation(request.param, Folders, clobber=True)
    monkeypatch.setattr(module, "_folders", set())
    yield parse_location(f"{request.param}://host/deep/run")
    _registry.clear()
    _registry.update(before)


def test_a_store_with_real_folders_holds_a_run(folders: Path, tmp_path: Path) -> None:
    run = make_run(folders, units=2, unit_size=2)
    assert (tmp_path / "host/deep/run/run.yaml").is_file()
    assert Run.open(folders).units("masks") == [0, 1]
    for unit in (0, 1):
        run.verify("images", unit)
    with pytest.raises(FileNotFoundError):
        (folders / "none.json").read_bytes()


def test_an_object_store_is_never_asked_to_make_a_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parse_location(store.url("a.json"))
    assert isinstance(path, RemotePath)

    def gone(*args: object, **options: object) -> None:
        raise FileNotFoundError("the upload is gone")

    monkeypatch.setattr(path._system(), "pipe_file", gone)
    monkeypatch.setattr(path._system(), "makedirs", lambda *args, **options: pytest.fail("that would make a bucket"))
    with pytest.raises(FileNotFoundError):
        path.put(b"1")


# -- what the system refuses is no damage


REFUSALS = [errno.EACCES, errno.EMFILE, errno.ESTALE, errno.EIO]


@pytest.mark.parametrize("number", REFUSALS)
def test_a_file_that_the_system_does_not_let_be_read_is_not_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = make_run(tmp_path / "r", units=1, unit_size=1, masks=False)
    path = run.tar("images", 0)

    def refused(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    def read_image() -> None:
        with sample_errors(path, "0"):
            refused(path)

    monkeypatch.setattr("synthgen.stores.tar.open_binary", refused)
    monkeypatch.setattr("synthgen.stores.checksum.open_binary", refused)
    for read in (lambda: index_tar(path), lambda: run.verify("images", 0), read_image):
        with pytest.raises(StorageError, match=rf"cannot be read: {os.strerror(number)}") as caught:
            read()
        assert "delete" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_damaged_is_still_to_be_deleted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", units=1, unit_size=1, masks=False)
    path = run.tar("images", 0)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(CorruptFile, match="delete it"):
        index_tar(path)
    with pytest.raises(CorruptFile, match="truncated"), sample_errors(path, "0"):
        raise OSError("image file is truncated")  # as Pillow says it: no error of the system


def test_a_copy_of_another_user_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    path = parse_location(store.url("a.bin"))
    write_bytes(path, b"one")
    open_binary(path).close()
    monkeypatch.setattr(os, "utime", refused)
    store.lines.clear()
    assert open_binary(path).read() == b"one"
    assert not any(line.startswith("GET") for line in store.lines)


# -- processes that share a cache


def slow_downloads(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """The names of what is downloaded, and how many bytes are on their way at the start of each."""
    names, sizes, arriving = list[str](), list[int](), dict[int, int]()
    download = RemotePath.download

    def slow(self: RemotePath, file: Path) -> None:
        names.append(self.name)
        arriving[threading.get_ident()] = self.version()[1]
        sizes.append(sum(arriving.values()))
        time.sleep(0.1)
        download(self, file)
        del arriving[threading.get_ident()]

    monkeypatch.setattr(RemotePath, "download", slow)
    return names, sizes


def test_one_downloads_and_the_others_wait_for_its_copy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parse_location(store.url("a.bin"))
    write_bytes(path, b"one")
    names, _ = slow_downloads(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda number: open_binary(path).read(), range(4))) == [b"one"] * 4
    assert names == ["a.bin"]
    assert [file.name for file in (cache_folder() / "locks").iterdir()] == ["room.lock"]


def test_what_is_on_its_way_counts_in_full(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHGEN_CACHE_BYTES", "2500")
    paths = [parse_location(store.url(f"{number}.bin")) for number in range(4)]
    for path in paths:
        write_bytes(path, bytes(1000))
    names, sizes = slow_downloads(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda path: open_binary(path).read(), paths)) == [bytes(1000)] * 4
    assert sorted(names) == [path.name for path in paths]
    assert max(sizes) == 2000
    assert sum(file.stat().st_size for file in copies()) <= 2500


def test_a_file_larger_than_the_bound_is_read_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHGEN_CACHE_BYTES", "500")
    paths = [parse_location(store.url(f"{number}.bin")) for number in range(2)]
    for path in paths:
        write_bytes(path, bytes(1000))
        assert open_binary(path).read() == bytes(1000)
    assert len(copies()) == 1


def test_the_lock_of_a_killed_process_is_free_and_its_file_goes(tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with locked(file) as lock:
            lock.note(b"1000")
            os.write(writer, b"x")
            time.sleep(600)
    os.read(reader, 1)
    assert note_of(file) == b"1000"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert file.is_file()
    with locked(file, keep=True):  # it waits for nobody
        assert note_of(file) == b""
    assert note_of(file) is None
    assert not file.exists()


def test_where_no_lock_can_be_had_each_downloads_for_itself(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("synthgen.stores._lock.fcntl.flock", unknown)
    path = parse_location(store.url("a.bin"))
    write_bytes(path, b"one")
    assert open_binary(path).read() == b"one"


# -- folders of this machine


def test_links_to_folders_are_followed_and_each_folder_is_walked_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("root/real/a", "root/.hidden/b", "other/deep/c", "other/.d", "third/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = tmp_path / "root"
    for name, target in (
        ("another", "third"),
        ("link", "other"),
        ("real/up", "root"),  # round and round
        ("same", "root/real"),
        ("zz", "third"),
    ):
        (root / name).symlink_to(tmp_path / target)
    (root / "broken").symlink_to(tmp_path / "none")
    (root / "itself").symlink_to(root / "itself")
    found = [path.relative_to(root).as_posix() for path in walk_files(root)]
    plain = ["another/e", "broken", "itself", "link/deep/c", "real/a"]
    assert sorted(found) == sorted([*plain, ".hidden/b", "link/.d"])
    assert sorted(path.relative_to(root).as_posix() for path in walk_files(root, hidden=False)) == plain
    assert "zz leads to a folder that was already read" in caplog.text
    assert list(walk_files(tmp_path / "none")) == []


def test_a_folder_that_may_not_be_listed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(StorageError, match="cannot be read: Permission denied; let this user read it"):
        list(walk_files(tmp_path))
