import math
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema import config
from kinema.data.sprites import World
from kinema.data.sprites_data import SpriteVideos
from kinema.diffusion.guidance import Cosine
from kinema.diffusion.times import LogitNormal, Uniform
from kinema.errors import UsageError, UserError
from kinema.models.wan.spec import Wan
from kinema.models.wan.transformer import WanSize
from kinema.objectives.denoising import Denoising
from kinema.objectives.objective import Objective, Role
from kinema.optim import Ema, Optim
from kinema.recipes import sprites
from kinema.run import Plan, Preview, Run


class Taste(Protocol):
    def taste(self) -> str: ...


@dataclass(frozen=True)
class Sweet:
    sugar: float = 1.0
    layers: int = 2

    def taste(self) -> str:
        return "sweet"


@dataclass(frozen=True)
class Salty:
    salt: float = 1.0
    layers: int = 3

    def taste(self) -> str:
        return "salty"


@dataclass
class Thawed:
    def taste(self) -> str:
        return "any"


@dataclass(frozen=True)
class Zoo:
    """A dataset with a field of every kind."""

    taste: Taste = field(default_factory=Sweet)
    tastes: tuple[Taste, ...] = (Sweet(2.0), Salty(3.0))
    named: dict[str, Taste] = field(default_factory=lambda: {"a": Salty(0.5)})
    optims: tuple[Optim, ...] = (Optim(1e-5),)
    maybe: Optim | None = None
    text: str | None = None
    words: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, math.inf)
    table: dict[str, float] = field(default_factory=dict)
    flag: bool = False
    number: float = 1.0
    mode: Literal["slow", "fast"] = "slow"

    def open(self, seed: int, device: torch.device):
        raise NotImplementedError


@dataclass(frozen=True)
class Duel(Objective):
    """Another objective with a student, and a second role."""

    student: Role
    critic: Role
    ratio: int = 5

    def turns(self):
        return ()


def run(**changes) -> Run:
    size = WanSize(dim=24, ffn_dim=32, heads=2, layers=2, text_dim=8, freq_dim=16)
    role = Role(Wan(size=size), Optim(1e-5, groups={r"blocks\.0\..*": 3e-7}), Ema(0.9))
    return Run(**{"objective": Denoising(role), "data": Zoo(), "steps": 8, "batch_size": 4} | changes)


def again(run: Run, path) -> Run:
    config.save(run, path / "run.yaml")
    return config.load(path / "run.yaml")


def refused(*overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        config.parse(run(), list(overrides))
    return str(caught.value)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_run_reads_back_equal(tmp_path):
    for one in (
        run(),
        run(data=SpriteVideos(World())),
        run(data=Zoo(maybe=Optim(), text="null", words=("yes", "1", "", "é: [x]", "a\nb"), pair=(-math.inf, 1e-300))),
        run(
            data=Zoo(table={"a.b": 1e-5, "1": 0.1 + 0.2, "~": 1e22}),
            plan=Plan(compute="bfloat16", recompute="block"),
            seed=-(2**62),
        ),
        run(preview=Preview(("a prompt",), 0), init_from="runs/1e5"),
    ):
        assert again(one, tmp_path) == one


@settings(max_examples=60, deadline=None)
@given(text=st.none() | st.text(), words=st.lists(st.text()), number=st.floats(allow_nan=False), flag=st.booleans())
def test_no_value_changes_on_its_way_through_a_file(tmp_path_factory, text, words, number, flag):
    one = run(data=Zoo(text=text, words=tuple(words), number=number, table={"x": number}, flag=flag))
    assert again(one, tmp_path_factory.mktemp("run")) == one


def test_types_survive_the_file(tmp_path):
    data = again(run(), tmp_path).data
    assert isinstance(data.pair, tuple) and isinstance(data.tastes, tuple) and isinstance(data.words, tuple)
    assert isinstance(data.number, float) and isinstance(data.tastes[1], Salty)


def test_the_file_names_classes_only_where_there_is_a_choice(tmp_path):
    config.save(run(), tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    assert "class_path: kinema.objectives.denoising.Denoising" in text
    assert "optim.Optim" not in text and "objective.Role" not in text and "python/" not in text


def test_saving_leaves_no_draft_behind_and_no_half_file(tmp_path, monkeypatch):
    config.save(run(), tmp_path / "run.yaml")
    before = (tmp_path / "run.yaml").read_text()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        config.save(run(steps=9), tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text() == before
    config.save(run(steps=9), tmp_path / "run.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_field_added_later_gets_its_default(tmp_path):
    config.save(run(), tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text().replace("max_skips: 10\n", "")
    (tmp_path / "run.yaml").write_text(text)
    assert config.load(tmp_path / "run.yaml") == run()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("class_path: kinema.objectives.denoising.Denoising", "class_path: os.system"),
        ("class_path: kinema.objectives.denoising.Denoising", "class_path: builtins.eval"),
        ("class_path: kinema.objectives.denoising.Denoising", "class_path: subprocess.Popen"),
        ("class_path: kinema.objectives.denoising.Denoising", "class_path: kinema.optim.Optim"),
        ("class_path: kinema.objectives.denoising.Denoising", "class_path: no.such.Class"),
        ("class_path: kinema.objectives.denoising.Denoising", "class_path: Denoising"),
        ("class_path: test_config.Sweet", "class_path: test_config.Thawed"),
        ("steps: 8", "steps: !!python/object/apply:os.system [exit]"),
        ("steps: 8", "steps: eight"),
        ("steps: 8", "steps: '8'"),
        ("steps: 8", "steps: 0"),
        ("steps: 8", "stops: 8"),
        ("steps: 8\n", ""),
        ("batch_size: 4", "batch_size: [4]"),
    ],
)
def test_a_foreign_file_is_refused_in_one_sentence(tmp_path, old, new):
    path = tmp_path / "run.yaml"
    config.save(run(), path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"run\.yaml"):
        config.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"[1, 2]", b"a: {", b"\xff\xfe\x00", b"model: x\nlr: 1\n", b"\x00"])
def test_what_is_no_run_is_refused(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.yaml"):
        config.load(tmp_path / "run.yaml")


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    config.save(run(), path)
    whole = path.read_bytes()
    for end in range(0, len(whole) - 1, 31):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            config.load(path)


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_depth():
    new = config.parse(
        run(),
        [
            *("--run.steps", "40"),
            "--run.objective.student.optim.lr=1e-4",
            *("--run.objective.student.optim.betas", "[0.8, 0.9]"),
            *("--run.objective.student.optim.groups.head.*", "2e-4"),
            *("--run.data.optims.0.lr", "7"),
            *("--run.data.named.a.salt", "9"),
            *("--run.data.maybe.lr", "0.5"),
            *("--run.data.pair", "[-inf, 1]".replace("-inf", "-.inf")),
            *("--run.data.number", "-inf"),
            *("--run.data.mode", "fast"),
            *("--run.data.text", "1e5"),
            *("--run.objective.student.ema", "null"),
        ],
    )
    optim = replace(
        run().objective.student.optim,
        lr=1e-4,
        betas=(0.8, 0.9),
        groups={r"blocks\.0\..*": 3e-7, "head.*": 2e-4},
    )
    student = replace(run().objective.student, optim=optim, ema=None)
    data = Zoo(
        optims=(Optim(7.0),),
        named={"a": Salty(9.0)},
        maybe=Optim(lr=0.5),
        pair=(-math.inf, 1.0),
        number=-math.inf,
        mode="fast",
        text="1e5",
    )
    assert new == run(steps=40, objective=Denoising(student), data=data)


def test_an_invalid_state_between_two_overrides_is_no_error():
    new = config.parse(run(), ["--run.micro_batch", "3", "--run.batch_size", "6"])
    assert (new.micro_batch, new.batch_size) == (3, 6)


CRITIC = "{class_path: kinema.models.wan.spec.Wan, init_args: {weights: somewhere}}"


def test_a_network_is_found_by_its_bare_name_on_any_machine():
    """Among its neighbours are kernels that need Triton, which is not on all of them."""
    made = config.parse(run(), ["--run.objective.student.spec", "WanCausal", "--run.objective.student.spec.chunk", "2"])
    assert type(made.objective.student.spec).__name__ == "WanCausal" and made.objective.student.spec.chunk == 2


def test_what_learns_needs_an_optimizer():
    with pytest.raises(UsageError, match=r"the student is to learn but has no optimizer; set run\.objective\.student"):
        config.parse(run(), ["--run.objective.student.optim", "null", "--run.objective.student.ema", "null"])


def test_a_swapped_class_keeps_what_both_have():
    new = config.parse(run(), ["--run.objective", f"{__name__}.Duel", "--run.objective.critic.spec", CRITIC])
    assert isinstance(new.objective, Duel)
    assert new.objective.student == run().objective.student
    new = config.parse(run(), ["--run.data.taste.layers", "7", "--run.data.taste", f"{__name__}.Salty"])
    assert new.data.taste == Salty(layers=7)


@pytest.mark.parametrize("name", ["kinema.diffusion.times.LogitNormal", "LogitNormal", "kinema.diffusion.LogitNormal"])
def test_classes_are_found_by_path_by_bare_name_and_in_their_package(name):
    new = config.parse(run(), ["--run.objective.times", name, "--run.objective.times.mean", "0.5"])
    assert new.objective.times == LogitNormal(mean=0.5)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("False", False), ("TRUE", True)])
def test_false_is_false(text, value):
    assert config.parse(run(), ["--run.data.flag", text]).data.flag is value


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--run.optim.lr", "1"], "run has no optim"),
        (["--run.objective.student.optm.lr", "1"], "did you mean run.objective.student.optim?"),
        (["--run.objective.student.optim.lrr", "1"], "did you mean run.objective.student.optim.lr?"),
        (["--run.stps", "1"], "did you mean run.steps?"),
        (["--rum.steps", "1"], "did you mean --run?"),
        (["--run.objective.times", "LogitNromal"], "did you mean LogitNormal?"),
        (["--run.objective.times", "os.system"], "not a frozen dataclass"),
        (["--run.objective.times", "kinema.optim.Optim"], "has no sample, which a Times has"),
        (["--run.objective", "kinema.optim.Optim"], "is not a Objective"),
        (["--run.data.taste", f"{__name__}.Thawed"], "not a frozen dataclass"),
        (["--run.data.mode", "fats"], "did you mean fast?"),
        (["--run.data.flag", "maybe"], "run.data.flag must be bool, not 'maybe'"),
        (["--run.data.flag", "1"], "must be bool"),
        (["--run.data.flag"], "needs a value"),
        (["--run.steps", "1.5"], "run.steps must be int"),
        (["--run.steps", "null"], "run.steps must be int"),
        (["--run.steps.more", "1"], "has no part more"),
        (["--run.data.optims.3.lr", "1"], "has 1 entries"),
        (["--run.objective.student", "null"], "cannot be null"),
        (["--run.data.pair", "[1]"], "run.data.pair"),
        (["--run.objective", f"{__name__}.Duel"], "needs run.objective.critic"),
        (["--run.batch_size", "5", "--run.micro_batch", "2"], "multiple"),
        (["run.steps", "5"], "is not an option"),
    ],
)
def test_a_wrong_override_names_the_place_and_the_fix(overrides, says):
    assert says in refused(*overrides)


# --- recipes and differences ----------------------------------------------------------------------------------------


def small(steps: int = 3, text: str | None = None, flag: bool = False) -> Run:
    """A recipe of somebody else's package."""
    return run(steps=steps, data=Zoo(text=text, flag=flag))


def test_recipes_are_functions_whose_parameters_are_options_too():
    new = config.configure(f"{__name__}:small", ["--steps", "5", "--run.seed", "3", "--flag", "true", "--text=x"])
    assert new == run(steps=5, data=Zoo(text="x", flag=True), seed=3)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("sprites:wna", [], "did you mean sprites:wan?"),
        ("sprites", [], "there is no recipe sprites"),
        ("no_such_package:x", [], "there is no recipe"),
        (f"{__name__}:Zoo", [], "is not a function"),
        (f"{__name__}:small", ["--stps", "3"], "did you mean --steps?"),
        (f"{__name__}:small", ["--steps", "many"], "--steps must be int"),
        (f"{__name__}:again", [], "again needs --"),
    ],
)
def test_a_wrong_recipe_names_the_nearest(name, options, says):
    with pytest.raises(UsageError) as caught:
        config.configure(name, options)
    assert says in str(caught.value)


def test_recipes_are_listed_with_their_first_line():
    listed = dict(config.recipes())
    assert {"sprites:text", "sprites:wan", "sprites:ursa", "sprites:ursa_dimo", "sprites:ttt_1x"} <= listed.keys()
    assert all(listed.values()) and not any(name.startswith("sprites_") for name in listed)
    with pytest.raises(UsageError, match=r"did you mean sprites:ursa_dimo\?"):
        config.recipe("sprites_ursa:dimo")


def test_every_recipe_can_be_found():
    assert all(callable(config.recipe(name)) for name, _ in config.recipes())


def test_differences_name_the_path_and_both_values():
    there, here = (
        run(),
        config.parse(run(), ["--run.objective.student.optim.lr", "1e-3", "--run.data.taste", "test_config.Salty"]),
    )
    assert config.differences(there, here) == [
        "run.objective.student.optim.lr is 1e-05 there and 0.001 here",
        "run.data.taste is test_config.Sweet there and test_config.Salty here",
    ]
    assert config.differences(there, run()) == []
    assert config.differences(run(objective=Denoising(there.objective.student, Uniform())), there) == []


def test_what_a_resumed_run_may_change_is_no_difference():
    changed = run(
        steps=99,
        log_every=1,
        save_every=1,
        keep=9,
        max_skips=3,
        preview=Preview(("x",)),
        plan=Plan(recompute="block", compile=True),
    )
    assert config.differences(run(), changed) == []
    assert config.differences(run(), run(plan=Plan(compute="bfloat16"))) != []


def test_a_place_for_values_and_classes_takes_either(tmp_path):
    for options, guidance in (
        (["--run.pipeline.guidance", "2.5"], 2.5),
        (["--run.pipeline.guidance", "Cosine", "--run.pipeline.guidance.scale", "4"], Cosine(4.0)),
    ):
        made = config.parse(sprites.wan(), [*options, "--run.objective.student.spec.size", "1.3B"])
        config.save(made, tmp_path / "run.yaml")
        assert made.pipeline.guidance == guidance and made.objective.student.spec.size == "1.3B"
        assert config.load(tmp_path / "run.yaml") == made
    with pytest.raises(UsageError, match=r"no class Cosin \(did you mean Cosine"):
        config.parse(sprites.wan(), ["--run.pipeline.guidance", "Cosin"])
