"""What each part of one-step distillation is good for: students that differ in one thing, trained and compared.

python -m kinema.ablations sprites-ursa runs/ablations --jobs 4 --n 256

Every student is a run of `sprites:ursa_ablation` in a folder of its knob's name; those that are there go on or are left
as they are. So the command can be repeated, and `--knobs` can be fewer. The table, with the teacher at 25 steps, and
the curves of all runs are in `report.html`.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kinema.errors import UserError
from kinema.recipes.sprites_ursa import KNOBS, ablation


def ablate(
    teacher: str,
    folder: Path,
    knobs: Sequence[str],
    jobs: int,
    n: int,
    device: str,
    options: Sequence[str],
    graph: bool = False,
    starts: int = 16,
) -> None:
    """Trains the students of `knobs`, `jobs` at a time, and compares them on `n` captions.

    `options` are of the recipe; `graph` records as CUDA graphs the turns of those that can be. Raises UserError for the
    first that fails; what the others trained stays.
    """
    kinema = [sys.executable, "-m", "kinema"]

    def trained(knob: str) -> int:
        (folder / knob).mkdir(parents=True, exist_ok=True)
        turns = ablation(knob, teacher=teacher).objective.turns()
        recorded = graph and all(turn.decides is not None for turn in turns)
        words = ["train", "sprites:ursa_ablation", "--knob", knob, "--teacher", teacher, *options]
        with (folder / knob / "train.log").open("a") as log:
            words += [
                "--out",
                str(folder / knob),
                "--device",
                device,
                *(["--run.plan.graph", "true"] if recorded else []),
            ]
            return subprocess.run([*kinema, *words], stdout=log, stderr=log, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        codes = dict(zip(knobs, pool.map(trained, knobs), strict=True))
    if failed := [knob for knob, code in codes.items() if code]:
        raise UserError(f"{', '.join(failed)} failed; see {folder / failed[0] / 'train.log'}, and run this again")
    words = ["evaluate", *(str(folder / knob) for knob in knobs), "--teacher", teacher, "--teacher-steps", "25"]
    words += ["--n", str(n), "--out", str(folder / "compared"), "--device", device, "--jobs", str(jobs)]
    words += ["--starts", str(starts)]
    subprocess.run([*kinema, *words], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m kinema.ablations")
    parser.add_argument("teacher")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--knobs", default=",".join(KNOBS))
    parser.add_argument("--jobs", type=int, default=1, help="students that are trained at once")
    parser.add_argument("--n", type=int, default=256, help="captions")
    parser.add_argument("--starts", type=int, default=16, help="videos of a caption, for diversity")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--graph", action="store_true", help="CUDA graphs, see run.plan.graph")
    args, options = parser.parse_known_args()
    try:
        ablate(
            args.teacher,
            args.folder,
            args.knobs.split(","),
            args.jobs,
            args.n,
            args.device,
            options,
            args.graph,
            args.starts,
        )
    except UserError as error:
        sys.exit(f"kinema.ablations: {error}")
