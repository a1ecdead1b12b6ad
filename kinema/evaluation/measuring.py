"""Measures what is in videos of `sprites`: colours, masks, tracks, and how near they are to all that the world knows.

Colours are told apart by the line from the background's colour to theirs, so anti-aliasing, blur and fading do not turn
one into another. Shapes are compared with rendered ones that went through the same measurements, motions by fitting all
that the world knows to the measured track. Lengths are in 64ths of the frame. `oracle.py` gives names to the numbers.

Shapes: B videos, T frames, K = 2 objects, C colours, S shapes, M motions, P the side of a normalized mask.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.data.scenes import COLOURS, MOTIONS, SHAPES, WALL
from kinema.data.sprites import coverage

P, REACH = 24, 1.9  # a mask is sampled P x P, out to REACH times the radius of a disc of its area
LEAST = 25.0  # pixels of 64 x 64 that an object covers on average, at least


@dataclass(frozen=True, eq=False)
class Measured:
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


def measure(videos: Tensor, known: tuple[str, ...]) -> Measured:
    """Of `[B, T, 3, H, W]` in -1…1, of any length and resolution; other shapes than the `known` ones are like none."""
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
    return Measured(
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
    from_wall = (image - palette([WALL], video.device)[0][:, None, None]).norm(dim=1)
    from_ground = (image - ground[:, :, None, None]).norm(dim=1)
    column = ((from_wall < from_ground) & (from_wall < 0.3)).float().mean(-2) > 0.85
    return (column & (column.float().mean(-1, keepdim=True) > 0.1)).float()


def _of_wall(offset: Tensor, wall_BW: Tensor, ground: Tensor) -> Tensor:
    """Pixels `[B, T, H, W]` of the wall or beside it; four columns on, of its colour mixed in: walls waver."""
    beside, near = (F.max_pool1d(wall_BW[:, None], n, 1, n // 2)[:, :, None] > 0 for n in (3, 9))
    _, off_line = _along(offset, palette([WALL], offset.device) - ground[:, None])
    return beside | near & (off_line[:, 0] < 0.01)


def _denoised(video: Tensor) -> Tensor:
    """Blurred if half of all neighbours differ, which is noise: the world is flat but for its edges."""
    level = (video[..., ::2, 1:] - video[..., ::2, :-1]).abs().flatten(1).median(1).values / 0.95
    for least, most, width in ((0.04, 0.25, 1.0), (0.25, torch.inf, 1.6)):
        rows = ((level > least) & (level <= most)).nonzero()[:, 0]
        if len(rows):
            video = video.index_copy(0, rows, blurred(video[rows], width))
    return video


def _colours_present(offset: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """The measured colours `[B, K, 3]` of the objects and whether there is such an object `[B, K]`.

    A pixel goes to the palette colour whose line from the background's colour it is nearest to.
    """
    frames = torch.linspace(0, offset.shape[1] - 1, min(11, offset.shape[1]), device=offset.device).round().long()
    some = offset[:, frames]
    scale = 4096 / some.shape[-1] / some.shape[-2]
    line = palette(list(COLOURS.values()), offset.device) - ground[:, None]  # [B, C, 3]
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
        soft = ((blurred(sharp, blur) - 0.2) / 0.6).clamp(0, 1)[:, None]
        centre, measured, _ = _follow(soft)
        masks.append(_normalized(soft, centre, measured.mean(-1)).mean(2)[:, 0])
    template = torch.stack(masks, 1).unflatten(0, (len(SHAPES), -1)).flatten(1, 2)
    return template.to(device), (area / radius.square()).unflatten(0, (len(SHAPES), -1)).mean(1).to(device)


def blurred(images: Tensor, width: float) -> Tensor:
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


def palette(colours: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    return torch.tensor(colours, dtype=torch.float32, device=device) / 255
