"""README.md, CONTRIBUTING.md and docs/*.md: their commands, Python blocks, links and pictures are of what is there."""

import ast
import contextlib
import copy
import importlib
import inspect
import io
import pathlib
import re
import shlex
import sys

import programs
import pytest
from absl import flags
from ml_collections import config_flags

import addp_jax
from addp_jax import main, modes, program, tasks
from addp_jax.training import loop

ROOT = programs.ROOT
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 150
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
STARTS = ("python -m addp_jax.", "launch/", "bash launch/", ". launch/")


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words of every command of ours: lines of bash blocks, and code within the text that is a whole command."""
    lines = [line for text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    found = []
    for line in lines:
        if not line.startswith(STARTS):
            continue
        words = [word for word in shlex.split(line, comments=True) if word not in (".", "bash")]
        if words[-1] != "addp_jax.main" and not words[0].endswith(".yaml"):
            found.append(words)
    return found


COMMANDS = {f"{page.name}: {' '.join(words)}": words for page in PAGES for words in commands(page)}


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_understood(words, monkeypatch):
    if words[0].startswith("launch/"):
        check_script(words, monkeypatch)
    elif words[2] == "addp_jax.main":
        check_main(words[3:], monkeypatch)
    else:
        check_module(words[2], words[3:], monkeypatch)


def check_main(arguments: list[str], monkeypatch) -> None:
    """The flags of addp_jax.main, on a copy of them: their names and values, the config and every field of it."""
    values = flags.FlagValues()
    for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]:
        if flag.name.split(".")[0] != "config":
            values[flag.name] = copy.deepcopy(flag)
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    arguments = ["addp_jax", *in_repository(arguments)]
    monkeypatch.setattr(sys, "argv", arguments)  # config flags look for the fields there
    main.require_config_file(arguments)
    assert values(arguments) == arguments[:1], "not a flag"
    if values["mode"].value not in main.CONVERSIONS:
        modes.split(values["config"].value.to_dict())


def in_repository(arguments: list[str]) -> list[str]:
    """--config is given from the root of the repository."""
    return [re.sub(r"^--config=(?=configs/)", f"--config={ROOT}/", argument) for argument in arguments]


class Known(Exception):
    """argparse has taken the arguments."""


def check_module(name: str, arguments: list[str], monkeypatch) -> None:
    """argparse of the module takes the arguments; nothing else of it runs."""
    module = importlib.import_module(name)
    parse_args = module.argparse.ArgumentParser.parse_args

    def parse_only(self, given=None, namespace=None):
        parse_args(self, given, namespace)
        raise Known

    monkeypatch.setattr(module.argparse.ArgumentParser, "parse_args", parse_only)
    problems = io.StringIO()
    try:
        with contextlib.redirect_stderr(problems), pytest.raises(Known):
            module.main(arguments)
    except SystemExit:
        pytest.fail(problems.getvalue())


def check_script(words: list[str], monkeypatch) -> None:
    """The script is there and its help names the options; what follows a config goes to addp_jax.main."""
    script, arguments = ROOT / words[0], words[1:]
    assert script.is_file(), script
    texts = script.read_text() + (ROOT / "tests" / "conftest.py").read_text() * (script.name == "test.sh")
    config = next((i for i, word in enumerate(arguments) if word.startswith("configs/")), len(arguments))
    if config < len(arguments):
        workdir, *fields = arguments[config + 1 :]
        check_main([f"--config={arguments[config]}", f"--workdir={workdir}", *fields], monkeypatch)
    for option in arguments[:config]:
        if option.startswith("--config."):
            check_main([f"--config={ROOT}/configs/demo_addp.py", option], monkeypatch)
        elif option.startswith("--"):
            assert re.search(rf"{re.escape(option.split('=')[0])}\b", texts), f"{script.name} does not know {option}"


def test_every_mode_and_config_is_in_the_pages():
    text = "".join(page.read_text() for page in PAGES)
    assert not [mode for mode in main.MODES if mode not in text]
    assert not [name for name in programs.names() if f"configs/{name.partition(':')[0]}.py" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_exist(page):
    setup = (ROOT / "setup.py").read_text()
    named = ",".join(re.findall(r"pip install -e '\.\[([\w,-]+)\]'", page.read_text()))
    assert not [extra for extra in named.split(",") if extra and f'"{extra}": ' not in setup]


# --- Python ---------------------------------------------------------------------------------------

PYTHON = {f"{page.name} {i}": text for page in PAGES for i, text in enumerate(blocks(page, "python"))}


@pytest.mark.parametrize("text", PYTHON.values(), ids=PYTHON)
def test_a_python_block_compiles_and_uses_what_there_is(text):
    """Imports, names of the package, and calls of a loaded `model`, whose arguments must fit."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            [importlib.import_module(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "addp_jax":
            assert hasattr(addp_jax, node.attr), node.attr
        elif isinstance(node, ast.Call):
            check_call(node)


def check_call(node: ast.Call) -> None:
    function, arguments = ast.unparse(node.func), list(node.args)
    if function == "addp_jax.load":
        signature = inspect.signature(addp_jax.load)
    elif function.startswith("model."):
        from addp_jax.api.model import Model

        signature = inspect.signature(getattr(Model, function.split(".")[1]))
        arguments = ["self", *arguments]
    else:
        return
    signature.bind(*arguments, **{keyword.arg: keyword.value for keyword in node.keywords})


def test_the_task_of_contributing_trains(tmp_path, monkeypatch):
    text = next(text for text in blocks(ROOT / "CONTRIBUTING.md", "python") if "class Task(" in text)
    (tmp_path / "linear_code.py").write_text(text)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    fields = modes.fields("linear_code") | {"steps": 2, "batch_size": 8, "eval_every": 2, "eval_batches": 1}
    fields["data"] |= {"num_train": 16, "num_eval": 8}
    fields["optim"] |= {"warmup_steps": 1}
    config = modes.split(fields)[0]
    task = program.create(config).task
    assert isinstance(task, tasks.Autoencoder) and not isinstance(task, tasks.Classifier)
    loop.train(config, str(tmp_path / "run"))
    assert '"eval/mse"' in (tmp_path / "run" / "log.jsonl").read_text()


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not heading or heading in headings(file), target


def headings(page: pathlib.Path) -> set[str]:
    """Of the headings, as GitHub makes anchors of them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    assert not [page.name for page in PAGES if page.parent != ROOT and f"docs/{page.name}" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_in_the_text_exist(page):
    """Every `config.a.b` of a page is a field of some config."""
    known = {field for task in tasks.names() for field in dotted(modes.fields(task), "config")}
    named = set(re.findall(r"`config((?:\.\w+)+)(?:=[^`]*)?`", page.read_text()))
    assert not [name for name in named if f"config{name}" not in known]


def dotted(tree: dict, prefix: str) -> set[str]:
    found = {prefix}
    for name, value in tree.items():
        found |= dotted(value, f"{prefix}.{name}") if isinstance(value, dict) else {f"{prefix}.{name}"}
    return found
