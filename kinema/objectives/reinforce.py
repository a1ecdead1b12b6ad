"""Di[M]O by a score function instead of a direct gradient: kept for comparison, it learns less per step.

The student draws several times from the same logits. What teacher and critic make of each draw is a reward for its
tokens, and tokens that did better than the other draws' at the same place become likelier (arXiv 1612.00563).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kinema.data.batch import Batch
from kinema.diffusion.logits import Drawn, Logits, compare, draw, steer
from kinema.errors import UsageError
from kinema.objectives.dimo import Dimo, Kept, flattening, jeffrey, note_broken
from kinema.objectives.objective import Cast, Metrics, Turn


@dataclass(frozen=True)
class Reinforce(Dimo):
    """Rewards of tokens x from p_T and p_A, teacher's and critic's at their corruption x_t; all draws share t.

    draws     how many draws share a prompt, a start and t
    reward    "log_ratio": log p_T(x) - log p_A(x), a sample of the reverse divergence's direction; "jeffreys": minus
              the mix of both divergences, which alone collapses to few modes
    baseline  what rewards are compared to: the other draws' mean, or a running mean of all rewards, kept with the run
    credit    rewards of single tokens, or one for the whole video
    direct    weight of Di[M]O's own direction, averaged over the draws
    """

    reverse: float = 0.5
    guidance: float = 1.0
    share_draft: bool = True
    draws: int = 4
    reward: Literal["log_ratio", "jeffreys"] = "log_ratio"
    baseline: Literal["others", "ema"] = "others"
    credit: Literal["token", "sequence"] = "token"
    direct: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.draws < 1 or (self.draws == 1 and self.baseline == "others"):
            raise UsageError(f"draws is {self.draws}; comparing draws with each other takes 2 or more, better 4")

    def memory(self) -> dict[str, Tensor]:
        """Also the running mean, and what was heard in the step: all of a step's passes are compared to one mean."""
        names = ("mean", "heard", "passes", "step") if self.baseline == "ema" else ()
        return super().memory() | {name: torch.zeros(()) for name in names}

    def turns(self) -> tuple[Turn, ...]:
        student, critic = super().turns()
        return (replace(student, decides=None) if self.baseline == "ema" else student), critic  # it notes the step

    def student_loss(self, cast: Cast, batch: Batch, step: int, kept: Kept | None = None) -> tuple[Tensor, Metrics]:
        student, draws = cast["student"], batch.keys.fold("student")
        known = self._known(batch, draws)
        logits, first = self.sample(student, batch, draws, known)
        self._keep(kept, batch, step, first.tokens, known)
        drawn = [first, *(self._again(logits, batch, draws.fold(i), known) for i in range(1, self.draws))]
        rewards, weights, judges, seen = [], [], [], []
        for i, one in enumerate(drawn):
            t, x_t = self._corrupted(student, one.tokens, step, draws, known, f"noise{i}" if i else "noise")
            judges += [pair := self.judged(cast, batch, x_t, t)]
            report = self._judge(*pair, one.tokens)
            weights.append(self._weight(student, x_t, one.tokens, t, known))
            rewards.append(report["reward"] * (weights[-1] > 0).view(x_t.shape))
            seen.append({name: value.flatten() for name, value in report.items()})
        gains = self._gains(cast, rewards, step)
        coefficient = self._entropy_coefficient(first.entropy, student.path.codes)
        tokens, flat = first.tokens[0].numel(), [one.tokens.flatten() for one in drawn]
        share = 1.0 if self.reduction == "sum" else 1.0 / tokens

        def direction(rows: slice, student_z, others: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            z = student_z()
            g = score(z, [code[rows] for code in flat], [gain.flatten()[rows] for gain in gains]) * share
            for weight, i in zip(weights, range(0, len(others), 2), strict=False):
                towards, _, _ = jeffrey(others[i], others[i + 1], self.reverse)
                g = g + towards * (self.direct * share / self.draws * weight[rows, None])
            if coefficient is not None:
                g = g + coefficient / tokens * flattening(z)
            return g, {}

        others = [logits for pair in judges for logits in pair] if self.direct else []
        loss, made = steer(logits, others, direction, 1 / len(first.tokens))
        note_broken(cast["memory"], made["nonfinite"], batch.micro == 0)
        if self.kd:
            loss = loss + self._kd(student, x_t, t, batch, judges[-1][0])
        means = {name: torch.stack([one[name] for one in seen]).mean(0) for name in ("kl", "kl_reverse")}
        metrics = {**self._metrics(means, first, t, x_t), "reward": torch.stack(rewards).mean()}
        return loss, {**metrics, "not_finite": made["nonfinite"].mean()}

    def _again(self, logits: Logits, batch: Batch, draws, known: Tensor | None) -> Drawn:
        drawn = draw(logits, draws.fold("sample").uniform(*logits.shape[1:]))
        return drawn._replace(tokens=self._with(known, batch, drawn.tokens))

    def _judge(self, teacher: Logits, critic: Logits, tokens: Tensor) -> dict[str, Tensor]:
        """Reward and divergences of every token, `[B, T, H, W]`."""

        def judge(rows: slice, zs: tuple[Tensor, ...]) -> dict[str, Tensor]:
            _, kl, kl_reverse = jeffrey(zs[0], zs[1], self.reverse)
            if self.reward == "jeffreys":
                reward = -((1 - self.reverse) * kl + self.reverse * kl_reverse)
            else:
                log_t, log_a = (z.log_softmax(-1).gather(-1, tokens.flatten()[rows, None])[:, 0] for z in zs)
                reward = log_t - log_a
            return {"reward": reward, "kl": kl, "kl_reverse": kl_reverse}

        return {name: value.view(tokens.shape) for name, value in compare((teacher, critic), judge).items()}

    def _gains(self, cast: Cast, rewards: list[Tensor], step: int) -> list[Tensor]:
        if self.credit == "sequence":
            rewards = [reward.flatten(1).sum(1)[:, None, None, None].expand_as(reward) for reward in rewards]
        if self.baseline == "others":
            return advantages(rewards)
        running = self._running(cast["memory"], torch.stack(rewards).mean(), step)
        return [reward - running for reward in rewards]

    @staticmethod
    def _running(memory: dict[str, Tensor], reward: Tensor, step: int) -> Tensor:
        """The mean before this step, b ← 0.99 b + 0.01 r after every earlier one; notes the rewards of this pass."""
        new = memory["step"] != step + 1
        heard, passes = memory["heard"], memory["passes"]
        mean = torch.where(new & (passes > 0), memory["mean"].lerp(heard, 0.01), memory["mean"])
        memory["mean"].copy_(mean)
        passes.copy_(torch.where(new, 0, passes) + 1)
        heard.copy_(torch.where(new, reward, heard.lerp(reward.to(heard.dtype), 1 / passes)))
        memory["step"].fill_(step + 1)
        return mean


def advantages(rewards: Sequence[Tensor]) -> list[Tensor]:
    """Leave-one-out: every reward less the mean of the other draws' at the same place. They sum to 0."""
    mean = torch.stack(list(rewards)).mean(0)
    count = len(rewards)
    return [count / (count - 1) * (reward - mean) for reward in rewards]


def score(z: Tensor, codes: Sequence[Tensor], gains: Sequence[Tensor]) -> Tensor:
    """The mean over draws of gain·(p - onehot(code)) `[n, K]`: descending it makes codes of positive gain likelier."""
    g = z.softmax(-1) * (sum(gains) / len(gains))[:, None]  # type: ignore[operator]
    for code, gain in zip(codes, gains, strict=True):
        g.scatter_add_(-1, code[:, None], -(gain / len(gains)).to(g.dtype)[:, None])
    return g
