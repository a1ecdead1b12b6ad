"""Videos of fixed prompts with fixed noise while a run trains, so that one can watch the same clips getting better."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.data.clips import fitted
from kinema.data.video import read_video, sheet, write_video
from kinema.errors import UsageError
from kinema.models.cogvideox.spec import CogVideoX
from kinema.run import Run
from kinema.training.world import World


def images(run: Run) -> Tensor | None:
    """The first frames `[B, 3, H, W]` in [-1, 1] that the previews continue, in the size of the run's videos."""
    p, files = run.pipeline, run.preview.images
    if p is None or not files:
        return None
    return torch.cat([fitted(read_video(Path(file), frames=1), p.height, p.width) for file in files])


def check(run: Run) -> None:
    """UsageError, before anything is trained, if previews lack the images that the learning network continues; what
    is wrong with a file is said then, too."""
    if not run.preview.every:
        return
    learning = [role.spec for role in run.objective.roles().values() if role.optim is not None]
    needed = any(isinstance(spec, CogVideoX) and spec.dimensions.image_channels for spec in learning)
    if needed and not run.preview.images:
        raise UsageError("this run learns to continue an image, but its previews have none; set run.preview.images")
    images(run)


def write_preview(path: Path, run: Run, spec: Any, denoiser: Any, world: World) -> None:
    """Rank 0 writes `path`.mp4, all previews side by side, and `path`.png, a sheet of their frames."""
    assert run.pipeline is not None
    studio = run.pipeline.open(world.device)
    videos = studio.videos(spec, denoiser, run.preview.prompts, run.seed, images=images(run))
    if world.rank:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path.with_suffix(".mp4"), torch.cat(list(videos), dim=-1), run.pipeline.fps)
    sheet(videos, run.preview.prompts, path.with_suffix(".png"))
