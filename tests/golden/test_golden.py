"""Every golden case, by `family/case name`: `pytest tests/golden -k ursa`, or `--goldens DIR` for cases of one's
own."""

import json

import pytest
import torch
from adapters import (  # noqa: F401  (they register themselves)
    cogvideox,
    cogvideox_networks,
    dimo,
    flow_match,
    objectives,
    self_forcing,
    ttt,
    ursa,
    wan,
)
from harness import ADAPTERS, Case, adapter, cases, check, group_of
from safetensors.torch import save_file

# Optional cases that record a quirk of a reference, and why kinema does not imitate it.
NOT_IMITATED = {
    "flow_match.corrupt_and_convert_off_grid": "sigma is a closed form of the time, never the nearest entry of a grid",
    "objectives.dmd_networks_mixed_grid": "all roles look at one noise level; networks of unequal shift are refused",
    "flow_match.euler_step_mixed_last": "a sample's last step does not end the steps of the others in its batch",
}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--goldens")
        found = cases(folder)
        if not found:
            raise pytest.UsageError(
                f"no */manifest.json with cases in {folder}; --goldens takes the folder of families"
            )
        metafunc.parametrize("case", found, ids=[case.id for case in found])


def test_golden(case):
    run(case)


def run(case: Case) -> dict[str, float]:
    if case.optional and case.kind in NOT_IMITATED:
        pytest.skip(NOT_IMITATED[case.kind])
    assert case.kind in ADAPTERS, f"no adapter answers cases of kind {case.kind}"
    return check(case, ADAPTERS[case.kind])


def written(folder, kind: str, value: float, **entry) -> Case:
    """A one-number case whose right answer is the input x = 1; a whole `value` is recorded as an integer."""
    family = folder / "family"
    family.mkdir()
    save_file({"in.x": torch.tensor([1.0]), "out.y": torch.tensor([value])}, family / "case.safetensors")
    tolerance = {"rtol": 0, "atol": {"y": 1e-3}}
    entry = {"name": "case", "kind": kind, "file": "case.safetensors", "tolerance": tolerance, **entry}
    (family / "manifest.json").write_text(json.dumps({"cases": [entry]}))
    return cases(folder)[0]


@adapter("test.identity")
def identity(case, tensors):
    return {"y": tensors["in.x"]}


@adapter("test.silent")
def silent(case, tensors):
    return {}


@adapter("test.beside")
def beside(case, tensors):
    return {"y": tensors["in.x"] + 0.4}


@adapter("test.undefined")
def undefined(case, tensors):
    return {"y": tensors["in.x"] * torch.nan}


@adapter("test.narrow")
def narrow(case, tensors):
    return {"y": tensors["in.x"][0]}


def test_right_answer_passes_and_is_measured(tmp_path):
    case = written(tmp_path, "test.identity", 1.0005)
    assert case.id == "family/case"
    assert run(case)["y"] == pytest.approx(5e-4, rel=0.01)


def test_wrong_answer_fails(tmp_path):
    with pytest.raises(AssertionError, match="off by"):
        run(written(tmp_path, "test.identity", 1.002))


def test_missing_answer_fails(tmp_path):
    with pytest.raises(AssertionError, match="no answer"):
        run(written(tmp_path, "test.silent", 1.0))


def test_undefined_answer_fails(tmp_path):
    with pytest.raises(AssertionError, match="off by"):
        run(written(tmp_path, "test.undefined", 1.0))


def test_answer_that_would_broadcast_fails(tmp_path):
    with pytest.raises(AssertionError, match="instead of"):
        run(written(tmp_path, "test.narrow", 1.0))


def test_answer_beside_an_integer_fails(tmp_path):
    with pytest.raises(AssertionError, match="differs"):
        run(written(tmp_path, "test.beside", 1))


def test_case_without_outputs_fails(tmp_path):
    case = written(tmp_path, "test.identity", 1.0)
    save_file({"in.x": torch.tensor([1.0])}, case.folder / "case.safetensors")
    with pytest.raises(AssertionError, match="nothing to compare"):
        run(case)


def test_weights_of_several_roles_keep_apart(tmp_path):
    case = written(tmp_path, "test.identity", 1.0, weights={"real": "real.safetensors", "fake": "fake.safetensors"})
    for i, role in enumerate(("real", "fake")):
        save_file({"sd.blocks.0.q": torch.tensor([float(i)])}, case.folder / f"{role}.safetensors")
    tensors = case.load()
    assert (tensors["sd.real.blocks.0.q"], tensors["sd.fake.blocks.0.q"]) == (0, 1)


def test_unknown_kind_fails_also_when_optional(tmp_path):
    with pytest.raises(AssertionError, match="no adapter"):
        run(written(tmp_path, "test.unheard_of", 1.0, optional=True))


def test_tolerance_group_is_the_last_name_without_its_number():
    groups = {"x": 1, "weight_x": 2, "gradients": 3, "grad_norms": 4, "n": 5, "flow": 6}
    names = {"out.x0": "x", "out.weight_x0": "weight_x", "out.grad.blocks.0.q.weight": "gradients"}
    names |= {"out.grad_norms": "grad_norms", "out.critic_grad_norms": "grad_norms"}
    names |= {"out.trailing.n50": "n", "out.call_003.flow": "flow"}
    assert {name: group_of(name, groups) for name in names} == names
