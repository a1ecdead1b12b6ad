"""The command `kinema`: options in, one clear sentence out where something is wrong.

Everything heavy is imported by the command that uses it, so that help is there at once.
"""

import argparse
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kinema import config
from kinema.commands import Parser, count, counts, device_of, execute, several
from kinema.config import nearest
from kinema.errors import UsageError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kinema.pretrained import Pretrained

EXAMPLES = """\
examples:
  kinema demo                                         make, fine-tune, measure and show, in minutes, on a CPU
  kinema sample sprites-wan --prompt "a big red star moves left on a black background"
  kinema train sprites:learn --run.steps 400          a recipe with one value changed; again to go on after a stop
  kinema evaluate runs/sprites-learn --n 128          scores of what was trained
  kinema report runs/sprites-learn                    one HTML file to look at

MODEL is a name shipped with kinema, a folder in the Hub's diffusers layout, or a run's folder.
`kinema COMMAND --help` has the options of a command. --debug shows where an error comes from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, see `commands.execute`."""
    return execute(_run, argv)


# --- commands --------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    run = config.configure(args.recipe, args.rest, also=("--out", "--device"))
    device = device_of(args.device)
    out = args.out or folder_of(args.recipe)
    from kinema.training import world
    from kinema.training.trainer import Trainer

    device = world.join(device)
    stopped = Trainer(run, out, device).train()
    world.leave()
    if stopped is not None:
        return 128 + stopped  # as a shell counts, so that nobody takes what can go on for what is done
    if os.environ.get("RANK", "0") == "0":
        print(out)
    return 0


def launch(args: argparse.Namespace) -> None:
    from kinema.training import slurm

    name = args.name or args.recipe.replace(":", "-")
    folder = args.out or Path("runs") / name
    job = slurm.Job(
        name=name,
        nodes=args.nodes,
        gpus=args.gpus_per_node,
        processes=args.processes_per_node or 0,
        cpus=args.cpus_per_task,
        hours=args.hours,
        warning=args.warning,
        partition=args.partition,
        extra=slurm.options(args.slurm or []),
    )
    started = slurm.submit(args.recipe, args.rest, folder.resolve(), job, args.local)
    print(f"job {started.job_id} trains in {folder}; its output is in {folder / 'jobs'}")
    if args.local:
        results = started.results()
        print(results[0])


def plan(args: argparse.Namespace) -> int:
    laid_out_for = config.default(args.recipe, "processes")  # None of most recipes, which leave that to run.plan
    processes = args.processes or laid_out_for or 1
    told = ["--processes", str(processes)] if laid_out_for else []
    run = config.configure(args.recipe, [*args.rest, *told], also=("--processes", "--card"))
    print(config.dump(run))
    from kinema.training import budget

    if args.card not in (None, *budget.CARDS) and not re.fullmatch(r"\d+(\.\d+)?", args.card):
        known = [*budget.CARDS]
        raise UsageError(f"there is no card {args.card}{nearest(args.card, known)}; use {', '.join(known)} or its GiB")
    made = budget.budget(run, processes, lambda what: print(f"{what} ...", file=sys.stderr, flush=True))
    print(budget.table(made, run, args.card))
    return 0 if args.card is None or budget.fits(made, args.card) else 1


def prepare(args: argparse.Namespace) -> None:
    match = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if not match or not int(match[1]) < int(match[2]):
        raise UsageError(f"--part is {args.part}; of 8 processes the parts are 0/8 to 7/8")
    part = int(match[1]), int(match[2])
    if args.family is not None or args.verify or args.origin is not None:
        _prepare_videos(args, part)
        return
    if Path(args.source).exists() and ":" not in args.source:
        raise UsageError(f"{args.source} is a path; say with --for which family its videos are prepared for")
    preparation = config.preparation(args.source, args.rest, also=("--out", "--device", "--part"))
    device, out = device_of(args.device), args.out or folder_of(args.source)
    from kinema.data.shards import prepare

    with _progress("items", -(-preparation.header()["items"] // part[1])) as each:
        prepare(preparation, out, device, part, each)
    print(out)


def _prepare_videos(args: argparse.Namespace, part: tuple[int, int]) -> None:
    if args.rest:
        raise UsageError(f"prepare has no option {args.rest[0]} for videos; see kinema prepare --help")
    from kinema import intake

    if args.verify:
        print(intake.checked(args.out or Path(args.source), _progress))
        return
    if args.out is None:
        raise UsageError("prepare needs a folder to write; give it with -o DIR")
    if args.origin is not None:
        how = (args.origin, args.family, args.model, args.times, args.out, device_of(args.device), _progress)
        print(intake.converted(Path(args.source), *how))
        return
    target = intake.target_of(args.family, args.model, args.fps, args.compute, args.unconditional)
    cut = intake.cut_of(
        target, args.frames, args.seconds, args.size, args.aspects, args.segment, args.crop, args.upscale
    )
    from kinema.data.preparing import prepare

    where = (Path(args.source), args.captions, target, cut, args.out)
    report = prepare(*where, _devices(args), _progress, part, args.threads or 0)
    print(intake.told(report, args.out))


def _devices(args: argparse.Namespace) -> list["torch.device"]:
    """All GPUs, unless one is named; `--processes` of them, or so many processes on the CPU."""
    first = device_of(args.device)
    if args.processes is None and args.device != "auto":
        return [first]
    import torch

    count = args.processes or (torch.cuda.device_count() if first.type == "cuda" else 1)
    return [
        torch.device("cuda", i % torch.cuda.device_count()) if first.type == "cuda" else first for i in range(count)
    ]


def sample(args: argparse.Namespace) -> None:
    prompts = [*(args.prompt or []), *(read_lines(args.prompts) if args.prompts else [])]
    if prompts and args.stories:
        raise UsageError("--stories have their own texts; leave --prompt and --prompts out, or --stories")
    if not prompts and not args.stories:
        raise UsageError(
            "sample needs prompts, --prompt TEXT (as often as you like) or --prompts FILE, or else --stories FILE"
        )
    if args.stories and (unused := [name for name in ("frames", "image", "video") if getattr(args, name) is not None]):
        raise UsageError(f"--stories say themselves how long videos are and how they begin; leave out --{unused[0]}")
    if args.compute != "float32" and not args.stories:
        raise UsageError("--compute is of long videos; give --stories, or leave it out")
    if args.rounds and not args.video:
        raise UsageError("--rounds says how often a video is continued; name it with --video FILE")
    model = _model(args)
    if args.stories:
        return _tell(model, args)
    _warn_of_unknown_words(model, prompts)
    from kinema.data.video import sheet, write_video

    out = args.out or Path("runs") / f"sample-{model.name}"
    out.mkdir(parents=True, exist_ok=True)
    pipeline, began = model.studio.pipeline, time.monotonic()
    images = _image(args.image, pipeline.height, pipeline.width, len(prompts)) if args.image else None
    with _progress("videos", len(prompts)) as each:
        if args.video:
            videos = _continued(model, args, prompts)
        else:
            videos = model.studio.videos(
                model.spec, model.denoiser, prompts, args.seed, batch=args.batch, each=each, images=images
            )
    seconds = time.monotonic() - began
    for number, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
        write_video(out / f"{number:03d}-{words}.mp4", video, pipeline.fps, args.upscale)
    sheet(videos, prompts, out / "sheet.png")
    timing = {
        "model": model.name,
        "device": str(model.studio.codec.device),
        "seed": args.seed,
        **model.settings(),
        "videos": len(prompts),
        "seconds": round(seconds, 3),
        "frames_per_second": round(len(prompts) * pipeline.frames / seconds, 3),
        "out": str(out),
    }
    (out / "sample.json").write_text(json.dumps({**timing, "prompts": prompts}, indent=1), encoding="utf-8")
    print(json.dumps(timing))


def _tell(model: "Pretrained", args: argparse.Namespace) -> None:
    from kinema import storytelling

    stories, out = storytelling.read_stories(args.stories), args.out or Path("runs") / f"stories-{model.name}"
    scenes = [scene for story in stories for scene in story]
    _warn_of_unknown_words(model, [text for scene in scenes for text in (scene.text, scene.negative) if text])
    with _progress("passes", len(stories) * model.studio.pipeline.steps) as each:
        for file in storytelling.tell(model, stories, out, args.seed, args.upscale, args.compute, each):
            print(file)


def _continued(model: "Pretrained", args: argparse.Namespace, prompts: Sequence[str]) -> "Tensor":
    """What comes after a video, for each of the prompts."""
    from kinema.data.clips import fitted
    from kinema.data.video import read_video
    from kinema.diffusion.denoiser import TokenDenoiser

    if args.image or not isinstance(model.denoiser, TokenDenoiser):
        why = "give one of --image and --video" if args.image else f"{model.name} is no model of codes, which continue"
        raise UsageError(f"--video cannot be continued: {why}; a causal model makes long videos with kinema stream")
    p = model.studio.pipeline
    video = fitted(read_video(args.video), p.height, p.width).expand(len(prompts), -1, -1, -1, -1)
    return model.studio.continued(model.spec, model.denoiser, prompts, video, args.rounds or 1, args.seed)


def _image(path: Path, height: int, width: int, count: int) -> "Tensor":
    """The first frame of a video or an image file, scaled and cropped, `count` times."""
    from kinema.data.clips import fitted
    from kinema.data.video import read_video

    return fitted(read_video(path, frames=1), height, width).expand(count, -1, -1, -1)


def stream(args: argparse.Namespace) -> None:
    raw = str(args.out) == "-"
    if args.out and not raw and args.out.suffix != ".mp4":
        raise UsageError(f"--out {args.out} is neither an .mp4 file nor -, which is standard output; give one of them")
    _check_fast(args)
    if len(args.prompt) > 1:
        raise UsageError("a stream begins with one --prompt; give those that follow it as --switch FRAME:TEXT")
    prompt = args.prompt[0]
    frames, args.frames = args.frames, None  # of the stream, and not of the model's own videos
    model = _model(args)
    _warn_of_unknown_words(model, [prompt, *(words for _, words in args.switch)])
    from kinema.broadcast import broadcast

    fps = model.studio.pipeline.fps
    frames = 0 if args.endless else frames if args.seconds is None else max(1, round(args.seconds * fps))
    out = args.out or Path("runs") / f"stream-{model.name}.mp4"
    how = {name: getattr(args, name) for name in ("seed", "window", "sink", "context", "anew", *FAST)}
    broadcast(model, prompt, out, args.switch, frames, **how)


def bench(args: argparse.Namespace) -> None:
    from dataclasses import replace

    device = device_of(args.device)
    tiny = args.tiny or device.type == "cpu"
    from kinema.bench.measure import table
    from kinema.bench.stream import Streaming, stream, vae
    from kinema.bench.train import Training, training

    names = ("frames", "height", "width", "window", "sink", "videos", "dtype")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    path = args.path or "balanced"
    if args.graded_at_once is not None and args.what != "train":
        raise UsageError(f"bench {args.what} grades no rollouts; leave out --graded-at-once")
    if (args.fp8 or args.fp8_attention) and args.what in ("stream", "vae") and (args.what == "vae" or path == "plain"):
        raise UsageError("8 bits are of the fast paths of stream; leave --fp8 and --fp8-attention out")
    if args.what in ("stream", "vae"):
        eights = {"eight": args.fp8, "eight_attention": args.fp8_attention}
        settings = replace(
            Streaming.tiny() if tiny else Streaming(), **given, **eights, path=path, decode=not args.latents
        )
        result = (stream if args.what == "stream" else vae)(settings, device)
    else:
        if given or args.fp8 or args.fp8_attention or args.latents or args.path in ("fused", "balanced"):
            raise UsageError(f"bench {args.what} has a size of its own; leave out all options of streams")
        settings = Training(args.what, "tiny" if tiny else "full", path != "plain", args.repeats, args.graded_at_once)
        result = training(settings, device)
    print(json.dumps(result) if args.json else table(result))


def export(args: argparse.Namespace) -> None:
    if args.out is None:
        raise UsageError("export needs a folder to write; give it with --out DIR")
    import torch

    from kinema.exporting import export
    from kinema.pretrained import export_file

    dtype = getattr(torch, args.dtype)
    if args.out.suffix in (".pt", ".safetensors"):
        if args.layout not in (None, "ursa", "original") or args.adapters:
            raise UsageError(f"--out {args.out} is a file, of a URSA in its release's layout; for others give a folder")
        print(export_file(args.run, args.out, args.role, args.ema, dtype))
        return
    print(export(args.run, args.out, args.role, args.layout, args.ema, args.adapters, dtype))


def inspect(args: argparse.Namespace) -> int:
    from kinema.inspection import inspect

    found = inspect(args.path)
    print("\n".join(line for one in found for line in one.lines()))
    return 0 if all(one.whole for one in found) else 1


def evaluate(args: argparse.Namespace) -> None:
    captions = read_lines(args.captions) if args.captions else None
    if len(args.model) > 1 or args.teacher or args.teacher_steps or args.student_steps:
        return _compare(args, captions)
    if args.starts is not None:
        raise UsageError("--starts is for comparisons with a teacher; name one with --teacher, or leave --starts out")
    args.model = args.model[0]
    _check_fast(args)
    model = _model(args).with_window(args.window, args.sink)
    model = model.quickened(args.fp8, args.fp8_attention) if args.fast else model
    from kinema.evaluation import evaluate as evaluation

    captions, scenes = _asked(args, captions)
    assert scenes is not None, "of sprites only"
    out = args.out or Path("runs") / f"evaluate-{model.name}"
    with _progress("videos", len(captions)) as each:
        scores = evaluation.evaluate(model, captions, scenes, out, args.seed, args.batch, each, args.jobs)
    print(scores.table())
    print(out / "scores.json")


def _compare(args: argparse.Namespace, captions: Sequence[str] | None) -> None:
    """The models, in their steps or those asked for, beside their teacher in its own."""
    if set_ := [
        n for n in ("steps", "guidance", "frames", "window", "sink", *FAST) if getattr(args, n) not in (None, False)
    ]:
        raise UsageError(f"--{set_[0]} is for one model alone; here give --teacher-steps and --student-steps")
    device = device_of(args.device)
    from kinema.evaluation.compare import STARTS, compare
    from kinema.evaluation.summary import from_folder
    from kinema.pretrained import find, load, teacher_of

    captions, scenes = _asked(args, captions, sprites_only=False)
    teacher = load(args.teacher or teacher_of(args.model[0]), device)
    teachers = [teacher.with_settings(steps=n) for n in args.teacher_steps or (None,)]
    models = [load(model, device, not args.no_ema) for model in args.model]
    students = [model.with_settings(steps=n) for model in models for n in args.student_steps or (None,)]
    out = args.out or Path("runs") / f"compare-{models[0].name}"
    out.mkdir(parents=True, exist_ok=True)
    runs = {path.name: path for model in args.model if ((path := find(model)) / "metrics.jsonl").exists()}

    def each(label: str) -> None:
        print(label, file=sys.stderr)

    columns = compare(
        students, teachers, captions, scenes, out, args.seed, args.batch, each, runs, args.jobs, args.starts or STARTS
    )
    for column in columns:
        print(column.label, "  ".join(f"{name} {s.value:.3f}" for name, s in column.scores.items()), sep="\n  ")
    print(from_folder(out))


def _asked(
    args: argparse.Namespace, captions: Sequence[str] | None, sprites_only: bool = True
) -> tuple[Sequence[str], list | None]:
    """The captions to evaluate with and what they ask for; None if they are not of sprites and need not be."""
    from kinema.data.captions import parse
    from kinema.data.sprites import World
    from kinema.evaluation import evaluate as evaluation

    if captions is None:
        held_out = evaluation.HELD_OUT
        world = held_out if args.split == "heldout" else World(split=args.split, seed=held_out.seed)
        return evaluation.held_out(args.n, world)
    if not sprites_only and any(parse(caption) is None for caption in captions):
        print("not all captions are of sprites, so the oracle judges none of the videos", file=sys.stderr)
        return captions, None
    return captions, evaluation.understood(captions)


def probe(args: argparse.Namespace) -> None:
    model = _model(args)
    from kinema.evaluation import memory

    out = args.out or Path("runs") / f"probe-{model.name}"
    for scenes in args.scenes:
        with _progress("stories", args.n) as each:
            scores = memory.probe(
                model, scenes, args.n, out / f"{scenes:02d}", args.seed, args.batch, each, args.jobs, args.rendered
            )
        print(f"{scenes} scenes\n{scores.table()}")
    print(out)


def report(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder; give the folder of a run or of an evaluation")
    from kinema.evaluation.summary import from_folder

    print(from_folder(args.folder))


def doctor(args: argparse.Namespace) -> int:
    from kinema.doctor import examine

    return examine()


def demo(args: argparse.Namespace) -> None:
    device = device_of(args.device)
    from kinema.demo import demo

    demo(args.out, device, args.recipe, args.rest, args.videos, args.steps)


def folder_of(recipe: str) -> Path:
    """Where a recipe trains if nothing else is said."""
    return Path("runs") / recipe.replace(":", "-")


# --- what commands share ---------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank; UserError names the first byte that is not UTF-8."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a text file with one caption per line") from error
    try:
        lines = [line.strip() for line in data.decode().splitlines()]
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{path} is not UTF-8: byte {column} of line {line} is 0x{data[error.start]:02x}; save it as UTF-8, "
            f"for example with: iconv -f latin1 -t utf-8 {path} > {path.stem}-utf8{path.suffix}"
        ) from error
    if not any(lines):
        raise UserError(f"{path} has no captions; write one per line")
    return [line for line in lines if line]


def _model(args: argparse.Namespace) -> "Pretrained":
    device = device_of(args.device)
    from kinema.pretrained import load

    wanted = {name: getattr(args, name, None) for name in ("steps", "guidance", "frames", "height", "width")}
    return load(args.model, device, not args.no_ema).with_settings(**wanted)


FAST = ("fast", "fp8", "fp8_attention")


def _fast(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--fast",
        action="store_true",
        help="of a causal model: the fast paths, fused kernels and graphs on CUDA, a quick decoder",
    )
    p.add_argument("--fp8", action="store_true", help="with --fast: linear layers in 8-bit floating point")
    p.add_argument("--fp8-attention", action="store_true", help="with --fast: self-attention in 8-bit floating point")


def _check_fast(args: argparse.Namespace) -> None:
    if not args.fast and (args.fp8 or args.fp8_attention):
        raise UsageError("8 bits are of the fast paths; add --fast")


def _warn_of_unknown_words(model: "Pretrained", prompts: Sequence[str]) -> None:
    from kinema.models.text import unknown_words

    if found := unknown_words(model.studio.text.tokenizer, prompts):
        words = ", ".join(f"{word!r}{f' (nearest: {near})' if near else ''}" for word, near in found.items())
        print(f"{model.name} does not know {words}; it reads an unknown word in the place of each", file=sys.stderr)


@contextmanager
def _progress(what: str, total: int) -> Iterator:
    """Gives `each(done)`, which shows how many are finished, how fast, and the time left; lines without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not total:
        yield lambda done: None
        return
    console, began = Console(stderr=True), time.monotonic()
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, rate="")

        def each(done: int) -> None:
            rate = done / max(time.monotonic() - began, 1e-9)
            bar.update(task, completed=done, rate=f"{rate:.2f} {what}/s")
            if not console.is_terminal and done:
                print(
                    f"{done}/{total} {what}  {rate:.2f}/s  {(total - done) / max(rate, 1e-9):.0f} s left",
                    file=sys.stderr,
                )

        yield each


# --- options ---------------------------------------------------------------------------------------------------------


def _run(words: list[str]) -> int:
    parser, commands = _parser()
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in commands:
        raise UsageError(f"there is no command {command}{nearest(command, commands)}; use {', '.join(commands)}")
    args, rest = parser.parse_known_args(words)
    if args.command is None:
        if rest:
            raise UsageError(f"there is no option {rest[0]}; see kinema --help")
        parser.print_help()
        return 2
    if rest and args.command not in ("train", "plan", "launch", "prepare", "demo"):
        known = [option for action in commands[args.command]._actions for option in action.option_strings]
        word = rest[0].partition("=")[0]
        what = f"no option {word}{nearest(word, known)}" if word.startswith("-") else f"no use for {word!r}"
        raise UsageError(f"{args.command} has {what}; see kinema {args.command} --help")
    args.rest = rest
    return args.function(args) or 0


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser("kinema", description="Post-training for video generators.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"kinema {_version()}")
    parts = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands: dict[str, Parser] = {}

    def command(function, help: str, epilog: str = "") -> Parser:
        part = parts.add_parser(function.__name__, help=help, description=help[0].upper() + help[1:], epilog=epilog)
        part.set_defaults(function=function)
        commands[function.__name__] = part
        return part

    known, data = (
        "\n".join(f"  {name:31}{line}" for name, line in config.recipes(kind)) for kind in ("Run", "Preparation")
    )
    overrides = (
        f"recipes:\n{known}\n  package.module:function  any function of your own that returns a kinema Run\n\n"
        "Every field of the run can be overridden:\n"
        "  --run.steps 40   --run.objective.student.optim.lr 1e-4   --run.plan.compute bfloat16\n"
        "  --run.objective.times LogitNormal --run.objective.times.mean 0.5\n"
        "and so can the recipe's own parameters, as --NAME VALUE. Options of the command come after RECIPE."
    )
    p = command(
        train,
        "train what a recipe describes; the same command goes on after a stop",
        overrides + "\n\nSeveral processes, one for each GPU of a node:\n"
        "  torchrun --nproc-per-node 8 -m kinema train RECIPE --run.plan.replicate 2\n"
        "Several nodes: kinema launch",
    )
    p.add_argument("recipe", metavar="RECIPE", help="for example sprites:wan")
    p.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    _device(p)
    p = command(launch, "train on a Slurm cluster, in one job that requeues itself until all steps are done", overrides)
    p.add_argument("recipe", metavar="RECIPE", help="for example bench:wan_sft")
    p.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    p.add_argument("--name", help="of the job (default: the recipe's); the same name finds its own checkpoints")
    p.add_argument("--nodes", type=count, default=1, metavar="N", help="(%(default)s)")
    p.add_argument(
        "--gpus-per-node", type=_count_or_none, default=8, metavar="N", help="0 trains on CPUs (%(default)s)"
    )
    p.add_argument("--processes-per-node", type=count, metavar="N", help="(default: one for each GPU)")
    p.add_argument("--cpus-per-task", type=count, default=8, metavar="N", help="(%(default)s)")
    p.add_argument("--hours", type=float, default=24.0, help="of one turn in the queue (%(default)s)")
    p.add_argument(
        "--warning", type=count, default=180, metavar="S", help="seconds to save in at its end (%(default)s)"
    )
    p.add_argument("--partition", help="(default: the cluster's)")
    p.add_argument("--slurm", action="append", metavar="NAME=VALUE", help="further options of sbatch; repeatable")
    p.add_argument(
        "--local", action="store_true", help="start the processes here, without a cluster, and wait for them"
    )
    p = command(plan, "print a run, and the memory and work of its steps, before a GPU is taken", overrides)
    p.add_argument("recipe", metavar="RECIPE", help="for example bench:wan_sft")
    p.add_argument("--processes", type=count, metavar="N", help="of the job (what the recipe is laid out for, or 1)")
    p.add_argument(
        "--card", metavar="CARD", help="say whether it fits this GPU: H100, H200, ..., or GiB; exits with 1 if not"
    )

    p = command(
        prepare,
        "make the data that a recipe describes; the same command goes on after a stop",
        f"recipes:\n{data}\n  package.module:function  any function of your own that returns a kinema Preparation\n\n"
        "The recipe's own parameters are given as --NAME VALUE, after RECIPE.\n\n"
        "videos:\n"
        "  kinema prepare videos/ --captions captions.jsonl --for wan -o data/\n"
        "  kinema prepare data/ --verify                       read everything again\n"
        "  kinema prepare pairs.lmdb/ --from self_forcing --for wan --times 1,0.9375,0.8333,0.625 -o data/",
    )
    p.add_argument("source", metavar="SOURCE", help="a recipe, for example sprites:ode_pairs, or a folder of videos")
    p.add_argument("-o", "--out", type=Path, metavar="DIR", help="the data's folder (of a recipe: runs/RECIPE)")
    p.add_argument("--part", default="0/1", metavar="I/N", help="share the work out: make part I of N (from 0/N)")
    _device(p)
    _videos(p)

    p = command(sample, "make videos of prompts: an mp4 each, and a sheet of frames")
    _generator(p)
    p.add_argument("--prompt", action="append", metavar="TEXT", help="what to show; may be given several times")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="a UTF-8 text file with one prompt per line")
    p.add_argument(
        "--stories",
        type=Path,
        metavar="FILE",
        help="long videos: JSON, a list of stories, each a list of scenes' texts",
    )
    p.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="of long videos (%(default)s)")
    p.add_argument("--image", type=Path, metavar="FILE", help="the first frame, for image-to-video, causal and URSA")
    p.add_argument("--video", type=Path, metavar="FILE", help="a video whose last frames a model of codes continues")
    p.add_argument("--rounds", type=count, metavar="N", help="how often it is continued (default: once)")
    for name in ("frames", "height", "width"):
        p.add_argument(f"--{name}", type=count, metavar="N", help=f"{name} of a video (default: the model's)")
    p.add_argument("--upscale", type=count, default=1, metavar="N", help="repeat each pixel N times in the files")

    p = command(
        stream,
        "make one long video of a causal model, chunk by chunk",
        "examples:\n"
        '  kinema stream MODEL --prompt "a red star moves left" --switch "48:a blue star moves left" --seconds 12\n'
        '  kinema stream MODEL --prompt "a red star" --endless --out - | ffplay -f rawvideo -pixel_format rgb24 ...',
    )
    _generator(p, batch=False, out="an .mp4 file, or - for raw frames (default: runs/stream-MODEL.mp4)")
    p.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="what to show; may be empty")
    p.add_argument(
        "--switch",
        action="append",
        type=_switch,
        default=[],
        metavar="FRAME:TEXT",
        help="another prompt from the first chunk that begins with FRAME's latent frame or later; which frame that is "
        "stands in the line that is printed; may be given several times",
    )
    p.add_argument("--anew", action="store_true", help="have what was made seen anew under a new prompt")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--frames", type=count, metavar="N", help="how long (default: the model's)")
    length.add_argument("--seconds", type=_seconds, metavar="S", help="the same in seconds")
    length.add_argument("--endless", action="store_true", help="until Ctrl-C, or until nobody reads")
    for name in ("height", "width"):
        p.add_argument(f"--{name}", type=count, metavar="N", help=f"{name} of the video (default: the model's)")
    p.add_argument("--window", type=count, metavar="N", help="latent frames a chunk sees (default: the model's)")
    p.add_argument("--sink", type=_natural, metavar="N", help="of these, first frames of the video that always stay")
    p.add_argument("--context", type=count, metavar="N", help="make context anew from N latent frames for each chunk")
    _fast(p)

    p = command(
        evaluate,
        "score a model's videos with the sprites oracle; goes on where it was stopped",
        "students beside their teacher, in one report:\n"
        "  kinema evaluate STUDENT --teacher-steps 25 --student-steps 1\n"
        "  kinema evaluate STUDENT STUDENT ... --teacher MODEL --teacher-steps 1,2,4,8,25,50",
    )
    _generator(p, several=True)
    _fast(p)
    p.add_argument("--captions", type=Path, metavar="FILE", help="a UTF-8 text file with one sprites caption per line")
    p.add_argument(
        "--n", type=count, default=512, help="how many captions of the world, without --captions (%(default)s)"
    )
    p.add_argument(
        "--frames",
        type=count,
        metavar="N",
        help="of a video (default: the model's); more are also scored in windows of the length of a clip",
    )
    p.add_argument("--window", type=count, metavar="N", help="latent frames a chunk sees (default: the model's)")
    p.add_argument("--sink", type=_natural, metavar="N", help="of these, first frames of the video that always stay")
    p.add_argument("--split", choices=("heldout", "train"), default="heldout", help="which of them (%(default)s)")
    p.add_argument("--jobs", type=count, default=1, metavar="N", help="processes that read the videos (%(default)s)")
    p.add_argument(
        "--starts", type=several, metavar="N", help="of a comparison: videos of a caption, for diversity (default: 16)"
    )
    p.add_argument("--teacher", metavar="MODEL", help="to compare with (default: whose student the first model is)")
    for name in ("teacher", "student"):
        text = f"steps of the {name} to compare, one column each (default: its own)"
        p.add_argument(f"--{name}-steps", type=counts, metavar="N,...", help=text)

    p = command(probe, "measure whether a character that comes back at the end of a story is remembered")
    _generator(p)
    p.add_argument(
        "--scenes", type=count, nargs="+", default=[3, 6, 12, 21], metavar="N", help="lengths of stories (%(default)s)"
    )
    p.add_argument("--n", type=count, default=64, help="stories of each length (%(default)s)")
    p.add_argument("--jobs", type=count, default=1, metavar="N", help="processes that read the videos (%(default)s)")
    p.add_argument(
        "--rendered", action=argparse.BooleanOptionalAction, default=True, help="measure rendered stories too"
    )

    p = command(export, "write what a run trained, with its card, as files that others read")
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    p.add_argument("--out", type=Path, metavar="DIR", help="the folder to write; of a URSA also a .pt or .safetensors")
    p.add_argument("--role", default="student", help="which of its networks (%(default)s)")
    p.add_argument(
        "--layout",
        help="diffusers (of a URSA: ursa), a folder that kinema sample and the public pipelines read, is the default "
        "for a student; kinema, self_forcing, sat, wan, ttt_video and qwen3 are the weights alone; original is the "
        "release's own: wan, sat or ursa",
    )
    p.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="the average of the weights, if there is one"
    )
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights (%(default)s)"
    )
    p.add_argument("--adapters", action="store_true", help="the adapters alone, not folded into the weights")

    p = command(inspect, "say what a checkpoint, a run or prepared data is, and what is missing in it")
    p.add_argument("path", metavar="PATH", help="a file, a folder, a Hub id (org/name@revision), or a shipped name")

    p = command(
        bench,
        "measure speed and memory on random weights",
        "Streams and decodes at the size of Wan 2.1 1.3B, 480x832 and 21 latent frames; trains as the recipes\n"
        "bench:wan_dmd (train), bench:ttt_video (ttt), bench:ursa_dimo (dimo) and bench:cogvideox_sft (cogvideox);\n"
        "on a CPU, all of it tiny.",
    )
    p.add_argument("what", choices=("stream", "vae", "train", "ttt", "dimo", "cogvideox"), help="what to measure")
    p.add_argument("--json", action="store_true", help="print one line of JSON")
    p.add_argument(
        "--path",
        choices=("plain", "fused", "graphs", "balanced"),
        help="stream: how fast a path to take; vae, train and others: plain, or the fast one if it is not given",
    )
    p.add_argument("--latents", action="store_true", help="stream: without decoding")
    p.add_argument("--fp8", action="store_true", help="stream: linear layers in 8-bit floating point")
    p.add_argument("--fp8-attention", action="store_true", help="stream: self-attention in 8-bit floating point")
    p.add_argument("--tiny", action="store_true", help="tiny networks and videos on a GPU, too")
    for name in ("frames", "height", "width", "window", "videos"):
        p.add_argument(f"--{name}", type=count, metavar="N", help=f"stream, vae: {name}")
    p.add_argument("--sink", type=_natural, metavar="N", help="stream: sink frames of the window")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="stream, vae: of the networks")
    p.add_argument("--repeats", type=count, default=1, metavar="N", help="train: turns of each kind (%(default)s)")
    p.add_argument(
        "--graded-at-once",
        type=_natural,
        metavar="N",
        help="train: gradients of so many latent frames of a rollout in one pass; 0: of each chunk in its own "
        "(default: all; with --path plain 0)",
    )
    _device(p)

    p = command(report, "write the report.html of a run or an evaluation")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    command(doctor, "say what kinema found on this machine and what it does without the rest")
    p = command(
        demo,
        "the whole circle in minutes: make, fine-tune, measure, show",
        "examples:\n  kinema demo\n"
        "  kinema demo sprites:cogvideox_lora --videos 64 --steps 50   adapters of a CogVideoX, from 16 clips\n"
        "  kinema demo sprites:learn --run.steps 200                   as of kinema train, every value can be changed",
    )
    p.add_argument("recipe", nargs="?", default="sprites:learn", metavar="RECIPE", help="what is learned (%(default)s)")
    p.add_argument("--videos", type=count, default=16, metavar="N", help="of new and of known shapes (%(default)s)")
    p.add_argument("--steps", type=count, default=20, metavar="N", help="network evaluations per video (%(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="(%(default)s)")
    _device(p)
    return parser, commands


def _videos(parser: argparse.ArgumentParser) -> None:
    """Options of `prepare` for videos."""
    g = parser.add_argument_group("videos")
    g.add_argument("--for", dest="family", choices=("wan", "cogvideox", "ursa", "ttt"), help="who learns from them")
    g.add_argument("--model", metavar="DIR", help="folder or Hub id of the VAE and text encoder (default: published)")
    g.add_argument("--captions", type=Path, metavar="FILE", help="jsonl, csv or parquet with video and caption columns")
    g.add_argument("--frames", metavar="N,N", help="lengths of samples (default: the model's)")
    g.add_argument("--seconds", metavar="S,S", help="lengths in seconds")
    g.add_argument("--size", metavar="HxW", help="of samples (default: the model's)")
    g.add_argument("--aspects", metavar="W:H,W:H", help="further shapes of that area, or all; a clip takes the nearest")
    g.add_argument("--fps", type=count, metavar="N", help="frames a second (default: the model's)")
    g.add_argument("--segment", type=_seconds, metavar="S", help="cut videos into pieces of S seconds")
    g.add_argument("--crop", choices=("centre", "random"), default="centre", help="what is kept of too wide frames")
    g.add_argument("--upscale", type=_seconds, default=1.0, metavar="X", help="enlarge clips up to X (%(default)s)")
    g.add_argument("--unconditional", metavar="TEXT", help="what stands for no text (default: the model's)")
    g.add_argument("--compute", choices=("float32", "bfloat16"), help="of the VAE (default: the model's)")
    g.add_argument("--processes", type=count, metavar="N", help="that encode (default: one for each GPU)")
    g.add_argument("--threads", type=count, metavar="N", help="that decode (default: one for each core)")
    g.add_argument("--verify", action="store_true", help="read everything in the data's folder, and say what is wrong")
    g.add_argument("--from", dest="origin", choices=("self_forcing", "ttt_video"), help="convert another system's data")
    g.add_argument("--times", metavar="T,T", help="of self_forcing trajectories: their times without the final 0")


def _generator(
    parser: argparse.ArgumentParser,
    batch: bool = True,
    several: bool = False,
    out: str = "where to write (default: a folder below runs/)",
) -> None:
    what = "a shipped name, a folder in diffusers layout, or a run's folder"
    parser.add_argument("model", metavar="MODEL", nargs="+" if several else None, help=what)
    parser.add_argument("--out", type=Path, metavar="OUT", help=out)
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--steps", type=count, metavar="N", help="network evaluations per video (default: the model's)")
    parser.add_argument("--guidance", type=float, metavar="W", help="1 is none (default: the model's)")
    if batch:
        parser.add_argument("--batch", type=count, default=32, metavar="N", help="videos made at once (%(default)s)")
    parser.add_argument("--no-ema", action="store_true", help="of a run: the trained weights, not their average")
    _device(parser)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s: a GPU if there is one)"
    )


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number from 0 upwards, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")


def _switch(text: str) -> tuple[int, str]:
    frame, colon, prompt = text.partition(":")
    if not colon or not frame.isdecimal():
        raise argparse.ArgumentTypeError(f"must be FRAME:TEXT, for example 48:a blue star, not {text!r}")
    return int(frame), prompt


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else count(text)


def _version() -> str:
    try:
        return importlib.metadata.version("kinema")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
