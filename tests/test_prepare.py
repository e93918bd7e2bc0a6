"""Reference images of FID as the release makes them."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from addp_jax.data import prepare


def photograph(path, size, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    low = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    image = Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)
    image.save(path, quality=95, **options)
    return path


def call(source, output, *more):
    """The exit status."""
    try:
        prepare.main(["--input", str(source), "--output", str(output), *more])
    except SystemExit as end:
        return end.code
    return 0


def test_bilinear_then_the_central_square(tmp_path, capsys):
    path = photograph(tmp_path / "in" / "a.jpg", (60, 40))
    assert call(path.parent, tmp_path / "out", "--size", "20") == 0
    expected = Image.open(path).resize((30, 20), Image.Resampling.BILINEAR).crop((5, 0, 25, 20))
    np.testing.assert_array_equal(Image.open(tmp_path / "out" / "00000.png"), expected)
    assert "1 images of 20x20 pixels" in capsys.readouterr().out


def test_pixels_stay_as_they_are_stored(tmp_path):
    """The release ignores the orientation that a camera notes."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = photograph(tmp_path / "in" / "a.jpg", (20, 20), exif=exif)
    assert call(path.parent, tmp_path / "out", "--size", "20") == 0
    np.testing.assert_array_equal(Image.open(tmp_path / "out" / "00000.png"), Image.open(path))


def test_files_are_numbered_in_the_order_of_the_list(tmp_path):
    names = ("val/n2/b.JPEG", "val/n1/c.JPEG", "val/n1/a.JPEG")
    for seed, name in enumerate(names):
        photograph(tmp_path / name, (24, 16), seed)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "val.txt").write_text("".join(f"{name[4:]} 0\n" for name in names))
    assert call(tmp_path, tmp_path / "out", "--size", "16") == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    for index, name in enumerate(names):
        expected = np.asarray(Image.open(tmp_path / name))[:, 4:20]
        np.testing.assert_array_equal(Image.open(tmp_path / "out" / f"{index:05d}.png"), expected)


@pytest.mark.parametrize("case", ("missing", "used", "broken", "size", "file"))
def test_mistakes_are_one_line(tmp_path, capsys, case):
    path = photograph(tmp_path / "in" / "a.jpg", (20, 20))
    output, more = tmp_path / "out", []
    if case == "missing":
        path.unlink()
    if case == "used":
        output = path.parent
    if case == "broken":
        path.write_bytes(b"text")
    if case == "size":
        more = ["--size", "0"]
    if case == "file":
        output = path / "out"
    assert call(path.parent, output, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and {"missing": "--input", "broken": "a.jpg", "size": "--size"}.get(case, "--output") in line


@pytest.mark.parametrize("output", ("link", ".", "new/deep/"))
def test_the_output_may_be_a_link_or_the_current_folder(tmp_path, monkeypatch, output):
    path = photograph(tmp_path / "in" / "a.jpg", (20, 20))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real" if output == "." else tmp_path)
    (path.parent / "b.jpg").write_bytes(b"text")
    assert call(path.parent, output, "--size", "8") == 2
    (path.parent / "b.jpg").unlink()
    assert call(path.parent, output, "--size", "8") == 0
    assert [file.name for file in pathlib.Path(output).iterdir()] == ["00000.png"] and (tmp_path / "link").is_symlink()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    path = photograph(tmp_path / "in" / "a.jpg", (20, 20))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert call(path.parent, tmp_path / "out", "--size", "8") == 2
    assert "--output: cannot write to" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
