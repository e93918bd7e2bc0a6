"""The layout of every trained parameter of every shipped config, as golden/layouts.txt has it.

After a wanted change, or with a new config: `python tests/test_golden_layouts.py`, and read the difference.
"""

import collections
import pathlib
import re

import jax
import numpy as np
import programs
import pytest
from jax.sharding import AbstractMesh, AxisType

from addp_jax import partition, tasks

GOLDEN = pathlib.Path(__file__).parent / "golden" / "layouts.txt"
MESH = AbstractMesh((2, 2, 2), partition.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
HEADER = "# Parameter -> mesh axis of each dimension, - = whole; how many parameters have this name and layout, where _N is a number\n"


def layouts(name: str) -> str:
    """One line per name: `decoder/block/mlp/fc1/kernel  - fsdp tensor`."""
    fields = programs.fields(name, "")
    task = tasks.create(fields.task, fields.model.to_dict(), np.float32)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(task.init, jax.random.key(0)))
    found = collections.Counter()
    for path, leaf in leaves:
        path = partition.path_name(path)
        spec = partition.parameter_spec("/" + path, leaf.shape, MESH, task.layout)
        found[re.sub(r"_\d+", "_N", path) + "  " + " ".join(axis or "-" for axis in spec)] += 1
    return "".join(f"{line}{f'  x{count}' if count > 1 else ''}\n" for line, count in sorted(found.items()))


def tables() -> str:
    """The layouts of all configs; those with the same ones share a table."""
    configs = collections.defaultdict(list)
    for name in programs.names():
        configs[layouts(name)].append(name)
    return HEADER + "".join(f"\n[{' '.join(names)}]\n{text}" for text, names in configs.items())


@pytest.mark.medium
def test_every_shipped_config_has_the_layouts_on_record():
    assert tables() == GOLDEN.read_text(), "if this is wanted: python tests/test_golden_layouts.py"


if __name__ == "__main__":
    with jax.set_mesh(partition.make_mesh(partition.Config(), jax.devices()[:1])):
        GOLDEN.write_text(tables())
