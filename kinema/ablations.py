"""What each part of one-step distillation is good for: students that differ in one thing, trained and compared.

python -m kinema.ablations sprites-ursa runs/ablations --jobs 4 --n 256

Every student is a run of `sprites:ursa_ablation` in a folder of its knob's name; those that are there go on or are left
as they are. So the command can be repeated, and `--knobs` can be fewer. The table, with the teacher at 25 steps, and
the curves of all runs are in `compared/report.html`, the scores at a glance in `compared/ablations.svg`.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kinema import config
from kinema.commands import count, device_of, execute, parser_of, several
from kinema.errors import UserError
from kinema.evaluation.dots import Dot, Panel, figure
from kinema.evaluation.evaluate import read_json
from kinema.recipes.sprites_ursa import KNOBS

RECIPE = "sprites:ursa_ablation"
SCORES = {"all three": "all three", "diversity": "diversity", "Fréchet distance": "Fréchet distance, less is better"}
BELOW = "95 % intervals; shaded: that of the first row; dashed: the teacher, {}; arrows: beyond the axis"


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

    `options` are of the recipe; `graph` records as CUDA graphs the turns of those that can be. Raises UserError for
    what no training could begin with, before one does, and for the first that fails; what the others trained stays.
    """
    kinema = [sys.executable, "-m", "kinema"]
    given = {knob: ["--knob", knob, "--teacher", teacher, *options] for knob in knobs}
    runs = {knob: config.configure(RECIPE, words) for knob, words in given.items()}

    def trained(knob: str) -> int:
        (folder / knob).mkdir(parents=True, exist_ok=True)
        recorded = graph and all(turn.decides is not None for turn in runs[knob].objective.turns())
        words = ["train", RECIPE, *given[knob]]
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
    if subprocess.run([*kinema, *words], check=False).returncode:
        raise UserError(f"{folder} has all students, but comparing them failed, as said above; run this again")
    path = folder / "compared" / "ablations.svg"
    path.write_text(drawn(read_json(folder / "compared" / "comparison.json")), encoding="utf-8")
    print(path)


def drawn(comparison: Mapping[str, Any]) -> str:
    """An SVG of `comparison.json`: `SCORES` of each student, that without a knob first, and of the teacher."""
    teacher = next(column for column in comparison["columns"] if column["teacher"])
    students = [column for column in comparison["columns"] if column["facts"] and not column["teacher"]]
    rows = {column["label"].rpartition(",")[0]: column["scores"] for column in students}
    names = sorted(rows, key=lambda name: name != "none")

    def dot(scores: Mapping[str, Any], score: str) -> Dot | None:
        found = scores.get(score, {"value": None})
        return None if found["value"] is None else Dot(found["value"], found["low"], found["high"])

    panels = []
    for score, title in SCORES.items():
        target = dot(teacher["scores"], score)
        dots = [dot(rows[name], score) for name in names]
        panels.append(Panel(title, dots, target and target.value, score == "all three"))
    return figure(names, panels, BELOW.format(teacher["label"]))


def main(words: list[str]) -> None:
    parser = parser_of("kinema.ablations", __doc__)
    parser.add_argument("teacher", metavar="TEACHER")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="options of the recipe come after it")
    parser.add_argument("--knobs", default=",".join(KNOBS), metavar="NAME,...", help="(default: all)")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="students that are trained at once")
    parser.add_argument("--n", type=count, default=256, help="captions")
    parser.add_argument("--starts", type=several, default=16, metavar="N", help="videos of a caption, for diversity")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--graph", action="store_true", help="CUDA graphs, see run.plan.graph")
    args, options = parser.parse_known_args(words)
    device_of(args.device)
    knobs = args.knobs.split(",")
    ablate(args.teacher, args.folder, knobs, args.jobs, args.n, args.device, options, args.graph, args.starts)


if __name__ == "__main__":
    sys.exit(execute(main))
