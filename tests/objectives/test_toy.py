"""On a world small enough to count its modes: students draw valid samples of all modes (minutes; --slow)."""

import pytest
import toy as world

from kinema.diffusion.times import Shifted
from kinema.objectives.dimo import Dimo

pytestmark = pytest.mark.slow
STEPS = 3000


@pytest.fixture(scope="module")
def toy() -> world.Toy:
    return world.build()


@pytest.mark.parametrize("steps", [2, 4])
def test_the_exact_integral_is_better_where_steps_are_few(toy, steps):
    exact, reference = (toy.score(toy.samples(toy.teacher, steps, integral=i))[0] for i in ("exact", "reference"))
    assert exact > 1.15 * reference


def test_one_step_of_the_teacher_is_no_student(toy):
    assert toy.score(toy.samples(toy.teacher, 1))[0] < 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_a_student_of_one_step_is_valid_and_keeps_all_modes(toy, seed):
    laws = {"first": Shifted(3.0), "then": Shifted(1.0), "switch": round(0.6 * STEPS)}
    objective = Dimo(None, None, None, guidance=1.0, critic_first=30, **laws)  # type: ignore[arg-type]
    valid, modes, entropy = toy.score(toy.samples(world.distil(toy, objective, STEPS, seed=seed), 1))
    assert valid >= 0.7 and modes == world.WORDS and entropy > 0.9
