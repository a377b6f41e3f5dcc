"""The walls of the house: who imports whom, how long a file may be, and what is public."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import ausm_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ausm_hf"
MODULES = {
    ".".join(("ausm_hf", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "checkpoints" not in path.parts or path.parent.name == "checkpoints"
}
TRAVELS = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL", "scipy", "av"}
GUARDED = {"mamba_ssm", "causal_conv1d", "triton", "einops"}


def imports(module: str, late: bool = True) -> set[str]:
    """What a module imports, as absolute names; without `late` only what it imports when it is itself imported."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not late:
            return
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not late:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from .room import file` imports the file.
            names = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found.update(names or {source})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def test_imports_go_in_no_circle():
    """Late imports count as well, but for the one in the registration, which is what makes the package load late."""
    graph = {name: imports(name) & MODULES.keys() - {name} for name in MODULES}
    graph["ausm_hf._register"] = imports("ausm_hf._register", late=False) & MODULES.keys()
    # To import a file is to import the package around it, which imports nothing but the registration.
    graph = {name: {other for other in others if other != "ausm_hf"} for name, others in graph.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, "ausm_hf.model")])
def test_what_travels_with_a_checkpoint_stands_alone(module):
    """transformers copies the files that are imported with a single dot, and no folder."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
    outside = {name.partition(".")[0] for name in imports(module)} - {"ausm_hf"}
    stdlib = {name for name in outside if name in sys.stdlib_module_names}
    assert outside - stdlib <= TRAVELS | GUARDED
    # What may be missing is never imported along with the file, unguarded.
    early = {name.partition(".")[0] for name in top_level_imports(tree)}
    assert not early & (GUARDED | {"av"})
    assert MODULES[module].parent == PACKAGE / "model"


def top_level_imports(tree: ast.Module) -> set[str]:
    """Names that are imported outside of any function, `if` or `try`."""
    return {
        name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }


@pytest.mark.parametrize(
    "room, stranger",
    [
        ("ausm_hf.model", "ausm_hf.data"),
        ("ausm_hf.model", "ausm_hf.training"),
        ("ausm_hf.model", "ausm_hf.evaluation"),
        ("ausm_hf.evaluation", "ausm_hf.training"),
        ("ausm_hf.data", "ausm_hf.training"),
        ("ausm_hf.data", "ausm_hf.evaluation"),
    ],
)
def test_rooms_that_do_not_know_each_other(room, stranger):
    for module in MODULES:
        if within(module, room):
            assert not [name for name in imports(module) if within(name, stranger)], module


def test_only_the_command_line_imports_the_command_line():
    for module in MODULES:
        assert not [name for name in imports(module) if within(name, "ausm_hf.cli")], module


@pytest.mark.parametrize(
    "path",
    [
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "examples", "spaces", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ],
)
def test_files_are_short_enough_to_be_read(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines < 700, f"{path} has {lines} lines"


def test_text_files_are_utf_8_on_every_system():
    """Windows reads and writes them in another encoding if none is named. JSON is read as bytes, which say theirs."""
    nameless = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("src", "examples", "spaces", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("read_text", "write_text")
        and "encoding" not in [keyword.arg for keyword in node.keywords]
    ]
    assert not nameless


@pytest.mark.parametrize("name", ausm_hf.__all__)
def test_public_names_are_documented(name):
    """`__all__` of the package is the one list of public names."""
    public = getattr(ausm_hf, name)
    docstring = public.__doc__ or ""
    assert len(docstring.strip().split()) > 5, f"{name} has no docstring"
    assert not docstring.startswith(f"{name}("), f"{name} has only the docstring that dataclasses make"


def test_public_methods_are_documented():
    without = [
        f"{name}.{method}"
        for name in ausm_hf.__all__
        if isinstance(public := getattr(ausm_hf, name), type)
        for method, value in vars(public).items()
        if not method.startswith("_")
        and callable(value)
        and not (getattr(value, "__doc__", None) or "").strip()
        # What overrides something of transformers is documented there.
        and not any(hasattr(base, method) for base in public.__mro__[1:])
    ]
    assert not without
