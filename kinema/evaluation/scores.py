"""How well videos keep to their captions, and how well they hold together: rates and means with 95 % intervals."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from kinema.data.scenes import KINDS, SHAPES, Scene, Sprite, Story
from kinema.evaluation import oracle
from kinema.evaluation.oracle import Reading, Seen
from kinema.seeds import keys

ATTRIBUTES = ("shape", "colour", "size", "motion")
RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """A rate or a mean over `n` videos and its 95 % interval; nan if there was nothing to measure."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Scores:
    """Scores by name.

    Rates: "background", "count", "shape", "colour", "size", "motion" (right for every object asked for), "all three"
    (shape, colour and motion), "occlusion" (of scenes with a wall), "everything". Means: "steadiness", "misfit" (64ths
    of the frame), "flicker" and the drifts (see `oracle`). If kinds are mixed, the rates of each as "two: shape" etc.
    """

    scores: dict[str, Score]

    def __getitem__(self, name: str) -> Score:
        return self.scores[name]

    def to_json(self) -> str:
        plain = {name: asdict(score) for name, score in self.scores.items()}
        finite = {k: {f: None if math.isnan(x) else x for f, x in score.items()} for k, score in plain.items()}
        return json.dumps(finite, indent=1)

    @classmethod
    def of_json(cls, plain: Mapping[str, Mapping[str, Any]]) -> "Scores":
        """What `to_json` wrote, as it is read."""
        finite = {k: {f: math.nan if x is None else x for f, x in score.items()} for k, score in plain.items()}
        return cls({name: Score(s["value"], s["low"], s["high"], int(s["n"])) for name, s in finite.items()})

    def table(self) -> str:
        width = max(map(len, self.scores), default=0)
        return "\n".join(
            f"{name:<{width}}  {s.value:7.3f}  [{s.low:.3f}, {s.high:.3f}]  n={s.n}" for name, s in self.scores.items()
        )


def score(videos: Tensor, scenes: Sequence[Scene], known: Sequence[str] = SHAPES) -> Scores:
    """Scores of `[B, T, 3, H, W]` in -1…1 against what their captions say (`captions.parse` reads those)."""
    return judge(oracle.read(videos, known), scenes)


def judge(readings: Sequence[Reading], scenes: Sequence[Scene]) -> Scores:
    """The same from readings, which can be collected batch by batch."""
    about = [facts(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    scores = _rates(about)
    for name, of in MEANS.items():
        scores[name] = mean([value for reading in readings for value in of(reading)])
    kinds = [kind for kind in KINDS if any(scene.kind == kind for scene in scenes)]
    for kind in kinds if len(kinds) > 1 else ():
        own = _rates([fact for fact, scene in zip(about, scenes, strict=True) if scene.kind == kind])
        scores |= {f"{kind}: {name}": value for name, value in own.items()}
    return Scores(scores)


def facts(reading: Reading, scene: Scene) -> dict[str, bool]:
    """What is right about one video."""
    right = _assigned(reading.objects, scene.sprites)
    said = {"background": reading.background == scene.background, "count": len(reading.objects) == len(scene.sprites)}
    said |= {name: all(name in names for names in right) for name in ATTRIBUTES}
    said["all three"] = said["shape"] and said["colour"] and said["motion"]
    if scene.kind == "behind":
        said["occlusion"] = reading.wall and reading.hidden
    said["everything"] = all(said.values())
    return said


def score_stories(videos: Tensor, stories: Sequence[Story], known: Sequence[str] = SHAPES) -> Scores:
    """Scores of stories `[B, scenes · T, 3, H, W]`: those of all their scenes, and of every return of a character
    "persistence" (the rate of looking the same as at first) and the distances "return colour", "… size", "… shape"."""
    read = [
        oracle.read(video.unflatten(0, (len(story.scenes), -1)), known)
        for video, story in zip(videos, stories, strict=True)
    ]
    returns = [r for readings, story in zip(read, stories, strict=True) for r in oracle.persistence(readings, story)]
    scenes = [scene for story in stories for scene in story.scenes]
    scores = judge([reading for readings in read for reading in readings], scenes).scores
    own = {"persistence": rate([r.same for r in returns])}
    for name in ("colour", "size", "shape"):
        own[f"return {name}"] = mean([getattr(r, name) for r in returns])
    return Scores(own | scores)


def rate(outcomes: Sequence[bool]) -> Score:
    """The share of successes, with Wilson's interval (1927): it stays inside 0…1 and is right for few videos too."""
    n = len(outcomes)
    if not n:
        return Score(math.nan, math.nan, math.nan, 0)
    z, p = 1.959964, sum(outcomes) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Score(p, max(0.0, middle - half), min(1.0, middle + half), n)


def mean(values: Sequence[float]) -> Score:
    """The mean, with the percentile bootstrap; the resamples are the same every time."""
    n = len(values)
    if not n:
        return Score(math.nan, math.nan, math.nan, 0)
    x = torch.tensor(values, dtype=torch.float64)
    low, high = x[resamples(n, RESAMPLES)].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Score(float(x.mean()), low, high, n)


def resamples(n: int, times: int, name: str = "bootstrap") -> Tensor:
    """`[times, n]` numbers below n, drawn with replacement."""
    return keys(0, name, range(times)).integers(n, n)


MEANS: dict[str, Callable[[Reading], list[float]]] = {
    "steadiness": lambda reading: [seen.steadiness for seen in reading.objects],
    "misfit": lambda reading: [seen.misfit for seen in reading.objects],
    "flicker": lambda reading: [reading.flicker],
    "drift of colour": lambda reading: [seen.drift["colour"] for seen in reading.objects],
    "drift of size": lambda reading: [seen.drift["size"] for seen in reading.objects],
    "drift of shape": lambda reading: [seen.drift["shape"] for seen in reading.objects],
}


def _rates(facts: Sequence[dict[str, bool]]) -> dict[str, Score]:
    names = dict.fromkeys(name for fact in facts for name in fact)
    return {name: rate([fact[name] for fact in facts if name in fact]) for name in names}


def _assigned(seen: Sequence[Seen], sprites: Sequence[Sprite]) -> list[set[str]]:
    """Which attributes of each sprite are right if seen objects are assigned to sprites as well as possible."""
    places: list[Seen | None] = [*seen] + [None] * max(0, len(sprites) - len(seen))
    options = [
        [
            {a for a in ATTRIBUTES if one and getattr(one, a) == getattr(sprite, a)}
            for one, sprite in zip(order, sprites, strict=True)
        ]
        for order in permutations(places, len(sprites))
    ]
    return max(options, key=lambda option: sum(map(len, option)))
