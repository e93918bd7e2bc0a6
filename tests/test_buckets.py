"""addp_jax.weights.buckets, mirror and bucket_lock on fsspec's file system in memory."""

import concurrent.futures
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading

import pytest
from fsspec.implementations import memory

from addp_jax import errors
from addp_jax.weights import bucket_lock, buckets, lock, manifest, mirror

URL = "memory://bucket/run"
FILES = ("identity.json", "state/_METADATA", "state/a/0", "state/a/1")


@pytest.fixture(autouse=True)
def store():
    memory.MemoryFileSystem.store.clear()
    yield memory.MemoryFileSystem.store
    buckets._fetched.cache_clear()


@pytest.fixture
def bucket():
    return buckets.Bucket(URL)


@pytest.fixture
def work(tmp_path, bucket):
    return mirror.Mirror(bucket, tmp_path / "own")


def write_step(work, step, names=FILES):
    for name in names:
        path = os.path.join(work, "checkpoints", str(step), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(f"{name} of {step}")


def pushed(work, step, keep=1, keep_every=0, names=FILES):
    write_step(work, step, names)
    work.push_step(step, keep, keep_every)


def steps(bucket):
    return buckets.committed(buckets.Bucket(f"{URL}/checkpoints").sizes())


def pulled(folder, **options):
    return buckets.pull_newest(buckets.Bucket(f"{URL}/checkpoints"), folder, **options)


def refused(text):
    return pytest.raises(errors.UserError, match=text)


# --- checkpoints ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As by SIGKILL: nothing that catches errors sees it."""


@contextlib.contextmanager
def killed_after(count):
    """Ends what goes on after so many changes of the store; each appears whole."""
    left = iter(range(count))

    def dying(method):
        def change(*args, **kwargs):
            if next(left, None) is None:
                raise Killed
            return method(*args, **kwargs)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in ("put_file", "pipe_file", "rm_file"):
            patch.setattr(memory.MemoryFileSystem, name, dying(getattr(memory.MemoryFileSystem, name)))
        yield


def test_a_kill_between_any_two_files_leaves_the_old_or_the_new_checkpoint(tmp_path, work, bucket, store):
    found = set()
    for count in range(100):
        store.clear()
        pushed(work, 1)
        write_step(work, 2)
        try:
            with killed_after(count):
                work.push_step(2, 1, 0)
            break
        except Killed:
            pass
        folder = tmp_path / str(count)
        newest = pulled(folder)
        found.add(newest)
        assert (folder / f"{newest}/state/a/1").read_text() == f"state/a/1 of {newest}"
        work.push_step(2, 1, 0)  # the run goes on
        names = buckets.Bucket(f"{URL}/checkpoints").sizes()
        assert sorted(names) == sorted(f"2/{name}" for name in (*FILES, manifest.NAME))
    assert found == {1, 2} and count > 2 * len(FILES)


def test_a_killed_upload_leaves_nothing_in_the_one_that_follows(work, bucket):
    bucket.write("checkpoints/2/state/of/another/time", b"x")
    bucket.write("checkpoints/1/state/begun", b"x")
    pushed(work, 2)
    assert {name.split("/")[1] for name in bucket.sizes("checkpoints")} == {"2"}
    assert "checkpoints/2/state/of/another/time" not in bucket.sizes("checkpoints")


def test_old_checkpoints_go_as_on_a_disk(work, bucket):
    for step in (2, 4, 5, 6, 7):
        pushed(work, step, keep=2, keep_every=4)
    assert steps(bucket) == [7, 6, 4]


def test_the_newest_checkpoint_that_is_whole_is_taken(tmp_path, work, bucket, capsys):
    for step in (1, 2, 3):
        pushed(work, step, keep=9)
    bucket.write("checkpoints/3/state/a/0", b"state/a/0 of 4")
    bucket.remove(["checkpoints/2/state/a/1"])
    assert pulled(tmp_path / "reader") == 1
    assert steps(bucket) == [3, 2, 1]  # a reader changes nothing
    assert "3 is damaged (file state/a/0: hash differs)" in capsys.readouterr().err
    assert pulled(tmp_path / "run", set_aside=True) == 1
    assert steps(bucket) == [1] and bucket.exists("checkpoints/3/damaged.json")
    assert sorted(os.listdir(tmp_path / "run")) == ["1"]
    pushed(work, 4)
    assert bucket.exists("checkpoints/3/state/a/0")  # never deleted
    pushed(work, 3, keep=9)  # but written anew
    assert not bucket.exists("checkpoints/3/damaged.json") and pulled(tmp_path / "later") == 4


@pytest.mark.parametrize("error, status", [
    (OSError("out of order"), 75), (TimeoutError(), 75), (Exception("Service Unavailable, 503"), 75), (Exception("slower, 429"), 75), (OSError(errno.ENOSPC, "full"), 75),
    (Exception("Anonymous caller, 401"), 2), (OSError("Forbidden: bucket/run"), 2), (PermissionError(), 2), (ValueError("Bad Request"), 2),
])  # fmt: skip
def test_a_store_that_fails_for_the_moment_asks_for_another_start(bucket, monkeypatch, error, status):
    monkeypatch.setattr(memory.MemoryFileSystem, "pipe_file", lambda *_, **__: (_ for _ in ()).throw(error))
    with refused("cannot write to memory://bucket/run: ") as caught:
        bucket.write("lock", b"")
    assert caught.value.status == status


def test_a_checkpoint_that_cannot_be_read_for_the_moment_is_not_damaged(tmp_path, work, bucket, monkeypatch):
    for step in (1, 2):
        pushed(work, step, keep=2)
    with monkeypatch.context() as patch, refused("cannot read .*: out of order") as caught:
        patch.setattr(memory.MemoryFileSystem, "get_file", lambda *_, **__: (_ for _ in ()).throw(OSError("out of order")))
        pulled(tmp_path / "run", set_aside=True)
    assert caught.value.status == 75
    assert pulled(tmp_path / "run", set_aside=True) == 2


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path, work, bucket):
    assert pulled(tmp_path) is None
    pushed(work, 1)
    bucket.write("checkpoints/1/state/a/0", b"")
    for _ in range(2):
        with refused("all checkpoints in memory://bucket/run/checkpoints are damaged"):
            pulled(tmp_path, set_aside=True)


def test_an_upload_that_does_not_arrive_whole_does_not_count(work, bucket, monkeypatch):
    write_step(work, 1)
    whole = buckets.Bucket.upload
    monkeypatch.setattr(buckets.Bucket, "upload", lambda self, folder, names: whole(self, folder, names[:-1]))
    with refused("checkpoints/1/.* did not arrive whole"):
        work.push_step(1, 1, 0)
    assert steps(bucket) == []


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, bucket):
    with refused("leads out of the folder"):
        bucket.download(["a/../../b"], tmp_path)


# --- copies of weights and runs ---------------------------------------------------------------------------------------------


def test_what_is_fetched(work, bucket):
    bucket.write("config.json", b"{}")
    bucket.write("vqgan.safetensors", b"abc")
    pushed(work, 7)
    assert buckets.fetched("runs/a") == "runs/a"
    with open(buckets.fetched(f"{URL}/vqgan.safetensors")) as file:
        assert file.read() == "abc"
    run = buckets.fetched(f"{URL}/")
    assert sorted(os.listdir(run)) == ["checkpoints", "config.json"] and run == buckets.fetched(URL)
    for path in (os.path.join(run, "checkpoints"), buckets.fetched(f"{URL}/checkpoints")):
        assert os.listdir(path) == ["7"]
    assert buckets.fetched(f"{URL}/checkpoints/7").endswith("/7")
    bucket.remove([f"checkpoints/7/{manifest.NAME}"])
    for name in ("checkpoints/7/", "checkpoints/8", "nothing"):
        buckets._fetched.cache_clear()
        with refused(f"config.init: nothing at {URL}/{name.rstrip('/')}: no weight file, run or checkpoint"):
            buckets.fetched(f"{URL}/{name}", "config.init: ")


def test_the_extra_that_opens_a_url_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for scheme in ("gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with refused(r"cannot open gs://bucket/run: .*gcsfs.*; pip install -e '.\[gs\]'"):
        buckets.Bucket("gs://bucket/run")
    with refused("cannot open bucket://run: Protocol not known: bucket"):
        buckets.Bucket("bucket://run")


# --- the mirror -------------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_left_as_it_is(tmp_path):
    with mirror.opened(str(tmp_path), trains=True) as folder:
        assert folder == str(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_a_block_writes_is_in_the_bucket_and_the_folder_gone(bucket, store):
    bucket.write("log.jsonl", b"1\n")
    bucket.write("generated/images/0.png", b"0")
    bucket.write("pictures/0.png", b"0")
    with mirror.opened(URL, trains=True, resumed=("generated",)) as folder:
        assert bucket.exists("lock")
        assert sorted(os.listdir(folder)) == ["checkpoints", "generated", "log.jsonl"]
        with open(f"{folder}/log.jsonl", "a") as file:
            file.write("2\n")
        for name in ("checkpoints/identity.json", "checkpoints/1.tmp", "a.tmp", "lock"):
            with open(f"{folder}/{name}", "w") as file:
                file.write(name)
    assert bucket.read("log.jsonl") == b"1\n2\n" and not os.path.exists(folder)
    assert sorted(bucket.sizes()) == ["checkpoints/identity.json", "generated/images/0.png", "log.jsonl", "pictures/0.png"]


def test_only_what_has_changed_is_uploaded(work, monkeypatch):
    uploads = []
    monkeypatch.setattr(buckets.Bucket, "upload", lambda self, folder, names: uploads.append(sorted(names)))
    for name in ("a", "b", "b"):
        with open(f"{work}/{name}", "a") as file:
            file.write("x")
        work.push()
    work.push()
    assert uploads == [["a"], ["b"], ["b"], []]


def test_a_store_that_fails_for_a_while_is_tried_again_and_at_the_end_is_an_error(bucket, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "PUSH_SECONDS", 0.01)
    failed = threading.Event()

    def failing(*_, **options):
        failed.set()
        raise OSError("out of order")

    with pytest.MonkeyPatch.context() as patch, refused("cannot write to memory://bucket/run: out of order"):
        with mirror.opened(URL, trains=False) as folder:
            with open(f"{folder}/log.jsonl", "w") as file:
                file.write("1")
            patch.setattr(memory.MemoryFileSystem, "put_file", failing)
            assert failed.wait(10)
    assert "warning: cannot write" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):  # what ends a run says more
        with mirror.opened(URL, trains=False) as folder:
            patch.setattr(memory.MemoryFileSystem, "put_file", failing)
            with open(f"{folder}/log.jsonl", "w") as file:
                file.write("1")
            raise KeyError


def test_no_room_for_what_is_uploaded_asks_for_another_start(work, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open(f"{work}/log.jsonl", "w") as file:
        file.write("1")
    monkeypatch.setattr(mirror.shutil, "copyfile", full)
    with refused("cannot copy .* before its upload: No space left on device") as caught:
        work.push()
    assert caught.value.status == 75


def test_the_folder_of_a_killed_run_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror.tempfile, "tempdir", str(tmp_path))
    code = "import os, signal\nfrom addp_jax.weights import mirror\nwith mirror._room() as room:\n room.mkdir(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    (parent,) = tmp_path.glob(f"{mirror.ROOM}-*")
    (left,) = [path for path in parent.iterdir() if path.is_dir()]
    with mirror._room() as room, mirror._room() as other:
        room.mkdir()
        other.mkdir()
        assert room != other and not left.exists()
        with mirror._room():
            assert room.exists() and other.exists()  # their processes live
    assert list(parent.iterdir()) == []


# --- the lock ---------------------------------------------------------------------------------------------------------------


def other_lock(bucket, **fields):
    bucket.write("lock", json.dumps(lock.own_record() | fields).encode())


def test_one_run_at_a_time(bucket):
    with bucket_lock.hold(bucket) as held:
        held.require()
        with refused(rf"memory://bucket/run: a run is at work here \(process {os.getpid()} on .*\); wait for it"):
            bucket_lock.Held(bucket)
    assert not bucket.exists("lock")


def test_a_run_that_was_killed_on_this_host_starts_again_at_once(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock.time, "sleep", lambda seconds: pytest.fail("waited"))
    for fields in ({"boot": "before"}, {"start": "before"}):
        other_lock(bucket, **fields)
        with bucket_lock.hold(bucket) as held:
            held.require()


def test_the_lock_of_another_host_is_watched(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(bucket_lock, "LOOK_SECONDS", 0.05)
    other_lock(bucket, host="elsewhere")
    with bucket_lock.hold(bucket) as held:
        held.require()
        other_lock(bucket, host=socket.gethostname(), since="later")
        with refused("another run has taken over this work directory"):
            held.require()
    assert bucket.exists("lock")  # the other's
    other_lock(bucket, host="elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket_lock.time, "sleep", lambda seconds: other_lock(bucket, host="elsewhere", beats=1))
        with refused("a run is at work here .* on elsewhere"):
            bucket_lock.Held(bucket)


def test_the_holder_gives_signs_of_life(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock, "HEARTBEAT_SECONDS", 0.01)
    with bucket_lock.hold(bucket):
        before = bucket.read("lock")
        for _ in range(500):
            if bucket.read("lock") != before:
                break
            bucket_lock.time.sleep(0.01)
        assert bucket.read("lock") != before


def test_a_run_without_its_lock_saves_nothing_more(tmp_path, bucket):
    with bucket_lock.hold(bucket) as held:
        work = mirror.Mirror(bucket, tmp_path, held)
        other_lock(bucket, since="later")
        with refused("another run has taken over"):
            pushed(work, 1)
    assert steps(bucket) == []


def test_folders_of_runs_that_live_are_left_alone(tmp_path, monkeypatch):
    """Several runs of a host begin and end at the same moments."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def come_and_go(_):
        for _ in range(100):
            with mirror._room() as room:
                (room / "checkpoints").mkdir(parents=True)
                (room / "log").write_text("x")
                assert (room / "log").exists()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert not any(next(tmp_path.iterdir()).iterdir())
