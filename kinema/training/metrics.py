"""What a run tells while it trains: averages kept on the device, read when they are logged, shown, and written down.

`metrics.jsonl` has one line per logging interval; a resumed run first drops the lines after its checkpoint.
"""

import json
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from kinema.files import write_text
from kinema.training.world import World


class Meter:
    """Means over the interval since the last reading. Values are scalars on the device; NaN means "nothing to say"."""

    def __init__(self):
        self._totals: dict[tuple[str, ...], Tensor] = {}  # what is added together → [sums, counts]

    def add(self, values: dict[str, Tensor]) -> None:
        names = tuple(values)
        new = torch.stack([value.detach().float() for value in values.values()])
        here = ~new.isnan()
        total = torch.stack([torch.where(here, new, 0), here.float()])
        if names in self._totals:
            total = total + self._totals[names]
        self._totals[names] = total

    def read(self, world: World) -> dict[str, float]:
        """The means over all ranks, by one sum over them and one transfer from the device; starts the next interval."""
        if not self._totals:
            return {}
        sums, counts = world.sum(torch.cat(list(self._totals.values()), dim=1)).tolist()
        totals: dict[str, list[float]] = {}
        for name, total, count in zip((n for names in self._totals for n in names), sums, counts, strict=True):
            before = totals.get(name, (0.0, 0.0))
            totals[name] = [before[0] + total, before[1] + count]
        self._totals = {}
        return {name: total / count for name, (total, count) in totals.items() if count and total == total}


class Log:
    """The three places metrics go to: the console (a live bar, or lines where there is no terminal), JSONL,
    TensorBoard."""

    def __init__(self, folder: Path, start: int, steps: int, console: Console | None = None):
        self.console = console or Console()
        self._path, self._start, self._steps, self._since = folder / "metrics.jsonl", start, steps, time.monotonic()
        self._elapsed = _forget_after(self._path, start)
        self._file = open(self._path, "a")  # noqa: SIM115  (open as long as the run)
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=start, loss="", rate="")
        self._shown = 0.0

    def __enter__(self) -> "Log":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        self._file.close()
        self._board.close()

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._bar.update(self._task, completed=step)

    def write(self, step: int, values: dict[str, float]) -> None:
        spent = time.monotonic() - self._since
        rate = (step - self._start) / max(spent, 1e-9)
        row = {"step": step, "seconds": round(self._elapsed + spent, 3), "steps_per_second": rate, **values, **memory()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, step)
        loss = next((f"loss {v:.4f}" for n, v in values.items() if n.startswith("loss")), "")
        self._bar.update(self._task, completed=step, loss=loss, rate=f"{rate:.2f} steps/s")
        done = step >= self._steps
        if not self.console.is_terminal and (done or time.monotonic() - self._shown > 5):
            self._shown = time.monotonic()
            left = (self._steps - step) / max(rate, 1e-9)
            self.console.print(
                f"step {step}/{self._steps}  {loss}  {rate:.2f} steps/s  {left:.0f} s left", soft_wrap=True
            )

    def say(self, message: str) -> None:
        self.console.print(message, soft_wrap=True, highlight=False)


class Silence:
    """What every rank but the first has in the place of a log."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_) -> None: ...
    def step(self, step: int) -> None: ...
    def write(self, step: int, values: dict[str, float]) -> None: ...
    def say(self, message: str) -> None: ...


def memory() -> dict[str, float]:
    """Peak memory of this process in GiB: of the host, and of the GPU where there is one."""
    peaks = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        peaks["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return peaks


def machine() -> str:
    """What the numbers of this process were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{gpu}, torch {torch.__version__}"


def _forget_after(path: Path, step: int) -> float:
    """Drops what a killed run logged after the checkpoint it resumes from; returns the seconds trained until then."""
    if not path.exists():
        return 0.0
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            break
        if row["step"] > step:
            break
        rows.append(row)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1]["seconds"] if rows else 0.0
