"""From the command line to a Run and from a Run to `run.yaml` and back: the only place where names become classes.

Single values (numbers, tuples, dictionaries, literals) are read by jsonargparse. The tree around them is walked here,
and not by jsonargparse, for two reasons: it accepts a class for a protocol only where all annotations agree to the
letter, and its files name every class, also where the annotation leaves no choice. A file names frozen dataclasses,
which are imported and called with the values beside them; whatever else it names is refused.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.errors import UsageError, UserError
from kinema.files import write_text

if TYPE_CHECKING:
    from kinema.data.shards import Preparation
    from kinema.run import Run

Hint = Any  # a type annotation
FREE = ("steps", "log_every", "save_every", "keep", "preview", "max_skips", "micro_batch")
LAYOUT = ("replicate", "shard", "context", "tensor", "reshard", "recompute", "compile", "fuse")
FREE += tuple(f"plan.{name}" for name in LAYOUT)


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipes(returns: str = "Run|Preparation") -> list[tuple[str, str]]:
    """(name, first line of the docstring) of the recipes in the package that return one of these classes.

    They are read from the source: nothing is imported.
    """
    return [(name, line) for name, (_, _, line) in _listed(returns).items()]


def _listed(returns: str) -> dict[str, tuple[str, str, str]]:
    """(file, function, first line of its docstring) by the recipe's name.

    `sprites:wan` is the function `wan` of the file `sprites`. What is in the file of a part, `sprites_ursa`, goes by
    the name of the whole: `dimo` is `sprites:ursa_dimo`, and `ursa` itself `sprites:ursa`. The function `_9s` is the
    recipe `9s`, as names of functions do not begin with digits.
    """
    found, files = {}, sorted((Path(__file__).parent / "recipes").glob("[!_]*.py"))
    for file in files:
        whole, _, part = file.stem.partition("_")
        for function in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef) or function.returns is None:
                continue
            if re.match(r"_\D", function.name) or not re.search(rf"\b({returns})\b", ast.unparse(function.returns)):
                continue
            name = f"{file.stem}:{function.name.lstrip('_')}"
            if part and file.with_stem(whole) in files:
                name = f"{whole}:{part}" if function.name == part else f"{whole}:{part}_{function.name.lstrip('_')}"
            found[name] = file.stem, function.name, (ast.get_docstring(function) or "").partition("\n")[0]
    return found


def recipe(name: str) -> Callable[..., "Run"]:
    """The function behind `sprites:wan` (a recipe of kinema) or `my_package.recipes:fast` (any one can import)."""
    known = _listed("Run|Preparation")
    if name in known:
        file, function, _ = known[name]
        return getattr(importlib.import_module(f"kinema.recipes.{file}"), function)
    module, _, function = name.partition(":")
    function = f"_{function}" if function[:1].isdigit() else function
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed command does not look for packages where it is called
    if function and (found := _attribute(module, function)) is not None:
        if not inspect.isfunction(found):
            raise UsageError(f"{name} is not a function; a recipe is a function that returns a Run or a Preparation")
        return found
    raise UsageError(f"there is no recipe {name}{nearest(name, known)}; known are {', '.join(known) or 'none'}")


def default(name: str, parameter: str) -> Any:
    """Of a recipe's parameter; None if it has no such one, or one that must be given."""
    found = inspect.signature(recipe(name)).parameters.get(parameter)
    return None if found is None or found.default is found.empty else found.default


def configure(name: str, overrides: list[str], also: Iterable[str] = ()) -> "Run":
    """The Run of a recipe: `--run.…` overrides the Run, every other option is a parameter of the recipe function.

    `also` are options that somebody else understands: they are offered where one is misspelt.
    """
    theirs = [f"--{'.'.join(path)}={text}" for path, text in _options(overrides) if path[0] == "run"]
    ours = [(path, text) for path, text in _options(overrides) if path[0] != "run"]
    run = _made(name, ours, ("--run", *also))
    from kinema.run import Run

    if not isinstance(run, Run):
        what = "prepares data; run it with kinema prepare" if _prepares(run) else "returned no Run"
        raise UsageError(f"{name} {what}")
    return parse(run, theirs)


def preparation(name: str, options: list[str], also: Iterable[str] = ()) -> "Preparation":
    """The Preparation of a recipe; its options are the parameters of the recipe function."""
    made = _made(name, list(_options(options)), also)
    if not _prepares(made):
        raise UsageError(f"{name} trains; run it with kinema train")
    return made


def _prepares(value: Any) -> bool:
    from kinema.data.shards import Preparation

    return not _misfit(type(value), Preparation)


def _made(name: str, ours: list[tuple[list[str], str]], also: Iterable[str]) -> Any:
    """What a recipe function returns for these options."""
    function = recipe(name)
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    given = {}
    for path, text in ours:
        option = ".".join(path)
        if option not in parameters:
            options = [f"--{p}" for p in parameters]
            known = f"{name} takes {', '.join(options) or 'no options of its own'}"
            known += ", and --run.… for every field of the run" if "--run" in also else ""
            raise UsageError(f"{name} has no option --{option}{nearest('--' + option, [*options, *also])}; {known}")
        given[option] = _parse(text, hints.get(option, str), f"--{option}")
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [f"--{parameter}" for parameter in needed if parameter not in given]:
        raise UsageError(f"{name} needs {' and '.join(missing)}; give {' VALUE '.join(missing)} VALUE")
    return function(**given)


# --- the three uses of the tree --------------------------------------------------------------------------------------


def parse(run: "Run", overrides: list[str]) -> "Run":
    """`run` with overrides such as `--run.steps 40`, `--run.objective.student.optim.lr=1e-4` applied in their order.

    An override of a field that holds a dataclass names another class, by its path or, where that is unambiguous, by its
    bare name. The new object keeps the fields that both classes have; fields of it may be overridden by what follows.
    Raises UsageError, which names the nearest match, for what does not exist or does not fit.
    """
    tree = _open(run)
    for path, text in _options(overrides):
        if path[0] != "run":
            raise UsageError(f"there is no option --{'.'.join(path)}{nearest(path[0], ['run'], '--')}")
        tree = _override(tree, type(run), path[1:], text, "run")
    return _close(tree, "run")


def save(run: "Run", path: Path) -> None:
    """Writes `run` so that `load` gives an equal one. There is the old file or the new one, at no moment a part."""
    write_text(path, dump(run))


def dump(run: "Run") -> str:
    """The text of `run.yaml`. All values are written, so that a default that changes later does not change this run.

    Its last line is YAML's end of a document, by which `load` knows that nothing is cut off.
    """
    import yaml

    plain = _plain(_open(run), type(run), "run")
    style = {"sort_keys": False, "default_flow_style": None, "width": 120, "explicit_end": True}
    text = yaml.safe_dump(plain, allow_unicode=True, **style)
    if yaml.safe_load(text) == plain:
        return text
    return yaml.safe_dump(plain, **style)  # PyYAML leaves U+0085, a line break to it, as it is unless all is escaped


def load(path: Path) -> "Run":
    """Reads what `save` wrote. Raises UserError for a file that is unreadable, truncated or not a run's."""
    import yaml

    from kinema.run import Run

    fix = "restore it, or start again in another folder"
    try:
        text = path.read_text(encoding="utf-8")
        plain = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; {fix}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{path} does not describe a run; {fix}")
    if not text.endswith("\n...\n"):
        raise UserError(f"{path} is cut off: its last line is not '...'; {fix}")
    try:
        return _close(_read(plain, Run, "run"), "run")
    except UsageError as error:
        raise UserError(f"{path} does not describe a run: {error}; {fix}") from error


def differences(there: "Run", here: "Run") -> list[str]:
    """Where two runs differ, in words, without the fields that a resumed run may change.

    These are how long the run goes on and what it tells and keeps meanwhile, which no step depends on, and how the work
    is divided, recomputed and compiled, which changes time and memory but not what is computed.
    """
    return [
        f"{path} is {a} there and {b} here"
        for path, a, b in _compare(_open(there), _open(here), "run")
        if not any(path == f"run.{free}" or path.startswith(f"run.{free}.") for free in FREE)
    ]


# --- the tree: dataclasses opened into nodes, so that a half-changed run need not be valid ---------------------------


@dataclass
class _Node:
    cls: type
    values: dict[str, Any]


def _node(cls: type, given: dict[str, Any]) -> _Node:
    """`given` and, for the rest, the defaults of `cls`, in the order of its fields."""
    values = {}
    for f in dataclasses.fields(cls):
        if f.name in given:
            values[f.name] = given[f.name]
        elif f.default is not dataclasses.MISSING:
            values[f.name] = _open(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            values[f.name] = _open(f.default_factory())
    return _Node(cls, values)


def _open(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _Node(type(value), {f.name: _open(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init})
    if isinstance(value, tuple | list):
        return type(value)(_open(item) for item in value)
    if isinstance(value, dict):
        return {key: _open(item) for key, item in value.items()}
    return value


def _close(tree: Any, where: str) -> Any:
    if isinstance(tree, tuple | list):
        return type(tree)(_close(item, f"{where}.{i}") for i, item in enumerate(tree))
    if isinstance(tree, dict):
        return {key: _close(item, f"{where}.{key}") for key, item in tree.items()}
    if not isinstance(tree, _Node):
        return tree
    values = {name: _close(value, f"{where}.{name}") for name, value in tree.values.items()}
    if missing := [f.name for f in dataclasses.fields(tree.cls) if f.init and f.name not in values]:
        raise UsageError(f"{where} is {_path(tree.cls)}, which needs {where}.{missing[0]}; set it")
    try:
        return tree.cls(**values)
    except (ValueError, TypeError, UserError) as error:
        raise UsageError(str(error) if where == "run" else f"{where}: {error}") from error


def _plain(tree: Any, hint: Hint, where: str) -> Any:
    """What YAML can hold; a class is named where `hint` allows more than this one."""
    if isinstance(tree, _Node):
        hints = _hints(tree.cls)
        plain = {name: _plain(value, hints[name], f"{where}.{name}") for name, value in tree.values.items()}
        return plain if _implied(hint) is tree.cls else {"class_path": _path(tree.cls), "init_args": plain}
    if isinstance(tree, tuple | list):
        return [_plain(item, _item(hint, i), f"{where}.{i}") for i, item in enumerate(tree)]
    if isinstance(tree, dict):
        return {key: _plain(item, _item(hint, key), f"{where}.{key}") for key, item in tree.items()}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise UserError(
        f"{where} is a {_path(type(tree))}; a run is made of frozen dataclasses, numbers, strings, tuples and dicts"
    )


def _read(plain: Any, hint: Hint, where: str) -> Any:
    if _is_value(hint):
        return _check(plain, hint, where)
    if plain is None and type(None) in _options_of(hint):
        return None
    if (values := _values_of(hint)) is not None and not isinstance(plain, dict | list):
        return _check(plain, values, where)
    for option in _options_of(hint):
        origin = typing.get_origin(option)
        if origin in (tuple, list) and isinstance(plain, list):
            arity = len(typing.get_args(option))
            if origin is tuple and Ellipsis not in typing.get_args(option) and arity != len(plain):
                raise UsageError(f"{where} has {len(plain)} entries; it takes {arity}")
            return origin(_read(item, _item(hint, i), f"{where}.{i}") for i, item in enumerate(plain))
        if origin is dict and isinstance(plain, dict):
            return {key: _read(item, _item(hint, key), f"{where}.{key}") for key, item in plain.items()}
    if not isinstance(plain, dict):
        raise UsageError(f"{where} is {plain!r}; {_wanted(hint)}")
    if "class_path" in plain:
        if extra := set(plain) - {"class_path", "init_args"}:
            raise UsageError(f"{where} has {extra.pop()} beside class_path; move it below init_args")
        cls, given = _class(str(plain["class_path"]), hint, where), plain.get("init_args") or {}
    else:
        cls, given = _implied(hint), plain
        if cls is None:
            raise UsageError(f"{where} names no class_path; {_wanted(hint)}")
    hints = _hints(cls)
    return _node(cls, {n: _read(v, _field(cls, hints, n, where), f"{where}.{n}") for n, v in given.items()})


def _override(tree: Any, hint: Hint, path: list[str], text: str, where: str) -> Any:
    """`tree` with the place `path` replaced by what `text` says."""
    if not path:
        return _replacement(tree, hint, text, where)
    name, *rest = path
    if tree is None and (cls := _implied(hint)):
        tree = _node(cls, {})
    if isinstance(tree, _Node):
        inner = _field(tree.cls, _hints(tree.cls), name, where)
        value = _override(tree.values.get(name), inner, rest, text, f"{where}.{name}")
        return _node(tree.cls, {**tree.values, name: value})
    if isinstance(tree, dict):
        if _is_value(hint):  # the keys are regular expressions, whose dots are their own
            name, rest = ".".join(path), []
        return {**tree, name: _override(tree.get(name), _item(hint, name), rest, text, f"{where}.{name}")}
    if isinstance(tree, tuple | list):
        if not name.isdigit() or int(name) >= len(tree):
            raise UsageError(f"{where} has {len(tree)} entries; {name} is not the number of one, counted from 0")
        items = list(tree)
        items[int(name)] = _override(items[int(name)], _item(hint, int(name)), rest, text, f"{where}.{name}")
        return type(tree)(items)
    if tree is None:
        raise UsageError(f"{where} is not set; name its class first with --{where}; {_wanted(hint)}")
    raise UsageError(f"{where} is {tree!r} and has no part {name}")


def _replacement(tree: Any, hint: Hint, text: str, where: str) -> Any:
    if _is_value(hint):
        return _parse(text, hint, where)
    if text in ("null", "None"):
        if type(None) in _options_of(hint):
            return None
        raise UsageError(f"{where} cannot be null; {_wanted(hint)}")
    if text[:1] in "[{":
        import yaml

        try:
            return _read(yaml.safe_load(text), hint, where)
        except yaml.YAMLError as error:
            raise UsageError(f"{where}: cannot read {text}: {' '.join(str(error).split())}") from error
    if (values := _values_of(hint)) is not None:
        with contextlib.suppress(UsageError):  # then it is the name of a class
            return _parse(text, values, where)
    cls = _class(text, hint, where, search=True)
    if not isinstance(tree, _Node):
        return _node(cls, {})
    old, new = _hints(tree.cls), _hints(cls)
    return _node(cls, {name: value for name, value in tree.values.items() if name in new and new[name] == old[name]})


def _compare(a: Any, b: Any, path: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(a, _Node) and isinstance(b, _Node):
        if a.cls is not b.cls:
            yield path, _path(a.cls), _path(b.cls)
        else:
            for name in a.values:
                yield from _compare(a.values[name], b.values[name], f"{path}.{name}")
    elif isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _compare(one, other, f"{path}.{i}")
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _compare(a[key], b[key], f"{path}.{key}")
    elif a != b:
        yield path, _short(a), _short(b)


def _short(tree: Any) -> str:
    return (
        _path(tree.cls)
        if isinstance(tree, _Node)
        else f"{len(tree)} entries"
        if isinstance(tree, list | tuple)
        else repr(tree)
    )


# --- annotations -----------------------------------------------------------------------------------------------------


def _hints(cls: type) -> dict[str, Hint]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _field(cls: type, hints: dict[str, Hint], name: str, where: str) -> Hint:
    if name in hints:
        return hints[name]
    raise UsageError(f"{where} has no {name}{nearest(name, hints, f'{where}.')}; {_path(cls)} has {', '.join(hints)}")


def _options_of(hint: Hint) -> tuple[Hint, ...]:
    """The members of a union; a hint that is none is its own only member."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_value(hint: Hint) -> bool:
    """Whether there are only numbers, strings and containers of these, and so no class to choose."""
    if hint in (bool, int, float, str, type(None), Ellipsis) or typing.get_origin(hint) is typing.Literal:
        return True
    containers = (tuple, list, dict, typing.Union, types.UnionType)
    return typing.get_origin(hint) in containers and all(_is_value(arg) for arg in typing.get_args(hint))


def _values_of(hint: Hint) -> Hint | None:
    """Of a union of values and classes, such as a scale that is a number or follows the time, the values."""
    values = tuple(option for option in _options_of(hint) if _is_value(option) and option is not type(None))
    return typing.Union[values] if values else None  # noqa: UP007 - of a tuple


def _implied(hint: Hint) -> type | None:
    """The class that a place has if none is named: the only dataclass of its annotation."""
    found = [option for option in _options_of(hint) if option is not type(None)]
    one = found[0] if len(found) == 1 else None
    return one if isinstance(one, type) and dataclasses.is_dataclass(one) and not inspect.isabstract(one) else None


def _item(hint: Hint, at: Any) -> Hint:
    """The annotation of an entry of a tuple, list or dict."""
    for option in _options_of(hint):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is dict and isinstance(at, str):
            return args[1]
        if origin in (tuple, list) and isinstance(at, int):
            return args[0] if origin is list or Ellipsis in args else args[at]
    return hint


def _wanted(hint: Hint) -> str:
    classes = [option for option in _options_of(hint) if option is not type(None)]
    return f"give the path of a frozen dataclass that is a {' or '.join(_name(c) for c in classes)}"


def _name(hint: Hint) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


# --- classes ---------------------------------------------------------------------------------------------------------


def _class(name: str, hint: Hint, where: str, search: bool = False) -> type:
    """The frozen dataclass at the path `name`, which must fit `hint`.

    With `search` it may also be a bare name, looked up where the classes of `hint` live, or a path that leaves out the
    module inside a package. Files always give the whole path.
    """
    module, _, bare = name.rpartition(".")
    found = [cls for cls in (_attribute(module, bare),) if cls is not None] if module else []
    if not found and search:
        modules = _modules(module) if module else _around(hint)
        found = [cls for cls in _dataclasses(modules) if cls.__name__ == bare]
    if not found:
        known = {cls.__name__ for cls in _dataclasses(_around(hint)) if not _misfit(cls, hint)}
        raise UsageError(f"{where}: there is no class {name}{nearest(bare, sorted(known))}; {_wanted(hint)}")
    fitting = [cls for cls in found if not _misfit(cls, hint)]
    if len(fitting) > 1:
        raise UsageError(f"{where}: {name} may be {' or '.join(sorted(map(_path, fitting)))}; give the whole path")
    if not fitting:
        raise UsageError(f"{where} cannot be {name}: it {_misfit(found[0], hint)}")
    return fitting[0]


def _misfit(cls: Any, hint: Hint) -> str:
    """Why `cls` cannot stand where `hint` is; empty if it can."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        return "is not a frozen dataclass"
    reasons = []
    for option in _options_of(hint):
        if option is type(None) or typing.get_origin(option) in (tuple, list, dict):
            continue
        if not isinstance(option, type):  # a Callable
            lacking = [] if callable(cls) and "__call__" in dir(cls) else ["__call__"]
        elif getattr(option, "_is_protocol", False):
            has = {*dir(cls), *(f.name for f in dataclasses.fields(cls))}
            lacking = sorted(_members(option) - has)
        else:
            if issubclass(cls, option):
                return ""
            reasons.append(f"is not a {option.__name__}")
            continue
        if not lacking:
            return ""
        reasons.append(f"has no {', '.join(lacking)}, which a {_name(option)} has")
    return " and ".join(reasons)


def _members(protocol: type) -> set[str]:
    names = {
        name
        for c in protocol.__mro__
        if c not in (object, typing.Protocol)
        for name in (*vars(c), *inspect.get_annotations(c))
    }
    return {name for name in names if not name.startswith("_") or name == "__call__"}


def _dataclasses(modules: Iterable[types.ModuleType]) -> Iterator[type]:
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                yield value


def _around(hint: Hint) -> Iterator[types.ModuleType]:
    """The modules of the classes of `hint` and their neighbours, short of all that a top-level package has."""
    for home in {option.__module__ for option in _options_of(hint) if isinstance(option, type)} - {"builtins"}:
        package = home.rpartition(".")[0]
        yield from _modules(package if "." in package else home)


def _modules(package: str) -> Iterator[types.ModuleType]:
    root = _module(package)
    if root is not None:
        yield root
        for info in pkgutil.iter_modules(getattr(root, "__path__", [])):
            with contextlib.suppress(ModuleNotFoundError):  # of what some of them need: Triton, where there is no GPU
                yield from _modules(f"{package}.{info.name}")


def _module(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise
    except (ValueError, TypeError):  # a name such as "a..b"
        return None


def _attribute(module: str, name: str) -> Any:
    return getattr(_module(module), name, None)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# --- single values ---------------------------------------------------------------------------------------------------


def _options(arguments: list[str]) -> Iterator[tuple[list[str], str]]:
    """(path, text) of `--a.b text` and `--a.b=text`."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not name:
            raise UsageError(f"{word} is not an option; options are written --name value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"{word} needs a value: {word} value, or {word}=value")
            text = rest.pop(0)
        yield name.split("."), text


def _parse(text: str, hint: Hint, where: str) -> Any:
    """The value that a word of the command line means."""
    options = _options_of(hint)
    if str in options:
        return None if type(None) in options and text in ("null", "None") else text
    if re.fullmatch(r"[-+]?(inf|nan)", text):
        text = re.sub(r"(?=inf|nan)", ".", text)
    elif text == "None":
        text = "null"
    return _convert(text, hint, where)


def _check(plain: Any, hint: Hint, where: str) -> Any:
    """The value that a file holds, as strictly typed as YAML allows: only integers become floats, and lists tuples."""
    options = _options_of(hint)
    if isinstance(plain, str) and not any(
        option is str or typing.get_origin(option) is typing.Literal for option in options
    ):
        raise UsageError(f"{where} must be {_name(hint)}, not {plain!r}")
    return plain if isinstance(plain, str) and str in options else _convert(plain, hint, where)


def _convert(value: Any, hint: Hint, where: str) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, str):
            return parser.parse_args([f"--value={value}"]).value
        return parser.parse_object({"value": value}).value
    except ArgumentError as error:
        choices = [
            str(c) for o in _options_of(hint) if typing.get_origin(o) is typing.Literal for c in typing.get_args(o)
        ]
        raise UsageError(f"{where} must be {_name(hint)}, not {value!r}{nearest(str(value), choices)}") from error


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """ " (did you mean …?)" with the most similar of `known`, or nothing where none is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""
