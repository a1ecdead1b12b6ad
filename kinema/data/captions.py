"""The language of `sprites`: a scene can be said in many ways, each of which determines all its attributes.

The grammar is a list of templates per kind of scene and a list of phrases per attribute, so reading a caption back is
matching the same templates as regular expressions. Plain lower-case ASCII without punctuation.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache

from kinema.data.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Sprite, Story
from kinema.seeds import key_of

# the first template and the first phrase of each list are the canonical ones
TEMPLATES: dict[str, tuple[str, ...]] = {
    "one": (
        "a {size} {colour} {shape} {moves} {ground}",
        "{ground} a {size} {colour} {shape} {moves}",
        "there is a {size} {colour} {shape} that {moves} {ground}",
        "a video of a {size} {colour} {shape} that {moves} {ground}",
        "{ground} we see a {size} {colour} {shape} and it {moves}",
        "a {colour} {shape} which is {size} {moves} {ground}",
        "{ground} one {size} {shape} in {colour} {moves}",
        "the {size} {colour} {shape} {moves} {ground}",
    ),
    "two": (
        "a {size} {colour} {shape} {moves} and a {size2} {colour2} {shape2} {moves2} {ground}",
        "{ground} a {size} {colour} {shape} {moves} and a {size2} {colour2} {shape2} {moves2}",
        "a {size} {colour} {shape} {moves} while a {size2} {colour2} {shape2} {moves2} {ground}",
        "there are two {ground} a {size} {colour} {shape} that {moves} and a {size2} {colour2} {shape2} that {moves2}",
        "{ground} we see a {size} {colour} {shape} that {moves} and a {size2} {colour2} {shape2} that {moves2}",
        "a {size} {colour} {shape} and a {size2} {colour2} {shape2} {ground} the first {moves} and the second {moves2}",
        "{ground} the {size} {colour} {shape} {moves} while the {size2} {colour2} {shape2} {moves2}",
    ),
    "behind": (
        "a {size} {colour} {shape} {moves} behind a wall and comes out again {ground}",
        "{ground} a {size} {colour} {shape} {moves} behind a wall and comes out again",
        "a {size} {colour} {shape} goes behind a wall as it {moves} and comes out again {ground}",
        "{ground} a {size} {colour} {shape} {moves} and is hidden by a wall for a while",
        "there is a wall {ground} and a {size} {colour} {shape} {moves} behind it",
        "a video of a {size} {colour} {shape} that {moves} disappears behind a wall and appears again {ground}",
        "the {size} {colour} {shape} {moves} {ground} passing behind a wall",
    ),
}
RECALLS = (
    "the {ordinal} one comes back and {moves} {ground}",
    "{ground} the {ordinal} one returns and {moves}",
    "we see the {ordinal} one again and it {moves} {ground}",
    "{ground} the {ordinal} one {moves}",
)
ORDINALS = ("first", "second", "third", "fourth")
INTRODUCTION = " it is the {ordinal} one"  # the name by which whoever comes for the first time is called from then on
GROUNDS = ("on a {} background", "against {}", "over a {} backdrop", "in front of a {} background")

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")},
    "colour": {name: (name,) for name in COLOURS},
    "shape": {name: (name,) for name in SHAPES},
    "moves": {
        "left": (
            "moves left",
            "moves to the left",
            "slides to the left",
            "travels leftward",
            "goes left",
            "drifts left",
        ),
        "right": (
            "moves right",
            "moves to the right",
            "slides to the right",
            "travels rightward",
            "goes right",
            "drifts right",
        ),
        "up": ("moves up", "rises", "slides upward", "travels upward", "goes up"),
        "down": ("moves down", "falls", "slides downward", "travels downward", "goes down", "sinks"),
        "bounce": ("bounces", "bounces up and down", "hops up and down", "jumps up and down", "keeps hopping"),
        "orbit": ("orbits", "circles around", "goes round in a circle", "moves in a circle", "runs in circles"),
        "still": ("stays still", "does not move", "rests", "stands still", "stays in place"),
    },
    "ground": {
        name: tuple(
            ground.format(said) for ground in GROUNDS for said in ((name, "gray") if name == "grey" else (name,))
        )
        for name in BACKGROUNDS
    },
}


def key(seed: int, index: int) -> int:
    """The key of the words chosen for a clip."""
    return key_of(seed, "caption", index)


def caption(scene: Scene, key: int) -> str:
    """One of the ways to say the scene, chosen by the 64 bits of `key`."""
    choose = _chooser(key)
    return _say(scene, choose(TEMPLATES[scene.kind]), choose)


def canonical(scene: Scene) -> str:
    return caption(scene, 0)


def story_captions(story: Story, key: int, recall: bool = True) -> list[str]:
    """One caption per scene; with `recall`, who comes is given a name, and that alone is said when it comes again."""
    order: list[int] = []
    said = []
    for n, (scene, character) in enumerate(zip(story.scenes, story.characters, strict=True)):
        choose = _chooser(key_of(key, n))
        again = recall and character in order
        template = choose(RECALLS if again else TEMPLATES[scene.kind])
        if character not in order:
            order.append(character)
            template += INTRODUCTION if recall else ""
        said.append(_say(scene, template.replace("{ordinal}", ORDINALS[order.index(character)]), choose))
    return said


def parse(caption: str) -> Scene | None:
    """The scene a caption of this grammar says, or None. Case, punctuation and spacing do not matter."""
    words = " ".join(re.findall(r"[a-z]+", caption.lower()))
    words = re.sub(r"\ban\b", "a", words)
    for kind, templates in TEMPLATES.items():
        for template in templates:
            if match := _pattern(template).fullmatch(words):
                said = {slot: _meanings(slot.rstrip("2"))[phrase] for slot, phrase in match.groupdict().items()}
                return Scene(said["ground"], tuple(_sprite(said, n) for n in ("", "2") if "shape" + n in said), kind)
    return None


def vocabulary() -> tuple[str, ...]:
    """Every word a caption of this grammar can contain, sorted."""
    texts = [t for templates in TEMPLATES.values() for t in templates] + [*RECALLS, *ORDINALS, INTRODUCTION, "an"]
    texts += [phrase for phrases in PHRASES.values() for said in phrases.values() for phrase in said]
    return tuple(sorted({word for text in texts for word in text.split() if "{" not in word}))


def _say(scene: Scene, template: str, choose: Callable[[Sequence[str]], str]) -> str:
    slots = {"ground": choose(PHRASES["ground"][scene.background])}
    for n, sprite in zip(("", "2"), scene.sprites, strict=False):
        slots["size" + n] = choose(PHRASES["size"][sprite.size])
        slots["colour" + n] = choose(PHRASES["colour"][sprite.colour])
        slots["shape" + n] = choose(PHRASES["shape"][sprite.shape])
        slots["moves" + n] = choose(PHRASES["moves"][sprite.motion])
    return re.sub(r"\ba (?=[aeiou])", "an ", template.format(**slots))


def _sprite(said: dict[str, str], n: str) -> Sprite:
    return Sprite(said["shape" + n], said["colour" + n], said["size" + n], said["moves" + n])


def _chooser(key: int) -> Callable[[Sequence[str]], str]:
    """A function that chooses among options by the digits of `key` in mixed radix."""
    rest = key % (1 << 64)

    def choose(options: Sequence[str]) -> str:
        nonlocal rest
        rest, digit = divmod(rest, len(options))
        return options[digit]

    return choose


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+?)(2?)\}", lambda m: f"(?P<{m[1]}{m[2]}>{'|'.join(_meanings(m[1]))})", template))


@cache
def _meanings(slot: str) -> dict[str, str]:
    return {phrase: name for name, phrases in PHRASES[slot].items() for phrase in phrases}
