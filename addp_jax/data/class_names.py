"""Names of classes that a user gives."""

from addp_jax import errors, files


def read(path: str) -> tuple[str, ...]:
    """The names in the file config.data.class_names, one per line in the order of the labels.

    Raises UserError naming the file and the line: it cannot be read, a line is empty, or a name comes twice.
    """
    with files.explain(f"config.data.class_names: cannot read {path}", OSError, UnicodeDecodeError):
        lines = [line.strip() for line in files.read_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise errors.UserError(f"config.data.class_names: {path} holds no names")
    first = {}
    for number, name in enumerate(lines, 1):
        if not name or not name.isprintable():
            raise errors.UserError(f"config.data.class_names: {path} line {number}: {name!r} is no name of a class")
        if first.setdefault(name, number) != number:
            where = f"config.data.class_names: {path} line {number}"
            raise errors.UserError(f"{where}: {name!r} stands in line {first[name]} already")
    return tuple(lines)
