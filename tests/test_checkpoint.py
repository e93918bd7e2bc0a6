"""Checkpoints: bit-exact, never silently wrong, never lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from addp_jax import errors, files, parameters
from addp_jax.weights import checkpoint, lock, manifest, provenance

IDENTITY = {"model": {"width": 8, "depth": 2}, "seed": 0, "teacher": "0123456789abcdef"}
KILLS = 3
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@flax.struct.dataclass
class TrainState:
    step: Any
    params: Any
    opt_state: Any
    ema_params: Any


def mesh(shape):
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def sharded(abstract, shape):
    """Abstract arrays with matrices split over both axes of a mesh of this shape."""
    def spec(leaf):
        names = jax.sharding.PartitionSpec("data", "fsdp") if len(leaf.shape) == 2 else jax.sharding.PartitionSpec()
        sharding = jax.sharding.NamedSharding(mesh(shape), names)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(spec, abstract)


def make_state(step, ema=True, width=8):
    kernel = jnp.arange(8 * width, dtype=jnp.float32).reshape(8, width) / 7 + step
    params = {"encoder": {"kernel": kernel, "bias": jnp.full((width,), step, jnp.bfloat16)}}
    moving = jax.tree.map(lambda leaf: leaf + 1, params) if ema else None
    return TrainState(jnp.asarray(step, jnp.int32), params, OPTIMIZER.init(params), moving)


def abstract_state(shape=(8, 1), **options):
    return sharded(jax.eval_shape(lambda: make_state(0, **options)), shape)


def open_run(workdir, identity=IDENTITY, **config):
    return checkpoint.Checkpointer(workdir, checkpoint.Config(**config), identity)


def write_run(workdir, steps, **config):
    run = open_run(workdir, **config)
    for step in steps:
        run.save(step, make_state(step))
    run.close()


def restore(workdir, **options):
    run = open_run(workdir)
    try:
        return run.restore_latest(abstract_state(**options))
    finally:
        run.close()


def folders(workdir):
    return sorted(entry.name for entry in (workdir / "checkpoints").iterdir() if entry.is_dir())


def largest_file(folder):
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != manifest.NAME]
    return max(files, key=lambda file: file.stat().st_size)


def flip_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("ema", [True, False])
def test_state_restores_bit_exactly_onto_another_mesh(tmp_path, ema):
    state = make_state(3, ema=ema)
    placed = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract_state((8, 1), ema=ema)))
    run = open_run(tmp_path)
    assert run.restore_latest(abstract_state(ema=ema)) is None
    run.save(3, placed)
    run.close()
    wanted = abstract_state((2, 4), ema=ema)
    restored, step = open_run(tmp_path).restore_latest(wanted)
    assert step == 3
    assert_equal(restored, state)
    assert restored.params["encoder"]["kernel"].sharding == wanted.params["encoder"]["kernel"].sharding


def test_donating_the_state_after_save_does_not_change_what_is_saved(tmp_path):
    run = open_run(tmp_path)
    state = make_state(1)
    run.save(1, state)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state))
    run.close()
    assert_equal(restore(tmp_path)[0], make_state(1))


def test_newest_and_every_nth_are_kept(tmp_path):
    write_run(tmp_path, range(1, 8), keep=2, keep_every=3)
    assert folders(tmp_path) == ["3", "6", "7"]


def test_saving_a_saved_step_changes_nothing(tmp_path):
    write_run(tmp_path, [4])
    before = (tmp_path / "checkpoints/4" / manifest.NAME).read_text()
    run = open_run(tmp_path)
    run.save(4, make_state(9))
    run.close()
    assert (tmp_path / "checkpoints/4" / manifest.NAME).read_text() == before
    assert_equal(restore(tmp_path)[0], make_state(4))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, words", [(flip_byte, "hash differs"), (truncate, "instead of"), (os.remove, "missing")]
)
def test_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, capsys, damage, words):
    write_run(tmp_path, [5, 7])
    damage(largest_file(tmp_path / "checkpoints/7"))
    state, step = restore(tmp_path)
    assert step == 5
    assert_equal(state, make_state(5))
    message = capsys.readouterr().err
    assert str(tmp_path / "checkpoints/7") in message and words in message
    assert "going on from step 5" in message and message.count("\n") == 1
    assert folders(tmp_path) == ["5", "7.damaged"]


def test_damaged_step_can_be_saved_again(tmp_path):
    write_run(tmp_path, [5, 7])
    for copies in (1, 2):
        flip_byte(largest_file(tmp_path / "checkpoints/7"))
        run = open_run(tmp_path)
        assert run.restore_latest(abstract_state())[1] == 5
        run.save(7, make_state(7))
        run.close()
        assert_equal(restore(tmp_path)[0], make_state(7))
        assert len(folders(tmp_path)) == 2 + copies


def test_every_file_of_a_checkpoint_is_guarded(tmp_path, capsys):
    write_run(tmp_path / "run", [5, 7])
    names = [file.relative_to(tmp_path / "run") for file in (tmp_path / "run/checkpoints/7").rglob("*")]
    names = [name for name in names if (tmp_path / "run" / name).stat().st_size and (tmp_path / "run" / name).is_file()]
    for name in names:
        flip_byte(tmp_path / "run" / name)
        assert checkpoint.load_params(tmp_path / "run", ema=False)[1]["step"] == 5, name
        flip_byte(tmp_path / "run" / name)
    assert checkpoint.load_params(tmp_path / "run", ema=False)[1]["step"] == 7


def test_step_killed_before_its_hashing_is_accepted_if_it_restores(tmp_path):
    write_run(tmp_path, [5, 7])
    (tmp_path / "checkpoints/7" / manifest.NAME).unlink()
    assert restore(tmp_path)[1] == 7
    shutil.rmtree(tmp_path / "checkpoints/7/state/d")
    shutil.rmtree(tmp_path / "checkpoints/7/state/ocdbt.process_0")
    assert restore(tmp_path)[1] == 5


def test_all_damaged_stops_the_run_and_never_starts_over_silently(tmp_path):
    write_run(tmp_path, [5])
    flip_byte(largest_file(tmp_path / "checkpoints/5"))
    for _ in range(2):
        with pytest.raises(errors.UserError, match="all checkpoints in .*checkpoints are damaged"):
            restore(tmp_path)
    assert folders(tmp_path) == ["5.damaged"]


def test_empty_folder_and_leftovers_of_a_killed_save_do_no_harm(tmp_path, capsys):
    write_run(tmp_path, [5])
    (tmp_path / "checkpoints/7").mkdir()
    (tmp_path / "checkpoints/6.orbax-checkpoint-tmp/state").mkdir(parents=True)
    run = open_run(tmp_path)
    assert run.restore_latest(abstract_state())[1] == 5
    assert "7 is damaged (folder state is missing)" in capsys.readouterr().err
    run.save(7, make_state(7))
    run.close()
    assert folders(tmp_path) == ["5", "7", "7.damaged"]
    assert restore(tmp_path)[1] == 7


def test_intact_checkpoint_is_never_set_aside_for_another_failure(tmp_path, monkeypatch):
    write_run(tmp_path, [5, 7])
    run = open_run(tmp_path)

    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", out_of_memory)
    with pytest.raises(errors.UserError, match="checkpoints/7 cannot be used: out of memory"):
        run.restore_latest(abstract_state())
    assert folders(tmp_path) == ["5", "7"]


def test_another_configs_run_is_refused_with_the_fields_that_differ(tmp_path):
    write_run(tmp_path, [1])
    other = {"model": {"width": 16, "depth": 2}, "seed": 0, "extra": None}
    with pytest.raises(errors.UserError) as caught:
        open_run(tmp_path, identity=other)
    message = str(caught.value)
    assert "model.width was 8, is 16" in message and "extra was 'absent', is None" in message
    assert "teacher was '0123456789abcdef', is 'absent'" in message
    assert "depth" not in message and "workdir" in message
    with pytest.raises(errors.UserError, match="and 5 more"):
        open_run(tmp_path, identity={**IDENTITY, **{f"field{i}": i for i in range(10)}})


def test_work_directory_without_checkpoints_takes_a_new_identity(tmp_path):
    open_run(tmp_path).close()
    open_run(tmp_path, identity={"shape": (1, 2)}).close()
    assert json.loads((tmp_path / "checkpoints" / provenance.NAME).read_text()) == {"shape": [1, 2]}


@pytest.mark.parametrize(
    "options, words",
    [({"width": 16}, r"params/encoder/kernel is float32\[8, 8\], expected float32\[8, 16\]"),
     ({"ema": False}, r"ema_params/encoder/kernel float32\[8, 8\] is not expected")],
)
def test_state_of_other_shapes_is_refused_by_leaf(tmp_path, options, words):
    write_run(tmp_path, [1])
    with pytest.raises(errors.UserError, match=words):
        restore(tmp_path, **options)
    assert folders(tmp_path) == ["1"]


def test_unwritable_work_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="workdir: cannot write to .*/file/run"):
        open_run(tmp_path / "file" / "run")
    with pytest.raises(errors.UserError, match="gs://bucket/run is a URL"):
        open_run("gs://bucket/run")


def test_read_only_work_directory_is_named(small_disk):
    if subprocess.run(["mount", "-o", "remount,ro", small_disk], capture_output=True).returncode:
        pytest.skip("remounting is not permitted")
    with pytest.raises(errors.UserError, match=f"workdir: cannot write to {small_disk}"):
        open_run(small_disk)


@pytest.mark.parametrize("fields", [{"keep": 0}, {"every": 0}, {"keep_every": -1}])
def test_config_that_would_keep_nothing_is_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: .*; use at least"):
        checkpoint.Config(**fields)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here (needs root)")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, leave):
    """Takes all of the disk but `leave` bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(b"x" * max(0, free - leave))


@pytest.mark.parametrize("leave", [0, 8_000, 30_000, 150_000, 280_000])
def test_full_disk_is_one_clear_error_and_loses_no_checkpoint(small_disk, leave):
    def state(step):
        values = np.random.default_rng(step).standard_normal(65_536, np.float32)
        return {"params": {"kernel": jnp.asarray(values)}, "step": jnp.asarray(step)}

    run = open_run(small_disk, keep=1)
    run.save(1, state(1))
    run.wait()
    fill(small_disk, leave)
    with pytest.raises(errors.UserError, match="no space left on .*the last good checkpoint is step [12]$") as caught:
        run.save(2, state(2))
        run.wait()
    assert caught.value.status == 75
    last = int(str(caught.value)[-1])
    assert last == 1 or leave == 280_000  # with space for the data but not the hashes 2 may be committed
    assert str(last) in folders(small_disk)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))
    (small_disk / "filler").unlink()
    restored, step = run.restore_latest(abstract)
    assert step == last
    assert_equal(restored, state(step))
    run.save(3, state(3))  # space was made: the same run can go on
    run.close()
    assert folders(small_disk) == ["3"]


KILLED = """
import os, sys, threading
import jax, jax.numpy as jnp
from addp_jax.weights import checkpoint
run = checkpoint.Checkpointer(sys.argv[1], checkpoint.Config(), {})
make = lambda step: {"params": [jnp.full((50_000,), step * 0.5) for _ in range(6)]}
abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), make(0))
found = run.restore_latest(abstract)
state, begin = found or (make(0), 0)
step = begin
assert all((leaf == step * 0.5).all() for leaf in state["params"]), step
print(step, flush=True)
while len(sys.argv) == 3:
    step += 1
    run.save(step, make(step))
    if step == begin + 2:  # the one before is written, however slow the machine is
        threading.Timer(float(sys.argv[2]), lambda: os.kill(os.getpid(), 9)).start()
os._exit(0)
"""


def spawn(code, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.medium
def test_run_killed_while_saving_always_restores_a_consistent_state(tmp_path):
    reached = []
    for seconds in np.random.default_rng().uniform(0.1, 0.6, KILLS):
        killed = spawn(KILLED, tmp_path, seconds)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        reached.append(int(killed.stdout))
    final = spawn(KILLED, tmp_path, 60, "only restore")
    assert final.returncode == 0, final.stderr
    reached.append(int(final.stdout))
    assert reached == sorted(reached) and reached[0] == 0 and reached[-1] > 2


def test_parameters_of_a_run_load_as_numpy_without_its_optimizer(tmp_path):
    write_run(tmp_path, [5, 7])
    wanted = jax.tree.map(np.asarray, make_state(7).params)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/7"):
        params, info = checkpoint.load_params(path, ema=False)
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
        assert_equal(params, wanted)
        assert info == {
            "path": str(tmp_path / "checkpoints/7"), "step": 7, "ema": False, "identity": IDENTITY
        }
    averaged, info = checkpoint.load_params(tmp_path / "checkpoints/5", ema=True)
    assert info["step"] == 5 and info["ema"]
    assert_equal(averaged, jax.tree.map(np.asarray, make_state(5).ema_params))


def test_parameters_saved_on_eight_devices_load_on_one(tmp_path):
    run = open_run(tmp_path)
    run.save(2, jax.device_put(make_state(2), jax.tree.map(lambda leaf: leaf.sharding, abstract_state((8, 1)))))
    run.close()
    code = """
import sys, jax
from addp_jax import parameters; from addp_jax.weights import checkpoint
assert jax.device_count() == 1
print(parameters.content_hash(checkpoint.load_params(sys.argv[1], ema=False)[0]))
"""
    loaded = spawn(code, tmp_path)
    assert loaded.stdout.strip() == parameters.content_hash(make_state(2).params), loaded.stderr
    assert loaded.stderr == ""


def test_loading_parameters_changes_nothing_and_skips_damaged_steps(tmp_path, capsys):
    write_run(tmp_path, [5, 7])
    flip_byte(largest_file(tmp_path / "checkpoints/7"))
    assert checkpoint.load_params(tmp_path, ema=True)[1]["step"] == 5
    assert "checkpoints/7 is damaged" in capsys.readouterr().err
    assert folders(tmp_path) == ["5", "7"]
    with pytest.raises(errors.UserError, match="all checkpoints in .*/7 are damaged"):
        checkpoint.load_params(tmp_path / "checkpoints/7", ema=True)


def test_path_without_checkpoint_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(errors.UserError, match=f"no checkpoint in {path}"):
            checkpoint.load_params(path, ema=False)


def test_imported_parameters_read_back_and_are_not_overwritten(tmp_path):
    params = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.float32([1, 2])}
    checkpoint.save_params(tmp_path, params, {"source": "weights.pth"})
    loaded, info = checkpoint.load_params(tmp_path, ema=True)
    assert_equal(loaded, params)
    assert (info["step"], info["ema"], info["identity"]) == (0, False, {"source": "weights.pth"})
    with pytest.raises(errors.UserError, match="already holds checkpoints"):
        checkpoint.save_params(tmp_path, params, {"source": "weights.pth"})


def test_console_stays_quiet_but_for_our_own_messages(tmp_path, capfd):
    write_run(tmp_path, [1, 2])
    restore(tmp_path)
    checkpoint.load_params(tmp_path, ema=True)
    assert capfd.readouterr() == ("", "")


def step_of(workdir, step=7):
    return workdir / "checkpoints" / str(step)


@pytest.mark.parametrize("text", ["", "{", "3", "null", "[]", "[" * 100_000, "\0" * 50])
def test_unreadable_identity_is_taken_from_the_newest_step(tmp_path, capsys, text):
    write_run(tmp_path, [5, 7])
    root = tmp_path / "checkpoints"
    (root / provenance.NAME).write_text(text)
    assert checkpoint.load_params(tmp_path, ema=True)[1]["identity"] == IDENTITY
    with pytest.raises(errors.UserError, match="of another run .seed was 0, is 1.;"):
        open_run(tmp_path, identity=IDENTITY | {"seed": 1})
    assert restore(tmp_path)[1] == 7
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{root / provenance.NAME} cannot be used" in message
    assert json.loads((root / provenance.NAME).read_text()) == IDENTITY


def remove_copies(workdir):
    """As a run leaves them that was saved before steps had a copy."""
    for folder in (workdir / "checkpoints").glob("[0-9]*"):
        (folder / provenance.NAME).unlink()
        manifest.write_manifest(folder)


@pytest.mark.parametrize("text", ["", "3", "[" * 100_000])
def test_unreadable_identity_without_a_copy_says_what_to_do(tmp_path, capsys, text):
    write_run(tmp_path, [7])
    remove_copies(tmp_path)
    path = tmp_path / "checkpoints" / provenance.NAME
    assert checkpoint.load_params(tmp_path, ema=True)[1]["identity"] == IDENTITY
    path.write_text(text)
    for use in (restore, lambda workdir: checkpoint.load_params(workdir, ema=True)):
        with pytest.raises(errors.UserError, match=f"^cannot read {path} .*put back a copy of it, or delete it .*$"):
            use(tmp_path)
    path.unlink()
    assert restore(tmp_path)[1] == 7 and json.loads(path.read_text()) == IDENTITY
    assert "not known: taken for those of this config" in capsys.readouterr().err


def test_a_flipped_letter_in_the_identity_is_noticed(tmp_path):
    write_run(tmp_path, [5, 7])
    path = tmp_path / "checkpoints" / provenance.NAME
    path.write_text(path.read_text().replace("0123", "0133"))
    assert checkpoint.load_params(tmp_path, ema=True)[1]["identity"] == IDENTITY
    assert restore(tmp_path)[1] == 7 and json.loads(path.read_text()) == IDENTITY
    copy = step_of(tmp_path) / provenance.NAME
    copy.write_text(copy.read_text().replace("0123", "0133"))
    assert checkpoint.load_params(tmp_path, ema=True)[1]["step"] == 5


def test_nothing_but_the_data_is_left(tmp_path):
    write_run(tmp_path, [7])
    (tmp_path / "checkpoints" / provenance.NAME).write_text("")
    (step_of(tmp_path) / manifest.NAME).write_text("")
    state, step = restore(tmp_path)
    assert step == 7
    assert_equal(state, make_state(7))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/etc/hostname", path), lambda path: path.write_text("x")])
@pytest.mark.parametrize("where", ["state/d/x", "x"])
def test_what_orbax_did_not_write_is_damage(tmp_path, capsys, make, where):
    write_run(tmp_path, [5, 7])
    make(step_of(tmp_path) / where)
    assert checkpoint.load_params(tmp_path, ema=True)[1]["step"] == 5
    assert restore(tmp_path)[1] == 5
    assert "7 is damaged (file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["007", "\u0663", "-5", "notes.txt", "7.damaged"])
def test_other_entries_are_left_alone(tmp_path, name):
    write_run(tmp_path, [5])
    (tmp_path / "checkpoints" / name).mkdir()
    run = open_run(tmp_path)
    assert run.restore_latest(abstract_state())[1] == 5
    run.save(7, make_state(7))
    run.close()
    assert folders(tmp_path) == sorted(["5", "7", name])


def test_a_file_or_pipe_in_a_steps_place_is_set_aside(tmp_path):
    write_run(tmp_path, [5])
    (tmp_path / "checkpoints/9").write_text("")
    os.mkfifo(tmp_path / "checkpoints/8")
    assert restore(tmp_path)[1] == 5
    assert {"9.damaged", "8.damaged"} < set(os.listdir(tmp_path / "checkpoints"))


def test_a_damaged_step_never_replaces_one_that_was_set_aside(tmp_path):
    write_run(tmp_path, [5, 7])
    (tmp_path / "checkpoints/7.damaged1").mkdir()
    (tmp_path / "checkpoints/7.damaged").mkdir()
    flip_byte(largest_file(step_of(tmp_path)))
    assert restore(tmp_path)[1] == 5
    assert folders(tmp_path) == ["5", "7.damaged", "7.damaged1", "7.damaged2"]


def break_metadata(folder):
    (folder / "state/_METADATA").write_text("{}")


def empty_ocdbt(folder):
    (folder / "state/manifest.ocdbt").write_text("")


def deep_metadata(folder):
    (folder / "state/_METADATA").write_text("[" * 100_000)


@pytest.mark.parametrize("damage", [break_metadata, empty_ocdbt, deep_metadata])
def test_a_state_that_agrees_with_its_manifest_and_cannot_be_read_is_one_line(tmp_path, damage):
    write_run(tmp_path, [5, 7])
    damage(step_of(tmp_path))
    entries = json.loads((step_of(tmp_path) / manifest.NAME).read_text())
    for name in entries:
        data = (step_of(tmp_path) / name).read_bytes()
        entries[name] = [len(data), manifest._digest(data)]
    (step_of(tmp_path) / manifest.NAME).write_text(json.dumps(entries))
    for use in (restore, lambda workdir: checkpoint.load_params(workdir, ema=True)):
        with pytest.raises(errors.UserError, match=f"^{step_of(tmp_path)} cannot be used: .*$"):
            use(tmp_path)
    (step_of(tmp_path) / manifest.NAME).unlink()
    assert restore(tmp_path)[1] == 5


def test_a_step_without_manifest_says_that_its_metadata_cannot_be_read(tmp_path):
    write_run(tmp_path, [7])
    (step_of(tmp_path) / manifest.NAME).unlink()
    empty_ocdbt(step_of(tmp_path))
    code = """
import sys
from addp_jax import errors; from addp_jax.weights import checkpoint
try:
    checkpoint.load_params(sys.argv[1], ema=True)
except errors.UserError as error:
    print(error)
"""
    for _ in range(3):
        result = spawn(code, tmp_path)
        assert result.stderr == f"checkpoint {step_of(tmp_path)} is damaged (its metadata cannot be read); not used\n"
        assert result.stdout == f"all checkpoints in {tmp_path} are damaged\n"


def test_small_files_that_tell_of_large_arrays_are_refused(tmp_path, monkeypatch):
    write_run(tmp_path, [7])
    monkeypatch.setattr(manifest, "EXPANSION", 0)
    assert checkpoint.load_params(tmp_path, ema=True)[1]["step"] == 7  # arrays of zeros need no files
    monkeypatch.setattr(manifest, "ZEROS", 100)
    with pytest.raises(errors.UserError, match="cannot be used: its metadata tell of .* bytes of arrays in .* bytes of files"):
        checkpoint.load_params(tmp_path, ema=True)


def test_foreign_parameters_are_one_line(tmp_path):
    run = open_run(tmp_path)
    run.save(1, {"weights": jnp.ones(3)})
    run.close()
    with pytest.raises(errors.UserError, match="checkpoints/1 cannot be used: it holds no params"):
        checkpoint.load_params(tmp_path, ema=True)


def test_saving_parameters_is_refused_while_a_run_is_at_work(tmp_path):
    with lock.hold(tmp_path), pytest.raises(errors.UserError, match="a run is at work here"):
        checkpoint.save_params(tmp_path, {"a": np.ones(2, np.float32)}, {})
    checkpoint.save_params(tmp_path, {"a": np.ones(2, np.float32)}, {})
    assert os.listdir(tmp_path) == ["checkpoints"]


FULL = """
import os, sys, jax.numpy as jnp, numpy as np
from addp_jax import errors; from addp_jax.weights import checkpoint
def state(step):
    return {"params": [jnp.asarray(np.random.default_rng(step * 100 + i).standard_normal(4000, np.float32)) for i in range(60)]}
run = checkpoint.Checkpointer(sys.argv[1], checkpoint.Config(keep=1), {})
run.save(1, state(1))
run.wait()
free = os.statvfs(sys.argv[1]).f_bavail * os.statvfs(sys.argv[1]).f_frsize
open(sys.argv[1] + "/filler", "wb").write(b"x" * max(0, free - 300_000))
try:
    run.save(2, state(2))
    run.close()
except errors.UserError as error:
    print(error)
"""


def test_no_library_traceback_stands_before_the_line_about_a_full_disk(small_disk):
    result = spawn(FULL, small_disk)
    assert result.stdout.endswith("the last good checkpoint is step 1\n") and result.stderr == ""


@pytest.mark.parametrize("name", [provenance.NAME, manifest.NAME])
def test_full_disk_while_the_last_files_are_written_is_the_same_line(tmp_path, monkeypatch, name):
    run, write = open_run(tmp_path), files.write_text
    run.save(1, make_state(1))
    run.wait()

    def full(path, text):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(errors.UserError, match="checkpoint 2: no space left on .*the last good checkpoint is step 2$"):
        run.save(2, make_state(2))
        run.wait()
    monkeypatch.undo()
    assert run.restore_latest(abstract_state())[1] == 2
    run.close()


def test_differences_name_fields_and_shorten_lists():
    names = [f"class {i}" for i in range(1000)]
    old = {"a": {"b": 1, "c": names, "d": names, "e": [1, 2]}, "x": {}}
    new = {"a": {"b": 2, "c": names[1:] + ["dog"], "d": names[::-1], "e": [1, 3]}, "x": {"y": "\x1b"}}
    assert provenance.differences(old, new) == [
        "a.b was 1, is 2",
        """a.c was a list of 1000, is one of 1000 (added "dog", removed "class 0")""",
        "a.d was a list of 1000, is one of 1000 (in another order)",
        "a.e was [1, 2], is [1, 3]",
        "x was {}, is 'absent'",
        "x.y was 'absent', is '\\x1b'",
    ]
    deep = {}
    for _ in range(900):
        deep = {"a": deep}
    assert provenance.differences(old, old) == [] and len(provenance.differences(deep, {})) == 1


def test_hashing_does_not_hold_up_the_loop(tmp_path, monkeypatch):
    hashing, write = [], manifest.write_manifest

    def slow(folder, stop):
        hashing.append("begun")
        time.sleep(0.5)
        write(folder)
        hashing.append("done")

    monkeypatch.setattr(manifest, "write_manifest", slow)
    run = open_run(tmp_path)
    run.save(1, make_state(1))
    assert "done" not in hashing
    run.close()
    assert hashing == ["begun", "done"] and (tmp_path / "checkpoints/1" / manifest.NAME).exists()
