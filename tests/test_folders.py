"""Folders of images as people have them: stray folders, links in circles, other kinds of files, splits that do not match."""

import os

import numpy as np
import programs
import pytest
from PIL import Image

from addp_jax import errors, program, tasks
from addp_jax.data import class_names, pack, part, pipeline, walk
from addp_jax.data.sources import array_record, image_folder, meta_list
from addp_jax.training import check


@pytest.fixture(autouse=True)
def fresh_lines(monkeypatch):
    """Every test sees the lines that are printed once in a process."""
    monkeypatch.setattr(walk, "_announced", set())


def write(folder, count=4, size=(20, 24), ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(str(folder).encode()))
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.{ending}")
    return folder


def splits(root, classes=("apple", "boat", "car"), train=4, val=2):
    for name in classes:
        write(root / "train" / name, train)
        write(root / "val" / name, val)
    return root


def test_folders_without_images_are_no_classes_and_are_named(tmp_path, capsys):
    splits(tmp_path)
    for name in ("__MACOSX", "@eaDir", "notes", ".hidden"):
        (tmp_path / "train" / name / "inner").mkdir(parents=True)
    (tmp_path / "train" / "notes" / "a.txt").write_text("no image")
    write(tmp_path / "train" / "__MACOSX", 1)  # what archives leave behind is no class even with images
    for split in ("train", "eval"):
        source = image_folder.ImageFolder(str(tmp_path), split)
        assert source.classes == ("apple", "boat", "car") and sorted(set(source.labels)) == [0, 1, 2]
    assert "notes" in capsys.readouterr().err


def test_labels_follow_the_training_split_and_extra_classes_are_refused(tmp_path, capsys):
    splits(tmp_path)
    write(tmp_path / "train" / "aardvark")
    source = image_folder.ImageFolder(str(tmp_path), "eval")
    assert source.classes[0] == "aardvark" and min(source.labels) == 1
    assert "no images of 1 classes: aardvark" in capsys.readouterr().err
    write(tmp_path / "val" / "zebra", 1)
    with pytest.raises(errors.UserError, match="has classes that .* lacks: zebra"):
        image_folder.ImageFolder(str(tmp_path), "eval")


def test_an_evaluation_split_without_class_folders_has_no_labels(tmp_path):
    splits(tmp_path)
    write(tmp_path / "flat" / "val", 3)
    (tmp_path / "flat" / "train").symlink_to(tmp_path / "train")
    config = pipeline.Config(source="image_folder", path=str(tmp_path / "flat"))
    assert set(image_folder.ImageFolder(config.path, "eval").labels) == {walk.UNKNOWN}
    classifier = program.create(programs.config("demo_classification", data__source="image_folder", data__num_train=0,
        data__num_eval=0, data__path=config.path, model__net__num_classes=3, model__encoder_weights=""))  # fmt: skip
    with pytest.raises(errors.UserError, match="does not tell the classes"):
        classifier.source("eval")
    tokenizer = tasks.create("tokenizer", {**programs.config("demo_tokenizer").model}, np.float32)
    assert len(tokenizer.open_source("eval", config)) == 3  # needs no labels


@pytest.mark.parametrize("num_classes, message", [(2, "num_classes = 2, but the data has 3 classes: apple; boat; car"), (3, ""), (9, "")])
def test_the_number_of_classes_is_compared_and_differences_are_named(tmp_path, capsys, num_classes, message):
    source = image_folder.ImageFolder(str(splits(tmp_path)), "train")
    if message:
        with pytest.raises(errors.UserError, match=message):
            tasks.check_classes(source, num_classes)
    else:
        tasks.check_classes(source, num_classes)
        assert ("the network 9" in capsys.readouterr().err) == (num_classes == 9)


@pytest.mark.parametrize("layout", ("a", "."))
def test_one_class_or_none_is_no_classification(tmp_path, layout):
    write(tmp_path / layout, 30)
    for source in (image_folder.ImageFolder(str(tmp_path)), part.Part(image_folder.ImageFolder(str(tmp_path)), 5)):
        with pytest.raises(errors.UserError, match="does not tell the classes"):
            tasks.check_classes(source, 1000)


def test_splits_one_folder_deeper_are_pointed_at(tmp_path):
    splits(tmp_path / "Data")
    with pytest.raises(errors.UserError, match="one folder deeper; set it to .*Data"):
        image_folder.ImageFolder(str(tmp_path))


def test_links_in_circles_end_and_every_image_comes_once(tmp_path):
    for name in ("apple", "boat"):
        write(tmp_path / name, 8)
        (tmp_path / name / "up").symlink_to("..")
        (tmp_path / name / "deep").mkdir()
        (tmp_path / name / "deep" / "home").symlink_to(tmp_path)
    source = image_folder.ImageFolder(str(tmp_path), hold_out=False)
    assert len(source) == 16 and list(source.labels) == [0] * 8 + [1] * 8
    assert len(image_folder.open_folder(str(tmp_path), "x")) == 16


def test_a_linked_class_and_a_linked_image_are_followed(tmp_path):
    write(tmp_path / "elsewhere", 3)
    write(tmp_path / "data" / "boat", 2)
    (tmp_path / "data" / "apple").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "boat" / "link.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    source = image_folder.ImageFolder(str(tmp_path / "data"), hold_out=False)
    assert list(source.labels) == [0] * 3 + [1] * 3


def test_other_kinds_of_files_are_counted_and_all_promised_ones_are_read(tmp_path, capsys):
    for kind, ending in (("PNG", "png"), ("JPEG", "jfif"), ("TIFF", "tif"), ("GIF", "gif"), ("WEBP", "WEBP"), ("BMP", "bmp")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"x.{ending}", kind)
    for name in ("a.heic", "b.heic", "notes.txt", "README"):
        (tmp_path / name).write_bytes(b"x")
    assert len(image_folder.ImageFolder(str(tmp_path), hold_out=False)) == 6
    assert "left out 4 files that are no images (2 .heic, " in capsys.readouterr().err


def test_pipes_are_left_out_by_name(tmp_path, capsys):
    write(tmp_path / "a", 3)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert len(image_folder.ImageFolder(str(tmp_path), hold_out=False)) == 3
    assert "pipe.png" in capsys.readouterr().err


def test_loose_images_beside_classes_are_counted(tmp_path, capsys):
    write(tmp_path / "a", 3), write(tmp_path, 2)
    assert len(image_folder.ImageFolder(str(tmp_path), hold_out=False)) == 3
    assert "left out 2 images beside the class folders" in capsys.readouterr().err


def test_held_out_images_are_announced_and_can_be_switched_off(tmp_path, capsys):
    write(tmp_path / "a", 20), write(tmp_path / "b", 20)
    assert (len(image_folder.ImageFolder(str(tmp_path))), len(image_folder.ImageFolder(str(tmp_path), "eval"))) == (38, 2)
    assert capsys.readouterr().err.count("2 of 40 images are held out") == 1
    assert len(image_folder.ImageFolder(str(tmp_path), hold_out=False)) == 40
    with pytest.raises(errors.UserError, match="config.data.hold_out=False: .* has no evaluation images"):
        image_folder.ImageFolder(str(tmp_path), "eval", hold_out=False)


@pytest.mark.parametrize(
    "line",
    ["../secret.png 0", "/etc/hostname 0", "a/../../b.png 1", "b\0.png 1", "1.png 2147483648", "1.png " + "9" * 5000, "1.png ٣", "1.png -1"],
)
def test_lines_of_a_list_are_checked_one_by_one(tmp_path, line):
    write(tmp_path / "train", 2)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "train.txt").write_text(f"0.png 0\n{line}\n", encoding="utf-8")
    with pytest.raises(errors.UserError, match="train.txt line 2: ") as caught:
        meta_list.MetaList(str(tmp_path))
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_a_list_with_a_byte_order_mark(tmp_path):
    write(tmp_path / "train", 2)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "train.txt").write_bytes(b"\xef\xbb\xbf0.png 0\r\n1.png 1\r\n")
    assert list(meta_list.MetaList(str(tmp_path)).labels) == [0, 1]


def test_a_part_is_one_of_each_stretch(tmp_path):
    for name in "abc":
        write(tmp_path / name, 20)
    nine = part.Part(image_folder.ImageFolder(str(tmp_path), hold_out=False), 9)
    assert np.bincount([nine[i]["label"] for i in range(9)]).tolist() == [3, 3, 3]


# --- fingerprints -------------------------------------------------------------------------------------------------------


def test_a_fingerprint_survives_moving_and_notices_changes(tmp_path):
    splits(tmp_path / "one")
    first = image_folder.ImageFolder(str(tmp_path / "one"))
    os.rename(tmp_path / "one", tmp_path / "two")
    moved = image_folder.ImageFolder(f"{tmp_path / 'two'}/")
    assert first.fingerprint() == moved.fingerprint()
    image = tmp_path / "two" / "train" / "apple" / "0.png"
    data = bytearray(image.read_bytes())
    timed = moved.fingerprint(times=True)
    data[-20] ^= 1
    image.write_bytes(data)  # of the same size
    again = image_folder.ImageFolder(str(tmp_path / "two"))
    assert again.fingerprint() == first.fingerprint() and again.fingerprint(times=True) != timed
    image.write_bytes(data + b"\0")
    assert image_folder.ImageFolder(str(tmp_path / "two")).fingerprint() != first.fingerprint()


def test_a_part_of_a_moved_folder_keeps_its_fingerprint(tmp_path):
    write(tmp_path / "one" / "a", 6), write(tmp_path / "one" / "b", 6)
    before = part.Part(image_folder.ImageFolder(str(tmp_path / "one"), hold_out=False), 4).fingerprint()
    os.rename(tmp_path / "one", tmp_path / "two")
    assert before == part.Part(image_folder.ImageFolder(str(tmp_path / "two"), hold_out=False), 4).fingerprint()


# --- packing ------------------------------------------------------------------------------------------------------------


def test_packing_the_folder_of_a_split_packs_all_of_it(tmp_path):
    splits(tmp_path / "im", train=20, val=20)
    pack.pack(str(tmp_path / "im" / "val"), str(tmp_path / "shards"), "val")
    pack.pack(str(tmp_path / "im" / "train"), str(tmp_path / "shards"), "train")
    pack.pack(str(tmp_path / "im"), str(tmp_path / "both"), "val")
    lengths = [len(array_record.ArrayRecord(str(tmp_path / place), split)) for place, split in
               (("shards", "val"), ("shards", "train"), ("both", "val"))]  # fmt: skip
    assert lengths == [60, 60, 60]


def test_a_damaged_shard_is_named(tmp_path):
    splits(tmp_path / "im")
    pack.pack(str(tmp_path / "im"), str(tmp_path / "shards"), "train", 3)
    shard = tmp_path / "shards" / "train-00001-of-00003.array_record"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(errors.UserError, match="train-00001-of-00003.array_record is damaged"):
        array_record.ArrayRecord(str(tmp_path / "shards"), "train")


# --- unreadable images --------------------------------------------------------------------------------------------------


def damaged(tmp_path):
    splits(tmp_path, train=6)
    image = tmp_path / "train" / "boat" / "1.png"
    image.write_bytes(image.read_bytes()[:300])
    (tmp_path / "train" / "car" / "5.png").write_text("<html>")
    (tmp_path / "val" / "apple" / "0.png").write_bytes(b"")
    return tmp_path


def config_of(path, **changes):
    return pipeline.Config(source="image_folder", path=str(path), **{"threads": 2, "on_unreadable": "skip"} | changes)


def train_images(path, steps=6, **changes):
    config = config_of(path, **changes)
    source = pipeline.open_source(config, "train")
    transform = tasks.image_transform("train", config, 16)
    with pipeline.train_batches(source, transform, seed=3, batch_size=6, start_step=0, config=config) as batches:
        images = [next(batches)["image"] for _ in range(steps)]
        return np.stack(images), batches.skipped


def test_training_replaces_unreadable_images_whatever_reads_them(tmp_path, capsys):
    images, skipped = train_images(damaged(tmp_path))
    for changes in ({"threads": 0}, {"threads": 7}, {"workers": 2}):
        other, also = train_images(tmp_path, **changes)
        np.testing.assert_array_equal(images, other)
        assert also == skipped == {7, 17}
    assert "1.png" in (told := capsys.readouterr().err) and "5.png" in told


def test_training_stops_at_an_unreadable_image_by_default(tmp_path):
    with pytest.raises(errors.UserError, match="cannot decode .*(boat/1.png|car/5.png)"):
        train_images(damaged(tmp_path), on_unreadable="stop")


def test_evaluation_leaves_unreadable_images_out(tmp_path):
    config = config_of(damaged(tmp_path))
    source = pipeline.open_source(config, "eval")
    with pipeline.eval_batches(source, tasks.image_transform("eval", config, 16), batch_size=4, config=config) as batches:
        valid = np.concatenate([batch["valid"] for batch in batches])
        assert valid.tolist() == [False] + [True] * 5 + [False] * 2 and batches.skipped == {0}


def test_nothing_readable_at_all_is_one_line(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(8):
            (tmp_path / name / f"{i}.png").write_text("text")
    with pytest.raises(errors.UserError, match="no example of .* can be read"):
        train_images(tmp_path)


def test_the_check_reads_everything_and_lists_what_is_wrong(tmp_path, capsys):
    damaged(tmp_path)
    (tmp_path / "val" / "car" / "1.png").write_bytes((tmp_path / "train" / "car" / "0.png").read_bytes())
    fields = dict(data__source="image_folder", data__path=str(tmp_path))
    made = program.create(programs.config("demo_judge", **fields, model__net__num_classes=3))
    with pytest.raises(SystemExit) as ended:
        check.check(made)
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 2 and lines[-1] == "24 images read, 4 problems"
    for name in ("train/boat/1.png", "train/car/5.png", "val/apple/0.png", "val/car/1.png is in both splits"):
        assert any(name in line for line in lines), name
    for bad in ("train/boat/1.png", "train/car/5.png", "val/apple/0.png", "val/car/1.png"):
        (tmp_path / bad).unlink()
    check.check(made.__class__(made.config, made.task, made.mesh, made.params))
    assert capsys.readouterr().out.splitlines()[-1] == "20 images read, 0 problems"


def test_links_to_themselves_and_to_folders_above_bring_nothing(tmp_path):
    write(tmp_path / "other", 3)
    for name in ("apple", "boat"):
        write(tmp_path / "data" / name, 4)
    (tmp_path / "data" / "apple" / "me").symlink_to("me")
    (tmp_path / "data" / "loop").symlink_to("loop")
    (tmp_path / "data" / "boat" / "above").symlink_to(tmp_path)
    source = image_folder.ImageFolder(str(tmp_path / "data"), hold_out=False)
    assert source.classes == ("apple", "boat") and len(source) == 8


def test_a_folder_of_pipes_is_no_class_and_a_deep_one_is(tmp_path):
    for name in ("a", "c"):
        write(tmp_path / name, 2)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "0.png")
    deep = os.path.join(str(tmp_path / "deep"), *["d"] * 400)
    os.makedirs(deep)
    Image.new("RGB", (4, 4)).save(os.path.join(deep, "0.png"))
    assert image_folder.ImageFolder(str(tmp_path), hold_out=False).classes == ("a", "c", "deep")


@pytest.mark.parametrize("names", [("Train", "Validation"), ("training", "test")])
def test_splits_of_other_names_are_pointed_at(tmp_path, names):
    for name in names:
        write(tmp_path / name / "a", 2)
    with pytest.raises(errors.UserError, match="set config.data.train_split and config.data.eval_split"):
        image_folder.ImageFolder(str(tmp_path))


def test_packing_refuses_negative_shards_and_takes_any_file_name(tmp_path):
    splits(tmp_path / "im")
    with pytest.raises(errors.UserError, match="--shards=-1"):
        pack.pack(str(tmp_path / "im"), str(tmp_path / "shards"), num_shards=-1)
    image = os.fsencode(tmp_path / "im" / "train" / "apple" / "0.png")
    os.rename(image, image[:-5] + b"\xff.png")
    pack.pack(str(tmp_path / "im"), str(tmp_path / "shards"))
    records = array_record.ArrayRecord(str(tmp_path / "shards"))
    assert any("udcff" in records[i]["path"] for i in range(len(records)))


@pytest.mark.parametrize("text", ['{"a": 1}', '["a", "a"]', '[1]', "", '"abc"'])
def test_the_names_beside_shards_are_a_list_of_different_names(tmp_path, text):
    pack.pack(str(splits(tmp_path / "im")), str(tmp_path / "shards"))
    (tmp_path / "shards" / "train-classes.json").write_text(text)
    with pytest.raises(errors.UserError, match="train-classes.json"):
        array_record.ArrayRecord(str(tmp_path / "shards"))


def test_a_part_larger_than_the_whole_and_a_file_without_names(tmp_path):
    with pytest.raises(errors.UserError, match="fewer than the 9 asked for"):
        part.Part(image_folder.ImageFolder(str(write(tmp_path / "x", 4)), hold_out=False), 9)
    (tmp_path / "names").write_text("\n\n")
    with pytest.raises(errors.UserError, match="holds no names"):
        class_names.read(str(tmp_path / "names"))
