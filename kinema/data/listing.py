"""Which videos there are and what they show: the lists that people keep, read as they are.

A captions file has a row for each video: `video`, and `caption` or, for pieces one after the other, `captions`.
Further columns that are understood: `start` and `end` in seconds, `motion` (a score), `scene_start` and `scene_end`
(for each of the captions whether a scene starts or ends with it). `text_0`, `text_1` … stand for `captions`, as in
TTT-Video's files.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kinema.data.clips import listed
from kinema.data.tables import table
from kinema.errors import UserError

VIDEOS = {
    ".mp4",
    ".mkv",
    ".webm",
    ".mov",
    ".avi",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".gif",
    ".ogv",
    ".flv",
    ".wmv",
    ".3gp",
}
NAMES = ("video", "path", "file", "file_name", "filename")


@dataclass(frozen=True)
class Told:
    """What one piece of a video shows, and whether a scene starts or ends with it."""

    text: str
    scene_start: bool = False
    scene_end: bool = False


@dataclass(frozen=True)
class Footage:
    """A video file from `start` to `end` seconds (None: its end). `told` is one text, or one for each piece."""

    video: Path
    told: tuple[Told, ...]
    start: float = 0.0
    end: float | None = None
    motion: float | None = None


def footage(videos: Path, captions: Path | None) -> tuple[list[Footage], dict[str, str]]:
    """What is at `videos`, sorted by file and start, and what is left out, by name, with the reason.

    `videos` is a folder, of CogVideo's layout or with files wherever, or a list that `kinema.data.clips` reads. Without
    a captions file a video's caption is in the text file of its name beside it.
    """
    left_out: dict[str, str] = {}
    if captions is not None:
        if not videos.is_dir():
            raise UserError(f"{videos} is not a folder; give the folder of the videos that {captions} lists")
        there, seen = {path.resolve() for path in _files(videos)}, set()
        found = []
        for one in _rows(captions, videos, left_out):
            seen.add(one.video.resolve())
            if one.video.resolve() not in there and not one.video.is_file():
                left_out[str(one.video)] = "does not exist"
            else:
                found.append(one)
        left_out |= {str(path): f"has no caption in {captions}" for path in sorted(there - seen)}
    elif videos.is_file() or (videos / "prompts.txt").exists() or (videos / "labels").is_dir():
        found = [Footage(clip.video, (Told(clip.caption),), clip.start) for clip in listed(videos)]
    elif videos.is_dir():
        found = []
        for path in _files(videos):
            beside = path.with_suffix(".txt")
            text = " ".join(beside.read_text(encoding="utf-8").split()) if beside.exists() else ""
            if text:
                found.append(Footage(path, (Told(text),)))
            else:
                left_out[str(path)] = f"has no caption: neither --captions nor {beside.name} has one"
    else:
        raise UserError(f"there are no videos at {videos}; give a folder of them")
    if not found:
        reasons = "; ".join(f"{name} {why}" for name, why in [*left_out.items()][:3])
        raise UserError(
            f"no video of {videos} has a caption ({reasons or 'there are no videos'}); give --captions FILE"
        )
    return sorted(found, key=lambda one: (str(one.video), one.start)), left_out


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in VIDEOS and p.is_file())


def _rows(captions: Path, videos: Path, left_out: dict[str, str]) -> Iterator[Footage]:
    try:
        for number, row in enumerate(table(captions), start=1):
            if not row:
                continue
            try:
                one = _row(row)
            except (ValueError, TypeError, KeyError) as error:
                left_out[f"{captions}, row {number}"] = str(error) or type(error).__name__
                continue
            places = (videos / one.video, captions.parent / one.video, one.video)
            place = next((place for place in places if place.is_file()), places[0])
            yield replace(one, video=place)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {captions} ({error}); correct it") from error


def _row(row: dict[str, Any]) -> Footage:
    name = next((row[key] for key in NAMES if row.get(key)), None)
    if name is None:
        raise ValueError(f"it names no video; give it a column {NAMES[0]}")
    numbered = sorted((int(m[1]), str(row[key])) for key in row if (m := re.fullmatch(r"text_(\d+)", key)) and row[key])
    texts = row.get("captions") or [text for _, text in numbered] or [row.get("caption") or row.get("text") or ""]
    told = tuple(_told(texts, row.get("scene_start") or (), row.get("scene_end") or ()))
    if not told or any(not one.text.strip() for one in told):
        raise ValueError("a caption is empty; write it")
    end, motion = row.get("end"), row.get("motion")
    return Footage(
        Path(str(name)),
        told,
        float(row.get("start") or 0.0),
        None if end in (None, "") else float(end),
        None if motion in (None, "") else float(motion),
    )


def _told(texts: Iterable[Any], starts: Any, ends: Any) -> Iterator[Told]:
    for i, text in enumerate(texts):
        said = {**text} if isinstance(text, dict) else {"text": text}
        starting = said.get("scene_start", starts[i] if i < len(starts) else False)
        ending = said.get("scene_end", ends[i] if i < len(ends) else False)
        yield Told(str(said.get("text") or said.get("caption") or ""), bool(starting), bool(ending))
