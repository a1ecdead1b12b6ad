"""What can be seen in the world `sprites`: names of attributes, and scenes as values made of those names.

A scene says everything a caption says and nothing else; where exactly things are is drawn when it is rendered.
"""

from dataclasses import dataclass
from functools import cache

from kinema.seeds import key_of

Colour = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
NOVEL_SHAPES = ("heart",)  # spoken of by the grammar, never shown to the shipped base models: theirs to learn
COLOURS: dict[str, Colour] = {
    "red": (228, 38, 48),
    "orange": (255, 146, 28),
    "yellow": (252, 236, 64),
    "green": (44, 184, 72),
    "cyan": (64, 216, 236),
    "blue": (56, 100, 255),
    "purple": (172, 72, 220),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, Colour] = {
    "black": (0, 0, 0),
    "grey": (108, 108, 112),
    "navy": (14, 20, 84),
    "brown": (94, 58, 34),
}
WALL: Colour = (202, 170, 128)  # beige
SIZES: dict[str, float] = {"small": 6.5, "big": 10.0}  # the radius of a circle of that size, in 64ths of the frame
MOTIONS = ("left", "right", "up", "down", "bounce", "orbit", "still")
KINDS = ("one", "two", "behind")


@dataclass(frozen=True)
class Sprite:
    shape: str
    colour: str
    size: str
    motion: str


@dataclass(frozen=True)
class Scene:
    """`kind` is "one", "two" (sprites of two shapes and two colours) or "behind" (one passes behind a wall)."""

    background: str
    sprites: tuple[Sprite, ...]
    kind: str = "one"


@dataclass(frozen=True)
class Story:
    """Scenes one after the other; `characters` says who plays in each. Character 0 opens the story and ends it."""

    scenes: tuple[Scene, ...]
    characters: tuple[int, ...]


@cache
def heldout(shape: str, colour: str, motion: str) -> bool:
    """Whether training never shows this triple: of the eight colours of every moving shape, one is withheld (12.5 %).

    So each shape, colour and motion, and each pair of them, stays common in training.
    """
    return list(COLOURS)[key_of("heldout", shape, motion) % len(COLOURS)] == colour
