"""Test-wide settings: eight fake CPU devices, strict shapes, a shared compilation cache."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the time: without the optimiser's passes it takes a third less.
SETTINGS = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + SETTINGS
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/addp_jax/xla"))

import jax  # noqa: E402  (the environment above must be set first)
from absl import flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags

import pytest  # noqa: E402

from addp_jax import partition


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a longer run of a test that is there at a shorter length; left out unless --slow")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.fixture(scope="session", autouse=True)
def mesh():
    """One device unless a test enters another mesh."""
    one = partition.make_mesh(partition.Config(), jax.devices()[:1])
    with jax.set_mesh(one):
        yield one


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Work directories of the three tiny stages, trained once."""
    import programs

    from addp_jax.training import loop

    root = tmp_path_factory.mktemp("trained")
    loop.train(programs.config("demo_tokenizer"), str(root / "tokenizer"))
    weights = {"model__tokenizer_weights": str(root / "tokenizer")}
    loop.train(programs.config("demo_predictor", **weights), str(root / "predictor"))
    weights["model__predictor_weights"] = str(root / "predictor")
    loop.train(programs.config("demo_addp", **weights), str(root / "addp"))
    return root


@pytest.fixture
def torch():
    """PyTorch, for the tests of its file format; not a dependency, so they are skipped where it is missing."""
    return pytest.importorskip("torch", reason="needs pip install torch")
