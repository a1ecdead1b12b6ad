"""The embedded procedural world: captioned videos of moving shapes, each a pure function of the world and its index.

Lengths are in 64ths of the frame, whatever its size, and a motion takes the whole clip, however many frames it has.
Pixels only ever see +, -, *, / and sqrt, and positions are rounded to 1/1024: a video is the same to the last bit alone
and in any batch.

Shapes: B videos, N sprites, T frames, K candidate places, P the side of the patch a sprite is drawn in.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from kinema.data import captions
from kinema.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MOTIONS,
    NOVEL_SHAPES,
    SHAPES,
    SIZES,
    WALL,
    Colour,
    Scene,
    Sprite,
    Story,
    heldout,
)
from kinema.seeds import Keys, keys

JITTER = 0.05  # how much a radius may differ from its size's, relatively
MARGIN = 1.0  # sprites keep this far from the border
PLACES = 32  # candidate placements of two sprites, the one with the least overlap is taken

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A distribution of clips. `one`, `two` and `behind` are the weights of the kinds of scenes.

    `split` is "train" (no sprite is a held-out triple of shape, colour and motion), "heldout" (all are) or "all".
    """

    size: int = 64
    frames: int = 33
    fps: int = 8
    seed: int = 0
    split: str = "train"
    one: float = 1.0
    two: float = 0.0
    behind: float = 0.0
    shapes: tuple[str, ...] = tuple(s for s in SHAPES if s not in NOVEL_SHAPES)
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[str, ...] = tuple(SIZES)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    motions: tuple[str, ...] = MOTIONS

    def __post_init__(self):
        _check("shapes", self.shapes, SHAPES)
        _check("colours", self.colours, COLOURS)
        _check("sizes", self.sizes, SIZES)
        _check("backgrounds", self.backgrounds, BACKGROUNDS)
        _check("motions", self.motions, MOTIONS)
        if self.split not in ("train", "heldout", "all"):
            raise ValueError(f"split={self.split!r} is none of train, heldout, all")
        if min(self.one, self.two, self.behind) < 0 or self.one + self.two + self.behind <= 0:
            raise ValueError("one, two and behind are weights: none below 0, one above")
        if self.behind and not {"left", "right"} & set(self.motions):
            raise ValueError("a sprite goes behind the wall to the left or right: add one of these to motions")

    def keys(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Keys:
        """The randomness of these clips. Splits and weights do not enter it, names are drawn by it."""
        return keys(self.seed, "sprites", indices, device=str(device))

    def scenes(self, indices: Sequence[int]) -> list[Scene]:
        return [self._scene(draws) for draws in self.keys(indices).fold("scene").uniform(8).tolist()]

    def scene(self, index: int) -> Scene:
        return self.scenes([index])[0]

    def caption(self, scene: Scene, index: int) -> str:
        """One of the many ways to say the scene."""
        return captions.caption(scene, captions.key(self.seed, index))

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self.caption(scene, index) for scene, index in zip(self.scenes(indices), indices, strict=True)]

    def clip(self, index: int) -> tuple[Scene, str]:
        scene = self.scene(index)
        return scene, self.caption(scene, index)

    def story(self, index: int, scenes: int = 3) -> Story:
        """A story: character 0 opens and ends it; in between others play, and sometimes (1 in 4) character 0 again."""
        draws = self.keys([index]).fold("story").uniform(scenes, 8)[0].tolist()
        last = scenes - 1
        characters = [0 if n in (0, last) or (n > 1 and draws[n][7] < 0.25) else 1 + (n - 1) % 3 for n in range(scenes)]
        cast: dict[int, Sprite] = {}
        played = []
        for character, draw in zip(characters, draws, strict=True):
            options = self._triples("one")
            if character in cast:
                known = cast[character]
                options = [t for t in options if (t[0], t[1]) == (known.shape, known.colour)]
                size = known.size
            else:
                others = cast.values()
                options = [t for t in options if all(t[0] != o.shape and t[1] != o.colour for o in others)]
                size = _pick(self.sizes, draw[1])
            if not options:
                raise ValueError("a story needs four characters of different shapes and colours: allow more of both")
            shape, colour, motion = _pick(options, draw[0])
            cast.setdefault(character, Sprite(shape, colour, size, motion))
            played.append(Scene(_pick(self.backgrounds, draw[2]), (Sprite(shape, colour, size, motion),)))
        return Story(tuple(played), tuple(characters))

    def story_captions(self, story: Story, index: int, recall: bool = True) -> list[str]:
        """One caption per scene. With `recall`, who comes for the first time is introduced as "the first one", "the
        second one", …, and later only called so: what it looks like has to be remembered."""
        return captions.story_captions(story, captions.key(self.seed, index), recall)

    def _scene(self, draws: list[float]) -> Scene:
        of_kind, of_background, of_first, of_second, *of_sizes = draws
        kind = _pick(KINDS, of_kind, (self.one, self.two, self.behind))
        triples = self._triples(kind)
        first = _pick(triples, of_first)
        cast = [first]
        if kind == "two":
            others = [t for t in triples if t[0] != first[0] and t[1] != first[1]]
            if not others:
                raise ValueError("two sprites differ in shape and colour: allow more shapes or colours")
            cast.append(_pick(others, of_second))
        # a big sprite could not both hide behind the wall and show itself whole beside it
        sizes = ("small",) if kind == "behind" else self.sizes
        sprites = tuple(Sprite(*t[:2], _pick(sizes, u), t[2]) for t, u in zip(cast, of_sizes, strict=False))
        return Scene(_pick(self.backgrounds, of_background), sprites, kind)

    def _triples(self, kind: str) -> list[tuple[str, str, str]]:
        motions = tuple(m for m in self.motions if kind != "behind" or m in ("left", "right"))
        return _triples(self.shapes, self.colours, motions, self.split)


def render(world: World, indices: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The clips `[B, T, 3, size, size]`, float32 in -1…1."""
    return render_scenes(world, world.scenes(indices), world.keys(indices, device))


def render_story(world: World, indices: Sequence[int], scenes: int = 3, device: torch.device | str = "cpu") -> Tensor:
    """The stories `[B, scenes · T, 3, size, size]`. A character keeps its exact size in all of its scenes."""
    stories = [world.story(index, scenes) for index in indices]
    own = world.keys(indices, device)
    cast_BC = own.fold("cast").uniform(4)
    videos = []
    for n in range(scenes):
        who_B = torch.tensor([story.characters[n] for story in stories], device=device)
        radius_B2 = cast_BC.gather(1, who_B[:, None]).expand(-1, 2)
        videos.append(render_scenes(world, [s.scenes[n] for s in stories], own.fold("scenes").fold(n), radius_B2))
    return torch.cat(videos, dim=1)


def render_scenes(world: World, scenes: Sequence[Scene], own: Keys, radius: Tensor | None = None) -> Tensor:
    """The scenes `[B, T, 3, size, size]`, placed by the draws of `own`; `radius [B, 2]` in 0…1 fixes its jitter."""
    jitter_B2 = own.fold("radius").uniform(2) if radius is None else radius
    place = own.fold("place").uniform(PLACES, 2, 8).double()
    video = jitter_B2.new_empty(len(scenes), world.frames, 3, world.size, world.size)
    for kind in KINDS:
        rows = [n for n, scene in enumerate(scenes) if scene.kind == kind]
        for part in (rows[n : n + 8] for n in range(0, len(rows), 8)):  # a few at a time stay in the processor's cache
            at = torch.tensor(part, device=video.device)
            video[at] = _clips(world, kind, [scenes[n] for n in part], place[at], jitter_B2[at])
    return video


def _clips(world: World, kind: str, scenes: list[Scene], draws: Tensor, jitter_B2: Tensor) -> Tensor:
    """The clips of scenes of one kind `[B, T, 3, size, size]`: the background, then the sprites, then the wall."""
    device = draws.device
    cast = [sprite for scene in scenes for sprite in scene.sprites]
    each = len(cast) // len(scenes)
    shape_N = torch.tensor([SHAPES.index(sprite.shape) for sprite in cast], device=device)
    motion_N = torch.tensor([MOTIONS.index(sprite.motion) for sprite in cast], device=device)
    size_N = torch.tensor([SIZES[sprite.size] for sprite in cast], device=device)
    radius_N = size_N * (1 + JITTER * (2 * jitter_B2[:, :each].reshape(-1) - 1))
    extent_N4 = torch.tensor(EXTENTS, device=device)[shape_N] * radius_N[:, None]
    draws_NK = draws[:, : PLACES if kind == "two" else 1, :each].transpose(1, 2).flatten(0, 1)
    tracks = _tracks(motion_N, extent_N4, draws_NK, world.frames, kind)
    track_NT2 = _apart(tracks, radius_N) if kind == "two" else tracks[:, 0]
    cover = coverage(shape_N, radius_N, track_NT2, world.size).unflatten(0, (-1, each))
    colour = _rgb([COLOURS[sprite.colour] for sprite in cast], device).unflatten(0, (-1, each))
    clips = _rgb([BACKGROUNDS[scene.background] for scene in scenes], device)[:, None, :, None, None]
    for n in range(each):
        clips = clips + cover[:, n, :, None] * (colour[:, n, None, :, None, None] - clips)
    if kind == "behind":
        wall = _rgb([WALL], device)[0][:, None, None]
        clips = clips + _wall(draws[:, 0, 0, 6:], world.size) * (wall - clips)
    return clips


# -- where things are ------------------------------------------------------------------------------------------------


def _tracks(motion_N: Tensor, extent_N4: Tensor, draws: Tensor, frames: int, kind: str) -> Tensor:
    """Centres `[N, K, T, 2]` as (x, y down). A motion is a path; the path is put anywhere it stays inside the frame."""
    u = draws[..., None].unbind(2)  # eight of [N, K, 1]
    t = torch.linspace(0, 1, frames, dtype=torch.float64, device=draws.device) if frames > 1 else draws.new_zeros(1)
    zero = torch.zeros_like(u[0] * t)
    room_N2 = 64 - 2 * MARGIN - extent_N4.double()[:, :2] - extent_N4.double()[:, 2:]
    travel = room_N2[:, None, :1] if kind == "behind" else 20 + 16 * u[2]
    phase = (2 + u[3]) * t + u[4]  # of two to three bounces
    height = (16 + 10 * u[2]) * 4
    phase = phase - phase.floor()
    reach = 10 + (2 if kind == "two" else 6) * u[2]
    turned = 2 * math.pi * (torch.where(u[5] < 0.5, 1.0, -1.0) * (0.9 + 0.3 * u[3]) * t + u[4])
    paths = {
        "left": (-travel * t, zero),
        "right": (travel * t, zero),
        "up": (zero, -travel * t),
        "down": (zero, travel * t),
        "bounce": (4 * (u[6] - 0.5) * t, -height * phase * (1 - phase)),
        "orbit": (reach * turned.cos(), reach * turned.sin()),
        "still": (zero, zero),
    }
    rows = torch.arange(len(motion_N), device=draws.device)
    path = torch.stack([torch.stack([x + zero, y + zero], -1) for x, y in map(paths.__getitem__, MOTIONS)])[
        motion_N, rows
    ]
    low = path.amin(2, keepdim=True)
    free = (room_N2[:, None, None] - (path.amax(2, keepdim=True) - low)).clamp(min=0)
    start = MARGIN + extent_N4.double()[:, None, None, :2] + free * draws[:, :, None, :2]
    return ((path - low + start) * 1024).round().float() / 1024  # hides the last bits of cos and sin


def _apart(tracks: Tensor, radius_N: Tensor) -> Tensor:
    """Of K places of two sprites `[2 B, K, T, 2]`, the first that keeps them apart or the best: `[2 B, T, 2]`."""
    pair = tracks.unflatten(0, (-1, 2))
    offset = pair[:, 0] - pair[:, 1]
    distance = (offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1]).sqrt()
    gap_BKT = distance - 1.2 * radius_N.unflatten(0, (-1, 2)).sum(1)[:, None, None]
    order = torch.arange(gap_BKT.shape[1], device=tracks.device)
    score_BK = (gap_BKT.amin(-1).clamp(-16, 1) - (gap_BKT < 0).sum(-1) * 32) * 64 - order
    best_B = score_BK.argmax(1)
    return pair[torch.arange(len(pair), device=tracks.device), :, best_B].flatten(0, 1)


def _wall(draws_B2: Tensor, size: int) -> Tensor:
    """How much of each column the wall covers `[B, 1, 1, 1, size]`: 21 to 24 wide, in the middle."""
    x = (torch.arange(size, device=draws_B2.device) + 0.5) * (64 / size)
    middle = 31 + 2 * draws_B2[:, 0, None].float()
    half = 10.5 + 1.5 * draws_B2[:, 1, None].float()
    return ((half - (x - middle).abs()) * (size / 64) + 0.5).clamp(0, 1)[:, None, None, None]


# -- what things look like -------------------------------------------------------------------------------------------


def coverage(shape_N: Tensor, radius_N: Tensor, track_NT2: Tensor, size: int) -> Tensor:
    """How much of each pixel a sprite covers `[N, T, size, size]`; distances are only taken in a patch around it."""
    scale = size / 64
    side = min(size, math.ceil(2 * (1 + JITTER) * SIZES["big"] * max(map(max, EXTENTS)) * scale) + 4)
    corner = (track_NT2 * scale - side / 2).floor().clamp(0, size - side)
    pixel = torch.arange(side, device=track_NT2.device)
    at_NTP2 = (corner[:, :, None] + (pixel + 0.5)[:, None]) / scale - track_NT2[:, :, None]
    at_NTP2 = at_NTP2 / radius_N[:, None, None, None]
    cover = track_NT2.new_zeros(*track_NT2.shape[:2], side, side)
    for number in shape_N.unique().tolist():
        rows = (shape_N == number).nonzero()[:, 0]
        x, y = at_NTP2[rows, :, None, :, 0], at_NTP2[rows, :, :, None, 1]
        distance = DISTANCES[SHAPES[number]](x, y) * (radius_N[rows, None, None, None] * scale)
        cover[rows] = (0.5 - distance).clamp(0, 1)
    first = (corner[..., 1] * size + corner[..., 0]).long()
    index = first[..., None] + (pixel[:, None] * size + pixel).flatten()
    canvas = cover.new_zeros(*cover.shape[:2], size * size)
    return canvas.scatter(2, index, cover.flatten(2)).unflatten(2, (size, size))


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return _length(x, y) - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y, 0.75**0.5 * x.abs() - 0.5 * y) - 0.675


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Mirrored at two lines into one half of one of the five points; then the distance to that point's edge."""
    cos, sin, point, notch = 0.8090169943749475, 0.5877852522924731, 1.32, 0.5
    x, y = x.abs(), -y
    fold = 2 * (cos * x - sin * y).clamp(min=0)
    x, y = x - fold * cos, y + fold * sin
    fold = 2 * (-cos * x - sin * y).clamp(min=0)
    x, y = (x + fold * cos).abs(), y + fold * sin - point
    edge_x, edge_y = notch * sin, notch * cos - 1
    along = ((x * edge_x + y * edge_y) / (edge_x * edge_x + edge_y * edge_y)).clamp(0, point)
    return _length(x - edge_x * along, y - edge_y * along) * torch.sign(y * edge_x - x * edge_y)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - 1.1, torch.minimum(x, y) - 0.4)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_length(x, y) - 0.8).abs() - 0.26


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two half discs on a square that stands on its corner (its side is 2**-0.5 times the scale)."""
    scale = 1.75
    x, y = x.abs() / scale, 0.54 - y / scale
    disc = _length(x - 0.25, y - 0.75) - 0.125**0.5
    along = (0.5 * (x + y)).clamp(min=0)
    point = torch.minimum(_length(x, y - 1), _length(x - along, y - along)) * torch.sign(x - y)
    return torch.where(x + y > 1, disc, point) * scale


# distances to the outline in radii, negative inside, y down; and how far each shape reaches: left, up, right, down
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
}
EXTENTS = (
    (1.0, 1.0, 1.0, 1.0),
    (0.88, 0.88, 0.88, 0.88),
    (1.17, 1.35, 1.17, 0.68),
    (1.26, 1.32, 1.26, 1.07),
    (1.1, 1.1, 1.1, 1.1),
    (1.06, 1.06, 1.06, 1.06),
    (1.06, 0.99, 1.06, 0.95),
)


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()


def _rgb(colours: list[Colour], device: torch.device) -> Tensor:
    return torch.tensor(colours, dtype=torch.float32, device=device) / 127.5 - 1


# -- choosing --------------------------------------------------------------------------------------------------------


@cache
def _triples(shapes: tuple[str, ...], colours: tuple[str, ...], motions: tuple[str, ...], split: str):
    every = [(s, c, m) for s in shapes for c in colours for m in motions]
    allowed = [t for t in every if split == "all" or heldout(*t) == (split == "heldout")]
    if not allowed:
        raise ValueError(f"no triple of {shapes}, {colours}, {motions} is in the split {split!r}: allow more of them")
    return allowed


def _check(field: str, names: Sequence[str], known: Iterable[str]) -> None:
    if not names or not set(names) <= set(known):
        raise ValueError(f"{field}={names}: name at least one of {', '.join(known)}, and nothing else")


def _pick(options: Sequence[T], u: float, weights: Sequence[float] | None = None) -> T:
    """The option a uniform number in [0, 1) falls on."""
    if weights is None:
        return options[int(u * len(options))]
    u *= sum(weights)
    for option, weight in zip(options, weights, strict=True):
        if u < weight:
            return option
        u -= weight
    return next(option for option, weight in zip(reversed(options), reversed(weights), strict=True) if weight > 0)
