"""The mesh, the table of parameter layouts, and that no layout changes a number."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from addp_jax import errors, partition, program, schema
from addp_jax.codecs import vqgan
from addp_jax.models import discriminator, pixel_to_token, token_predictor, vit
from addp_jax.tasks import addp

CUBE = AbstractMesh((2, 2, 2), partition.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
LOSS = 1e-6
GRADIENT = 1e-5
PARAMETERS = 1e-6  # absolute, after one step whose learning rate is 3e-4
LARGE = 2**20  # elements; a transformer matrix of this size must be split
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


@functools.cache
def shapes(name: str, arg: str = "") -> dict:
    """{path: shape} of every parameter of every network of an ADDP config, and of a discriminator."""
    task = addp.Task(schema.build(addp.Config, programs.fields(name, arg).model.to_dict(), "config.model"), jnp.float32)
    size = task.config.tokenizer.image_size

    def init(rng):
        return {
            "pixel_to_token": pixel_to_token.init(task.net, rng),
            "token_predictor": token_predictor.init(task.predictor, rng),
            "tokenizer": vqgan.init(task.tokenizer, rng),
            "discriminator": discriminator.init(discriminator.Discriminator(discriminator.Config()), rng, size),
        }

    tree = jax.eval_shape(init, jax.random.key(0))
    return {partition.path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- mesh -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, expected",
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, -1), (1, 2, 4)), ((4, 2, 1), (4, 2, 1)), ((8, 1, -1), (8, 1, 1)),
     ((-1, -2, 1), (4, 2, 1)), ((-1, -16, 1), (1, 8, 1)), ((-1, -12, 1), (2, 4, 1))],
)
def test_one_size_may_be_left_open(sizes, expected):
    mesh = partition.make_mesh(partition.Config(*sizes))
    assert mesh.axis_names == partition.MESH_AXES and tuple(mesh.shape.values()) == expected
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 256])
def test_as_many_as_divide_sixteen_are_taken_of_what_tensor_leaves(devices, tensor, monkeypatch):
    """The mesh of the published configs, with tensor parallelism beside it."""
    monkeypatch.setattr(partition, "_grid", lambda sizes, devices: np.reshape(jax.devices() * 32, -1)[: len(devices)].reshape(sizes))
    monkeypatch.setattr(partition, "Mesh", lambda grid, axes, axis_types: dict(zip(axes, grid.shape)))
    config = partition.Config(-1, -16, tensor)
    if devices % tensor:
        with pytest.raises(errors.UserError, match=f"tensor={tensor} does not multiply to the {devices} devices"):
            partition.make_mesh(config, [None] * devices)
        return
    fsdp = math.gcd(devices // tensor, 16)
    assert partition.make_mesh(config, [None] * devices) == {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize("sizes, expected", [((2, -16, 1), (2, 4, 1)), ((1, -16, -1), (1, 8, 1)), ((2, -2, -1), (2, 2, 2)), ((-1, -16, 2), (1, 4, 2))])
def test_data_is_taken_first_as_well(sizes, expected):
    assert tuple(partition.make_mesh(partition.Config(*sizes)).shape.values()) == expected


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (3, -1, 1), (2, 2, 1), (16, 1, 1), (0, -1, 1), (0, 8, 1), (-2, -4, 1), (-1, -16, 3), (16, -16, 1), (-1, -16, -2)])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(errors.UserError, match="config.mesh: data=.* the 8 devices present"):
        partition.make_mesh(partition.Config(*sizes))


def test_every_device_is_used_once():
    mesh = partition.make_mesh(partition.Config(2, 2, 2))
    assert set(mesh.devices.flat) == set(jax.devices())


# --- names and layouts ----------------------------------------------------------------------------


def test_names_become_mesh_axes():
    assert partition.spec("batch", "length", "embed") == P(("data", "fsdp"), None, None)
    assert partition.spec("layers", "width", "heads") == P(None, "fsdp", "tensor")
    assert partition.spec(None, "mlp") == P(None, "tensor")


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="lenght"):
        partition.spec("batch", "lenght")
    with pytest.raises(KeyError, match="lenght"):
        partition.constrain(jnp.zeros((8, 2)), "batch", "lenght")


@pytest.mark.parametrize("names", [("heads", "mlp"), ("width", "width"), ("batch", "width")])
def test_a_mesh_axis_used_twice_is_an_error(names):
    with pytest.raises(ValueError, match="twice"):
        partition.spec(*names)


def test_chosen_rows_are_gathered_without_the_others(monkeypatch):
    """As from several processes, which see parts of the array only."""
    mesh = partition.make_mesh(partition.Config(data=2, fsdp=4))
    array = np.random.default_rng(0).integers(0, 256, (128, 5, 3), np.uint8)
    rows = [127, 3, 3, 64, 0] + list(range(70))
    with jax.set_mesh(mesh):
        placed = jax.device_put(array, partition.batch_sharding(mesh))
        text = partition._chosen.lower(placed, np.zeros(partition.CHOSEN_AT_ONCE, int)).compile().as_text()
        assert "all-reduce" in text and "all-gather" not in text

        class Spread:  # an array whose rows are not all here
            is_fully_addressable = False

        monkeypatch.setattr(partition, "_chosen", lambda _, at, own=partition._chosen: own(placed, at))
        np.testing.assert_array_equal(partition.chosen(Spread(), rows), array[rows])
    np.testing.assert_array_equal(partition.chosen(placed, rows), array[rows])


def test_constrain_needs_a_name_for_each_dimension():
    with pytest.raises(ValueError, match="2 axis names"):
        partition.constrain(jnp.zeros((8, 2, 2)), "batch", "length")


def test_constrain_does_nothing_without_a_mesh():
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        array = jnp.zeros((8, 2))
        assert partition.constrain(array, "batch", "length") is array


def test_constrain_splits_the_batch_over_data_and_fsdp():
    mesh = partition.make_mesh(partition.Config(2, 2, 2))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda array: partition.constrain(array, "batch", "length"))(jnp.arange(16.0).reshape(8, 2))
    assert out.sharding.is_equivalent_to(partition.batch_sharding(mesh), 2)
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, 2)}


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(ValueError, match="no entry for /net/surprise"):
        partition.shardings({"net": {"surprise": np.zeros((4, 4))}}, CUBE, vit.LAYOUT)


def test_a_row_of_another_rank_is_an_error():
    with pytest.raises(ValueError, match="names 1 axes.*the shape is"):
        partition.shardings({"net": {"class_token": np.zeros((1, 4))}}, CUBE, vit.LAYOUT)


def test_a_dimension_that_does_not_divide_names_the_mesh_and_the_parameter():
    with pytest.raises(errors.UserError, match="config.mesh: /token_embed has 7 along 'width', not divisible by fsdp=2"):
        partition.shardings({"token_embed": np.zeros((5, 7))}, CUBE, token_predictor.LAYOUT)


def test_scalars_are_replicated():
    assert partition.shardings({"count": np.zeros(())}, CUBE, ())["count"].spec == P()


LAYOUTS = {
    "pixel_to_token": pixel_to_token.LAYOUT, "token_predictor": token_predictor.LAYOUT, "tokenizer": vqgan.LAYOUT,
    "discriminator": discriminator.LAYOUT,
}  # fmt: skip


def layout_of(path: str):
    return LAYOUTS[path.split("/")[0]]


@pytest.mark.parametrize("name", ["vitb", "vitl"])
def test_every_parameter_of_full_size_has_one_row_that_fits(name):
    for path, shape in shapes(name).items():
        partition.parameter_spec("/" + path, shape, CUBE, layout_of(path))
        rows = [names for pattern, names in layout_of(path) if re.fullmatch(pattern, "/" + path)]
        assert [len(names) for names in rows].count(len(shape)) == 1, path


@pytest.mark.parametrize("name", ["vitb", "vitl"])
def test_no_large_transformer_parameter_is_replicated(name):
    for path, shape in shapes(name).items():
        if path.startswith(("pixel_to_token", "token_predictor")) and np.prod(shape) >= LARGE:
            assert "fsdp" in partition.parameter_spec("/" + path, shape, CUBE, layout_of(path)), path


@pytest.mark.parametrize("network", LAYOUTS)
def test_every_row_of_a_layout_is_of_use(network):
    paths = ["/" + path for path in shapes("vitb") if path.startswith(network)]
    used = {next(pattern for pattern, _ in LAYOUTS[network] if re.fullmatch(pattern, path)) for path in paths}
    assert used == {pattern for pattern, _ in LAYOUTS[network]}


@pytest.mark.parametrize("name, platform, dtype", [("auto", "cpu", "float32"), ("bfloat16", "cpu", "bfloat16")])
def test_the_dtype_of_the_computation(name, platform, dtype):
    assert partition.compute_dtype(name, partition.make_mesh(partition.Config())) == jnp.dtype(dtype)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(errors.UserError, match="config.dtype: 'float16'"):
        partition.compute_dtype("float16", partition.make_mesh(partition.Config()))


# --- the same numbers on every mesh ---------------------------------------------------------------


@pytest.mark.parametrize("sizes", MESHES)
def test_per_device_equals_the_whole_and_constrain_does_nothing_in_it(sizes):
    mesh = partition.make_mesh(partition.Config(*sizes))
    local = 8 // (sizes[0] * sizes[1])
    weight, batch = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(16, dtype=np.float32).reshape(8, 2)

    def function(weight, batch):
        assert batch.shape == (local, 2)  # a device sees its own examples only
        assert partition.constrain(batch, "batch", "length") is batch
        return jnp.tanh(batch @ weight / 50)

    with jax.set_mesh(mesh):
        out = jax.jit(partition.per_device(function, mesh))(weight, batch)
        with pytest.raises(KeyError, match="lenght"):
            partition.per_device(lambda weight, batch: partition.constrain(batch, "batch", "lenght"), mesh)(weight, batch)
    np.testing.assert_allclose(out, np.tanh(batch @ weight / 50), rtol=1e-6)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), tree)


@functools.cache
def after_one_step(sizes):
    """State and metrics of one ADDP step on a mesh, from parameters and images that are the same for all."""
    # A first step with a learning rate; eps above the rounding of gradients that are zero in exact arithmetic.
    config = programs.config("demo_addp", optim__warmup_steps=0, optim__eps=1e-5)
    mesh = partition.make_mesh(partition.Config(*sizes), jax.devices()[: int(np.prod(sizes))])
    run = program.create_training(config, num_train=64, mesh=mesh)
    nets = {"tokenizer": (vqgan, run.task.tokenizer), "token_predictor": (token_predictor, run.task.predictor)}
    with jax.set_mesh(mesh):
        inits = {name: jax.eval_shape(functools.partial(module.init, net), jax.random.key(0)) for name, (module, net) in nets.items()}
        frozen = jax.device_put(random_like(inits, 1), partition.replicated(mesh))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), run.state)
        state = zeros.replace(params=random_like(run.state.params, 2))
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, run.state))
        images = np.random.default_rng(3).integers(0, 256, (8, 16, 16, 3), np.uint8)
        batch = {"image": jax.device_put(images, partition.batch_sharding(mesh))}
        step = run.step.lower(state, frozen, batch).compile(QUICK_COMPILE)
        state, metrics = jax.block_until_ready(step(state, frozen, batch))
        for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(run.state), strict=True):
            assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    return jax.device_get((state, metrics))


@pytest.mark.medium
@pytest.mark.parametrize("sizes", MESHES)
def test_a_training_step_is_the_same_on_every_mesh(sizes):
    (expected, alone), (found, metrics) = after_one_step((1, 1, 1)), after_one_step(sizes)
    np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=LOSS)
    np.testing.assert_allclose(metrics["grad_norm"], alone["grad_norm"], rtol=GRADIENT)  # Adam hides its scale
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=PARAMETERS)


@pytest.mark.medium
def test_the_compared_step_moves_every_kind_of_parameter():
    """Else the comparison between meshes says nothing."""
    state, metrics = after_one_step((1, 1, 1))
    moved = jax.tree.map(lambda before, after: np.abs(after - before).max(), random_like(state.params, 2), state.params)
    still = [partition.path_name(path) for path, size in jax.tree_util.tree_leaves_with_path(moved) if size < 5 * PARAMETERS]
    assert all("key/bias" in path for path in still), still  # attention is blind to a shift of all keys
    assert int(state.step) == 1 and metrics["learning_rate"] > 0
