"""The collapse guard: what the monitors of a run must look like, and which of them do not.

It is a function of the rows of metrics.jsonl alone, so a resumed run and the report of an old one say the same. Ranges
are wide: they hold for every size trained here and in the papers, and leaving one means that something is wrong.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kinema.errors import UserError

Row = dict[str, float]
START = 3  # the rows whose median is how a metric started


@dataclass(frozen=True)
class Healthy:
    """The range of one metric; the alarm rings when its last `rows` values are all outside.

    low, high   its values; NaN and what a row does not have are passed over
    fall, rise  the least and the greatest multiple of how it started
    over        another metric that it is divided by
    typical     the range seen in runs that went well
    cause       what is wrong when it is outside
    """

    metric: str
    typical: str
    cause: str
    low: float = -math.inf
    high: float = math.inf
    fall: float = -math.inf
    rise: float = math.inf
    over: str = ""
    rows: int = 3

    def broken(self, rows: Sequence[Row]) -> str:
        """What is wrong after these rows, in a sentence; empty if nothing is."""
        values = [value for row in rows if (value := self._of(row)) is not None]
        last = values[-self.rows :]
        if len(last) < self.rows:
            return ""
        start = abs(sorted(values[:START])[len(values[:START]) // 2])
        low, high = max(self.low, self.fall * start), min(self.high, self.rise * start)
        if not all(value < low for value in last) and not all(value > high for value in last):
            return ""
        name = f"{self.metric} / {self.over}" if self.over else self.metric
        bound = f"below {low:.3g}" if last[-1] < low else f"above {high:.3g}"
        return f"{name} is {last[-1]:.3g}, {bound} for {self.rows} rows (healthy: {self.typical}): {self.cause}"

    def _of(self, row: Row) -> float | None:
        value, by = row.get(self.metric), row.get(self.over, 1.0 if not self.over else None)
        if value is None or by is None or math.isnan(value) or math.isnan(by):
            return None
        return value / by if by else math.copysign(math.inf, value)


HEALTHY = (
    Healthy(
        "student/prompt",
        "0.5 to twice the guidance",
        "the videos shun their prompts; the sign of guidance is wrong, or cond and uncond are exchanged",
        low=0.0,
    ),
    Healthy(
        "student/critic_fit",
        "0.3 to 1",
        "the critic knows the student's videos no better than a copy of the teacher; it does not keep up, or is frozen",
        high=1.1,
    ),
    *(
        Healthy(
            f"student/gap_q{q}",
            "0.1 to 1.5, falling",
            "critic and teacher drift apart; lower the student's learning rate or let it learn more rarely",
            rise=5.0,
        )
        for q in (1, 2, 3, 4)
    ),
    Healthy("update/critic", "1e-6 to 1e-2 per step", "the critic does not learn; check its optimizer", 1e-8, 0.1),
    Healthy("update/student", "1e-6 to 1e-2 per step", "the student does not learn; check its optimizer", 1e-8, 0.1),
    Healthy(
        "update/student",
        "0.1 to 10",
        "the student outruns its critic; raise the critic's learning rate or student_every",
        over="update/critic",
        high=100.0,
    ),
    Healthy(
        "student/motion",
        "near its start",
        "the videos stand still; the student has collapsed to pictures",
        fall=0.3,
    ),
    Healthy("student/spread", "0.7 to 1.3", "colours or contrast run away", fall=0.4, rise=2.0),
    Healthy("student/saturated", "below 0.01", "numbers no latent of a video has; contrast runs away", high=0.1),
    Healthy(
        "student/diversity", "0.6 to 1.1", "all samples look alike; the student has collapsed to one video", low=0.15
    ),
    Healthy(
        "student/same_noise", "-0.1 to 0.1", "samples start from the same noise; their keys are equal", high=0.5, rows=1
    ),
    Healthy("student/not_finite", "0", "directions are not finite and were left out", high=0.0, rows=1),
    Healthy(
        "critic/told_apart", "0.5 to 0.9", "the discriminator has won and says nothing any more", high=0.99, rows=10
    ),
)


class Guard:
    """Watches the rows of a run as they are logged; `alarms` are those that ring now, by what is watched."""

    def __init__(self, metrics: Path, step: int):
        self._rows = [row for row in read_rows(metrics) if row["step"] <= step]
        self.alarms = ring(self._rows)

    def watch(self, row: Row) -> list[str]:
        """Takes the next row; returns the alarms that were not ringing before."""
        self._rows.append(row)
        ringing = ring(self._rows)
        new = [said for healthy, said in ringing.items() if healthy not in self.alarms]
        self.alarms = ringing
        return new

    def check(self, step: int, seed: int) -> None:
        """Raises UserError if every direction since the row before was thrown away."""
        if self._rows[-1].get("student/not_finite", 0.0) > 0.999:
            raise UserError(
                f"no direction of the steps before {step} was finite (seed {seed}); lower the learning rates and start "
                f"again from the last healthy checkpoint"
            )


def ring(rows: Sequence[Row]) -> dict[Healthy, str]:
    """The alarms after these rows."""
    return {healthy: said for healthy in HEALTHY if (said := healthy.broken(rows))}


def read_rows(metrics: Path) -> list[Row]:
    """The rows of a metrics.jsonl, without one that is cut off."""
    rows = []
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@torch.no_grad()
def update_size(optimizer: torch.optim.Optimizer) -> Tensor:
    """|Adam's last step| / |weights| of what an optimizer trains here, from its moments; NaN before its first step."""
    moved, there, steps = [], [], []
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        states = [optimizer.state[part] for part in group["params"]]
        n = torch.stack([state["step"] for state in states]).clamp(min=1)
        roots = ((1 - beta2**n).sqrt()).unbind()
        spread = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])  # type: ignore[reportPrivateImportUsage]
        torch._foreach_div_(spread, roots)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_add_(spread, group["eps"])  # type: ignore[reportPrivateImportUsage]
        steps_of = torch._foreach_div([state["exp_avg"] for state in states], spread)  # type: ignore[reportPrivateImportUsage]
        norms = torch.stack(torch._foreach_norm(steps_of))  # type: ignore[reportPrivateImportUsage]
        moved.append(norms * (group["lr"] / (1 - beta1**n)))
        there.append(torch.stack(torch._foreach_norm(group["params"])).float())  # type: ignore[reportPrivateImportUsage]
        steps.append(torch.stack([state["step"] for state in states]))
    size = torch.cat(moved).norm() / torch.cat(there).norm()
    return torch.where(torch.cat(steps).max() > 0, size, torch.nan)
