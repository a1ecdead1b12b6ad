"""Weight files as streams: what is read is what was written, damage is named, and nothing is in memory twice."""

import json
import pickle
import weakref

import pytest
import torch
from torch import nn

from kinema.errors import UserError
from kinema.models.weights import load_into, open_weights, save


def tensors(count=5, size=1000):
    return {f"layer.{i}.weight": torch.full((size,), float(i)) for i in range(count)}


def test_shards_are_read_back_and_replace_an_earlier_export(tmp_path):
    folder = save(tmp_path / "out", tensors().items(), {"config.json": {"a": 1}}, max_shard=8000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    opened = open_weights(folder)
    assert opened.config == {"a": 1} and opened.shapes["layer.3.weight"] == (1000,)
    assert {name: float(tensor[0]) for name, tensor in opened} == {f"layer.{i}.weight": i for i in range(5)}
    save(folder, tensors(2).items(), {})
    assert sorted(file.name for file in folder.iterdir()) == ["model.safetensors"]


def test_folders_with_other_things_are_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        save(tmp_path, tensors().items(), {})
    assert (tmp_path / "notes.txt").exists()


def test_an_export_that_fails_leaves_nothing_behind(tmp_path):
    def broken():
        yield from tensors(1).items()
        raise OSError("No space left on device")

    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "out", broken(), {})
    assert not list(tmp_path.iterdir())


def test_a_pipeline_folder_means_its_part(tmp_path):
    save(tmp_path / "transformer", tensors(1).items(), {})
    save(tmp_path / "vae", tensors(2).items(), {})
    assert len(open_weights(tmp_path).shapes) == 1 and len(open_weights(tmp_path, "vae").shapes) == 2


def test_parts_of_torch_files(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"generator": tensors(1), "critic": tensors(2), "generator_ema": {"model": tensors(3)}, "step": 4}, file)
    assert open_weights(file).part == "generator_ema" and len(open_weights(file).shapes) == 3
    assert len(open_weights(file, part="critic").shapes) == 2
    with pytest.raises(UserError, match=r"no part 'teacher', only generator, critic, generator_ema"):
        open_weights(file, part="teacher")
    torch.save({"step": 4}, file)
    with pytest.raises(UserError, match="holds no weights"):
        open_weights(file)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_truncated_files_are_named(tmp_path, keep):
    torch.save(tensors(), tmp_path / "a.pt")
    save(tmp_path / "out", tensors().items(), {})
    for file in (tmp_path / "a.pt", tmp_path / "out" / "model.safetensors"):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(UserError, match=rf"{file.name} is damaged.*again") as error:
            list(open_weights(file))
        assert "\n" not in str(error.value)


def test_pickles_with_more_than_tensors_are_not_run(tmp_path):
    torch.save({"model": tensors(1), "code": pytest.approx}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(print))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=f"{name} is damaged"):
            open_weights(tmp_path / name)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither safetensors nor torch files"):
        open_weights(tmp_path)
    folder = save(tmp_path / "out", tensors().items(), {}, max_shard=8000)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lists model-00002-of-00003\.safetensors, which"):
        open_weights(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_weights(folder)


def test_the_same_tensor_in_two_files_is_ambiguous(tmp_path):
    for stem in ("a", "a.fp16"):
        save(tmp_path / stem, tensors(1).items(), {}, stem)
    (tmp_path / "a.fp16" / "a.fp16.safetensors").rename(tmp_path / "a" / "a.fp16.safetensors")
    with pytest.raises(UserError, match="repeats layer"):
        open_weights(tmp_path / "a")


def test_loading_is_strict():
    module = nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    with pytest.raises(UserError, match="bias missing; more unexpected"):
        load_into(module, {"weight": good["weight"], "more": torch.ones(1)}.items(), "cpu")
    with pytest.raises(UserError, match=r"weight is \[2, 3\] but the network wants \[3, 2\]"):
        load_into(module, {"weight": torch.ones(2, 3)}.items(), "cpu")
    with pytest.raises(UserError, match="twice"):
        load_into(module, [*good.items(), ("bias", torch.zeros(3))], "cpu")
    with pytest.raises(UserError, match="and 2 more missing"):
        load_into(nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(12)), [], "cpu")


def test_parameters_and_buffers_come_to_life_one_by_one():
    """When a tensor is asked for, only the one before may still be there: no second copy of the network ever is."""
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module[0].bias.requires_grad_(False)
    alive = []

    def stream():
        for name, slot in module.state_dict().items():
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.ones(slot.shape, dtype=slot.dtype)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    load_into(module, stream(), "cpu")
    assert len(alive) == 7 and not any(t.is_meta for t in module.state_dict().values())
    assert module[0].weight.requires_grad and not module[0].bias.requires_grad
    module(torch.zeros(2, 4))


def test_loaded_tensors_do_not_hold_the_file(tmp_path):
    folder = save(tmp_path / "out", {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}.items(), {})
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    load_into(module, open_weights(folder), "cpu")
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(module.weight, torch.ones(3, 2))


def test_dtype_is_the_modules_unless_given():
    weights = {"weight": torch.ones(3, 2, dtype=torch.float16), "bias": torch.zeros(3)}
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with torch.device("meta"):
            module = nn.Linear(2, 3)
        assert load_into(module, weights.items(), "cpu", dtype).weight.dtype == expected


def test_views_are_written_alone(tmp_path):
    fused = torch.arange(6.0).view(3, 2)
    folder = save(tmp_path / "out", {"q": fused[:1], "k": fused[1:]}.items(), {})
    assert json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")["q"]["shape"] == [1, 2]
    assert torch.equal(dict(open_weights(folder))["k"], fused[1:])
