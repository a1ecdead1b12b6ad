"""How a causal model divides a video into chunks: groups of latent frames that are made together, one after another."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunks:
    """Chunks of `size` latent frames; with `first_alone` frame 0 is a chunk of its own."""

    size: int = 3
    first_alone: bool = False

    def lengths(self, frames: int, given: int = 0) -> tuple[int, ...]:
        """The lengths of the chunks of `frames` frames that follow `given` ones. ValueError if they fill none."""
        return self._divided(frames, self.first_alone and not given)

    def prefix(self, frames: int) -> tuple[int, ...]:
        """The lengths of the chunks of `frames` given frames: whole chunks, or a lone image and whole chunks."""
        return self._divided(frames, self.first_alone or frames % self.size == 1) if frames else ()

    def fitting(self, frames: int, alone: bool | None = None) -> tuple[int, ...]:
        """The lengths of a video that fill chunks: `frames` itself, or those next to it."""
        alone = self.first_alone if alone is None else alone
        below = max(0, frames - alone) // self.size * self.size + alone
        return (frames,) if below == frames else tuple(n for n in (below, below + self.size) if n)

    def _divided(self, frames: int, alone: bool) -> tuple[int, ...]:
        fitting = self.fitting(frames, alone)
        if fitting != (frames,):
            lone, either = " after the first" * alone, " or ".join(map(str, fitting))
            raise ValueError(f"{frames} frames do not fill chunks of {self.size}{lone}; use {either}")
        return (1,) * alone + (self.size,) * ((frames - alone) // self.size)
