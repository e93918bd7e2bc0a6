"""Test-wide settings: eight fake CPU devices, strict shapes, a shared compilation cache, programs that compile quickly.

Compiling is most of the time, so the compiler leaves its optimisations out. The modules marked `golden` compare with
numbers of other code, and so compile as users do.
"""

import ctypes
import gc
import os
import resource
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/addp_jax/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402  (the environment above must be set first)
from absl import flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags

import pytest  # noqa: E402

from addp_jax import partition

MARKERS = {
    "golden": "a whole module that compares with numbers of other code; its programs are optimised as users' are",
    "medium": "takes a while; left out with --fast, as are the tests that use `trained`",
    "slow": "a longer run of a test that is there at a shorter length; left out unless --slow",
}
peaks = []  # largest resident memory of each finished test process, GiB


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--fast", action="store_true", help="leave out the tests marked medium")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
        # The first user of `trained` trains three stages.
        if config.getoption("--fast") and (item.get_closest_marker("medium") or "trained" in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason="medium: leave out --fast"))


def pytest_sessionfinish(session):
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts in bytes, Linux in KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if "PYTEST_XDIST_WORKER" in os.environ:
        session.config.workeroutput["peak"] = peak
    else:
        peaks.append(peak)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if not error:
        peaks.append(node.workeroutput["peak"])


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"peak memory of a test process: {max(peaks, default=0):.1f} GiB")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module(request):
    """The module's optimisation level; its programs are dropped at its end, or they pile up to gigabytes."""
    if request.node.get_closest_marker("golden"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # returns the freed memory


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
