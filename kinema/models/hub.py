"""Where a model is: a path, a checkpoint shipped with kinema, or an id on the Hugging Face Hub, `org/name@revision`.

A Hub id is what names no path here and does not look like one. Only files of weights, configurations and tokenizers are
fetched, never code. `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` are the Hub library's and mean what they always do.
"""

import json
import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from kinema.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"  # what is shipped with the package
ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?")
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.pth", "*.pt", "*.bin")
COMMIT = re.compile(r"[0-9a-f]{40}")

log = logging.getLogger(__name__)


def located(path: str | Path, part: str = "") -> Path:
    """A path as it is, the folder of a shipped checkpoint, or the local copy of a Hub id, fetched if need be.

    With a `part` of a pipeline ("vae", "text_encoder", "tokenizer"): the folder that has it, which is another where a
    pipeline shares parts. Its kinema.json then names its `parent`, a folder beside it or a shipped checkpoint. Raises
    UserError if the parent is not there.
    """
    folder = _place(path)
    if not part or not folder.is_dir() or (folder / part).is_dir():
        return folder
    parent = _parent(folder / "kinema.json")
    if parent is None:
        return folder
    if not isinstance(parent, str) or parent in ("", ".", "..") or Path(parent).name != parent:
        raise UserError(f"{folder / 'kinema.json'} has parent {parent!r}; it must be a folder's name, as sprites-wan")
    for candidate in (folder.resolve().parent / parent, ASSETS / parent):
        if (candidate / part).is_dir():
            return candidate
    raise UserError(f"{folder} has the {part} of {parent}, which is not beside it; copy {parent} there")


def _place(path: str | Path) -> Path:
    shipped = ASSETS / path
    if Path(path).exists():
        return Path(path)
    if shipped.is_dir():
        return shipped
    return fetched(str(path)) if is_hub_id(path) else Path(path)


def _parent(file: Path) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text()).get("parent")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not valid JSON with names ({error}); download or copy it again") from error


def is_hub_id(path: str | Path) -> bool:
    """Whether it reads `org/name` or `org/name@revision`, and neither it nor a folder `org` is there."""
    match = isinstance(path, str) and ID.fullmatch(path)
    return bool(match) and not Path(path).exists() and not Path(str(path).split("/")[0]).exists()


@lru_cache(maxsize=64)
def fetched(name: str) -> Path:
    """The folder of a Hub id at its revision, by default the newest. UserError says what to do without a network."""
    match = ID.fullmatch(name)
    assert match, name
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # A commit's files are listed over the network unless it is told that there is none.
    how = {"revision": match["revision"], "local_files_only": constants.HF_HUB_OFFLINE}
    try:
        folder = Path(snapshot_download(match["repo"], allow_patterns=[*FILES], **how))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not on this machine and the Hub cannot be reached; download it where there is a network, with "
            f"`hf download {match['repo']}`, and copy its folder, or unset HF_HUB_OFFLINE"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot fetch {name} from the Hub ({reason}); give a folder, or an id that exists") from error
    if not (match["revision"] and COMMIT.fullmatch(match["revision"])):
        log.warning("%s is at commit %s; write %s@%s to pin it", name, folder.name, match["repo"], folder.name)
    return folder


def revision_of(path: str | Path) -> str:
    """The commit of a Hub id, "" of all else."""
    return fetched(str(path)).name if is_hub_id(path) else ""
