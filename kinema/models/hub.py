"""Where a model is: a path, a checkpoint shipped with kinema, or an id on the Hugging Face Hub, `org/name@revision`.

A Hub id is what names no path here and does not look like one. Only files of weights, configurations and tokenizers are
fetched, never code. `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` are the Hub library's and mean what they always do.
"""

import logging
import re
from functools import lru_cache
from pathlib import Path

from kinema.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"  # what is shipped with the package
ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?")
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.pth", "*.pt", "*.bin")
COMMIT = re.compile(r"[0-9a-f]{40}")

log = logging.getLogger(__name__)


def located(path: str | Path) -> Path:
    """A path as it is, the folder of a shipped checkpoint, or the local copy of a Hub id, fetched if need be."""
    shipped = ASSETS / path
    if Path(path).exists():
        return Path(path)
    if shipped.is_dir():
        return shipped
    return fetched(str(path)) if is_hub_id(path) else Path(path)


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
