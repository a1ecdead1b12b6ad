"""Imports point one way, from mathematics to commands, and what is heavy is imported where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import kinema

ROOT = Path(kinema.__file__).parent

# A layer may import from itself and from what is above it in this list. Modules of one line are peers.
LAYERS = [
    ("errors", "seeds", "optim", "constants", "files"),
    ("diffusion",),
    ("models",),
    ("sampling", "streaming", "storytelling", "data"),
    ("objectives",),
    ("run", "config", "commands"),
    ("training",),
    ("pretrained",),
    ("evaluation",),
    ("recipes",),
    (
        "demo",
        "few_steps",
        "doctor",
        "shipping",
        "ablations",
        "broadcast",
        "intake",
        "inspection",
        "exporting",
        "lightning",
        "bench",
    ),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "diffusers",
    "transformers",
    "tokenizers",
    "av",
    "lmdb",
    "tensorboard",
    "jsonargparse",
    "yaml",
    "PIL",
    "lightning",
}


def files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if "assets" not in path.relative_to(ROOT).parts[:-1])


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, at_import: bool = False) -> list[str]:
    """Full names of what a module imports; `at_import` leaves out functions' bodies and `if TYPE_CHECKING`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif not (at_import and happens_later(node)):
            found += imports(node, at_import)
    return found


def happens_later(node: ast.AST) -> bool:
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return is_function or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_imports_point_one_way():
    wrong = []
    for path in files():
        if layer(path) == "__init__":
            continue
        for name in imports(parsed(path), at_import=True):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "kinema" and other in RANK and RANK[other] > RANK[layer(path)]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_every_module_has_its_place():
    assert {layer(path) for path in files()} - {"__init__"} <= set(RANK)


def test_heavy_packages_are_imported_where_they_are_used():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files()
        for name in imports(parsed(path), at_import=True)
        if name.partition(".")[0] in HEAVY and layer(path) != "lightning"  # which is made of subclasses of Lightning's
    ]
    assert not wrong


def test_only_training_knows_of_processes():
    parts = "torch.distributed.tensor."  # what reads weights must know a tensor that is one rank's part of a whole
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files()
        for name in imports(parsed(path))
        if layer(path) != "training" and (name == "torch.distributed" or name.startswith("torch.distributed."))
        if not (name.startswith(parts) and path.relative_to(ROOT).as_posix() == "models/weights.py")
    ]
    assert not wrong


def test_nothing_is_unpickled_or_run_from_text():
    wrong = []
    for path in files():
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            only_weights = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if called in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {called}")
            if called == "torch.load" and not only_weights:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} torch.load without weights_only=True")
    assert not wrong


def test_the_command_line_is_imported_without_torch():
    code = "import sys, kinema.cli as c; c._parser(); sys.exit(bool({'torch', 'jsonargparse'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
