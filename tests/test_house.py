"""Where modules are, and what may import what."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {"app", "create_data_lists", "detect", "eval", "export", "train", "hubconf", "bulk_detect"}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "fpnssd").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(MODULES) - {"fpnssd", *(name for name, one in MODULES.items() if one.name == "__init__.py")}


def test_every_module_imports_in_a_fresh_clone(tmp_path):
    """A module that git ignores would be missing there."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", code, *MODULES], cwd=tmp_path / "clone", check=True, capture_output=True, text=True
    )
    assert done.stdout == ""  # importing a command has no side effect
    status = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert status.stdout == ""


def test_package_imports_no_command():
    for name, path in MODULES.items():
        if name.startswith("fpnssd"):
            assert not imports_of(path) & COMMANDS, name


def test_no_two_modules_import_each_other():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(path.pop())

    for name in graph:
        visit(name)


OPTIONAL = {
    "av", "cv2", "matplotlib", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "pillow_heif", "pyarrow", "ray",
    "skimage", "supervision", "torch.utils.tensorboard",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_imports_inside_of_functions_are_of_optional_packages(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in (node for function in functions for node in ast.walk(function)):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in imported:
            assert {module, module.partition(".")[0]} & OPTIONAL, f"{name} imports {module} on line {node.lineno}"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("create_data_lists", ["--yolo", "x", "--out", "y", "--val-shar", "0.1"]),
        ("train", ["--minut", "5"]),
        ("eval", ["--min-scor", "0.4"]),
        ("detect", ["x.jpg", "--min-scor", "0.4"]),
        ("export", ["--to", "onnx", "--preci", "fp32"]),
        ("bulk_detect", ["--images", "x", "--out", "y", "--min-scor", "0.4"]),
    ],
)
def test_options_are_not_abbreviated(script, arguments, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(arguments)
    assert f"unrecognized arguments: {arguments[-2]}" in capsys.readouterr().err
