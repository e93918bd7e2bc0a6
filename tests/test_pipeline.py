"""Order, resume, process and worker counts, padding, device transfer."""

import dataclasses
import multiprocessing
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from addp_jax import errors, schema
from addp_jax.data import part, pipeline, sources, transforms
from addp_jax.data.sources import shapes

CONFIG = pipeline.Config()


class Numbers(sources.Source):
    """Example i is the number i."""

    classes, labelled = (), True

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"number": np.int32(i)}

    def __repr__(self):
        return f"Numbers({self.size})"


@dataclasses.dataclass(frozen=True)
class Draw:
    """Keeps the number and adds a random one, as an augmentation would."""

    def __call__(self, example, rng):
        return {**example, "draw": rng.random()}


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


def train(count, size=50, batch_size=8, start_step=0, seed=3, config=CONFIG, rows=None):
    batches = pipeline.train_batches(
        Numbers(size),
        Draw(),
        seed=seed,
        batch_size=batch_size,
        start_step=start_step,
        config=config,
        rows=rows,
    )
    return take(batches, count)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# The rows of a batch of 8 by process: in blocks, and as the hosts of a TPU slice may have them.
SHARES = ([range(8)], [range(4), range(4, 8)], [[0, 1, 4, 5], [2, 3, 6, 7]], [[0, 1], [4, 5], [2, 3], [6, 7]])


def joined(parts, shares):
    """The batches that the processes have together, from the list of each one's."""
    order = np.argsort(np.concatenate(shares))
    return [{name: np.concatenate([part[name] for part in step])[order] for name in step[0]} for step in zip(*parts)]


@pytest.mark.parametrize("shares", SHARES[1:])
def test_global_batches_are_the_same_for_any_process_count(shares):
    parts = [train(12, rows=np.array(rows)) for rows in shares]
    assert all(len(part[0]["number"]) == len(rows) for part, rows in zip(parts, shares))
    assert_same(train(12), joined(parts, shares))


def test_processes_draw_different_random_numbers():
    draws = [train(6, rows=np.array(rows)) for rows in SHARES[1]]
    first, second = (np.concatenate([batch["draw"] for batch in part]) for part in draws)
    assert not set(first) & set(second)


def test_resume_at_step_n_equals_the_undisturbed_run():
    assert_same(train(15)[9:], train(6, start_step=9))


def test_every_epoch_holds_every_example_once_in_a_new_order():
    numbers = np.concatenate([batch["number"] for batch in train(12, size=48)])
    first, second = numbers[:48], numbers[48:]
    assert sorted(first) == sorted(second) == list(range(48))
    assert list(first) != list(second) and list(first) != sorted(first)


def test_augmentation_differs_between_epochs_and_seeds():
    draws = np.concatenate([batch["draw"] for batch in train(12, size=48)])
    assert len(set(draws)) == 96
    assert not np.array_equal(train(1)[0]["number"], train(1, seed=4)[0]["number"])


@pytest.mark.parametrize("threads, prefetch", [(0, 0), (0, 2), (4, 1)])
def test_threads_and_prefetch_do_not_change_the_batches(threads, prefetch):
    assert_same(train(10), train(10, config=pipeline.Config(threads=threads, prefetch=prefetch)))


@pytest.mark.medium
class Waiting(Numbers):
    """Counts how many examples are being read."""

    def __init__(self, size):
        super().__init__(size)
        self.barrier = threading.Barrier(8, timeout=60)

    def __getitem__(self, i):
        self.barrier.wait()  # of eight reads none goes on before the others have begun
        return super().__getitem__(i)


def test_reads_of_a_batch_wait_together_and_do_not_change_it():
    config = dataclasses.replace(CONFIG, reads=8, threads=1)
    batches = pipeline.train_batches(Waiting(50), Draw(), seed=3, batch_size=8, start_step=0, config=config)
    assert_same(take(batches, 7), train(7))


def test_worker_processes_do_not_change_the_batches():
    config = pipeline.Config(workers=2)
    assert_same(train(7, start_step=4), train(7, start_step=4, config=config))


def test_worker_processes_end_when_closed():
    before = set(multiprocessing.active_children())
    batches = pipeline.train_batches(
        Numbers(20), Draw(), seed=0, batch_size=4, start_step=0, config=pipeline.Config(workers=1)
    )
    next(batches)
    assert set(multiprocessing.active_children()) - before
    batches.close()
    assert not set(multiprocessing.active_children()) - before


def test_too_few_examples_for_a_batch_names_what_to_change():
    with pytest.raises(errors.UserError, match=r"config.data.path.*7 examples.*config.batch_size = 8"):
        train(1, size=7)


def evaluate(size, batch_size, shares=(None,), config=CONFIG):
    parts = []
    for rows in shares:
        with pipeline.eval_batches(
            Numbers(size), Draw(), batch_size=batch_size, config=config, rows=None if rows is None else np.array(rows)
        ) as batches:
            parts.append(list(batches))
    return parts


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("size", [1, 3, 8, 13, 16])
def test_eval_covers_every_example_exactly_once(size, shares):
    parts = evaluate(size, 8, shares)
    assert {len(part) for part in parts} == {-(-size // 8)}
    batches = joined(parts, shares)
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert valid.dtype == bool and len(valid) == -(-size // 8) * 8
    assert np.concatenate([batch["number"] for batch in batches])[valid].tolist() == list(range(size))


@pytest.mark.medium
def test_eval_with_worker_processes_is_the_same():
    assert_same(evaluate(13, 4)[0], evaluate(13, 4, config=pipeline.Config(workers=2))[0])


def write_images(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg")


def test_image_folder_end_to_end(tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        write_images(tmp_path / split / "cat", count)
        write_images(tmp_path / split / "dog", count)
    config = pipeline.Config(source="image_folder", path=str(tmp_path))
    source = pipeline.open_source(config, "train")
    [batch] = take(
        pipeline.train_batches(
            source, transforms.train_image(16), seed=0, batch_size=12, start_step=0, config=config
        ),
        1,
    )
    assert batch["image"].shape == (12, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert sorted(batch["label"]) == [0] * 6 + [1] * 6
    assert len(pipeline.open_source(config, "eval")) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_file_is_named_by_a_user_error(tmp_path, workers):
    write_images(tmp_path / "train" / "cat", 4)
    (tmp_path / "train" / "cat" / "broken.jpg").write_bytes(b"nothing")
    config = pipeline.Config(source="image_folder", path=str(tmp_path), eval_split="train", workers=workers)
    batches = pipeline.train_batches(
        pipeline.open_source(config, "train"),
        transforms.train_image(16),
        seed=0,
        batch_size=5,
        start_step=0,
        config=config,
    )
    with pytest.raises(errors.UserError, match="broken.jpg"), batches:
        next(batches)


def test_user_error_is_found_behind_other_exceptions():
    def wrapped():
        try:
            raise errors.UserError("cat.jpg")
        except errors.UserError as error:
            raise RuntimeError("in a thread") from error
        yield

    with pytest.raises(errors.UserError, match="cat.jpg"):
        next(pipeline.Batches(wrapped()))


def test_errors_of_the_program_stay_what_they_are():
    def broken():
        raise KeyError("label")
        yield

    with pytest.raises(KeyError):
        next(pipeline.Batches(broken()))


def test_part_of_a_source_keeps_every_class(tmp_path):
    for name in ("cat", "dog", "eel"):
        write_images(tmp_path / "train" / name, 4)
    config = pipeline.Config(source="image_folder", path=str(tmp_path), eval_split="train", num_train=6)
    source = pipeline.open_source(config, "train")
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(errors.UserError, match="config.data.num_train = 13"):
        pipeline.open_source(dataclasses.replace(config, num_train=13), "train")


@pytest.mark.parametrize("size", [80, 250, 333])
def test_part_of_a_source_whose_classes_take_turns_keeps_every_class(size):
    source = shapes.Shapes(1000, 0, 8)
    some = part.Part(source, size)
    chosen = [int(some[i]["index"]) for i in range(size)]
    assert sorted(set(chosen)) == chosen
    counts = np.bincount([int(some[i]["label"]) for i in range(size)], minlength=len(source.classes))
    assert counts.min() > size / len(source.classes) / 3


def test_the_part_that_is_the_whole_is_the_source():
    whole = part.Part(Numbers(17), 17)
    assert [int(whole[i]["number"]) for i in range(17)] == list(range(17))


def test_shapes_splits_are_disjoint():
    config = pipeline.Config(num_train=20, num_eval=10)
    train_source, eval_source = (pipeline.open_source(config, split, 16) for split in ("train", "eval"))
    assert len(train_source) == 20 and len(eval_source) == 10
    seen = {train_source[i]["image"].tobytes() for i in range(20)}
    assert len(seen) == 20
    assert not seen & {eval_source[i]["image"].tobytes() for i in range(10)}


def test_shapes_have_a_default_size_and_the_wanted_image_size():
    source = pipeline.open_source(pipeline.Config(max_objects=3), "train", 16)
    assert isinstance(source, shapes.Shapes) and len(source) > 1000
    assert source[0]["image"].shape == (16, 16, 3) and source[0]["boxes"].shape == (3, 4)


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"source": "imagefolder"}, "config.data.source = 'imagefolder'; choose array_record, coco, image_folder"),
        ({"source": "image_folder"}, "config.data.path is empty"),
        ({"num_train": -1}, "config.data.num_train: -1; use at least 0"),
        ({"workers": -1}, "config.data.workers: -1; use at least 0"),
        ({"on_unreadable": "ignore"}, "config.data.on_unreadable: 'ignore'; use stop or skip"),
        ({"crop_scale": (0.5, 0.2)}, "config.data.crop_scale"),
        ({"max_objects": 0}, "config.data.max_objects"),
    ],
)
def test_wrong_fields_are_named(fields, match):
    with pytest.raises(errors.UserError, match=match):
        pipeline.open_source(schema.build(pipeline.Config, fields, "config.data"), "train")


def device_sharding():
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_to_device_keeps_values_and_order(depth):
    host = [{"image": np.full((8, 2, 2, 3), i, np.uint8), "label": np.arange(8, dtype=np.int32)} for i in range(4)]
    moved = list(pipeline.to_device(iter(host), device_sharding(), depth))
    assert_same(host, [jax.tree.map(np.asarray, batch) for batch in moved])
    assert moved[0]["image"].sharding.is_equivalent_to(device_sharding(), 4)
    assert moved[0]["image"].dtype == np.uint8


def test_to_device_reads_ahead_by_depth_and_no_more():
    taken = []

    def host():
        for i in range(10):
            taken.append(i)
            yield {"label": np.full(4, i, np.int32)}

    batches = pipeline.to_device(host(), device_sharding(), depth=3)
    next(batches)
    assert taken == [0, 1, 2]
    batches.close()


def test_closing_to_device_closes_the_host_batches():
    class Closable:
        closed = False

        def __iter__(self):
            return iter([{"label": np.zeros(4, np.int32)}] * 5)

        def close(self):
            self.closed = True

    host = Closable()
    batches = pipeline.to_device(host, device_sharding())
    next(batches)
    batches.close()
    assert host.closed
