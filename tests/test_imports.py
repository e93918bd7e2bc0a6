"""Who may import whom, which library is at home where, and how large files and functions may grow. Read from the source."""

import ast
import functools
import pathlib
import re
import sys

import pytest

from addp_jax import schema

ROOT = pathlib.Path(__file__).parents[1]
# A room imports from lower layers and from itself. Rooms of one layer do not know each other.
LAYERS = (
    {"main"},
    {"__init__"},
    {"modes", "api"},
    {"planning"},
    {"generation", "recognition", "measuring"},
    {"training"},
    {"program"},
    {"tasks"},
    {"weights"},
    {"models", "samplers", "metrics", "data", "optim"},
    {"codecs"},
    {"logs"},
    {"pictures"},
    {"partition", "processes", "ops", "parameters"},
    {"diffusion"},
    {"schema"},
    {"files"},
    {"errors"},
)
# Library -> where alone it may be imported.
HOMES = {
    "orbax": ("addp_jax/weights/checkpoint.py", "addp_jax/processes.py"),
    "fsspec": ("addp_jax/weights/buckets.py",),
    "grain": ("addp_jax/data/",),
    "tensorflow_datasets": ("addp_jax/data/",),
    "array_record": ("addp_jax/data/",),
    "cv2": ("addp_jax/data/",),
    "flax.linen": ("addp_jax/models/", "addp_jax/codecs/", "addp_jax/planning/calls.py"),
    "flax.nnx": (),
    "tensorboardX": ("addp_jax/training/reports.py",),
    "clu": ("addp_jax/training/reports.py",),
    "pycocotools": ("addp_jax/data/", "addp_jax/metrics/detection.py"),
    "torch": ("addp_jax/weights/",),
    "ml_collections": ("addp_jax/main.py", "configs/"),
    "absl.flags": ("addp_jax/main.py",),
    "jax.sharding": ("addp_jax/partition.py",),
    "jax.experimental.mesh_utils": ("addp_jax/partition.py",),
    "jax.experimental.multihost_utils": ("addp_jax/processes.py",),
    "tensorflow": (),
    "keras": (),
    "torchvision": (),
}
IN_FUNCTIONS_ONLY = ("torch", "libtpu")
FILE_LINES, FUNCTION_LINES, TOP_MODULES = 300, 50, 14


@functools.cache
def sources(folder: str) -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / folder).rglob("*.py"))}


# Read while the tests are collected: in Python 3.11 `ast.parse` fails when a finalizer that it happens to run parses too,
# and the objects that other tests leave behind have such finalizers (a traceback that pytest formats is parsed).
TREES = {path: ast.parse(text) for folder in ("addp_jax", "configs") for path, text in sources(folder).items()}


def names_imported(node) -> list[str]:
    """`import a.b` and `from a.b import c` as a.b and a.b.c; a relative import begins with a dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def imports(path: str) -> list[str]:
    """Everything a file imports, in functions too."""
    return [name for node in ast.walk(TREES[path]) for name in names_imported(node)]


def imports_on_loading(path: str) -> list[str]:
    """What is imported as soon as the file is: not in functions."""

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return []
        return names_imported(node) + [name for child in ast.iter_child_nodes(node) for name in visit(child)]

    return visit(TREES[path])


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def functions(path: str):
    """`(name, lines)` of every function and method."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


PACKAGE, CONFIGS = list(sources("addp_jax")), list(sources("configs"))


def room(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def layer(name: str) -> int:
    """0 is the highest; -1 for a room that has no layer yet."""
    return next((number for number, rooms in enumerate(LAYERS) if name in rooms), -1)


def test_every_room_has_its_layer():
    assert not [path for path in PACKAGE if layer(room(path)) < 0 and path != "addp_jax/__init__.py"]


def test_imports_point_downwards():
    found = [(path, name) for path in PACKAGE for name in imports(path) if within(name, "addp_jax")]
    pairs = {(path, name): (room(path), name.split(".")[1]) for path, name in found}
    assert not [pair for pair, (one, other) in pairs.items() if one != other and layer(other) <= layer(one)]
    assert len(pairs) > 50


def test_imports_are_absolute():
    assert not [(path, name) for path in PACKAGE + CONFIGS for name in imports(path) if name.startswith(".")]


@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_at_home(library):
    paths = [path for path in PACKAGE + CONFIGS for name in imports(path) if within(name, library)]
    assert not [path for path in paths if not path.startswith(HOMES[library])]


def test_optional_libraries_are_imported_in_functions_only():
    found = [(path, name) for path in PACKAGE for name in imports_on_loading(path)]
    assert not [(path, name) for path, name in found for library in IN_FUNCTIONS_ONLY if within(name, library)]


def test_diffusion_needs_jax_and_numpy_only():
    modules = {name.split(".")[0] for name in imports("addp_jax/diffusion.py")}
    assert modules - sys.stdlib_module_names == {"jax", "numpy"}


def test_the_package_knows_no_config_file():
    assert not [(path, name) for path in PACKAGE for name in imports(path) if within(name, "configs")]


def test_config_files_import_each_other_the_package_and_ml_collections_only():
    found = [(path, name) for path in CONFIGS for name in imports(path)]
    assert not [(path, name) for path, name in found if name.split(".")[0] not in ("configs", "addp_jax", "ml_collections", "dataclasses")]


def test_no_field_of_a_config_is_asked_for_with_a_default():
    """`config.get("x", y)` hides misspelt fields."""
    nodes = [(path, node) for path in PACKAGE for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    owners = [(path, ast.unparse(node.func.value)) for path, node in nodes if getattr(node.func, "attr", "") == "get"]
    assert not [(path, owner) for path, owner in owners if owner.split(".")[-1].endswith("config")]


def test_files_and_functions_stay_small():
    lines = {path: len(text.splitlines()) for path, text in (sources("addp_jax") | sources("configs")).items()}
    assert not {path: count for path, count in lines.items() if count > FILE_LINES}
    sizes = {(path, name): count for path in lines for name, count in functions(path)}
    assert not {name: count for name, count in sizes.items() if count > FUNCTION_LINES}


def test_the_hall_is_small():
    assert len(list((ROOT / "addp_jax").glob("*.py"))) <= TOP_MODULES


# --- contracts --------------------------------------------------------------------------------------------------------------

# Of other libraries' objects, which have no type of ours: where `getattr` may have a default.
FOREIGN = {"addp_jax/partition.py", "addp_jax/files.py", "addp_jax/weights/checkpoint.py", "addp_jax/data/pipeline.py"}


def test_nobody_asks_whether_an_object_has_a_member():
    """What a task, sampler, codec or source can do, its protocol says."""
    calls = [(path, node) for path in PACKAGE for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    named = [(path, node, getattr(node.func, "id", "")) for path, node in calls]
    assert not [(path, ast.unparse(node)) for path, node, name in named if name == "hasattr"]
    defaults = [(path, ast.unparse(node)) for path, node, name in named if name == "getattr" and len(node.args) == 3]
    assert {path for path, _ in defaults} <= FOREIGN, defaults


def test_only_tasks_name_fields_of_their_examples():
    """A batch's fields are those of `Task.example`; the features of images and the source of labels are classifications'."""
    knowing = ("addp_jax/tasks/", "addp_jax/data/", "addp_jax/training/check.py", "addp_jax/measuring/judge.py")
    texts = {path: sources("addp_jax")[path] for path in PACKAGE if not path.startswith(knowing)}
    assert not [path for path, text in texts.items() if '["label"]' in text or '["boxes"]' in text]


OWN_COMMANDS = ("addp_jax/main.py", "addp_jax/measuring/", "addp_jax/data/")  # these have flags of their own
FLAGS = re.compile(r"--(workdir|config|mode|weights|output|layout|topology|level|program|coordinator|distributed|force)\b")


def test_messages_below_main_name_fields_and_not_flags():
    """A Python caller has typed no flag; `main` adds the spelling."""
    found = []
    for path in (path for path in PACKAGE if not path.startswith(OWN_COMMANDS)):
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Raise):
                found += [(path, node.lineno) for text in ast.walk(node) if isinstance(text, ast.Constant) and FLAGS.search(str(text.value))]
    assert not found


def test_a_field_is_written_once():
    """No dataclass's default is said again by a config file: what `base.run` changes, and the files change, differs from it."""
    from addp_jax import modes, tasks
    from configs import base

    assert set(base.run("addp", None).to_dict()) == set(modes.fields("addp"))
    for name in tasks.names():
        config = tasks.load(name).Config()
        assert base.run(name, None).model.to_dict() == schema.fields(config)
