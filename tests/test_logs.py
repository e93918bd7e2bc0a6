"""What a run reports can be read back, survives a resume, and stays valid."""

import io
import json
import os
import pathlib
import struct
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from addp_jax import errors, files, logs, pictures
from addp_jax.training import reports


def events(workdir):
    """Every event of the run's TensorBoard files: frames of length, checksum, message, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def summaries(workdir):
    return {(v.tag, e.step): v for e in events(workdir) for v in e.summary.value}


def log(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (workdir / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_scalars_read_back_from_both_logs(tmp_path):
    writer = reports.Writer(tmp_path)
    writer.scalars(1, {"loss": 2.5, "train/accuracy": jnp.float32(0.25)})
    writer.scalars(2, {"loss": 1.5})
    writer.close()
    assert [(line["step"], line["loss"]) for line in log(tmp_path)] == [(1, 2.5), (2, 1.5)]
    assert log(tmp_path)[0]["train/accuracy"] == 0.25 and log(tmp_path)[0]["time"] > 1e9
    found = summaries(tmp_path)
    assert found["loss", 2].simple_value == 1.5 and found["train/accuracy", 1].simple_value == 0.25


def test_log_is_complete_on_disk_after_each_call(tmp_path):
    writer = reports.Writer(tmp_path)
    writer.scalars(1, {"loss": 2.5})
    assert len(log(tmp_path)) == 1
    writer.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scalars_that_are_not_finite_stay_valid_json(tmp_path, value):
    writer = reports.Writer(tmp_path)
    writer.scalars(1, {"loss": value})
    writer.close()
    assert log(tmp_path)[0]["loss"] is None


def test_images_are_pictures_and_events(tmp_path):
    writer = reports.Writer(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    writer.images(12, {"samples/grid": image, "float": image / 255.0})
    writer.close()
    for name in ("samples/grid", "float"):
        picture = np.asarray(Image.open(tmp_path / f"pictures/{name}_0000012.png"))
        np.testing.assert_array_equal(picture, image)
        encoded = summaries(tmp_path)[name, 12].image.encoded_image_string
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), image)


def test_resume_leaves_no_duplicate_steps(tmp_path):
    writer = reports.Writer(tmp_path)
    for step in range(0, 6):
        writer.scalars(step, {"loss": step})
    writer.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # torn by a kill
    writer = reports.Writer(tmp_path, start_step=3)
    writer.scalars(4, {"loss": 40})
    writer.close()
    assert [(line["step"], line["loss"]) for line in log(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
    assert [e.step for e in events(tmp_path) if e.HasField("session_log")] == [0, 4]  # hides from 4 on
    assert [e.step for e in events(tmp_path) if e.HasField("summary")] == [0, 1, 2, 3, 4, 5, 4]


def test_run_from_the_beginning_starts_an_empty_log(tmp_path):
    for _ in range(2):
        writer = reports.Writer(tmp_path)
        writer.scalars(0, {"loss": 1})
        writer.close()
    assert len(log(tmp_path)) == 1


def test_disabled_writer_writes_nothing(tmp_path, capfd):
    writer = reports.Writer(tmp_path / "run", enabled=False)
    writer.scalars(1, {"loss": 1.0})
    writer.images(1, {"a": np.zeros((2, 2, 3))})
    writer.close()
    progress = logs.Progress(10, enabled=False)
    progress.update(5)
    progress.close()
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")


def test_unwritable_work_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="cannot write to workdir .*/file/run"):
        reports.Writer(tmp_path / "file" / "run")


def test_full_disk_is_a_clear_error_and_not_a_hang(tmp_path):
    writer = reports.Writer(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(errors.UserError, match="cannot write to workdir .*: No space left on device"):
        writer.scalars(1, {"loss": 1.0})


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((3, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    canvas = pictures.grid(images, columns=2, pad=1)
    assert canvas.shape == (2 * 4 + 1, 2 * 5 + 1, 3) and canvas.dtype == np.uint8
    assert (canvas[1:4, 1:5] == 10).all() and (canvas[1:4, 6:10] == 20).all() and (canvas[5:8, 1:5] == 30).all()
    inside = np.zeros(canvas.shape[:2], bool)
    inside[1:4, 1:5] = inside[1:4, 6:10] = inside[5:8, 1:5] = True
    assert (canvas[~inside] == 255).all()


def test_grid_takes_floats_and_clips_them():
    canvas = pictures.grid(np.array([-1.0, 0.5, 2.0]).reshape(3, 1, 1, 1) * np.ones((1, 1, 1, 3)), columns=9, pad=0)
    assert canvas[0, :, 0].tolist() == [0, 128, 255]


def test_captioned_keeps_each_image_below_its_caption():
    rows = [("original", np.zeros((5, 40, 3), np.uint8)), ("", np.full((7, 60, 3), 0.5))]
    canvas = pictures.captioned(rows)
    top = pictures.CAPTION_HEIGHT
    assert canvas.shape == (2 * top + 12, 60, 3)
    assert (canvas[top : top + 5, :40] == 0).all() and (canvas[top : top + 5, 40:] == 255).all()
    assert (canvas[2 * top + 5 :] == 128).all()
    assert (canvas[:top] < 255).any() and (canvas[top + 5 : 2 * top + 5] == 255).all()


@pytest.mark.parametrize("caption", ["two\nlines", "a\x1b[2J", "\udcff", "\0", "猫", "tab\there"])
def test_a_caption_is_one_line_whatever_a_name_holds(caption):
    canvas = pictures.contact_sheet([caption, "b"], np.zeros((2, 5, 40, 3), np.uint8))
    assert (canvas == 0).all(-1).sum() >= 2 * 5 * 40


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(logs, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_progress_redraws_one_line_with_rate_and_time_left(clock):
    stream = Terminal()
    progress = logs.Progress(100, stream=stream)
    for step in range(0, 41):
        progress.update(step, f"loss {step}")
        clock.seconds += 0.5
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "step 40/100  2 steps/s  ETA 0:30  loss 40" in last and last.endswith("\n")
    assert last.startswith("[##########..............] ")
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().count("\r") == 21


def test_progress_in_a_log_file_is_a_plain_line_now_and_then(clock):
    stream = io.StringIO()
    progress = logs.Progress(10_000, start_step=500, unit="image", stream=stream)
    for step in range(500, 601):
        progress.update(step)
        clock.seconds += 0.25
    progress.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and len(lines) == 4
    assert lines[0] == "image 500/10000" and lines[2] == "image 580/10000  4 images/s  ETA 39:15"
    assert lines[3].startswith("image 600/10000")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_progress_of_no_steps_does_not_fail(stream):
    progress = logs.Progress(0, 0, stream=stream)
    progress.update(0)
    progress.close()
    assert "step 0/0" in stream.getvalue()


def test_progress_that_never_began_prints_nothing():
    stream = Terminal()
    logs.Progress(5, stream=stream).close()
    assert stream.getvalue() == ""


def test_curves_draw_a_panel_per_key(tmp_path):
    writer = reports.Writer(tmp_path)
    for step in range(5):
        writer.scalars(step, {"loss": float("nan") if step == 2 else 5 - step, "accuracy": step})
    writer.close()
    drawn = []
    for keys in (["loss"], ["loss", "accuracy", "absent"], ["loss"] * (reports.PANELS_PER_ROW + 1)):
        reports.curves(tmp_path / "log.jsonl", tmp_path / "curves.png", keys)
        drawn.append(np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")))
    one, three, many = drawn
    assert three.shape[1] == 3 * one.shape[1] and one.std() > 5
    assert many.shape[:2] == (2 * one.shape[0], reports.PANELS_PER_ROW * one.shape[1])


@pytest.mark.parametrize("place", ["curves", "pictures", "film"])
def test_a_file_that_cannot_be_written_is_named(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    (tmp_path / "folder.png").mkdir()
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    write = {
        "curves": lambda: reports.curves(tmp_path / "log.jsonl", tmp_path / "file" / "curves.png"),
        "pictures": lambda: pictures.save_pictures(tmp_path, {"folder": frames[0]}),
        "film": lambda: pictures.save_gif(tmp_path / "file" / "film.gif", frames),
    }
    with pytest.raises(errors.UserError, match=r"cannot write .*(file/curves.png|folder.png|file/film.gif): \w") as caught:
        write[place]()
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("make", ["absent", "folder", "pipe"])
def test_a_log_that_cannot_be_read_is_named(make, tmp_path):
    path = tmp_path / "log.jsonl"
    {"absent": lambda path: None, "folder": pathlib.Path.mkdir, "pipe": os.mkfifo}[make](path)
    with pytest.raises(errors.UserError, match="cannot read .*log.jsonl: "):
        reports.curves(path, tmp_path / "curves.png")
    if make != "absent":
        with pytest.raises(errors.UserError, match="cannot write to workdir"):
            reports.Writer(tmp_path, start_step=1)


def test_a_picture_that_cannot_be_replaced_stays_whole(tmp_path, monkeypatch):
    pictures.save_pictures(tmp_path, {"a": np.zeros((4, 4, 3), np.uint8)})
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(errors.UserError, match="cannot write .*a.png: No space left on device"):
        pictures.save_pictures(tmp_path, {"a": np.full((4, 4, 3), 255, np.uint8)})
    assert np.asarray(Image.open(tmp_path / "a.png")).max() == 0


STRANGE = [
    '{"step": null}', '{"step": "3"}', '{"step": true}', '{"step": 1.5}', '{"step": [1]}', '{"step": -1}', '{"step": 1e3}', "[" * 100_000,
    '{"a":' * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": ' + "9" * 30 + "}", "[1]", "3", "null", "\0\0", "\ufffd", '{"loss": 1}', "",
]  # fmt: skip


def test_lines_of_a_log_whose_step_is_no_number_are_left_out(tmp_path):
    sound = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0}']
    (tmp_path / "log.jsonl").write_text("\n".join([sound[0], *STRANGE, sound[1]]))
    reports.Writer(tmp_path, start_step=4).close()
    assert (tmp_path / "log.jsonl").read_text().splitlines() == sound
    reports.curves(tmp_path / "log.jsonl", tmp_path / "curves.png", ["loss"])


def test_values_of_a_log_that_are_no_numbers_are_left_out(tmp_path):
    values = {"a": '"high"', "b": "[1]", "c": "{}", "d": "NaN", "e": "-Infinity", "f": "1e999", "g": "9" * 400, "h": "true", "i": "0.5"}
    (tmp_path / "log.jsonl").write_text('{"step": 1, ' + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}\n")
    reports.Writer(tmp_path, start_step=4).close()
    assert log(tmp_path) == [{"step": 1, "d": None, "e": None, "f": None, "g": None, "i": 0.5}]
    reports.curves(tmp_path / "log.jsonl", tmp_path / "curves.png", list(values))


class Broken(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, error):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text):
        self.tries += 1
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device"), ValueError("closed")])
def test_progress_that_nobody_can_see_any_more_does_not_end_the_run(error, terminal, clock):
    stream = Broken(error)
    stream.isatty = lambda: terminal
    progress = logs.Progress(10, stream=stream)
    for step in range(10):
        progress.update(step)
        clock.seconds += 60
    progress.close()
    assert stream.tries == 1


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_what_nobody_can_read_any_more_is_dropped(error):
    stream = Broken(error)
    print("text", file=logs.Lasting(stream), flush=True)
    assert stream.tries and logs.Lasting(stream).isatty() == stream.isatty()


def test_progress_without_a_stream_shows_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(logs.sys, "stderr", stream)
        progress = logs.Progress(10)
        progress.update(1)
        progress.close()


@pytest.mark.parametrize("classes", [2, 300, 20_000])
def test_the_picture_of_many_classes_needs_no_square(classes):
    examples = np.arange(classes) % 3
    hits = examples // 2
    matrix = np.diag(hits) if classes == 2 else None
    picture = pictures.confusion(examples, hits, matrix)
    assert picture.dtype == np.uint8 and picture.shape == (500, 1000, 3) and picture[:, :500].std() > 5 and picture[:, 500:].std() > 5
