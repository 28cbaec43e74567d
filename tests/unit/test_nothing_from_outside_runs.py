"""Nothing that comes in is ever run as code: the package holds no call that could do it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "triage"

MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml",
    "jsonpickle", "code", "codeop", "xmlrpc", "dbm",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {"recv_pyobj", "send_pyobj", "load_pickle", "read_pickle", "from_pickle"}


def violations(source: str) -> list[str]:
    """What in a module could run bytes from outside, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = _of_import(node) or _of_call(node)
        if what:
            found.append(f"{getattr(node, 'lineno', 0)}: {what}")
    return found


def _of_import(node: ast.AST) -> str:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    else:
        return ""
    return next((f"import {name}" for name in names if name.split(".")[0] in MODULES), "")


def _of_call(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    if isinstance(node.func, ast.Name):
        return node.func.id if node.func.id in BUILTINS else ""
    if not isinstance(node.func, ast.Attribute):
        return ""
    name, owner = node.func.attr, ast.unparse(node.func.value)
    if name in METHODS:
        return name
    if name == "load" and owner in ("torch", "torch.jit") and not _is_true(options, "weights_only"):
        return f"{owner}.load without weights_only=True"
    if "allow_pickle" in options and not _is(options["allow_pickle"], False):
        return "allow_pickle"
    if "shell" in options and not _is(options["shell"], False):
        return "a shell"
    if owner == "os" and name in ("system", "popen"):
        return f"os.{name}"
    return ""


def _is(value: ast.expr, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def _is_true(options: dict[str | None, ast.expr], name: str) -> bool:
    return name in options and _is(options[name], True)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from yaml import load",
        "import marshal as m",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "socket.recv_pyobj()",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.jit.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_search_finds_what_it_is_for(text: str) -> None:
    """Each of these, once."""
    assert len(violations(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "model.eval()",
        "re.compile(text)",
        "json.load(file)",
        "subprocess.run(['ls'])",
    ],
)
def test_the_search_lets_harmless_calls_be(text: str) -> None:
    """Of the same names."""
    assert violations(text) == []


def test_the_package_runs_nothing_that_comes_in() -> None:
    """No pickle in any form, no eval, no torch.load of more than weights, no shell."""
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 50
    found = {
        str(path.relative_to(PACKAGE)): broken
        for path in sources
        if (broken := violations(path.read_text(encoding="utf-8")))
    }
    assert found == {}
