"""The folder of generated images: what is whole stays, nothing is ever half written, other settings are refused."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from addp_jax import errors
from addp_jax.generation import sample_folder

SETTINGS = {"seed": 0, "margins": (0.5, 0.0)}
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)
NAMES = [f"{i:06d}" for i in range(5)]


def filled(path, numbers):
    with sample_folder.SampleFolder(path, SETTINGS) as folder:
        for i in numbers:
            folder.write(NAMES[i], lambda i=i: IMAGES[i])
    return sample_folder.SampleFolder(path, SETTINGS)


def test_what_is_there_and_whole_is_not_missing(tmp_path):
    folder = filled(tmp_path, [0, 2, 3])
    whole = folder.file(NAMES[2]).read_bytes()
    folder.file(NAMES[2]).write_bytes(whole[:-20])
    damaged = bytearray(folder.file(NAMES[3]).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    folder.file(NAMES[3]).write_bytes(damaged)
    assert folder.missing(NAMES).tolist() == [False, True, True, True, True]


def test_leftovers_of_a_kill_are_removed(tmp_path):
    filled(tmp_path, [0])
    (tmp_path / "images" / "000001.png.tmp").write_bytes(b"half")
    sample_folder.SampleFolder(tmp_path, SETTINGS)
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["000000.png"]


def test_the_npz_holds_the_images_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_folder, "READ_AT_ONCE", 2)
    folder = filled(tmp_path, range(5))
    path = folder.write_npz(NAMES, (8, 6, 3))
    np.testing.assert_array_equal(np.load(path)["arr_0"], IMAGES)
    np.testing.assert_array_equal(list(folder.read(NAMES)), IMAGES)


def test_other_settings_are_refused_and_named(tmp_path):
    filled(tmp_path, [0])
    with pytest.raises(errors.UserError, match=r"\(seed 0, now 1\): give another config.generate.output"):
        sample_folder.SampleFolder(tmp_path, SETTINGS | {"seed": 1})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(errors.UserError, match="settings.json cannot be read"):
        sample_folder.SampleFolder(tmp_path, SETTINGS)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(errors.UserError, match="no settings.json"):
        sample_folder.SampleFolder(tmp_path, SETTINGS)


def test_settings_are_readable(tmp_path):
    filled(tmp_path, [])
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 0, "margins": [0.5, 0.0]}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="config.generate.output: cannot write to"):
        sample_folder.SampleFolder(tmp_path / "file", SETTINGS)
    folder = sample_folder.SampleFolder(tmp_path / "folder", SETTINGS)
    (tmp_path / "folder" / "images").rmdir()
    folder.write(NAMES[0], lambda: IMAGES[0])
    with pytest.raises(errors.UserError, match="No such file"):
        folder.wait()


def test_what_is_no_png_in_colour_is_missing_and_no_program_is_started(tmp_path, monkeypatch):
    """PostScript under the name of a PNG would make Pillow run Ghostscript; a pipe would never end."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho 10.0\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    folder = filled(tmp_path / "out", [4])
    folder.file(NAMES[0]).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n")
    os.mkfifo(folder.file(NAMES[1]))
    Image.fromarray(IMAGES[0]).save(folder.file(NAMES[2]), "BMP")
    Image.fromarray(IMAGES[0]).convert("L").save(folder.file(NAMES[3]))
    assert folder.missing(NAMES).tolist() == [True] * 4 + [False]
    for name in NAMES[:3]:
        with pytest.raises(OSError):
            list(folder.read([name]))
    assert not (tmp_path / "started").exists()
