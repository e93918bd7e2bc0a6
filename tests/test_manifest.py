"""addp_jax.manifest: exactly the folder's regular files, each as it was; nothing outside is opened."""

import json
import os

import pytest

from addp_jax.weights import manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_bytes(b"abc")
    (folder / "inner/b").write_bytes(b"x" * 3_000_000)
    (folder / "empty").write_bytes(b"")
    manifest.write_manifest(folder)
    return folder


def entries(folder):
    return json.loads((folder / manifest.NAME).read_text())


def test_a_sound_folder(folder):
    assert manifest.inspect(folder) == "" and set(entries(folder)) == {"a", "inner/b", "empty"}
    assert manifest.verified(folder, "a") == b"abc" and manifest.verified(folder, "c") is None
    (folder / "a").write_bytes(b"abd")
    assert manifest.inspect(folder) == "file a: hash differs" and manifest.verified(folder, "a") is None


@pytest.mark.parametrize("text", [b"", b"\0" * 500, b'{\n"a": [3,', b"[" * 100_000, b"not json", b'{"a": [3, "x"]}\0\0'])
def test_a_torn_manifest_counts_as_none(folder, text):
    (folder / manifest.NAME).write_bytes(text)
    assert manifest.inspect(folder) == "" and not manifest.exists(folder)


WRONG = [
    "{}", "[]", "3", "null", '"x"', '{"a": 3}', '{"a": [3]}', '{"a": [true, "x"]}', '{"a": {"b": 1, "c": 2}}', '[["a", [3, "x"]]]',
    '{"a": [3, "x"], "a": [3, "x"]}', '{"a": [3, "x"], }',
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_manifest_of_another_kind_is_damage(folder, text):
    (folder / manifest.NAME).write_text(text)
    assert manifest.NAME in manifest.inspect(folder) and manifest.exists(folder)


@pytest.mark.parametrize("name", ["/proc/self/pagemap", "../../../etc/hostname", "inner/../a", "./a", "nothing"])
def test_names_come_from_the_folder_only(folder, name, monkeypatch):
    listed = entries(folder) | {name: [0, "x"]}
    (folder / manifest.NAME).write_text(json.dumps(listed))
    monkeypatch.setattr(manifest, "_hash", None)  # nothing is hashed before names and sizes agree
    assert manifest.inspect(folder) == f"file {name}: missing"
    assert manifest.verified(folder, name) is None


def test_files_that_are_not_listed_are_damage(folder):
    (folder / "inner/new\n").write_text("")
    assert manifest.inspect(folder) == f"file inner/new\\n: not listed in {manifest.NAME}"


def link_outside(path):
    path.symlink_to("/etc/hostname")


def link_to_a_folder(path):
    path.symlink_to(path.parent)


@pytest.mark.parametrize("make", [os.mkfifo, link_outside, link_to_a_folder])
@pytest.mark.parametrize("where", ["inner/x", "x", manifest.NAME])
def test_links_and_pipes_are_damage_with_and_without_a_manifest(folder, make, where):
    for keep in (True, False):
        (folder / where).unlink(missing_ok=True)
        make(folder / where)
        assert "not a regular file" in manifest.inspect(folder)
        if where != manifest.NAME and not keep:
            (folder / manifest.NAME).unlink()


def test_sizes_are_compared_before_anything_is_hashed(folder, monkeypatch):
    os.truncate(folder / "inner/b", 2**40)  # with holes: no space
    monkeypatch.setattr(manifest, "_hash", None)
    assert manifest.inspect(folder) == f"file inner/b: {2**40} bytes instead of 3000000"


def test_a_huge_manifest_is_not_read(folder):
    os.truncate(folder / manifest.NAME, 2**40)
    assert "larger than 64 MiB" in manifest.inspect(folder)


def test_a_process_in_a_hurry_leaves_no_manifest(folder):
    os.remove(folder / manifest.NAME)
    manifest.write_manifest(folder, stop=lambda: True)
    assert not manifest.exists(folder)
    manifest.write_manifest(folder, stop=lambda: False)
    assert manifest.exists(folder) and not manifest.inspect(folder)
