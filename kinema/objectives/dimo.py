"""Di[M]O: a many-step model of tokens becomes one of a single step (arXiv 2503.15457), on any token path.

The student draws all tokens at once. Its draw is corrupted, and what teacher and critic say about the clean tokens
there differs where the student's distribution does: that difference is moved, without gradient, to the student's
logits, as DMD moves a direction to its videos. The critic learns to denoise the student's draws.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch
from kinema.diffusion.denoiser import TokenDenoiser
from kinema.diffusion.guidance import Above, guided
from kinema.diffusion.logits import Drawn, Logits, draw, steer
from kinema.diffusion.logits import tokens as tokens_of
from kinema.diffusion.times import Shifted, SomeShared, Times, shares_strata
from kinema.errors import UsageError, UserError
from kinema.objectives.monitors import by_quartile
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn
from kinema.seeds import Draw

BROKEN = 3  # steps in a row with a direction that is not finite, after which a run stops
Kept = dict[tuple[int, int], tuple[Tensor, Tensor | None]]  # (step, micro-batch) → tokens, and which frames were given


@dataclass(frozen=True)
class Mixed:
    """With probability `fraction` a sample starts from the student's own draft for its prompt, of which every token is
    replaced with probability `replace` by one of a usual start."""

    fraction: float = 0.2
    replace: float = 0.2


@dataclass(frozen=True)
class Frames:
    """With probability `probability` the first frames of a sample are given, as many as one of `lengths` says.

    Needs batches with real codes; the network sees these frames clean and nothing is learned from them.
    """

    probability: float
    lengths: tuple[int, ...] = (1,)

    def given(self, video: Tensor, draw: Draw) -> Tensor:
        """`[B, T]`: which frames are given."""
        lengths = torch.zeros(len(video), 1, dtype=torch.int64, device=video.device)
        choice = draw.fold("length").integers(len(self.lengths), 1)
        for i, length in enumerate(self.lengths):
            lengths = torch.where(choice == i, length, lengths)
        lengths = torch.where(draw.fold("given").uniform(1) < self.probability, lengths, 0)
        return torch.arange(video.shape[1], device=video.device) < lengths


@dataclass(frozen=True)
class Dimo(Objective):
    """Batches need prompts and the shape of their `video`; its codes are looked at only with `conditions`.

    reverse                  share of KL(critic ‖ teacher) in the direction, the rest is KL(teacher ‖ critic); -0.2 too
    guidance, guided_above   of the teacher, folded into the student, which then needs none; 1 learns what the data's
                             text dropout makes of it: both branches
    first, then, switch      laws of the times at which both are compared: `first`, and `then` from step `switch` on
    critic_first             steps in which the critic learns alone
    student_every            critic steps per student step
    share_draft              where both learn, the critic takes the student's tokens instead of new ones: a pass less
    steps_at                 times of the student's passes, from 1 down; a step trains one of them, all ranks the same
    count                    which tokens count: all, by 1 - p(x_t | x), or those that the corruption changed
    reduction                over the tokens of a video. The sum is large, and clipping then is what sets its scale
    entropy, entropy_band    coefficient of an entropy bonus; of a pair, the first where a batch's mean token entropy
                             is above the band (shares of ln K), the second where it is below, and linear within
    kd                       weight of KL(teacher ‖ student) at x_t, a second graded pass
    smoothing                of the critic's targets; biases what it says
    """

    student: Role
    teacher: Role
    critic: Role
    reverse: float = 0.0
    guidance: float = 3.0
    guided_above: float = 0.1
    first: Times = field(default_factory=lambda: SomeShared(Shifted(3.0)))
    then: Times = field(default_factory=lambda: SomeShared(Shifted(1.0)))
    switch: int = 12_000
    critic_first: int = 200
    student_every: int = 1
    share_draft: bool = False
    steps_at: tuple[float, ...] = (1.0,)
    count: Literal["all", "noise", "changed"] = "all"
    reduction: Literal["sum", "mean"] = "sum"
    entropy: float | tuple[float, float] = 0.0
    entropy_band: tuple[float, float] = (0.2, 0.4)
    kd: float = 0.0
    smoothing: float = 0.0
    mixed: Mixed | None = None
    conditions: Frames | None = None

    def __post_init__(self):
        steps = (*self.steps_at, 0.0)
        if self.steps_at[:1] != (1.0,) or any(t <= s for t, s in pairwise(steps)):
            raise UsageError(f"steps_at is {self.steps_at}; it must start at 1 and decrease, without a final 0")

    def turns(self) -> tuple[Turn, ...]:
        kept: Kept = {}  # of the step at hand: the trainer asks for the turns of each step
        known = not shares_strata(self.first, self.then)
        student = Turn(
            "student",
            partial(self.student_loss, kept=kept),
            self.student_every,
            self.critic_first,
            decides=partial(self._decides, "student", False) if known else None,
        )

        def decides(batch: Batch, step: int) -> Hashable:
            shared = self.share_draft and student.due(step)
            return self._decides("student" if shared else "critic", shared, batch, step)

        return student, Turn("critic", partial(self.critic_loss, kept=kept), decides=decides if known else None)

    def memory(self) -> dict[str, Tensor]:
        """Whether a direction of the step at hand was not finite, and for how many steps before it one was not."""
        return {"broken": torch.zeros(()), "broken_before": torch.zeros(())}

    def watch(self, memory: Mapping[str, float], step: int, seed: int) -> None:
        """Raises UserError where `BROKEN` steps in a row had directions that were not finite."""
        if memory["broken"] > 0 and memory["broken_before"] + 1 >= BROKEN:
            raise UserError(
                f"{round(memory['broken_before']) + 1} steps in a row, up to step {step} (seed {seed}), had directions "
                f"that are not finite; lower the learning rates and start again from the last healthy checkpoint"
            )

    def _decides(self, role: str, shared: bool, batch: Batch, step: int) -> Hashable:
        micro = batch.micro if self.share_draft else batch.micro == 0
        return shared, self._exit_step(batch.keys.fold(role)), step < self.switch, micro

    def _exit_step(self, draws: Draw) -> int:
        """Which of the student's passes learns, alike on all ranks."""
        return seeds.shared(len(self.steps_at), draws.shared, "exit")

    def student_loss(self, cast: Cast, batch: Batch, step: int, kept: Kept | None = None) -> tuple[Tensor, Metrics]:
        """`kept` is where the tokens are left for the critic's turn."""
        student, draws = cast["student"], batch.keys.fold("student")
        known = self._known(batch, draws)
        logits, drawn = self.sample(student, batch, draws, known)
        self._keep(kept, batch, step, drawn.tokens, known)
        t, x_t = self._corrupted(student, drawn.tokens, step, draws, known)
        teacher, critic = self.judged(cast, batch, x_t, t)
        weight = self._weight(student, x_t, drawn.tokens, t, known)
        coefficient = self._entropy_coefficient(drawn.entropy, student.path.codes)
        tokens = drawn.tokens[0].numel()
        share = 1.0 if self.reduction == "sum" else 1.0 / tokens

        def direction(rows: slice, student_z, others: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            g, forward, reverse = jeffrey(others[0], others[1], self.reverse)
            g = g * (share * weight[rows, None])
            if coefficient is not None:
                g = g + coefficient / tokens * flattening(student_z())
            return g, {"kl": forward, "kl_reverse": reverse}

        loss, seen = steer(logits, (teacher, critic), direction, 1 / len(x_t))
        note_broken(cast["memory"], seen["nonfinite"], batch.micro == 0)
        if self.kd:
            loss = loss + self._kd(student, x_t, t, batch, teacher)
        return loss, {**self._metrics(seen, drawn, t, x_t), "not_finite": seen["nonfinite"].mean()}

    def critic_loss(self, cast: Cast, batch: Batch, step: int, kept: Kept | None = None) -> tuple[Tensor, Metrics]:
        """On the student's tokens that its own turn left in `kept`, if they are there, else on new ones."""
        student, critic, draws = cast["student"], cast["critic"], batch.keys.fold("critic")
        tokens, known = (kept or {}).pop((step, batch.micro), None) or self._draft(student, batch, draws)
        with torch.no_grad():
            t, x_t = self._corrupted(student, tokens, step, draws, known)
        error = critic.error(x_t, tokens, t, batch.cond, self.smoothing)
        counted = torch.ones_like(error) if known is None else (~known).to(error.dtype)
        loss = (error * counted).sum() / counted.sum().clamp(min=1)
        return loss, by_quartile("error", error.detach(), t)

    @torch.no_grad()
    def _draft(self, student: TokenDenoiser, batch: Batch, draws: Draw) -> tuple[Tensor, Tensor | None]:
        known = self._known(batch, draws)
        return self.sample(student, batch, draws, known)[1].tokens, known

    def _keep(self, kept: Kept | None, batch: Batch, step: int, tokens: Tensor, known: Tensor | None) -> None:
        if kept is not None and self.share_draft:
            kept[step, batch.micro] = tokens, known

    def sample(self, student: TokenDenoiser, batch: Batch, draws: Draw, known: Tensor | None) -> tuple[Logits, Drawn]:
        """The student's logits of the pass that learns, and its tokens. Passes before that one have no gradient."""
        if batch.video.ndim != 4:
            raise UsageError(
                f"Di[M]O draws codes [B, T, H, W] of the shape of the batch's video, but that is "
                f"{list(batch.video.shape)}; use CodePrompts, SpriteCodes or other data that knows the shape"
            )
        exit_step = self._exit_step(draws)
        shape = tuple(batch.video.shape)
        x, extra = self._start(student, batch, draws, known)
        for i in range(exit_step):
            with torch.no_grad():
                made = self._pass(student, x, self.steps_at[i], batch, extra)
                tokens = self._with(known, batch, tokens_of(made, draws.fold(f"sample{i}").uniform(*shape[1:])))
                s = self._time(self.steps_at[i + 1], x, known)
                x, extra = student.path.corrupt(tokens, s, draws.fold(f"between{i}")), {}
        logits = self._pass(student, x, self.steps_at[exit_step], batch, extra)
        drawn = draw(logits, draws.fold("sample").uniform(*shape[1:]))
        return logits, drawn._replace(tokens=self._with(known, batch, drawn.tokens))

    def judged(self, cast: Cast, batch: Batch, x_t: Tensor, t: Tensor) -> tuple[Logits, Logits]:
        """What the guided teacher and the critic say at x_t, without gradient."""
        scale = 1.0 if self.guidance == 1 else Above(self.guidance, self.guided_above)
        with torch.no_grad():
            teacher: Any = guided(cast["teacher"], batch.cond, batch.uncond, scale)(x_t, t)
            return teacher, cast["critic"](x_t, t, batch.cond)

    def times_at(self, step: int) -> Times:
        return self.first if step < self.switch else self.then

    def _start(self, student: TokenDenoiser, batch: Batch, draws: Draw, known: Tensor | None) -> tuple[Tensor, dict]:
        shape = tuple(batch.video.shape)
        x, extra = student.begin(shape, draws.fold("start"))
        if self.mixed is not None:
            with torch.no_grad():
                other, noise = student.begin(shape, draws.fold("draft"))
                made = self._pass(student, self._with(known, batch, other), 1.0, batch, noise)
                draft = tokens_of(made, draws.fold("drafted").uniform(*shape[1:]))
            chance = draws.fold("mixed")
            x = mix(x, draft, chance.fold("sample").uniform(1), chance.fold("token").uniform(*shape[1:]), self.mixed)
        return self._with(known, batch, x), extra

    def _pass(self, student: TokenDenoiser, x: Tensor, time: float, batch: Batch, extra: dict[str, Any]) -> Logits:
        return student(x, torch.full((len(x), 1), time, device=x.device), batch.cond, **extra)

    def _corrupted(
        self, student: TokenDenoiser, tokens: Tensor, step: int, draws: Draw, known: Tensor | None, noise: str = "noise"
    ) -> tuple[Tensor, Tensor]:
        """(t, x_t) of the step's law, with the noise of that name; given frames stay clean."""
        t = self.times_at(step).sample(student.path, tokens.shape[1], draws.fold("time"))  # type: ignore[arg-type]
        t = t if known is None else torch.where(known, 0.0, t)
        return t, student.path.corrupt(tokens, t, draws.fold(noise))

    def _known(self, batch: Batch, draws: Draw) -> Tensor | None:
        return None if self.conditions is None else self.conditions.given(batch.video, draws.fold("conditions"))

    @staticmethod
    def _with(known: Tensor | None, batch: Batch, x: Tensor) -> Tensor:
        return x if known is None else torch.where(known[..., None, None], batch.video, x)

    @staticmethod
    def _time(time: float, x: Tensor, known: Tensor | None) -> Tensor:
        t = torch.full((len(x), 1), time, device=x.device)
        return t if known is None else torch.where(known, 0.0, t)

    def _weight(self, student: TokenDenoiser, x_t: Tensor, tokens: Tensor, t: Tensor, known: Tensor | None) -> Tensor:
        """How much every token counts, `[n]`: masked models learn nothing where nothing is masked."""
        path, weight = student.path, torch.ones(x_t.shape, device=x_t.device)
        if self.count == "noise":
            weight = 1 - path.likelihood(x_t, tokens, t)
        elif self.count == "changed":
            weight = (x_t != tokens).to(weight.dtype)
        noisy = path.noisy(x_t)
        if noisy is not None:
            weight = weight * noisy
        return (weight if known is None else weight * ~known[..., None, None]).flatten()

    def _entropy_coefficient(self, entropy: Tensor, codes: int) -> Tensor | None:
        low, high = self.entropy if isinstance(self.entropy, tuple) else (self.entropy, self.entropy)
        if low == high == 0:
            return None
        ends = [share * math.log(codes) for share in self.entropy_band]
        fallen = ((ends[1] - entropy.mean()) / (ends[1] - ends[0])).clamp(0, 1)
        return low + (high - low) * fallen

    def _kd(self, student: TokenDenoiser, x_t: Tensor, t: Tensor, batch: Batch, teacher: Logits) -> Tensor:
        tokens = x_t[0].numel()

        def direction(rows: slice, student_z, others: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
            return self.kd / tokens * (student_z().softmax(-1) - others[0].softmax(-1)), {}

        return steer(student(x_t, t, batch.cond), (teacher,), direction, 1 / len(x_t))[0]

    def _metrics(self, seen: dict[str, Tensor], drawn: Drawn, t: Tensor, x_t: Tensor) -> Metrics:
        kl, reverse = (seen[name].view(x_t.shape).flatten(2).mean(2) for name in ("kl", "kl_reverse"))
        jeffreys = (1 - self.reverse) * kl + self.reverse * reverse
        means = {"kl": kl.mean(), "jeffreys": jeffreys.mean(), "entropy": drawn.entropy.mean()}
        return {**means, **by_quartile("kl", kl, t)}


def jeffrey(teacher: Tensor, critic: Tensor, reverse: float) -> tuple[Tensor, Tensor, Tensor]:
    """The direction g `[n, K]`, KL(p_T ‖ p_A) and KL(p_A ‖ p_T) `[n]` of the logits of teacher and critic `[n, K]`.

    g = (1 - reverse)·(p_A - p_T) + reverse·p_A·(log p_A - log p_T - KL(p_A ‖ p_T)): the gradient of the mix of the two
    divergences in the critic's logits. It sums to 0 over the codes.
    """
    log_t, log_a = teacher.log_softmax(-1), critic.log_softmax(-1)
    p_t, p_a = log_t.exp(), log_a.exp()
    ratio = log_a - log_t
    backward = (p_a * ratio).sum(-1, keepdim=True)
    g = p_a - p_t if reverse == 0 else (1 - reverse) * (p_a - p_t) + reverse * p_a * (ratio - backward)
    return g, -(p_t * ratio).sum(-1), backward[:, 0]


def note_broken(memory: dict[str, Tensor], nonfinite: Tensor, new: bool) -> None:
    """Counts, on the device, in how many steps in a row a direction was not finite; `new`: a step begins."""
    if new:
        streak = torch.where(memory["broken"] > 0, memory["broken_before"] + 1, 0)
        memory["broken_before"].copy_(streak)
        memory["broken"].zero_()
    memory["broken"].copy_(torch.maximum(memory["broken"], nonfinite.any().to(memory["broken"].dtype)))


def flattening(z: Tensor) -> Tensor:
    """Minus the gradient of a row's entropy in its logits, p·(log p + H) `[n, K]`: descending it flattens the row."""
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    return p * (log_p - (p * log_p).sum(-1, keepdim=True))


def mix(fresh: Tensor, draft: Tensor, sample: Tensor, token: Tensor, mixed: Mixed) -> Tensor:
    """`fresh` tokens `[B, …]`, or `draft` with some replaced by `fresh`: the uniforms `[B, 1]` and `[B, …]` decide."""
    chosen = (sample < mixed.fraction).reshape(-1, *[1] * (fresh.ndim - 1))
    return torch.where(chosen & (token >= mixed.replace), draft, fresh)
