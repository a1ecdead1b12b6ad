"""What DMD, SiD and the GAN share: a student is moved by what two networks think of the videos it makes by itself.

The videos are its own rollouts (Self Forcing, arXiv 2506.08009, algorithm 1), exactly as it streams them, so it learns
from its own context and not from ground truth. An objective here is a *term* (what the student's loss and the critic's
loss are, given a video and where on the path it is looked at) together with a cast. Further terms may act on the same
rollout: `DMD(..., also=(Adversarial(), Anchor(0.25)))`. They are a tuple of values and not a sum of objectives, because
then there is one cast, one rollout and one look, which is what makes their sum cheap and their gradients comparable.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from kinema import seeds
from kinema.data.batch import Batch
from kinema.diffusion.path import GaussianPath
from kinema.diffusion.rollout import End, Recompute, exit_steps, regraded, rollout
from kinema.diffusion.times import Shifted, unwarp
from kinema.errors import UsageError
from kinema.models.protocols import CausalSpec
from kinema.models.wan.last_frames import LastFrames
from kinema.models.wan.vae import VideoAutoencoder, WanVAE
from kinema.objectives import monitors
from kinema.objectives.objective import Cast, Metrics, Objective, Role, Turn
from kinema.seeds import Draw


@dataclass(frozen=True, eq=False)
class Sample:
    """A video of the student and where on the path it is looked at.

    video   `[B, T, C, H, W]` float32; in the student's turn it carries gradients
    skip    leading frames that are not scored
    t       `[B, 1]`, and noise of the video's shape: x_t is `seen`
    batch   the prompts it was made from, and what else came with them
    """

    video: Tensor
    skip: int
    t: Tensor
    noise: Tensor
    batch: Batch
    draw: Draw

    def seen(self, path: GaussianPath, video: Tensor | None = None) -> Tensor:
        """x_t of the video, or of another with the same noise."""
        return path.mix(self.video if video is None else video, self.noise, self.t)


class Term(Protocol):
    """What pulls at the student's videos, and what the critic has to learn for it."""

    def check(self, roles: dict[str, Role]) -> None:
        """Raises UsageError if the cast cannot play this."""
        ...

    def student_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]: ...
    def critic_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]: ...


@dataclass(frozen=True, kw_only=True)
class DistributionMatching(Objective):
    """A game of student and critic on rollouts; the subclass is its term.

    shape           (C, h, w) of a latent frame
    frames          of a rollout, from fewest to most; how many is drawn anew for each micro-batch, alike on all ranks
    scored          only the last so many frames are scored. If there are more, the first scored one becomes the latent
                    of the image there, as the other networks know videos that begin with one; it needs the `codec`
    student_every   the critic learns at every step, the student at every so many
    share_rollout   where both learn, the critic takes the student's video instead of a new one: fewer rollouts
    graded_at_once  the chunks' last steps get their gradients from passes over as many chunks as so many frames have,
                    after the rollout, which has none: a pass more of each chunk, but far fewer kernels; 0: from each
                    chunk's own pass within it
    exit            at which step chunks end: one for all of them ("shared"), one for each, or the last
    context_noise   noise level at which finished chunks are remembered
    context         makes the context anew before each chunk; one that begins with an image needs the `codec`
    t_floor         u, the time before the shift, is uniform in [t_floor, 1) …
    floor_at_exit   … or from the time after the step the rollout ended with
    cap_at_exit     … and up to the time of that step
    critic_shift    of the critic's turn, where it is not the student's
    also            further terms on the same rollout
    """

    student: Role
    critic: Role
    shape: tuple[int, int, int]
    frames: tuple[int, int] = (21, 21)
    scored: int = 21
    student_every: int = 5
    share_rollout: bool = False
    graded_at_once: int = 0
    exit: Literal["shared", "per_chunk", "last"] = "shared"
    renoise: Literal["fresh", "ode"] = "fresh"
    context_noise: float = 0.0
    context: Recompute | None = None
    t_floor: float = 0.0
    floor_at_exit: bool = False
    cap_at_exit: bool = False
    critic_shift: float | None = None
    codec: WanVAE | None = None
    also: tuple[Term, ...] = ()

    def __post_init__(self):
        for name, role in self.roles().items():
            needed = ("shift", "chunks", "steps_at") if name == "student" else ("shift",)
            if lacking := [part for part in needed if part not in dir(role.spec)]:
                raise UsageError(
                    f"the {name} is a {type(role.spec).__name__}, which has no {lacking[0]}; give the student a causal "
                    "network, as WanCausal, and the others networks of its family"
                )
        shifts = {name: role.spec.shift for name, role in self.roles().items()}  # type: ignore[attr-defined]
        if len(set(shifts.values())) > 1:
            told = ", ".join(f"{name} {shift:g}" for name, shift in shifts.items())
            raise UsageError(f"the roles were trained with different shifts ({told}); use networks of one shift")
        low, high = self.frames
        for frames in {low, high}:
            try:
                self._spec.chunks.lengths(frames)
            except ValueError as error:
                raise UsageError(str(error)) from error
        for term in (self, *self.also):
            term.check(self.roles())
        if not 0 < low <= high or self.scored > low:
            raise UsageError(f"frames are {self.frames} and {self.scored} of them are scored; score at most {low}")
        if high > self.scored and self.codec is None:
            raise UsageError(
                f"rollouts of up to {high} frames, of which {self.scored} are scored, need a codec that makes "
                f"an image of the frame before these; set codec"
            )
        if self.context is not None and self.context.image_first and self.codec is None:
            raise UsageError("a context that begins with an image needs a codec that makes it; set codec")
        if self.graded_at_once and self.graded_at_once < self._spec.chunks.size:
            raise UsageError(
                f"graded_at_once is {self.graded_at_once}, less than the {self._spec.chunks.size} frames of a chunk; "
                "use so many or more, or 0"
            )
        if self.graded_at_once and self.context is not None:
            raise UsageError("a context that is made anew keeps nothing to grade later; set graded_at_once to 0")
        if self.student_every < 1:
            raise UsageError(
                f"student_every is {self.student_every}; the student learns at every step (1) or more rarely"
            )

    def turns(self) -> tuple[Turn, ...]:
        kept: Kept = {}  # of the step at hand: the trainer asks for the turns of each step
        student = Turn(
            "student",
            partial(self._student_turn, kept),
            self.student_every,
            self.student_first,
            decides=lambda batch, step: self._length(batch, batch.keys.fold("student")),
        )

        def decides(batch: Batch, step: int) -> Hashable:
            shared = self.share_rollout and student.due(step)
            return shared, self._length(batch, batch.keys.fold("student" if shared else "critic"))

        critic = Turn("critic", partial(self._critic_turn, kept, self._critic_losses), decides=decides)
        return student, critic

    @property
    def student_first(self) -> int:
        """The step from which the student learns."""
        return 0

    def check(self, roles: dict[str, Role]) -> None:
        raise NotImplementedError

    def student_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        raise NotImplementedError

    def critic_loss(self, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
        raise NotImplementedError

    def make(self, cast: Cast, batch: Batch, draw: Draw) -> tuple[Tensor, int, int | None]:
        """A rollout `[B, T, …]`, its leading frames that are not scored, and the step it ended with if that was one.

        Gradients are kept where they are enabled, of the exit steps of the scored frames.
        """
        student, chunks, times = cast["student"], self._spec.chunks, self._spec.steps_at
        frames, exits = self._length(batch, draw)
        noise = student.path.prior((len(batch), frames, *self.shape), draw.fold("noise"))
        images = None
        if self.context is not None and self.context.image_first and self.codec is not None:
            images = LastFrames(_opened(self.codec, noise.device), self.context.frames)
        denoise, cache = partial(student, cond=batch.cond), student.backbone.new_cache(frames, self.scored)
        ends: list[End] = []
        later = torch.is_grad_enabled() and self.graded_at_once > 0
        made = rollout(
            denoise,
            student.path,
            noise,
            times,
            cache,
            chunks,
            draw.fold("rollout"),
            exits,
            graded_frames=self.scored,
            context_noise=self.context_noise,
            renoise=self.renoise,
            context=self.context,
            image=images,
            ends=ends if later else None,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not later):
            video = torch.cat([_seen(chunk, images) for chunk in made], dim=1)
        if later:
            ends = [end for end in ends if end.frame >= frames - self.scored]
            graded = (regraded(denoise, group, cache) for group in _groups(ends, self.graded_at_once))
            video = torch.cat([video[:, : ends[0].frame], *graded], dim=1)
        skip = 0
        if frames > self.scored:
            video, skip = self._scored_part(video), 1 if chunks.first_alone else chunks.size
        return video, skip, exits if isinstance(exits, int) else None

    def _length(self, batch: Batch, draw: Draw) -> tuple[int, int | tuple[int, ...]]:
        """The frames of a rollout and the steps its chunks end with, alike on all ranks."""
        chunks, words, (low, high) = self._spec.chunks, (draw.shared, batch.micro), self.frames
        frames = low + seeds.shared(1 + (high - low) // chunks.size, *words, "frames") * chunks.size
        return frames, exit_steps(self.exit, len(self._spec.steps_at), len(chunks.lengths(frames)), *words)

    def look(self, video: Tensor, skip: int, exit_step: int | None, batch: Batch, draw: Draw, shift: float) -> Sample:
        """Draws where on the path a video is looked at: t = clip(warp(u), 0.02, 0.98), one for each video."""
        low, high = self._interval(exit_step)
        u = low + (high - low) * draw.fold("time").uniform(1)
        t = Shifted(shift, 0.02, 0.98).quantile(GaussianPath(), u)
        noise = draw.fold("noise").normal(*video.shape[1:])
        return Sample(video, skip, t, noise, batch, draw)

    def _student_turn(self, kept: "Kept", cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        draw = batch.keys.fold("student")
        video, skip, exit_step = self.make(cast, batch, draw)
        if self.share_rollout:
            kept[step, batch.micro] = video.detach(), skip, exit_step
        sample = self.look(video, skip, exit_step, batch, draw.fold("look"), self._spec.shift)
        loss, metrics = _summed([self.student_loss, *(term.student_loss for term in self.also)], cast, sample)
        return loss, {**metrics, **monitors.of_videos(video.detach(), draw.fold("noise"))}

    def _critic_turn(self, kept: "Kept", losses: list, cast: Cast, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        draw = batch.keys.fold("critic")
        video, skip, exit_step = kept.pop((step, batch.micro), None) or self._made_without_gradients(cast, batch, draw)
        shift = self._spec.shift if self.critic_shift is None else self.critic_shift
        return _summed(losses, cast, self.look(video, skip, exit_step, batch, draw.fold("look"), shift))

    @property
    def _critic_losses(self) -> list:
        return [self.critic_loss, *(term.critic_loss for term in self.also)]

    @torch.no_grad()
    def _made_without_gradients(self, cast: Cast, batch: Batch, draw: Draw) -> tuple[Tensor, int, int | None]:
        return self.make(cast, batch, draw)

    def _interval(self, exit_step: int | None) -> tuple[float, float]:
        """Where u lies after a rollout that ended with this step."""
        times, shift = self._spec.steps_at, self._spec.shift
        low, high = self.t_floor, 1.0
        if exit_step is not None and self.floor_at_exit:
            low = unwarp(times[exit_step + 1], shift) if exit_step + 1 < len(times) else 0.0
        if exit_step is not None and self.cap_at_exit:
            high = unwarp(times[exit_step], shift)
        return low, high

    def _scored_part(self, video: Tensor) -> Tensor:
        """The last `scored` frames, the first of them as the latent of an image."""
        assert self.codec is not None
        codec, later = _opened(self.codec, video.device), self.scored - 1
        with torch.no_grad():
            image = codec.encode(codec.decode(video[:, : video.shape[1] - later].detach())[:, -1:])
        return torch.cat([image, video[:, video.shape[1] - later :]], dim=1)

    @property
    def _spec(self) -> CausalSpec:
        return self.student.spec  # type: ignore[return-value]


Kept = dict[tuple[int, int], tuple[Tensor, int, int | None]]  # (step, micro-batch) → what `make` made


def _seen(chunk: Tensor, images: LastFrames | None) -> Tensor:
    """The chunk, once the images know it that the context of the next may begin with."""
    if images is not None:
        images.add(chunk)
    return chunk


def _groups(ends: list[End], frames: int) -> Iterator[list[End]]:
    """Consecutive chunks, as many as fit into so many frames."""
    group: list[End] = []
    for end in ends:
        if group and end.frame + end.x.shape[1] - group[0].frame > frames:
            yield group
            group = []
        group.append(end)
    yield group


def surrogate(x: Tensor, direction: Tensor) -> Tensor:
    """½ mean (x - sg(x - direction))²: a loss whose gradient at x is direction / (the count of its numbers)."""
    return 0.5 * (x - (x - direction).detach()).square().mean()


def distance(x: Tensor, estimate: Tensor) -> Tensor:
    """mean |x - estimate| of each sample, shaped to divide it: the scale of directions. No gradient."""
    return (x - estimate).detach().abs().flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))


def follow(cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
    """The critic's denoising loss on a video: the error of its own prediction, which keeps it the student's score."""
    error = cast["critic"].loss(sample.video, sample.t, sample.batch.cond, sample.draw)
    return error.mean(), monitors.by_quartile("error", error.detach().mean(1, keepdim=True), sample.t)


def _summed(losses: list, cast: Cast, sample: Sample) -> tuple[Tensor, Metrics]:
    total, metrics = torch.zeros((), device=sample.video.device), {}
    for loss in losses:
        value, told = loss(cast, sample)
        total, metrics = total + value, {**metrics, **told}
    return total, metrics


@lru_cache(maxsize=2)
def _opened(codec: WanVAE, device: torch.device) -> VideoAutoencoder:
    return codec.load(device)
