"""addp_jax.files: regular files, whole writes, names that stay inside, one-line reasons."""

import os
import pathlib

import pytest

from addp_jax import errors, files


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError):
            files.open_regular(path)
    (tmp_path / "text").write_bytes(b"abc")
    assert files.read_bytes(tmp_path / "text") == b"abc"


def test_a_broken_link_and_a_missing_file_are_reported_as_such(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("link", "missing"):
        with pytest.raises(FileNotFoundError):
            files.open_regular(tmp_path / name)


def test_lines_lose_their_byte_order_mark_and_carriage_returns(tmp_path):
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfapple\r\nboat\r\n")
    assert files.read_lines(tmp_path / "list") == ["apple", "boat", ""]


def test_names_stay_below_their_folder():
    assert files.below("root", "a/b.png") == "root/a/b.png"
    for name in ("../x", "a/../../x", "/etc/hostname", "", "a\0b"):
        with pytest.raises(ValueError, match="leads out"):
            files.below("root", name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "file", "old")

    def fail(file):
        file.write(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        files.replace(tmp_path / "file", fail)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_the_longest_name_can_be_written(tmp_path):
    name = "x" * 255
    files.write_text(tmp_path / name, "whole")
    assert (tmp_path / name).read_text() == "whole"


def test_deep_json_is_a_value_error(tmp_path):
    (tmp_path / "deep").write_text("[" * 200_000)
    with pytest.raises(ValueError):
        files.read_json(tmp_path / "deep")


def test_reasons_are_one_printable_line():
    assert files.printable("a\nb\x1b[2J\udcff") == "a\\nb\\x1b[2J\\udcff"
    assert files.reason(ValueError("first\x07\nsecond")) == "first\\x07"
    assert files.reason(OSError(2, "No such file or directory", "x")) == "No such file or directory"
    assert len(files.reason(ValueError("x" * 1000))) == files.REASON_LENGTH
    assert files.reason(ValueError()) == "ValueError"


def test_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/house")
    assert files.expand("~/runs") == "/house/runs" and files.expand("runs/~x") == "runs/~x"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(errors.UserError, match="output: cannot write to .*taken"):
        files.require_writable(tmp_path / "taken" / "out", "--output")
    files.require_writable(tmp_path / "new" / "out", "--output")
    assert pathlib.Path(tmp_path / "new" / "out").is_dir() and not os.listdir(tmp_path / "new" / "out")
