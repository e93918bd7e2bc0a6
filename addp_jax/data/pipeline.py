"""Global order, augmentation, per-process rows, batches, prefetch.

Batch n is a function of (source, seed, n) alone: nothing of the pipeline needs to be saved, and the number of
processes, workers and threads may change between runs.
"""

import collections
import concurrent.futures
import dataclasses
import functools
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

    # What the examples are is told by their fingerprint; the same ones may come from another place.
    source: str = schema.field("shapes", matters=schema.NOTHING, tiny="shapes")  # a file in addp_jax/data/sources
    # Folder; array_record: or a glob of shards; tfds: its data_dir.
    path: str = schema.field("", matters=schema.NOTHING, tiny="")
    # array_record: folder on a disk of this host to which the shards are copied first; "" = read where they are.
    stage: str = schema.field("", matters=schema.NOTHING, tiny="")
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
    # shapes: plain (large, upright, one of four colours, on grey) | full (bright on quiet backgrounds) | textured (any
    # pose, six hues, textures everywhere, distractors, occlusion)
    shapes: str = schema.field("full", choices=("plain", "full", "textured"))
    # label_maps and what is made from shapes, see `data.segmentation.Labels`.
    ignored_label: int = schema.field(255, least=0, most=255)  # pixels of no class
    shift_labels: bool = False  # 0 = other, ignored; k = class k - 1
    # File with one class name per line, in the order of the labels; "" = as the source knows them.
    class_names: str = schema.field("", matters=schema.NOTHING)
    workers: int = schema.field(0, least=0, matters=schema.NOTHING)  # processes that decode; 0 = threads only
    threads: int = schema.field(2, least=0, matters=schema.NOTHING, tiny=1)  # that make batches, per process
    # Examples read at a time, per process or worker: many where a read waits long, as from a bucket.
    reads: int = schema.field(1, least=1, matters=schema.NOTHING, tiny=1)
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
      config: workers, threads, reads, prefetch and on_unreadable are read.
      rows: those of every batch that this process reads (`partition.rows`); None = all.
      fields: of an example that a batch keeps; None = all.
    Raises UserError: fewer examples than a batch; while iterating, an image that cannot be read, with its name.
    """
    if len(source) < batch_size:
        raise errors.UserError(
            f"config.data.path: {source!r} has {len(source)} examples, fewer than config.batch_size = {batch_size}; "
            "lower config.batch_size or add images"
        )
    drawn = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None).random_map(_with_state)
    return _iterate(_Rows(drawn, _Examples(source, transform, config), batch_size, rows, fields), config, start_step)


def eval_batches(
    source, transform: Transform, *, batch_size: int, config: Config,
    rows: np.ndarray | None = None, fields: Iterable[str] | None = None,
) -> "Batches":  # fmt: skip
    """Every example once, in index order, with "valid": bool [B], False = padding.

    The last batch is filled up by repeating the last example, so that all batches have one shape and all processes have
    as many. Arguments, result and errors as for `train_batches`.
    """
    padded = -(-len(source) // batch_size) * batch_size
    drawn = grain.MapDataset.range(padded).seed(0).random_map(_with_state)
    return _iterate(_Rows(drawn, _Evaluated(source, transform, config), batch_size, rows, fields), config, 0)


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


VALID = "valid"  # in an example of an evaluation: False = padding, or it could not be read
SKIPPED = "skipped"  # in an example: the position of the unreadable one that it replaces, or NONE
NONE = np.int32(-1)


def _with_state(position: int, rng: np.random.Generator):
    """What an example is made from: its position, and where its random numbers begin. grain lends `rng` only now."""
    return position, (type(rng.bit_generator), rng.bit_generator.state)


@dataclasses.dataclass(frozen=True)
class _Examples:
    """Examples of a source by their position: read, then transformed.

    With `config.on_unreadable="skip"` the next readable one takes the place of one that is not, and says so.
    """

    source: object
    transform: Transform
    config: Config

    def read(self, position: int) -> dict | errors.Unreadable:
        try:
            return self.source[position]
        except errors.Unreadable as error:
            return error

    def example(self, position: int, found: dict | errors.Unreadable, state) -> dict:
        """From what `read` found at `position` and a state of `_with_state`. Raises Unreadable if it is not skipped."""
        skips, count = self.config.on_unreadable == "skip", len(self.source)
        for offset in range(count):
            at = (position + offset) % count
            try:
                example = self._transformed(self.read(at) if offset else found, state)
            except errors.Unreadable as error:
                if not skips:
                    raise
                walk.say(f"skipped: {error}")
                continue
            return {**example, SKIPPED: np.int32(position) if offset else NONE} if skips else example
        raise errors.UserError(f"config.data.path: no example of {self.source!r} can be read")

    def _transformed(self, found: dict | errors.Unreadable, state) -> dict:
        if isinstance(found, errors.Unreadable):
            raise found
        kind, start = state
        generator = kind(0)
        generator.state = start
        return self.transform(found, np.random.Generator(generator))


class _Evaluated(_Examples):
    """The last example fills up; "valid" says which ones count."""

    def read(self, position: int) -> dict | errors.Unreadable:
        return super().read(min(position, len(self.source) - 1))

    def example(self, position: int, found: dict | errors.Unreadable, state) -> dict:
        example = super().example(min(position, len(self.source) - 1), found, state)
        return {**example, VALID: np.bool_(position < len(self.source) and example.get(SKIPPED, NONE) == NONE)}


@functools.cache
def _readers(count: int) -> concurrent.futures.ThreadPoolExecutor:
    """The threads of this process that read."""
    return concurrent.futures.ThreadPoolExecutor(count, "read")


class _Rows:
    """One process's rows of batch after batch: row r of a batch is the same example for any process count."""

    def __init__(self, drawn, examples: _Examples, batch_size: int, rows, fields):
        """drawn: of `_with_state`, in the global order; the others as for `train_batches`."""
        self.drawn, self.examples, self.batch_size = drawn, examples, batch_size
        self.rows = np.arange(batch_size) if rows is None else rows
        self.fields = None if fields is None else tuple(fields)

    def __len__(self) -> int:
        return len(self.drawn) // self.batch_size

    def __getitem__(self, batch: int) -> dict:
        drawn = [self.drawn[int(batch) * self.batch_size + int(row)] for row in self.rows]
        reads = self.examples.config.reads
        found = (_readers(reads).map if reads > 1 else map)(self.examples.read, [position for position, _ in drawn])
        rows = [self._kept(self.examples.example(position, one, state)) for (position, state), one in zip(drawn, found)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _kept(self, example: dict) -> dict:
        if self.fields is None:
            return example
        if missing := [name for name in self.fields if name not in example]:
            lacking = " and no ".join(missing)
            raise errors.UserError(f"config.data.source: its examples have no {lacking}, which this task reads")
        return {name: example[name] for name in (*self.fields, VALID, SKIPPED) if name in example}


def _iterate(rows: _Rows, config: Config, start_step: int) -> "Batches":
    # Whole batches are split over workers: otherwise their number would change the batches.
    batches = grain.MapDataset.source(rows)[start_step:]
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
