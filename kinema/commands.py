"""What commands share, `kinema` and `python -m kinema.…` alike: one clear sentence where something is wrong.

Nothing heavy is imported before it is used, so that help is there at once.
"""

import argparse
import errno
import importlib.metadata
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kinema.config import nearest
from kinema.errors import ElsewhereError, UsageError, UserError

if TYPE_CHECKING:
    import torch


def execute(command: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command with the words of the command line, or `argv`, and returns its exit code: 0, 2 for a wrong command
    line, 1 for all else, and for what a signal stopped 128 + its number, 130 for Ctrl-C.

    What goes wrong is said in one sentence; with --debug among the words it is raised.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    failed, hook = [], threading.excepthook  # a library's thread that fails ends the command, by a sentence as well
    if not debug:
        threading.excepthook = failed.append
    try:
        code = command([word for word in words if word != "--debug"]) or 0
        if failed:
            raise failed[0].exc_value
        return code
    except BaseException as error:
        if debug or isinstance(error, SystemExit):
            raise
        message, code = explain(error)
        if "RANK" in os.environ:
            _end_in_a_job(error, message, code)
        if message:
            print(f"kinema: {' '.join(message.split())}", file=sys.stderr)
        return code
    finally:
        threading.excepthook = hook


def _end_in_a_job(error: BaseException, message: str, code: int) -> None:
    """Ends a process of several. What is wrong on all ranks alike is said by the first, and the others give it time to:
    the launcher ends the job with the first process that fails."""
    rank = os.environ["RANK"]
    if rank != "0" and isinstance(error, UsageError | ElsewhereError):
        time.sleep(10)
    else:
        print(f"kinema: rank {rank}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    os._exit(code)  # at once, and not after the other ranks answered, which may be waiting for this one


def explain(error: BaseException) -> tuple[str, int]:
    """One sentence for the person at the keyboard, and the exit code."""
    text = str(error)
    if isinstance(error, UserError):
        return text, 2 if isinstance(error, UsageError) else 1
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130
    if isinstance(error, BrokenPipeError):
        return "", 1
    if isinstance(error, ImportError):
        return _missing(error), 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            "out of memory; make --run.micro_batch (train) or --batch (sample, evaluate) smaller, "
            "or train with --run.plan.recompute block",
            1,
        )
    full = os.strerror(errno.ENOSPC) in text  # safetensors, for one, says so in an error of its own
    if full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"the disk is full{_at(error)}; free some space, or write elsewhere with --out, and run this again", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_at(error)}; check that path and its permissions", 1
    name = type(error).__name__
    return f"{name}: {text}; this is not expected, --debug shows where it happens", 1


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are UsageErrors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str):
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def parser_of(module: str, doc: str | None) -> Parser:
    """The parser of `python -m module`, whose help is the module's docstring."""
    about, _, uses = (doc or "").partition("\n\n")
    return Parser(f"python -m {module}", description=about, epilog=uses)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 upwards, not {text!r}")
    return int(text)


def several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a number from 2 upwards, not {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    return tuple(count(part) for part in text.split(","))


def device_of(text: str) -> "torch.device":
    """The device `auto`, `cpu`, `cuda` or `cuda:1`; where it is not there, a UserError says what was found."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise UsageError(
            f"there is no device {text}{nearest(text, ['auto', 'cpu', 'cuda'])}; use auto, cpu, cuda or cuda:N"
        )
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return torch.device("cuda", 0) if found else torch.device("cpu")
    device = torch.device(text)
    if device.type == "cpu":
        return device
    if not found:
        why = f"is built for CUDA {torch.version.cuda} but sees no GPU" if torch.version.cuda else "is a build for CPUs"
        raise UserError(
            f"there is no GPU for --device {text}: torch {torch.__version__} {why}; use --device cpu, or auto"
        )
    if (device.index or 0) >= found:
        raise UserError(f"there is no {text}: this machine has {found} GPU(s), cuda:0 to cuda:{found - 1}")
    return torch.device("cuda", device.index or 0)


def _at(error: BaseException) -> str:
    return f": {error.filename}" if isinstance(error, OSError) and error.filename else ""


def _missing(error: ImportError) -> str:
    """What to install for a module that is not there."""
    name = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name in ("", "kinema"):
        return f"{error}; the installation is incomplete or mixed, reinstall with: pip install --force-reinstall kinema"
    if extra := extra_of(name):
        return f"this needs {name}, which is not installed; install it with: pip install 'kinema[{extra}]'"
    return f"this needs {name}, which is not installed; install it with: pip install {name}"


def extra_of(package: str) -> str | None:
    """The extra of kinema that brings `package`."""
    try:
        requires = importlib.metadata.requires("kinema") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in requires:
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line)
        if found and found[1].lower().replace("-", "_") == package.lower().replace("-", "_"):
            return found[2]
    return None
