"""Videos of fixed prompts with fixed noise while a run trains, so that one can watch the same clips getting better."""

from pathlib import Path
from typing import Any

import torch

from kinema.data.video import sheet, write_video
from kinema.run import Run
from kinema.training.world import World


def write_preview(path: Path, run: Run, spec: Any, denoiser: Any, world: World) -> None:
    """Rank 0 writes `path`.mp4, all previews side by side, and `path`.png, a sheet of their frames."""
    assert run.pipeline is not None
    studio = run.pipeline.open(world.device)
    videos = studio.videos(spec, denoiser, run.preview.prompts, run.seed)
    if world.rank:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path.with_suffix(".mp4"), torch.cat(list(videos), dim=-1), run.pipeline.fps)
    sheet(videos, run.preview.prompts, path.with_suffix(".png"))
