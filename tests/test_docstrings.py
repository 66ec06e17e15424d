"""Public interfaces say what goes in, what comes out and what may be raised. Read from the source, nothing is imported."""

import ast
import re
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "src" / "vfmtok_hf"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def exported_names(tree: ast.Module) -> set[str]:
    """What `__all__` lists."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def public_interfaces() -> dict[str, tuple[Function | ast.ClassDef, str]]:
    """Exported classes and functions and the public methods of the former, each with the docstring that describes it."""
    interfaces = {}
    modules = (path for path in sorted(PACKAGE.rglob("*.py")) if (path.parent / "__init__.py").is_file())
    trees = {path: ast.parse(path.read_text()) for path in modules}
    for path, tree in trees.items():
        exporting = (tree, trees[PACKAGE / "__init__.py"], trees[path.parent / "__init__.py"])
        exported = set().union(*map(exported_names, exporting))
        for node in tree.body:
            if not isinstance(node, Function | ast.ClassDef) or node.name not in exported:
                continue
            name = f"{path.relative_to(PACKAGE).with_suffix('').as_posix()}:{node.name}"
            interfaces[name] = node, ast.get_docstring(node) or ""
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, Function) and (method.name in ("__init__", "__call__") or method.name[0] != "_"):
                    # The arguments of a constructor are described with the class.
                    described_by = node if method.name == "__init__" else method
                    interfaces[f"{name}.{method.name}"] = method, ast.get_docstring(described_by) or ""
    return interfaces


INTERFACES = public_interfaces()

# What transformers, torch or diffusers call and describe, and what does no more here than there.
HOOKS = {
    "train",
    "preprocess",
    "postprocess",
    "validate_architecture",
    "from_pretrained",
    "save_pretrained",
    "save_config",
    "download",
    "extra_repr",
}
# A description may point to another one.
REFERENCE = re.compile(r"arguments[^.]*(as in|those of|as in transformers)\s+\[?`", re.IGNORECASE)


def is_property(function: Function) -> bool:
    return any(getattr(decorator, "id", None) == "property" for decorator in function.decorator_list)


def arguments(function: Function) -> list[str]:
    listed = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in listed if argument.arg not in ("self", "cls")]


def raised(function: Function) -> set[str]:
    """Exceptions that a function raises itself."""
    calls = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def test_there_is_something_to_check():
    assert len(INTERFACES) > 60
    assert "modeling/modeling_vfmtok:VFMTokModel.encode" in INTERFACES


@pytest.mark.parametrize("name", INTERFACES)
def test_public_interfaces_are_described(name):
    node, docstring = INTERFACES[name]
    if name.rpartition(".")[2] in HOOKS or is_one_line_config_constructor(node):
        return
    assert docstring, "has no docstring"
    if isinstance(node, Function) and not is_property(node):
        unnamed = [argument for argument in arguments(node) if not re.search(rf"\b{argument}\b", docstring)]
        assert unnamed == [] or REFERENCE.search(docstring), "its docstring does not name these arguments"
        unsaid = raised(node) - {"AttributeError"} if "Raises" not in docstring else set()
        assert unsaid == set() or REFERENCE.search(docstring), (
            "it raises these, and its docstring has no Raises section"
        )


def is_one_line_config_constructor(node: ast.AST) -> bool:
    """Models are built from a configuration, which is described by itself."""
    return isinstance(node, Function) and node.name == "__init__" and arguments(node) == ["config"]
