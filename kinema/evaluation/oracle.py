"""Reads videos of `sprites` back into shapes, colours, sizes and motions, with no network and no look at captions.

What is measured, and how, is in `measuring.py`; here it gets its names. Lengths are in 64ths of the frame.

Shapes: B videos, T frames, K = 2 objects, P the side of a normalized mask.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.data.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Story
from kinema.evaluation.measuring import Measured, measure, palette

OTHER = "other"  # a motion that none of the known ones fits
STRANGE = 3.0, 5.0  # a track that misses all motions by half its spread, within these, is some other motion


@dataclass(frozen=True, eq=False)
class Seen:
    """An object: what it is called, how sure that is (0…1 per attribute), and the measurements behind the names."""

    shape: str
    colour: str
    size: str
    motion: str
    confidence: dict[str, float]
    rgb: tuple[float, float, float]  # 0…1
    radius: float  # of this shape; compare `scenes.SIZES`
    misfit: float  # root mean square distance of the track from the best fitting motion
    steadiness: float  # 1 if the mask looks the same in all frames, 0 if it has nothing to do with its average
    # from the first third to the last: distance of "colour" (0…1), "size" (log radius), "shape"
    drift: dict[str, float]
    track: Tensor  # [T, 2] x and y, nan where it is not visible
    area: Tensor  # [T]
    mask: Tensor  # [P, P] averaged over time, centred, scaled to equal area


@dataclass(frozen=True, eq=False)
class Reading:
    background: str
    confidence: float  # in the background
    rgb: tuple[float, float, float]  # of the background, 0…1
    objects: tuple[Seen, ...]  # at most two, the one that covers more first
    wall: bool
    hidden: bool  # the first object vanished and came back
    flicker: float  # standard deviation over time of the median pixel, 0…1


@dataclass(frozen=True)
class Resemblance:
    """How a character that returns in `scene` compares to its first appearance; distances as in `Seen.drift`."""

    scene: int
    same: bool  # shape, colour and size are read as before
    colour: float
    size: float
    shape: float


def read(videos: Tensor, known: Sequence[str] = SHAPES) -> list[Reading]:
    """Readings of `[B, T, 3, H, W]` in -1…1, of any length and resolution; only `known` shapes are considered."""
    parts = (videos[n : n + 4] for n in range(0, len(videos), 4))  # few at a time stay in the processor's cache
    return [reading for part in parts for reading in _readings(measure(part, tuple(known)))]


def features(videos: Tensor) -> Tensor:
    """What is continuous in the readings, `[B, 34]` float64: the space `frechet.distance` compares videos in.

    Colours, presence, size, likeness to each shape, misfit of each motion, place, steadiness; background and wall.
    """
    return torch.cat([_features(measure(part, SHAPES)) for part in videos.split(4)])


def look(videos: Tensor) -> tuple[list[Reading], Tensor]:
    """Both `read` and `features` of videos, measured once."""
    parts = [measure(videos[n : n + 4], SHAPES) for n in range(0, len(videos), 4)]
    return [reading for part in parts for reading in _readings(part)], torch.cat([_features(part) for part in parts])


def persistence(readings: Sequence[Reading], story: Story) -> list[Resemblance]:
    """Every return of a character of the story against its first appearance; one reading per scene, in order."""
    firsts = [(story.characters.index(character), n) for n, character in enumerate(story.characters)]
    return [_resemblance(n, readings[first].objects, readings[n].objects) for first, n in firsts if first < n]


def _resemblance(scene: int, before: tuple[Seen, ...], now: tuple[Seen, ...]) -> Resemblance:
    if not before or not now:  # who is not there resembles nobody
        return Resemblance(scene, False, 1.0, 1.0, 1.0)
    a, b = before[0], now[0]
    same = len(before) == len(now) and (a.shape, a.colour, a.size) == (b.shape, b.colour, b.size)
    return Resemblance(
        scene, same, math.dist(a.rgb, b.rgb), abs(math.log(a.radius / b.radius)), _unlike(a.mask, b.mask)
    )


def _unlike(a: Tensor, b: Tensor) -> float:
    """0 for equal masks, 1 for masks that share nothing."""
    return float((a - b).square().sum() / (a.square().sum() + b.square().sum()).clamp(min=1e-6))


# -- naming ----------------------------------------------------------------------------------------------------------


def _readings(m: Measured) -> list[Reading]:
    sure = presence = m.presence.clamp(0, 1)
    grounds = (-_distances2(m.ground, list(BACKGROUNDS.values())) / 0.02).softmax(-1)
    colours = (-_distances2(m.rgb, list(COLOURS.values())) / 0.03).softmax(-1) * sure[..., None]
    shapes = (m.likeness / 0.04).softmax(-1) * sure[..., None] * m.likeness.amax(-1, keepdim=True).clamp(0, 1)
    shape = shapes.argmax(-1)
    radius = m.radius.gather(-1, shape[..., None])[..., 0]
    sizes = -(radius[..., None].log() - torch.tensor([*SIZES.values()], device=radius.device).log()).square() / 0.02
    sizes = sizes.softmax(-1) * sure[..., None]
    motions = (-m.misfit / 8).softmax(-1) * presence[..., None]
    spread = m.misfit[..., MOTIONS.index("still")].sqrt()
    strange = m.misfit.amin(-1).sqrt() > (spread / 2).clamp(*STRANGE)
    full = m.full[..., None].clamp(min=1)
    visible = m.area > 0.3 * full
    drift = _drift(m, visible)
    steadiness = _steadiness(m.mask_t, m.mask, m.area > 0.85 * full)
    readings = []
    for b, ground in enumerate(grounds):
        seen = []
        for k in range(int(m.exists[b].sum())):
            confidences = {"shape": shapes, "colour": colours, "size": sizes, "motion": motions}
            seen.append(
                Seen(
                    shape=SHAPES[int(shape[b, k])],
                    colour=list(COLOURS)[int(colours[b, k].argmax())],
                    size=list(SIZES)[int(sizes[b, k].argmax())],
                    motion=OTHER if strange[b, k] else MOTIONS[int(motions[b, k].argmax())],
                    confidence={name: float(values[b, k].max()) for name, values in confidences.items()},
                    rgb=_triple(m.rgb[b, k]),
                    radius=float(radius[b, k]),
                    misfit=float(m.misfit[b, k].min().sqrt()),
                    steadiness=float(steadiness[b, k]),
                    drift={name: float(values[b, k]) for name, values in drift.items()},
                    track=m.track[b, k].masked_fill(~visible[b, k, :, None], torch.nan),
                    area=m.area[b, k],
                    mask=m.mask[b, k],
                )
            )
        readings.append(
            Reading(
                background=list(BACKGROUNDS)[int(ground.argmax())],
                confidence=float(ground.max()),
                rgb=_triple(m.ground[b]),
                objects=tuple(seen),
                wall=bool(m.wall[b] > 0),
                hidden=bool(seen) and _vanished(visible[b, 0].tolist()),
                flicker=float(m.flicker[b]),
            )
        )
    return readings


def _vanished(visible: list[bool]) -> bool:
    """Seen, not seen, seen again."""
    if True not in visible:
        return False
    inside = visible[visible.index(True) : len(visible) - visible[::-1].index(True)]
    return False in inside


def _drift(m: Measured, visible: Tensor) -> dict[str, Tensor]:
    """Distances between the means of the first and of the last third of the time, each `[B, K]`."""
    frames = m.area.shape[-1]
    third = max(1, frames // 3)
    weights = [torch.zeros(frames, device=m.area.device) for _ in range(2)]
    weights[0][:third], weights[1][-third:] = 1, 1
    start, end = (w * visible / (w * visible).sum(-1, keepdim=True).clamp(min=1) for w in weights)
    colour = torch.einsum("bkt,bktc->bkc", end - start, m.rgb_t).norm(dim=-1)
    areas = [(w * m.area).sum(-1).clamp(min=1) for w in (start, end)]
    masks = [torch.einsum("bkt,bktpq->bkpq", w, m.mask_t) for w in (start, end)]
    apart = (masks[0] - masks[1]).square().sum((-1, -2))
    together = (masks[0].square() + masks[1].square()).sum((-1, -2)).clamp(min=1e-6)
    return {"colour": colour, "size": (areas[1] / areas[0]).log().abs() / 2, "shape": apart / together}


def _steadiness(mask_t: Tensor, mask: Tensor, whole: Tensor) -> Tensor:
    apart = (mask_t - mask[:, :, None]).square().sum((-1, -2)) / mask.square().sum((-1, -2)).clamp(min=1e-6)[..., None]
    return 1 - ((apart.clamp(max=1) * whole).sum(-1) / whole.sum(-1).clamp(min=1))


def _features(m: Measured) -> Tensor:
    first, second = m.exists.unbind(1)
    full = m.full[..., None].clamp(min=1)
    steady = _steadiness(m.mask_t, m.mask, m.area > 0.85 * full)
    log_radius = (m.full.clamp(min=1) / math.pi).sqrt().log()
    weight = (m.area > 0.5 * full).float()
    place = (m.track * weight[..., None]).sum(2) / weight.sum(2, keepdim=True).clamp(min=1) / 32 - 1
    spread = (m.area / full).clamp(max=2).std(-1, correction=0)
    one = [m.presence, log_radius, steady, spread]
    main = [
        m.rgb[:, 0],
        torch.stack([o[:, 0] for o in one], 1),
        m.likeness[:, 0],
        m.misfit[:, 0].sqrt().clamp(max=20) / 10,
    ]
    other = [m.rgb[:, 1], torch.ones_like(m.presence[:, 1:]), log_radius[:, 1:], place[:, 1]]
    parts = [torch.cat([*main, place[:, 0]], 1) * first[:, None], torch.cat(other, 1) * second[:, None]]
    return torch.cat([m.ground, m.wall[:, None], *parts], 1).double()


def _distances2(rgb: Tensor, colours: Sequence[tuple[int, int, int]]) -> Tensor:
    return (rgb[..., None, :] - palette(colours, rgb.device)).square().sum(-1)


def _triple(rgb: Tensor) -> tuple[float, float, float]:
    r, g, b = rgb.tolist()
    return r, g, b
