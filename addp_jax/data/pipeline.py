"""Global order, augmentation, per-process rows, batches, prefetch.

Batch n is a function of (source, seed, n) alone: nothing of the pipeline needs to be saved, and the number of
processes, workers and threads may change between runs.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import grain
import jax
import numpy as np

from addp_jax import errors, schema
from addp_jax.data import part, sources, walk

Transform = Callable[[dict, np.random.Generator], dict]


@schema.config
class Config:
    """Where the examples come from and how they are read."""

    source: str = schema.field("shapes", tiny="shapes")  # a file in addp_jax/data/sources
    # Folder; array_record: or a glob of shards; tfds: its data_dir. The content matters to a run, not the place.
    path: str = schema.field("", matters=schema.NOTHING, tiny="")
    name: str = ""  # tfds: name of the data set, such as imagenet2012
    train_split: str = schema.field("train", matters=schema.NOTHING)  # sub-folder, list or tfds split
    eval_split: str = schema.field("val", matters=schema.NOTHING)
    # Examples used, spread evenly over the source: every class keeps its share; 0 = all (shapes: 50,000 and 2,000).
    num_train: int = schema.field(0, least=0, tiny=64)
    num_eval: int = schema.field(0, least=0, matters=schema.NOTHING, tiny=16)
    hold_out: bool = True  # of an image folder without splits, keep one image in twenty for evaluation
    # stop with the file's name | skip: take the next readable image (evaluation: leave it out), and say so
    on_unreadable: str = schema.field("stop", choices=("stop", "skip"), matters=schema.NOTHING)
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random resized crop (release: main_pretrain.py)
    flip: bool = True  # horizontally, half of the training images
    max_objects: int = schema.field(1, least=1)  # shapes: objects per picture
    plain: bool = False  # shapes: large, upright, one of four colours, on grey
    # label_maps and what is made from shapes, see `data.segmentation.Labels`.
    ignored_label: int = schema.field(255, least=0, most=255)  # pixels of no class
    shift_labels: bool = False  # 0 = other, ignored; k = class k - 1
    # File with one class name per line, in the order of the labels; "" = as the source knows them.
    class_names: str = schema.field("", matters=schema.NOTHING)
    workers: int = schema.field(0, least=0, matters=schema.NOTHING)  # processes that decode; 0 = threads only
    threads: int = schema.field(2, least=0, matters=schema.NOTHING, tiny=1)  # that read, per process
    prefetch: int = schema.field(4, least=0, matters=schema.NOTHING)  # batches held ready

    def __post_init__(self):
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: {self.crop_scale}; use two rising fractions")


def open_source(config: Config, split: str, image_size: int = 64) -> sources.Source:
    """The examples of a split, "train" or "eval"; a `Part` of the source where the config asks for fewer.

    image_size: side in pixels of generated images; files have their own. Raises UserError: too few, or as the source.
    """
    source = sources.open_split(config, split, image_size)
    size = config.num_train if split == "train" else config.num_eval
    if size > len(source):
        raise errors.UserError(f"config.data.num_{split} = {size}, but {source!r} has fewer; use 0 for all")
    return part.Part(source, size) if 0 < size < len(source) else source


def train_batches(
    source, transform: Transform, *, seed: int, batch_size: int, start_step: int, config: Config,
    rows: np.ndarray | None = None, fields: Iterable[str] | None = None,
) -> "Batches":  # fmt: skip
    """An endless iterator of this process's rows of batch start_step, start_step + 1...: arrays [number of rows, ...].

    Examples are shuffled anew in every epoch. Shuffling and random transforms belong to the global order: the rows of
    all processes, put in their places, are the batch that a single process would have had.

    Args:
      transform: (example, rng) -> dict of arrays of fixed shapes.
      seed: of the order and the augmentation.
      batch_size: examples in a global batch.
      config: workers, threads and prefetch are read.
      rows: those of every batch that this process reads (`partition.rows`); None = all.
      fields: of an example that a batch keeps; None = all.
    Raises UserError: fewer examples than a batch; while iterating, an image that cannot be read, with its name.
    """
    if len(source) < batch_size:
        raise errors.UserError(
            f"config.data.path: {source!r} has {len(source)} examples, fewer than config.batch_size = {batch_size}; "
            "lower config.batch_size or add images"
        )
    source, transform = _reading(source, transform, config)
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None).random_map(transform)
    return _iterate(_Rows(examples, batch_size, rows, fields), config, start_step)


def eval_batches(
    source, transform: Transform, *, batch_size: int, config: Config,
    rows: np.ndarray | None = None, fields: Iterable[str] | None = None,
) -> "Batches":  # fmt: skip
    """Every example once, in index order, with "valid": bool [B], False = padding.

    The last batch is filled up by repeating the last example, so that all batches have one shape and all processes have
    as many. Arguments, result and errors as for `train_batches`.
    """
    count = len(source)
    source, transform = _reading(source, transform, config)
    padded = _Padded(source, -(-count // batch_size) * batch_size)
    examples = grain.MapDataset.source(padded).seed(0).random_map(transform)
    examples = examples.map_with_index(_MarkValid(count))
    return _iterate(_Rows(examples, batch_size, rows, fields), config, 0)


def one_by_one(
    source, transform: Transform, *, config: Config, share: tuple[int, int], fields: Iterable[str]
) -> Iterator[dict]:
    """Every example of a share once, with "valid"; their sizes may differ.

    share: (number, count) of those that several processes have. All have as many examples: "valid" is False for one
    that fills up. Other arguments and errors as for `eval_batches`.
    """
    number, count = share
    rows = np.array([number])
    with eval_batches(source, transform, batch_size=count, config=config, rows=rows, fields=fields) as batches:
        for batch in batches:
            yield {name: values[0] for name, values in batch.items()}


@dataclasses.dataclass(frozen=True)
class _Padded:
    source: object
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        return self.source[min(int(i), len(self.source) - 1)]


@dataclasses.dataclass(frozen=True)
class _MarkValid:
    num_examples: int

    def __call__(self, index: int, example: dict) -> dict:
        return {**example, VALID: np.bool_(index < self.num_examples and example.get(SKIPPED, NONE) == NONE)}


VALID = "valid"  # in an example of an evaluation: False = padding, or it could not be read
SKIPPED = "skipped"  # in an example: the position of the unreadable one that it replaces, or NONE
NONE = np.int32(-1)


def _reading(source, transform: Transform, config: Config):
    """`source` and `transform`, or with on_unreadable="skip" those that replace an example that cannot be read."""
    if config.on_unreadable == "stop":
        return source, transform
    return range(len(source)), _Replacing(source, transform)


@dataclasses.dataclass(frozen=True)
class _Replacing:
    """`transform` of the example at a position, or of the next readable one after it, which then says so."""

    source: object
    transform: Transform

    def __call__(self, position: int, rng: np.random.Generator) -> dict:
        state = rng.bit_generator.state
        for offset in range(len(self.source)):
            try:
                example = self.transform(self.source[(position + offset) % len(self.source)], rng)
            except errors.Unreadable as error:
                rng.bit_generator.state = state
                walk.say(f"skipped: {error}")
                continue
            return {**example, SKIPPED: np.int32(position) if offset else NONE}
        raise errors.UserError(f"config.data.path: no example of {self.source!r} can be read")


class _Rows:
    """One process's rows of batch after batch: row r of a batch is the same example for any process count."""

    def __init__(self, examples, batch_size: int, rows: np.ndarray | None, fields: Iterable[str] | None):
        self.examples, self.batch_size = examples, batch_size
        self.rows = np.arange(batch_size) if rows is None else rows
        self.fields = None if fields is None else tuple(fields)

    def __len__(self) -> int:
        return len(self.examples) // self.batch_size * len(self.rows)

    def __getitem__(self, i: int) -> dict:
        batch, row = divmod(int(i), len(self.rows))
        example = self.examples[batch * self.batch_size + int(self.rows[row])]
        if self.fields is None:
            return example
        if missing := [name for name in self.fields if name not in example]:
            lacking = " and no ".join(missing)
            raise errors.UserError(f"config.data.source: its examples have no {lacking}, which this task reads")
        return {name: example[name] for name in (*self.fields, VALID, SKIPPED) if name in example}


def _iterate(rows: _Rows, config: Config, start_step: int) -> "Batches":
    # Batching before the split over workers: otherwise their number changes the batches.
    batches = grain.MapDataset.source(rows).batch(len(rows.rows), drop_remainder=True)[start_step:]
    prefetch = max(config.prefetch, config.threads)
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=prefetch))
    if config.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=1))
    return Batches(iter(batches))


class Batches(Iterator):
    """An iterator of batches that must be closed: close() ends threads and workers. Also a context manager.

    An error ends it, and a `UserError` from a thread or a worker process arrives as such.
    """

    def __init__(self, iterator):
        self._iterator = iterator
        self.skipped = set()  # positions of the examples so far that could not be read and were replaced

    def __next__(self) -> dict:
        try:
            # A copy of what workers send: a worker's arrays live in shared memory that outlives neither it nor close().
            batch = {name: x if type(x) is np.ndarray else np.array(x) for name, x in next(self._iterator).items()}
        except StopIteration:
            raise
        except Exception as error:
            self.close()
            raise _cause(error)
        skipped = batch.pop(SKIPPED, NONE)
        self.skipped.update(skipped[skipped != NONE].tolist())
        return batch

    def close(self):
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_):
        self.close()


def _cause(error: BaseException) -> BaseException:
    """The UserError behind an exception, or the exception itself."""
    cause = error
    while cause is not None and not isinstance(cause, errors.UserError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def to_device(batches: Iterable[dict], sharding: jax.sharding.NamedSharding, depth: int = 2) -> Iterator[dict]:
    """Yields dicts of global arrays [B, ...], moved to the devices ahead of their use.

    Args:
      batches: dicts of arrays [rows of this process, ...]; closed with the generator.
      sharding: of the leading axis.
      depth: batches on the devices at a time, at least 1.
    """
    ready = collections.deque()
    try:
        for batch in batches:
            ready.append({name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()})
            if len(ready) >= depth:
                yield ready.popleft()
        while ready:
            yield ready.popleft()
    finally:
        getattr(batches, "close", lambda: None)()
