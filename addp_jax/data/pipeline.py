"""Global order, augmentation, per-process rows, batches, prefetch.

Batch n is a function of (source, seed, n) alone: nothing of the pipeline needs
to be saved, and the number of processes, workers and threads may change
between runs.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import grain
import jax
import numpy as np

from addp_jax import errors, files, schema
from addp_jax.data import prepared, shapes, sources, walk

Transform = Callable[[dict, np.random.Generator], dict]

_SHAPES_SEED = {"train": 0, "eval": 1}
_SHAPES_SIZE = {"train": 50_000, "eval": 2_000}


@dataclasses.dataclass(frozen=True)
class Config:
    """config.data: where the images come from and how they are read.

    Attributes:
      source: "shapes", "image_folder", "meta_list", "array_record" or "tfds".
      path: the image folder, the folder or glob of array_record shards, or the
        TFDS data_dir.
      name: TFDS data set, e.g. "imagenet2012".
      train_split: sub-folder, list or TFDS split to train on.
      eval_split: the same for evaluation.
      num_train: examples to train on; 0 = all (shapes: 50,000). A part is spread
        evenly over the source, so every class keeps its share.
      num_eval: the same for evaluation; 0 = all (shapes: 2,000).
      crop_scale: range of the random crop's area, fraction of the image.
      hold_out: of an image folder without splits, keep a part for evaluation.
      on_unreadable: "stop" ends with the file's name; "skip" takes the next
        readable image instead (evaluation: leaves it out) and says which.
      flip: mirror half of the training images.
      max_objects: objects per picture, shapes only.
      plain: the easiest pictures, shapes only.
      class_names: file with one class name per line, in the order of the
        labels; "" = the names that the source knows.
      workers: worker processes; 0 = threads only.
      threads: reader threads in each process; 0 = none.
      prefetch: batches held ready in each process.
    """

    source: str = "shapes"
    # Where the data lies does not matter to a run: its content does (`sources.fingerprint`).
    path: str = schema.field("", matters=schema.NOTHING)
    name: str = ""
    train_split: str = schema.field("train", matters=schema.NOTHING)
    eval_split: str = schema.field("val", matters=schema.NOTHING)
    num_train: int = schema.field(0, least=0)
    num_eval: int = schema.field(0, least=0, matters=schema.NOTHING)
    hold_out: bool = True
    on_unreadable: str = schema.field("stop", matters=schema.NOTHING)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    max_objects: int = 1
    plain: bool = False
    class_names: str = schema.field("", matters=schema.NOTHING)
    workers: int = schema.field(0, least=0, matters=schema.NOTHING)
    threads: int = schema.field(2, least=0, matters=schema.NOTHING)
    prefetch: int = schema.field(4, least=0, matters=schema.NOTHING)

    def __post_init__(self):
        if self.on_unreadable not in ("stop", "skip"):
            raise errors.UserError(f"config.data.on_unreadable: {self.on_unreadable!r}; use stop or skip")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise errors.UserError(f"config.data.crop_scale = {self.crop_scale} must be two rising fractions")
        if self.max_objects < 1:
            raise errors.UserError(f"config.data.max_objects = {self.max_objects} must be at least 1")


def open_source(config: Config, split: str, image_size: int = 64):
    """The source of one split.

    Args:
      config: where the images are.
      split: "train" or "eval".
      image_size: side in pixels of the generated shapes; other sources ignore it.

    Raises:
      UserError: unknown source, or what the source raises.
    """
    wanted = config.num_train if split == "train" else config.num_eval
    if config.source == "shapes":
        size = wanted or _SHAPES_SIZE[split]
        return shapes.Shapes(size, _SHAPES_SEED[split], image_size, config.max_objects, config.plain)
    source = _open_files(config, split)
    if wanted > len(source):
        raise errors.UserError(f"config.data.num_{split} = {wanted}, but {source!r} has fewer; use 0 for all")
    return Part(source, wanted) if wanted else source


def _open_files(config: Config, split: str):
    name = config.train_split if split == "train" else config.eval_split
    if config.source == "tfds":
        return prepared.Tfds(config.name, name, config.path)
    if config.source not in ("image_folder", "meta_list", "array_record"):
        raise errors.UserError(
            f"config.data.source = {config.source!r}; choose shapes, image_folder, meta_list, array_record or tfds"
        )
    if not config.path:
        raise errors.UserError(f"config.data.path is empty; config.data.source={config.source} reads from it")
    if config.source == "image_folder":
        return sources.ImageFolder(config.path, split, config.train_split, config.eval_split, config.hold_out)
    return (sources.MetaList if config.source == "meta_list" else prepared.ArrayRecord)(config.path, name)


def class_names(path: str) -> tuple[str, ...]:
    """The names in the file config.data.class_names, one per line in the order of the labels.

    Raises UserError naming the file and the line: it cannot be read, a line is empty, or a name comes twice.
    """
    try:
        lines = [line.strip() for line in files.read_lines(path)]
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"config.data.class_names: cannot read {path}: {files.reason(error)}") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise errors.UserError(f"config.data.class_names: {path} holds no names")
    first = {}
    for number, name in enumerate(lines, 1):
        if not name or not name.isprintable():
            raise errors.UserError(f"config.data.class_names: {path} line {number}: {name!r} is no name of a class")
        if first.setdefault(name, number) != number:
            raise errors.UserError(f"config.data.class_names: {path} line {number}: {name!r} stands in line {first[name]} already")
    return tuple(lines)


class Part:
    """`size` examples spread over a source: one of each of as many equal stretches, since files are sorted by class; which
    one of it is drawn (always the same), since the classes of generated shapes take turns.
    """

    def __init__(self, source, size: int):
        if size > len(source):
            raise errors.UserError(f"{source!r} has {len(source)} examples, fewer than the {size} asked for")
        self.source, self.size, self.classes = source, size, source.classes
        self._chosen = spread(len(source), size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        return self.source[int(self._chosen[i])]

    def __repr__(self) -> str:
        return f"Part({self.source!r}, {self.size})"

    def fingerprint(self, times: bool = False) -> str:
        return f"{self.size} of {sources.fingerprint(self.source, times)}"


def spread(total: int, size: int) -> np.ndarray:
    """Which `size` of `total` examples stand for all: one of each of as many equal stretches, always the same, rising."""
    edges = np.arange(size + 1) * total // size
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def train_batches(
    source,
    transform: Transform,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    config: Config,
    rows: np.ndarray | None = None,
) -> "Batches":
    """An endless iterator of this process's rows of batch start_step, start_step + 1, ...

    Examples are shuffled anew in every epoch. Shuffling and random transforms
    belong to the global order, so the rows of all processes, put in their
    places, are the batch that a single process would have had.

    Args:
      source: random-access source.
      transform: (example, rng) -> dict of arrays of fixed shapes.
      seed: of the order and the augmentation.
      batch_size: examples in a global batch.
      start_step: the first batch wanted.
      config: workers, threads and prefetch are read.
      rows: those of every batch that this process reads (`partition.rows`);
        None = all.

    Returns:
      Batches of dicts of arrays [number of rows, ...]. Call its close() when
      done.

    Raises:
      UserError: fewer examples than a batch; while iterating, an image that cannot be read, with its name.
    """
    if len(source) < batch_size:
        raise errors.UserError(
            f"config.data.path: {source!r} has {len(source)} examples, fewer than config.batch_size = {batch_size}; "
            "lower config.batch_size or add images"
        )
    source, transform = _reading(source, transform, config)
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None).random_map(transform)
    return _iterate(_Rows(examples, batch_size, rows), config, start_step)


def eval_batches(
    source,
    transform: Transform,
    *,
    batch_size: int,
    config: Config,
    rows: np.ndarray | None = None,
) -> "Batches":
    """Every example once, in index order, with "valid": bool [B], False = padding.

    The last batch is filled up by repeating the last example, so that all
    batches have one shape and all processes have as many. Arguments, result and
    errors as for `train_batches`.
    """
    count = len(source)
    source, transform = _reading(source, transform, config)
    padded = _Padded(source, -(-count // batch_size) * batch_size)
    examples = grain.MapDataset.source(padded).seed(0).random_map(transform)
    examples = examples.map_with_index(_MarkValid(count))
    return _iterate(_Rows(examples, batch_size, rows), config, 0)


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
        return {**example, "valid": np.bool_(index < self.num_examples and example.get(SKIPPED, NONE) == NONE)}


SKIPPED = "skipped"  # in an example: the position of the unreadable one that it replaces, or NONE
NONE = np.int32(-1)


def _reading(source, transform: Transform, config: Config):
    """`source` and `transform`, or with on_unreadable="skip" those that replace an example that cannot be read."""
    if config.on_unreadable == "stop":
        return source, transform
    return _Positions(len(source)), _Replacing(source, transform)


@dataclasses.dataclass(frozen=True)
class _Positions:
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> int:
        return int(i)


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

    def __init__(self, examples, batch_size: int, rows: np.ndarray | None):
        self.examples, self.batch_size = examples, batch_size
        self.rows = np.arange(batch_size) if rows is None else rows

    def __len__(self) -> int:
        return len(self.examples) // self.batch_size * len(self.rows)

    def __getitem__(self, i: int) -> dict:
        batch, row = divmod(int(i), len(self.rows))
        return self.examples[batch * self.batch_size + int(self.rows[row])]


def _iterate(rows: _Rows, config: Config, start_step: int) -> "Batches":
    # Batching before the split over workers: otherwise their number changes the batches.
    batches = grain.MapDataset.source(rows).batch(len(rows.rows), drop_remainder=True)[start_step:]
    prefetch = max(config.prefetch, config.threads)
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=prefetch))
    if config.workers:
        options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options)
    return Batches(iter(batches))


class Batches(Iterator):
    """An iterator of batches that must be closed: close() ends threads and workers.

    Also a context manager. An error ends it, and a `UserError` from a thread or
    a worker process arrives as such.
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
    """Moves host batches to the devices `depth` batches ahead of their use.

    Args:
      batches: dicts of arrays [rows of this process, ...]; closed with the generator.
      sharding: of the leading axis.
      depth: batches on the devices at a time, at least 1.

    Yields:
      Dicts of global arrays [B, ...].
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
