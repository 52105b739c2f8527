"""What Calque calls of torch-tensorrt is there, with those arguments: its newest wheel's source against ours, nothing imported."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.api.bindings import fetched

pytestmark = pytest.mark.api

PACKAGE = "torch_tensorrt"
SOURCE = Path(__file__).parents[2] / "targets" / "_torch_tensorrt.py"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel's content; it is of 4 MB, what it needs is not fetched."""
    return fetched("torch-tensorrt>=2.14", tmp_path_factory.mktemp("torch-tensorrt"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(wheel: Path, module: str, name: str, seen: frozenset[str] = frozenset()) -> Function | ast.ClassDef | None:
    """The function or class that a module of the wheel has by a name, its own or imported; None where it has none."""
    folder = wheel.joinpath(*module.split("."))
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    if module in seen or not path.is_file():
        return None
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + folder.is_dir()] if node.level else []
            place = ".".join([*above, *([node.module] if node.module else [])])
            named = [each.name for each in node.names if (each.asname or each.name) == name or each.name == "*"]
            if named and (found := defined(wheel, place, name, seen | {module})):
                return found
    return None


def faults(source: Path, wheel: Path) -> list[str]:
    """What the source imports of the package that is not there, and calls with arguments that it does not take, by line."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            imported |= {each.asname or each.name: (node.module or "", each.name) for each in node.names}
    found = [f"{name}: {module} has no such name" for module, name in imported.values() if defined(wheel, module, name) is None]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in imported:
            place = imported[node.func.id]
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == PACKAGE:
            place = (PACKAGE, node.func.attr)
        else:
            continue
        found += [f"{node.lineno}: {fault}" for fault in _call_faults(node, defined(wheel, *place), ast.unparse(node.func))]
    return found


def _call_faults(call: ast.Call, definition: Function | ast.ClassDef | None, name: str) -> list[str]:
    if definition is None:
        return [f"{name} is not there"]
    read = set[str]()
    if isinstance(definition, ast.ClassDef):
        # A class that takes any keyword reads those it knows by name.
        read = {str(node.value) for node in ast.walk(definition) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        definition = next(node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    taken = definition.args
    positional = [argument.arg for argument in (*taken.posonlyargs, *taken.args) if argument.arg != "self"]
    # `**kwargs` takes anything without a word, so that what is not named is taken for misspelt.
    known = {*positional, *(argument.arg for argument in taken.kwonlyargs), *read}
    given = [keyword.arg for keyword in call.keywords if keyword.arg]
    found = [f"{name} takes no {keyword}" for keyword in given if keyword not in known]
    if len(call.args) > len(positional) and taken.vararg is None:
        found.append(f"{name} takes {len(positional)} arguments by position")
    required = positional[: len(positional) - len(taken.defaults)][len(call.args) :]
    required += [argument.arg for argument, default in zip(taken.kwonlyargs, taken.kw_defaults, strict=True) if default is None]
    return found + [f"{name} needs {each}" for each in required if each not in given]


def test_what_is_called_is_there_and_takes_those_arguments(wheel: Path) -> None:
    assert not faults(SOURCE, wheel)


def test_shapes_are_given_in_words_that_the_package_reads(wheel: Path) -> None:
    from calque.artifact import TensorSpec
    from calque.targets._torch_tensorrt import _ranges

    definition = defined(wheel, PACKAGE, "Input")
    assert isinstance(definition, ast.ClassDef)
    told = {
        **_ranges(TensorSpec("x", "int64", (1, 2)), {}),
        **_ranges(TensorSpec("x", "int64", ("batch_size",)), {"x": {"min": [1], "opt": [1], "max": [2]}}),
    }
    wanted = ast.parse(f"Input({', '.join(f'{name}=1' for name in told)})", mode="eval").body
    assert isinstance(wanted, ast.Call)
    assert set(told) == {"shape", "min_shape", "opt_shape", "max_shape"}
    assert not _call_faults(wanted, definition, "Input")


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("arg_input_binding_names=", "input_binding_names=", "takes no input_binding_names"),
        ("dtype=getattr", "data_type=getattr", "takes no data_type"),
        ("supports_dynamic_shapes=True", "dynamic=True", "takes no dynamic"),
        (".get_output(0), starts)", ".get_output(0))", "needs write_indices"),
        ("import emit_kv_cache_update_layer", "import emit_kv_cache_layer as emit_kv_cache_update_layer", "has no such name"),
        ("torch_tensorrt.Input(", "torch_tensorrt.InputSpec(", "is not there"),
    ],
)
def test_what_does_not_go_with_the_package_is_told(wheel: Path, tmp_path: Path, right: str, wrong: str, told: str) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    assert right in text
    path = tmp_path / SOURCE.name
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    assert any(told in fault for fault in faults(path, wheel))


def test_the_release_before_lacks_what_require_asks_for(tmp_path: Path) -> None:
    content = fetched("torch-tensorrt==2.13.0", tmp_path)
    assert any("takes no output_binding_names" in fault for fault in faults(SOURCE, content))
