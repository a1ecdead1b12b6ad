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

    def _divided(self, frames: int, alone: bool) -> tuple[int, ...]:
        rest = frames - alone
        if rest < 0 or rest % self.size or not frames:
            below = max(0, rest) // self.size * self.size + alone
            fitting = f"{below} or {below + self.size}" if below else f"{below + self.size}"
            raise ValueError(
                f"{frames} frames do not fill chunks of {self.size}{' after the first' * alone}; use {fitting}"
            )
        return (1,) * alone + (self.size,) * (rest // self.size)
