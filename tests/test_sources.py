"""Folders, lists, shards and TFDS as random-access sources; packing."""

import errno
import io
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from addp_jax import errors
from addp_jax.data import pack, sources, transforms
from addp_jax.data.sources import array_record, image_folder, index, meta_list, tfds


def jpeg(seed=0, height=12, width=16):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(len(str(path))) if data is None else data)


@pytest.fixture
def folder(tmp_path):
    """root/{train,val}/{cat,dog}/: six training images, two to evaluate on."""
    root = tmp_path / "images"
    for name in ("train/dog/b.JPG", "train/dog/deep/er/c.webp", "train/dog/a.jpeg", "train/cat/x.png"):
        write(root / name)
    for name in ("train/cat/y.bmp", "train/cat/z.jpg", "val/cat/v.jpg", "val/dog/w.jpg"):
        write(root / name)
    return root


def names(source):
    return [os.path.relpath(source[i]["path"], source.root).replace(os.sep, "/") for i in range(len(source))]


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_image_folder_reads_a_split_in_sorted_order(folder):
    source = image_folder.ImageFolder(str(folder))
    assert source.classes == ("cat", "dog")
    assert names(source) == ["cat/x.png", "cat/y.bmp", "cat/z.jpg", "dog/a.jpeg", "dog/b.JPG", "dog/deep/er/c.webp"]
    assert [int(source[i]["label"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert source[2]["image"] == (folder / "train/cat/z.jpg").read_bytes()
    assert source[2]["index"] == 2 and source[2]["label"].dtype == np.int32


def test_image_folder_ignores_hidden_and_foreign_files(folder):
    write(folder / "train/cat/.hidden.jpg")
    write(folder / "train/.cache/a.jpg")
    write(folder / "train/cat/notes.txt")
    source = image_folder.ImageFolder(str(folder))
    assert len(source) == 6 and source.classes == ("cat", "dog")


def test_labels_agree_when_a_split_lacks_a_class(folder):
    write(folder / "train/ant/a.jpg")
    train, held_out = (image_folder.ImageFolder(str(folder), split) for split in ("train", "eval"))
    assert train.classes == held_out.classes == ("ant", "cat", "dog")
    assert [int(held_out[i]["label"]) for i in range(2)] == [1, 2]


def test_folder_without_splits_holds_out_one_in_twenty(tmp_path):
    for i in range(45):
        write(tmp_path / f"class{i % 3}" / f"{i:02}.jpg")
    train, held_out = (image_folder.ImageFolder(str(tmp_path), split) for split in ("train", "eval"))
    assert len(held_out) == 2 and len(train) == 43
    assert not set(names(train)) & set(names(held_out))
    assert names(held_out) == names(image_folder.ImageFolder(str(tmp_path), "eval"))


def test_flat_folder_is_one_class(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.jpg")
    train, held_out = (image_folder.ImageFolder(str(tmp_path), split) for split in ("train", "eval"))
    assert train.classes == ("all",) and len(train) == 4 and len(held_out) == 1
    assert {int(train[i]["label"]) for i in range(4)} == {0}


def test_flat_split_folders(tmp_path):
    for i in range(3):
        write(tmp_path / "train" / f"{i}.jpg")
    write(tmp_path / "val" / "v.jpg")
    assert len(image_folder.ImageFolder(str(tmp_path))) == 3
    assert names(image_folder.ImageFolder(str(tmp_path), "eval")) == ["v.jpg"]


def test_one_missing_split_is_named(folder):
    with pytest.raises(errors.UserError, match="config.data.eval_split") as caught:
        image_folder.ImageFolder(str(folder), "eval", "train", "test")
    assert "test" in one_line(caught)


def test_missing_and_empty_folders_name_the_layouts(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(errors.UserError, match="config.data.path") as caught:
            image_folder.ImageFolder(str(path))
        assert path.name in one_line(caught) and "CLASS" in one_line(caught)


def test_single_image_cannot_be_split(tmp_path):
    write(tmp_path / "only.jpg")
    with pytest.raises(errors.UserError, match="one image"):
        image_folder.ImageFolder(str(tmp_path))


def test_unreadable_folder_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(errors.UserError, match="Permission denied") as caught:
        image_folder.ImageFolder(str(folder))
    assert "config.data.path" in one_line(caught) and "train" in one_line(caught)


def test_file_that_vanished_is_named(folder):
    source = image_folder.ImageFolder(str(folder))
    (folder / "train/cat/x.png").unlink()
    with pytest.raises(errors.UserError, match="x.png"):
        source[0]


def test_large_folder_pickles_fast_and_small():
    paths = [f"n{i % 1000:08}/n{i:08}.JPEG" for i in range(20_000)]
    source = sources.Files("/data", paths, [i % 1000 for i in range(20_000)], ())
    data = pickle.dumps(source)
    assert len(data) < 20_000 * 40
    assert pickle.loads(data).path(1234) == "/data/" + paths[1234]
    assert repr(source) == "Files('/data', 20000 images)"


def test_file_names_may_hold_any_characters(tmp_path):
    for name in ("Ünï çode.jpg", "a b'c.jpg"):
        write(tmp_path / "train" / "k" / name)
        write(tmp_path / "val" / "k" / name)
    source = image_folder.ImageFolder(str(tmp_path))
    assert names(source) == ["k/a b'c.jpg", "k/Ünï çode.jpg"]


@pytest.mark.parametrize("below", ["train", ""])
def test_meta_list_reads_both_layouts(tmp_path, below):
    write(tmp_path / below / "n1/a b.jpg")
    write(tmp_path / below / "n2/b.jpg")
    write(tmp_path / "meta/train.txt", b"n2/b.jpg 7\r\n\nn1/a b.jpg 3\n")
    source = meta_list.MetaList(str(tmp_path), "train")
    assert [int(source[i]["label"]) for i in range(2)] == [7, 3]
    assert source.path(1) == str(tmp_path / below / "n1/a b.jpg")


@pytest.mark.parametrize("line", ["n1/a.jpg", "n1/a.jpg cat", "n1/a.jpg -1", "5"])
def test_bad_line_of_a_meta_list_is_named_with_its_number(tmp_path, line):
    write(tmp_path / "train/n1/a.jpg")
    write(tmp_path / "meta/train.txt", f"n1/a.jpg 0\n{line}\n".encode())
    with pytest.raises(errors.UserError, match="train.txt line 2"):
        meta_list.MetaList(str(tmp_path), "train")


def test_meta_list_without_list_or_images_says_so(tmp_path):
    with pytest.raises(errors.UserError, match=r"config.data.path.*meta.train.txt"):
        meta_list.MetaList(str(tmp_path), "train")
    write(tmp_path / "meta/train.txt", b"n1/a.jpg 0\n")
    with pytest.raises(errors.UserError, match="n1/a.jpg"):
        meta_list.MetaList(str(tmp_path), "train")
    write(tmp_path / "meta/train.txt", b"\n")
    with pytest.raises(errors.UserError, match="empty"):
        meta_list.MetaList(str(tmp_path), "train")


@pytest.fixture
def packed(folder, tmp_path):
    output = tmp_path / "packed"
    pack.main(["--input", str(folder), "--output", str(output), "--shards", "4"])
    return output


def test_packing_keeps_every_byte_and_the_order(folder, packed):
    source, records = image_folder.ImageFolder(str(folder)), array_record.ArrayRecord(str(packed), "train")
    assert len(records) == len(source) == 6 and records.classes == source.classes
    for i in range(6):
        assert records[i]["image"] == source[i]["image"]
        assert records[i]["label"] == source[i]["label"] and records[i]["index"] == i
    assert records[5]["path"] == "dog/deep/er/c.webp"
    again = pickle.loads(pickle.dumps(records))
    assert again[3]["image"] == records[3]["image"] and repr(again) == repr(records)


def test_packed_folder_holds_complete_files_only(packed):
    shards = [f"train-0000{i}-of-00004.array_record" for i in range(4)]
    assert sorted(os.listdir(packed)) == sorted(["train-classes.json"] + shards)


def test_shards_are_found_by_glob_and_both_splits_share_a_folder(folder, packed):
    pack.main(["--input", str(folder), "--output", str(packed), "--split", "val"])
    assert len(array_record.ArrayRecord(str(packed), "val")) == 2
    assert len(array_record.ArrayRecord(str(packed / "*.array_record"), "train")) == 6


def test_packing_a_meta_list(folder, tmp_path):
    write(folder / "meta/train.txt", b"cat/x.png 5\n")
    pack.pack(str(folder), str(tmp_path / "out"))
    assert array_record.ArrayRecord(str(tmp_path / "out"))[0]["label"] == 5


def test_packing_refuses_to_overwrite(folder, packed, capsys):
    before = {name: (packed / name).stat().st_mtime_ns for name in os.listdir(packed)}
    with pytest.raises(SystemExit, match="2"):
        pack.main(["--input", str(folder), "--output", str(packed)])
    assert "already holds" in capsys.readouterr().err
    assert before == {name: (packed / name).stat().st_mtime_ns for name in os.listdir(packed)}


def test_packing_names_a_bad_image_and_leaves_nothing(folder, tmp_path, capsys):
    write(folder / "train/cat/bad.jpg", jpeg()[:200])
    with pytest.raises(SystemExit, match="2"):
        pack.main(["--input", str(folder), "--output", str(tmp_path / "out")])
    assert "bad.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_shard_is_counted(packed):
    (packed / "train-00002-of-00004.array_record").unlink()
    with pytest.raises(errors.UserError, match="3 of 4 train shards"):
        array_record.ArrayRecord(str(packed), "train")


def test_folder_without_shards_says_how_to_make_them(packed):
    with pytest.raises(errors.UserError, match=r"no val-\*.*addp_jax.data.pack"):
        array_record.ArrayRecord(str(packed), "val")


def test_shard_of_another_format_is_a_user_error(packed):
    write(packed / "train-00002-of-00004.array_record", b"not a shard" * 1000)
    with pytest.raises(errors.UserError, match="config.data.path"):
        array_record.ArrayRecord(str(packed), "train")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A prepared array_record data set "tiny_pictures" with five training images."""
    tfds = pytest.importorskip("tensorflow_datasets")

    # Not registered, so that it is read from its files alone.
    class TinyPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=["a", "b"])
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(5)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": io.BytesIO(jpeg(i)), "label": i % 2}

    root = tmp_path_factory.mktemp("tfds")
    TinyPictures.pkg_dir_path = root
    builder = TinyPictures(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return root


def test_tfds_gives_encoded_images_labels_and_names(tfds_folder):
    source = tfds.Tfds("tiny_pictures", "train", str(tfds_folder))
    assert len(source) == 5 and source.classes == ("a", "b")
    found = {(source[i]["image"], int(source[i]["label"])) for i in range(5)}
    assert found == {(jpeg(i), i % 2) for i in range(5)}
    assert transforms.decode(source[0]["image"], "").shape == (12, 16, 3)
    again = pickle.loads(pickle.dumps(source))
    assert again[2]["image"] == source[2]["image"] and repr(again) == repr(source)


def test_tfds_split_syntax(tfds_folder):
    assert len(tfds.Tfds("tiny_pictures", "train[:2]", str(tfds_folder))) == 2


def test_tfds_failures_say_what_to_do(tfds_folder, tmp_path):
    with pytest.raises(errors.UserError, match=r"has no 'val', it has train"):
        tfds.Tfds("tiny_pictures", "val", str(tfds_folder))
    with pytest.raises(errors.UserError, match="config.data.name.*no_such_thing"):
        tfds.Tfds("no_such_thing", "train", str(tfds_folder))
    with pytest.raises(errors.UserError, match="is not in .*tfds build cifar10 --file_format=array_record"):
        tfds.Tfds("cifar10", "train", str(tmp_path))


def test_tfds_tfrecord_is_refused_with_the_remedy(tfds_folder, tmp_path):
    shutil.copytree(tfds_folder, tmp_path / "copy")
    info = next((tmp_path / "copy").rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(errors.UserError, match="TFRECORD.*--file_format=array_record") as caught:
        tfds.Tfds("tiny_pictures", "train", str(tmp_path / "copy"))
    one_line(caught)


# --- an index file --------------------------------------------------------------------------------


def test_an_index_is_the_folder_without_a_look_at_it(folder, monkeypatch, capsys):
    os.rename(folder / "train/cat/y.bmp", folder / "train/cat/\udcff y.bmp")
    index.main(["--input", str(folder)])
    assert "6 images, 2 classes" in capsys.readouterr().out
    expected = {split: image_folder.ImageFolder(str(folder), split) for split in ("train", "eval")}
    for name in ("scandir", "stat", "listdir"):
        monkeypatch.setattr(os, name, lambda *_, **__: pytest.fail("looked at a folder"))
    for split, source in expected.items():
        found = index.Index(str(folder), split)
        assert names(found) == names(source) and found.classes == source.classes and found.labelled
        assert found.fingerprint() == source.fingerprint()
        assert [found[i] for i in range(len(found))] == [source[i] for i in range(len(source))]


def test_an_index_of_a_flat_folder_has_one_class(tmp_path):
    for number in range(21):
        write(tmp_path / f"{number}.png")
    index.main(["--input", str(tmp_path)])
    found = [index.Index(str(tmp_path), split) for split in ("train", "eval")]
    assert list(map(len, found)) == [20, 1] and found[0].classes == ("all",) and not found[0].labelled


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: "", "line 1: "),
        (lambda text: text.replace('"folder"', '"other"'), "line 1: "),
        (lambda text: text.replace('"folder": "train"', '"folder": "../other"'), "line 1: '../other' leads out"),
        (lambda text: text.replace('"cat/x.png"', '"/etc/passwd"'), "line 2: '/etc/passwd' leads out"),
        (lambda text: text.replace('"cat/x.png"', "7"), "line 2: "),
        (lambda text: text[: text.rindex("[")], "names 5 of 6 images"),
    ],
)
def test_a_damaged_index_is_named(folder, change, message):
    index.main(["--input", str(folder)])
    path = folder / "index" / "train.jsonl"
    path.write_text(change(path.read_text()))
    with pytest.raises(errors.UserError) as caught:
        index.Index(str(folder))
    assert f"config.data.path: {path}" in one_line(caught) and message in one_line(caught)
    path.unlink()
    with pytest.raises(errors.UserError, match=r"cannot read .*train.jsonl: .*; write it with python -m addp_jax.data.sources.index"):
        index.Index(str(folder))


# --- a mount that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("number, failures, status", [(errno.EIO, 2, None), (errno.ESTALE, 99, 75), (errno.EACCES, 99, 2)])
def test_a_read_that_fails_for_the_moment_is_tried_again(folder, monkeypatch, number, failures, status):
    source, original, asked = image_folder.ImageFolder(str(folder)), sources.files.read_bytes, []

    def read(path):
        asked.append(path)
        if len(asked) <= failures:
            raise OSError(number, os.strerror(number))
        return original(path)

    monkeypatch.setattr(sources.files, "read_bytes", read)
    monkeypatch.setattr(sources, "WAITS", (0.0, 0.0, 0.0))
    if status is None:
        assert source[0]["image"] == original(source.path(0)) and len(asked) == failures + 1
        return
    with pytest.raises(errors.Unreadable, match="cannot read .*x.png") as caught:
        source[0]
    assert caught.value.status == status and len(asked) == (4 if status == 75 else 1)


# --- shards on a disk of this host ----------------------------------------------------------------


def test_shards_are_staged_once(folder, tmp_path, monkeypatch):
    pack.pack(str(folder), str(tmp_path / "shards"), num_shards=2)
    local = tmp_path / "local"
    assert array_record.stage(str(tmp_path / "shards"), "train", str(local)) == str(local)
    staged, remote = (array_record.ArrayRecord(str(place)) for place in (local, tmp_path / "shards"))
    assert [staged[i] for i in range(6)] == [remote[i] for i in range(6)] and staged.fingerprint() == remote.fingerprint()
    first = sorted(local.glob("*.array_record"))[0]
    first.write_bytes(first.read_bytes()[:-1])  # as of a copy that was cut short
    copied, replace = [], array_record.files.replace
    monkeypatch.setattr(array_record.files, "replace", lambda target, fill: copied.append(target) or replace(target, fill))
    array_record.stage(str(tmp_path / "shards"), "train", str(local))
    assert copied == [str(first)]
    assert first.read_bytes() == (tmp_path / "shards" / first.name).read_bytes()
