"""Reads videos of `sprites` back into shapes, colours, sizes and motions, with no network and no look at captions.

Colours are told apart by the line from the background's colour to theirs, so anti-aliasing, blur and fading do not turn
one into another. Shapes are compared with rendered ones that went through the same measurements, motions by fitting all
that the world knows to the measured track. Lengths are in 64ths of the frame.

Shapes: B videos, T frames, K = 2 objects, C colours, S shapes, M motions, P the side of a normalized mask.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.data.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, WALL, Story
from kinema.data.sprites import coverage

OTHER = "other"  # a motion that none of the known ones fits
P, REACH = 24, 1.9  # a mask is sampled P x P, out to REACH times the radius of a disc of its area
LEAST = 25.0  # pixels of 64 x 64 that an object covers on average, at least
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
    drift: dict[
        str, float
    ]  # from the first third to the last: distance of "colour" (0…1), "size" (log radius), "shape"
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
    return [reading for part in parts for reading in _readings(_measure(part, tuple(known)))]


def features(videos: Tensor) -> Tensor:
    """What is continuous in the readings, `[B, 34]` float64: the space `frechet.distance` compares videos in.

    Colours, presence, size, likeness to each shape, misfit of each motion, place, steadiness; background and wall.
    """
    return torch.cat([_features(_measure(part, SHAPES)) for part in videos.split(4)])


def look(videos: Tensor) -> tuple[list[Reading], Tensor]:
    """Both `read` and `features` of videos, measured once."""
    parts = [_measure(videos[n : n + 4], SHAPES) for n in range(0, len(videos), 4)]
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


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Measured:
    ground: Tensor  # [B, 3] the background's colour, 0…1
    flicker: Tensor  # [B]
    wall: Tensor  # [B] share of the columns
    exists: Tensor  # [B, K]
    presence: Tensor  # [B, K] how much of its colour is where the object is
    rgb: Tensor  # [B, K, 3]
    rgb_t: Tensor  # [B, K, T, 3]
    area: Tensor  # [B, K, T]
    full: Tensor  # [B, K] the area while nothing covers it
    track: Tensor  # [B, K, T, 2]
    mask_t: Tensor  # [B, K, T, P, P]
    mask: Tensor  # [B, K, P, P]
    likeness: Tensor  # [B, K, S] to each shape, at most 1
    radius: Tensor  # [B, K, S] if it is that shape
    misfit: Tensor  # [B, K, M] mean square distance of the track from each motion


def _measure(videos: Tensor, known: tuple[str, ...]) -> _Measured:
    video = _denoised((videos.float().nan_to_num() / 2 + 0.5).clamp(-4, 5))
    ground = video[..., ::2, ::2].movedim(2, 1).flatten(2).median(-1).values
    wall_BW = _wall_columns(video, ground)
    offset = video - ground[:, None, :, None, None]
    offset = offset * ~_of_wall(offset, wall_BW, ground)[:, :, None]
    rgb, exists = _colours_present(offset, ground)
    masks = _masks(offset, rgb - ground[:, None], exists)
    centre, area, presence = _follow(masks)
    full = area.quantile(0.9, dim=-1)
    mask_t = _normalized(masks, centre, full)
    whole = (area > 0.85 * full[..., None]) * exists[..., None]
    whole = whole / whole.sum(-1, keepdim=True).clamp(min=1)
    mask = torch.einsum("bkt,bktpq->bkpq", whole, mask_t)
    solid = (masks > 0.95).float()
    rgb_t = torch.einsum("bkthw,btchw->bktc", solid, offset) / solid.sum((-1, -2)).clamp(min=1)[..., None]
    template, unit_area = _templates(str(videos.device))
    likeness = 1 - (mask[:, :, None, None] - template).square().sum((-1, -2)).amin(-1) / template.square().sum(
        (-1, -2)
    ).mean(-1)
    names = torch.tensor([shape in known for shape in SHAPES], device=videos.device)
    return _Measured(
        ground=ground,
        flicker=videos.float().nan_to_num().std(1, correction=0).flatten(1).median(1).values / 2,
        wall=wall_BW.mean(-1),
        exists=exists,
        presence=presence,
        rgb=rgb,
        rgb_t=rgb_t + ground[:, None, None],
        area=area,
        full=full,
        track=centre,
        mask_t=mask_t,
        mask=mask,
        likeness=likeness.clamp(min=-1).masked_fill(~names, -1),
        radius=(full[..., None] / unit_area).sqrt(),
        misfit=_misfits(centre, whole),
    )


def _wall_columns(video: Tensor, ground: Tensor) -> Tensor:
    """Which columns are wall `[B, W]`: nearer to its colour than to the background's, all the way down."""
    frames = torch.linspace(0, video.shape[1] - 1, min(9, video.shape[1]), device=video.device).round().long()
    image = video[:, frames].median(1).values
    from_wall = (image - _palette([WALL], video.device)[0][:, None, None]).norm(dim=1)
    from_ground = (image - ground[:, :, None, None]).norm(dim=1)
    column = ((from_wall < from_ground) & (from_wall < 0.3)).float().mean(-2) > 0.85
    return (column & (column.float().mean(-1, keepdim=True) > 0.1)).float()


def _of_wall(offset: Tensor, wall_BW: Tensor, ground: Tensor) -> Tensor:
    """Pixels `[B, T, H, W]` of the wall or beside it; four columns on, of its colour mixed in: walls waver."""
    beside, near = (F.max_pool1d(wall_BW[:, None], n, 1, n // 2)[:, :, None] > 0 for n in (3, 9))
    _, off_line = _along(offset, _palette([WALL], offset.device) - ground[:, None])
    return beside | near & (off_line[:, 0] < 0.01)


def _denoised(video: Tensor) -> Tensor:
    """Blurred if half of all neighbours differ, which is noise: the world is flat but for its edges."""
    level = (video[..., ::2, 1:] - video[..., ::2, :-1]).abs().flatten(1).median(1).values / 0.95
    for least, most, width in ((0.04, 0.25, 1.0), (0.25, torch.inf, 1.6)):
        rows = ((level > least) & (level <= most)).nonzero()[:, 0]
        if len(rows):
            video = video.index_copy(0, rows, _blurred(video[rows], width))
    return video


def _colours_present(offset: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """The measured colours `[B, K, 3]` of the objects and whether there is such an object `[B, K]`.

    A pixel goes to the palette colour whose line from the background's colour it is nearest to.
    """
    frames = torch.linspace(0, offset.shape[1] - 1, min(11, offset.shape[1]), device=offset.device).round().long()
    some = offset[:, frames]
    scale = 4096 / some.shape[-1] / some.shape[-2]
    line = _palette(list(COLOURS.values()), offset.device) - ground[:, None]  # [B, C, 3]
    amount, off_line = _along(some, line)
    share = ((off_line <= off_line.amin(1, keepdim=True)) & (amount > 0.35) & (off_line < 0.1)).float()
    mass = share.sum((-1, -2)) * scale  # [B, C, t]
    centre = torch.stack([_mean_at(share, -1), _mean_at(share, -2)], -1)
    first = mass.mean(-1).argmax(1)
    rows = torch.arange(len(first), device=first.device)
    apart = (centre - centre[rows, first, None]).norm(dim=-1)
    both = (mass > LEAST / 2) & (mass[rows, first, None] > LEAST / 2)
    # what surrounds the first object or speckles it is a rim or a stain of it, not a second one
    elsewhere = ((apart > 5) & both).sum(-1) >= 0.5 * both.sum(-1).clamp(min=1)
    rest = mass.mean(-1) * elsewhere
    rest[rows, first] = 0
    second = rest.argmax(1)
    chosen = torch.stack([first, second], 1)
    size = torch.stack([mass.mean(-1)[rows, first], rest[rows, second]], 1)
    exists = (size > LEAST) & (size > 0.15 * size[:, :1])
    core = (share * (amount > 0.75)).gather(1, chosen[:, :, None, None, None].expand(-1, -1, *share.shape[2:])).float()
    rgb = torch.einsum("bkthw,btchw->bkc", core, some) / core.sum((-1, -2, -3)).clamp(min=1)[..., None]
    guess = line.gather(1, chosen[..., None].expand(-1, -1, 3))
    solid = (core.sum((-1, -2, -3)) * scale / len(frames) > LEAST / 4)[..., None]
    return torch.where(solid, rgb, guess) + ground[:, None], exists


def _along(offset: Tensor, line: Tensor) -> tuple[Tensor, Tensor]:
    """How far along each line a pixel is (0 background, 1 colour) and how far off it, squared `[B, n, T, H, W]`."""
    length = line.square().sum(-1).clamp(min=1e-4)[:, :, None, None, None]
    projected = torch.einsum("bnc,btchw->bnthw", line, offset)
    amount = (projected / length).clamp(0, 1.1)
    off_line = offset.square().sum(2)[:, None] + amount * (amount * length - 2 * projected)
    return amount, off_line


def _masks(offset: Tensor, line: Tensor, exists: Tensor) -> Tensor:
    """Soft masks of the objects `[B, K, T, H, W]`. A fifth of the contrast at either end is taken for noise."""
    amount, off_line = _along(offset, line)
    off_line = off_line.masked_fill(~exists[:, :, None, None, None], torch.inf)
    return ((amount - 0.2) / 0.6).clamp(0, 1) * ((off_line < off_line.flip(1)) & (off_line < 0.15))


def _follow(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centres `[B, K, T, 2]`, areas `[B, K, T]` and the share of the mask that is at the object `[B, K]`.

    It starts where the mask is densest and then takes the mean around the centre found before, so that what is far away
    does not pull.
    """
    height, width = masks.shape[-2:]
    total = masks.sum((-1, -2)) * 4096 / height / width
    coarse = F.adaptive_avg_pool2d(masks.flatten(0, 2)[:, None], 16)
    dense = F.avg_pool2d(coarse, 3, 1, 1).flatten(1).argmax(1).unflatten(0, masks.shape[:3])
    centre = torch.stack([dense % 16, dense // 16], -1) * 4 + 2.0
    x = (torch.arange(width, device=masks.device) + 0.5) * 64 / width
    y = (torch.arange(height, device=masks.device) + 0.5) * 64 / height
    reach = torch.full_like(total[..., 0], 18.0)
    area = total
    for _ in range(3):
        distance2 = (x - centre[..., 0:1]).square()[..., None, :] + (y - centre[..., 1:2]).square()[..., :, None]
        near = masks * (distance2 < reach[..., None, None, None].square())
        area = near.sum((-1, -2)) * 4096 / height / width
        centre = torch.stack([_mean_at(near, -1), _mean_at(near, -2)], -1)
        reach = (2.2 * (area.quantile(0.9, dim=-1) / math.pi).sqrt()).clamp(6, 30)
    return centre, area, area.sum(-1) / total.sum(-1).clamp(min=1)


def _mean_at(share: Tensor, dim: int) -> Tensor:
    """The mean place along `dim` of what is in an image, in 64ths of the frame."""
    profile = share.sum(-1 if dim == -2 else -2).float()
    place = (torch.arange(profile.shape[-1], device=share.device) + 0.5) * 64 / profile.shape[-1]
    return (profile * place).sum(-1) / profile.sum(-1).clamp(min=1e-3)


def _normalized(masks: Tensor, centre: Tensor, full: Tensor) -> Tensor:
    """The masks around their centres, scaled so that a disc of their area has radius 1: `[B, K, T, P, P]`."""
    u = torch.linspace(-REACH, REACH, P, device=masks.device)
    radius = (full / math.pi).sqrt().clamp(min=1)[..., None, None]
    x, y = (centre[..., None, n] + radius * u for n in (0, 1))
    grid = torch.stack([x[..., None, :].expand(*x.shape, P), y[..., :, None].expand(*y.shape, P)], -1) / 32 - 1
    sampled = F.grid_sample(masks.flatten(0, 2)[:, None], grid.flatten(0, 2), align_corners=False)
    return sampled[:, 0].unflatten(0, masks.shape[:3])


@cache
def _templates(device: str) -> tuple[Tensor, Tensor]:
    """Normalized masks of every shape, over sizes and blurs `[S, n, P, P]`, and their areas at radius 1 `[S]`."""
    radius = torch.tensor([5.5, 6.5, 8.0, 10.0]).repeat(len(SHAPES))
    shape = torch.arange(len(SHAPES)).repeat_interleave(4)
    track = torch.tensor([[32.0, 32.0], [32.25, 32.5], [32.5, 32.0], [31.75, 32.25]]).expand(len(radius), -1, -1)
    sharp = coverage(shape, radius, track, 64)
    area = sharp.sum((-1, -2)).mean(-1)
    masks = []
    for blur in (0.0, 1.0, 1.6):
        soft = ((_blurred(sharp, blur) - 0.2) / 0.6).clamp(0, 1)[:, None]
        centre, measured, _ = _follow(soft)
        masks.append(_normalized(soft, centre, measured.mean(-1)).mean(2)[:, 0])
    template = torch.stack(masks, 1).unflatten(0, (len(SHAPES), -1)).flatten(1, 2)
    return template.to(device), (area / radius.square()).unflatten(0, (len(SHAPES), -1)).mean(1).to(device)


def _blurred(images: Tensor, width: float) -> Tensor:
    """Gaussian blur of `[…, H, W]`."""
    if width == 0:
        return images
    weight = torch.exp(-0.5 * (torch.arange(-5.0, 6.0, device=images.device) / width).square())
    weight = (weight / weight.sum())[None, None]
    flat = F.pad(images.flatten(0, -3)[:, None], (5, 5, 5, 5), mode="replicate")
    return F.conv2d(F.conv2d(flat, weight[..., None]), weight[:, :, None]).view_as(images)


def _misfits(track: Tensor, weight: Tensor) -> Tensor:
    """Mean square distance of tracks `[B, K, T, 2]` from every motion `[B, K, M]`, at its best place, extent and phase.

    In the complex plane all motions are a place plus an amount times a curve of time, so each fit is one regression
    whose amount is then limited to what the motion may be.
    """
    curve, direction, least, most, motion = _motions(track.shape[2], str(track.device))
    z = torch.complex(track[..., 0], track[..., 1])
    z = z - (weight * z).sum(-1, keepdim=True)
    weight_n = weight[..., None, :]
    curve = curve - (weight_n * curve).sum(-1, keepdim=True)  # [B, K, n, T]
    power = (weight_n * curve.abs().square()).sum(-1)
    amount = (weight_n * curve.conj() * z[..., None, :]).sum(-1) / power.clamp(min=1e-6)
    # a curve may turn by any angle (orbit) or go in one direction only
    along = torch.where(direction == 0, amount.abs().to(z.dtype), amount * direction.conj()).real
    unit = torch.where(direction == 0, torch.polar(torch.ones_like(along), amount.angle()), direction)
    limited = along.clamp(min=least).clamp(max=most) * unit
    spread = (weight * z.abs().square()).sum(-1, keepdim=True)
    error = (spread + power * ((limited - amount).abs().square() - amount.abs().square())).clamp(min=0)
    return torch.stack([error[..., motion == m].amin(-1) for m in range(len(MOTIONS))], -1)


@cache
def _motions(frames: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Curves of time `[n, T]`, their direction (0: any), least and greatest extent, and which motion each is `[n]`."""
    t = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)
    rows: list[tuple[Tensor, complex, float, float, str]] = [(0 * t, 1, 0, 0, "still")]
    for name, direction in (("left", -1), ("right", 1), ("up", -1j), ("down", 1j)):
        rows.append((t, direction, 12, 64, name))
    for turns in torch.linspace(0.8, 1.35, 12).tolist():
        for sense in (1, -1):
            rows.append((torch.exp(2j * math.pi * sense * turns * t), 0, 7, 24, "orbit"))
    for periods in torch.linspace(1.75, 3.25, 13).tolist():
        for phase in torch.arange(12) / 12:
            in_arc = (periods * t + phase) % 1
            rows.append((4 * in_arc * (1 - in_arc), -1j, 8, 40, "bounce"))
    curves, directions, least, most, names = zip(*rows, strict=True)
    return (
        torch.stack([curve.to(torch.complex64) for curve in curves]).to(device),
        torch.tensor(directions, dtype=torch.complex64, device=device),
        torch.tensor(least, dtype=torch.float32, device=device),
        torch.tensor(most, dtype=torch.float32, device=device),
        torch.tensor([MOTIONS.index(name) for name in names], device=device),
    )


def _palette(colours: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    return torch.tensor(colours, dtype=torch.float32, device=device) / 255


# -- naming ----------------------------------------------------------------------------------------------------------


def _readings(m: _Measured) -> list[Reading]:
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


def _drift(m: _Measured, visible: Tensor) -> dict[str, Tensor]:
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


def _features(m: _Measured) -> Tensor:
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


def _distances2(rgb: Tensor, palette: Sequence[tuple[int, int, int]]) -> Tensor:
    return (rgb[..., None, :] - _palette(palette, rgb.device)).square().sum(-1)


def _triple(rgb: Tensor) -> tuple[float, float, float]:
    r, g, b = rgb.tolist()
    return r, g, b
