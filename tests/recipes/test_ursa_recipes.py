"""The recipes of codes: each takes steps, the parts of one are the start of the next, and a student samples alone."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from kinema import cli, config, pretrained, shipping
from kinema.data.video import read_video, write_video
from kinema.diffusion.token_sampling import Jumps, Redraws
from kinema.errors import UsageError, UserError
from kinema.evaluation import compare
from kinema.evaluation.evaluate import held_out, rendered
from kinema.models.ursa import layouts
from kinema.models.ursa.codec import FSQTraining
from kinema.models.ursa.spec import URSA
from kinema.models.ursa.transformer import URSATransformer
from kinema.models.weights import open_weights
from kinema.recipes import sprites, sprites_ursa, ursa_dimo
from kinema.training.trainer import Trainer

CPU = torch.device("cpu")
CODEC, SIZE = sprites_ursa.CODEC, sprites_ursa.SIZE
PROMPT = "a big red circle moves left on a black background"


@pytest.fixture(scope="module", autouse=True)
def small():
    """Networks of fewer layers and channels than the recipes': the same files and shapes in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sprites_ursa, "CODEC", replace(CODEC, block_out_channels=(16, 16, 16)))
        patch.setattr(sprites_ursa, "SIZE", replace(SIZE, layers=2, ffn_dim=128))
        yield


def test_teacher_and_student_fit_their_limits():
    """8 MB with the tokenizers, and 4 MB without, in half precision."""
    numbers = [
        sum(p.numel() for p in spec.build().parameters())
        for spec in (FSQTraining(CODEC), URSA(sprites_ursa.PATH, SIZE))
    ]
    assert 2 * sum(numbers) < 7.5e6 and 2 * numbers[1] < 3.9e6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Tokenizers of a run of one step."""
    folder = tmp_path_factory.mktemp("ursa")
    Trainer(sprites_ursa.tokenizer(steps=1, batch_size=1, clips=16), folder / "tokenizer", CPU).train()
    shipping.codes(folder / "tokenizer", folder / "base", CPU)
    return folder / "base"


@pytest.fixture(scope="module")
def teacher(base):
    run = sprites_ursa.ursa(steps=1, batch_size=1, clips=2, block=1, base=str(base))
    Trainer(run, base.parent / "run", CPU).train()
    assert config.load(base.parent / "run" / "run.yaml") == run
    pretrained.write(pretrained.load(str(base.parent / "run"), CPU), base.parent / "teacher")
    return base.parent / "teacher"


@pytest.mark.parametrize(
    ("name", "more"), [("dimo", {}), ("dimo", {"student_steps": 2}), ("reinforce", {"draws": 2})], ids=str
)
def test_a_teacher_becomes_a_student_that_samples_alone(teacher, tmp_path, capsys, name, more):
    run = getattr(sprites_ursa, name)(steps=2, batch_size=1, clips=4, teacher=str(teacher), **more)
    trainer = Trainer(run, tmp_path / "run", CPU)
    before = {key: tensor.clone() for key, tensor in trainer._state().items() if ".model." in key}
    trainer.train()
    after = trainer._state()
    moved = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["data/truncated"] == 0 and row["student/not_finite"] == 0 for row in logged)
    assert any(key.startswith("student.") for key in moved) and any(key.startswith("critic.") for key in moved)
    assert not any("embed_tokens" in key for key in moved)
    assert config.load(tmp_path / "run" / "run.yaml") == run
    student = pretrained.load(str(tmp_path / "run"), CPU)
    assert student.settings()["steps"] == more.get("student_steps", 1) and student.settings()["guidance"] == 1.0
    assert isinstance(student.studio.pipeline.sampler, Redraws if more.get("student_steps") else Jumps)
    out = tmp_path / "files"
    out.mkdir()
    (out / "README.md").write_text("mine")
    for name in ("student.pt", "student-too.safetensors"):
        words = ["export", str(tmp_path / "run"), "--out", str(out / name), "--dtype", "bfloat16"]
        assert cli.main(words) == 0
        opened = open_weights(out / name)
        assert opened.kinema["model"] == "URSA" and opened.config["num_hidden_layers"] == sprites_ursa.SIZE.layers
        again = URSATransformer(sprites_ursa.SIZE)
        again.load_state_dict(dict(layouts.to_kinema(opened, "ursa")), strict=True)
        assert cli.main(words) == 1 and f"{out / name} exists" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "mine" and {t.dtype for _, t in opened} == {torch.bfloat16}
    assert cli.main([*words, "--layout", "kinema"]) == 2
    card = (out / "student.md").read_text()
    assert f"num_inference_steps={student.settings()['steps']}" in card and "guidance_scale=1" in card
    assert "text to video only" in card and "33 x 64 x 64" in card
    codes = student.studio.latents(student.spec, student.denoiser, [PROMPT], [0])
    pretrained.write(student, tmp_path / "out")
    assert pretrained.describe(str(tmp_path / "out"))[1] == replace_paths(student.studio.pipeline, tmp_path / "out")
    assert codes.shape == (1, 9, 8, 8) and codes.min() >= 0 and codes.max() < sprites_ursa.CODEC.codes


def replace_paths(pipeline, folder):
    """What a pipeline is where it has moved to `folder`: its student must sample as it was trained to."""
    text, codec = replace(pipeline.text, path=str(folder)), replace(pipeline.codec, path=str(folder))
    return replace(pipeline, text=text, codec=codec)


@pytest.fixture(scope="module")
def student(teacher):
    """The teacher itself in one step, as a folder that has only its transformer."""
    made = pretrained.load(str(teacher), CPU).with_settings(steps=1, guidance=1.0)
    pretrained.write(made, teacher.parent / "student", parent=teacher)
    return teacher.parent / "student"


def test_a_student_shares_its_teachers_tokenizers(teacher, student):
    assert {path.name for path in student.iterdir() if path.is_dir()} == {"transformer", "scheduler"}
    spec, pipeline = pretrained.describe(str(student))
    assert pipeline.codec.size == sprites_ursa.CODEC and pipeline.text.load(CPU).ids([PROMPT]).shape == (1, 40)
    assert pretrained.teacher_of(str(student)) == str(teacher)
    assert ursa_dimo.dimo(str(student), "prompts.txt").data.codec.size == sprites_ursa.CODEC
    spec.export_pipeline(pretrained.load(str(student), CPU).module, student, student.parent / "whole")
    assert (student.parent / "whole" / "vae" / "config.json").exists()


def test_a_student_is_compared_with_its_teacher(student, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "REPEATS", 1)
    words = f"evaluate {student} --n 2 --starts 2 --teacher-steps 2 --student-steps 1 --device cpu --out {tmp_path}"
    assert cli.main(words.split()) == 0
    columns = {column["label"]: column for column in json.loads((tmp_path / "comparison.json").read_text())["columns"]}
    two, same = columns["teacher, 2 steps"], columns["student, 1 step"]
    assert (two["facts"]["passes"], same["facts"]["passes"]) == (4, 1)
    assert 0 < same["scores"]["token entropy"]["value"] <= math.log(sprites_ursa.CODEC.codes)
    assert same["kept"]["times faster"] > 1 and same["kept"]["joint score kept"] is None  # it draws nothing yet
    assert 0.9 < same["scores"]["tokens that differ"]["value"] <= 1  # almost noise
    assert columns["rendered"]["scores"]["diversity"]["value"] > 0.1
    page = (tmp_path / "report.html").read_text()
    assert page.count("<video") == 4 and "diversity kept" in page
    (tmp_path / "captions.txt").write_text("a cat on a mat")
    words = words.replace("--teacher-steps 2", f"--captions {tmp_path / 'captions.txt'}").replace("--n 2", "--batch 1")
    assert cli.main([*words.split(), "--teacher-steps", "1", "--out", str(tmp_path / "cat")]) == 0
    cat = json.loads((tmp_path / "cat" / "comparison.json").read_text())["columns"]
    assert len(cat) == 2 and "diversity" not in cat[1]["scores"] and cat[1]["kept"]["tokens kept"] > 0
    assert (tmp_path / "cat" / "report.html").read_text().count("<video") == 2
    assert cli.main([*words.split(), "--steps", "2"]) == 2 and "--student-steps" in capsys.readouterr().err


def test_given_frames_are_the_first_of_what_is_made(teacher):
    """An image is the code of itself alone; of a video that goes on, every frame stays and the rest is new."""
    model = pretrained.load(str(teacher), CPU).with_settings(steps=2)
    truth = rendered(held_out(1)[1], 33)
    codes = model.studio.latents(model.spec, model.denoiser, [PROMPT], [0], images=truth[:, 0])
    assert torch.equal(codes[:, :1], model.studio.codec.encode(truth[:, :1])) and codes.shape == (1, 9, 8, 8)
    longer = model.studio.continued(model.spec, model.denoiser, [PROMPT], truth[:, :17], rounds=2)
    assert torch.equal(longer[:, :17], truth[:, :17]) and longer.shape[1] == 17 + 2 * 20
    one = model.studio.continued(model.spec, model.denoiser, [PROMPT], truth[:, :17])
    assert torch.equal(longer[:, :37], one) and not torch.equal(longer[:, 37:], one[:, 17:])


def test_images_and_videos_are_given_on_the_command_line(teacher, student, tmp_path, capsys):
    write_video(tmp_path / "given.mp4", rendered(held_out(1)[1], 33)[0], 8)
    given, rest = str(tmp_path / "given.mp4"), ["--prompt", PROMPT, "--steps", "1", "--device", "cpu"]
    for how, frames in (("--image", 33), ("--video", 53)):
        assert cli.main(["sample", str(teacher), how, given, *rest, "--out", str(tmp_path / how[2:])]) == 0
        (made,) = (tmp_path / how[2:]).glob("*.mp4")
        assert len(read_video(made)) == frames
    prompts_only = replace(
        pretrained.load(str(student), CPU), spec=replace(URSA.from_pretrained(str(student)), continues=False)
    )
    pretrained.write(prompts_only, tmp_path / "distilled")
    capsys.readouterr()
    for model, how, says in (
        (tmp_path / "distilled", ["--image", given], "distilled from prompts alone"),
        (teacher, ["--rounds", "2"], "--video FILE"),
        (teacher, ["--image", given, "--video", given], "give one of"),
        ("sprites-wan", ["--video", given], "is no model of codes"),
    ):
        assert cli.main(["sample", str(model), *how, *rest, "--out", str(tmp_path / "no")]) == 2
        assert says in capsys.readouterr().err


def test_the_same_video_again_is_no_diversity():
    scene = held_out(1)[1][0]
    assert compare.apart([rendered([scene], 33).expand(3, -1, -1, -1, -1)])["diversity"].value < 1e-6


def test_recipes_of_codes_go_by_the_name_of_their_world():
    for name, function in (("ursa", "ursa"), ("ursa_dimo", "dimo"), ("ursa_tokenizer", "tokenizer")):
        assert config.recipe(f"sprites:{name}") is getattr(sprites_ursa, function)


def test_a_teacher_of_another_family_is_refused():
    with pytest.raises(UserError, match="sprites-wan is no URSA"):
        sprites_ursa.dimo(teacher="sprites-wan")


@pytest.mark.parametrize("knob", [*sprites_ursa.KNOBS, "temprature"])
def test_every_ablation_changes_one_thing(teacher, knob):
    if knob not in sprites_ursa.KNOBS:
        with pytest.raises(UsageError, match="no knob"):
            sprites_ursa.ablation(knob, teacher=str(teacher))
        return
    plain, run = (sprites_ursa.ablation(name, teacher=str(teacher)) for name in ("none", knob))
    assert replace(run, objective=plain.objective) == plain and (run == plain) == (knob == "none")
    assert run.objective.guidance == 3.0


def test_a_released_folder_has_the_released_settings(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "released")
    (tmp_path / "released" / "kinema.json").unlink()
    _, pipeline = pretrained.describe(str(tmp_path / "released"))
    assert (pipeline.frames, pipeline.height, pipeline.width, pipeline.fps) == (49, 320, 512, 12)
    assert (pipeline.steps, pipeline.guidance, pipeline.text.motion) == (50, 7.0, 9.0)
    assert pipeline.text.unconditional.startswith("worst quality") and pipeline.sampler == Jumps()


def test_a_model_that_was_written_is_read_again_and_makes_the_same_codes(teacher):
    made = pretrained.load(str(teacher.parent / "run"), CPU).with_settings(steps=2)
    again = pretrained.load(str(teacher), CPU).with_settings(steps=2)
    assert isinstance(again.spec, URSA) and again.settings()["guidance"] == 3.0
    ours = made.module.state_dict()
    for name, tensor in again.module.state_dict().items():
        torch.testing.assert_close(tensor, ours[name], atol=1e-3, rtol=1e-3)  # written in half precision
    videos = again.studio.videos(again.spec, again.denoiser, [PROMPT])
    assert videos.shape == (1, 33, 3, 64, 64) and videos.abs().max() <= 1


@pytest.mark.parametrize("name", ["dimo", "reinforce", "smoke"])
def test_recipes_of_real_size_describe_what_they_were_asked_for(teacher, tmp_path, name):
    (tmp_path / "prompts.txt").write_text(PROMPT)
    run = getattr(ursa_dimo, name)(str(teacher), str(tmp_path / "prompts.txt"))
    config.save(run, tmp_path / "run.yaml")
    assert config.load(tmp_path / "run.yaml") == run
    assert run.seed == 1337 and run.plan.compute == "bfloat16" and run.plan.recompute == "block"
    roles = run.objective.roles()
    assert roles["student"].optim.lr == 1e-6 and roles["critic"].optim.lr == 2e-6 and roles["teacher"].optim is None
    assert not roles["student"].optim.trains("embed_tokens.weight") and roles["student"].optim.trains("lm_head.weight")
    assert run.pipeline.guidance == (3.0 if name == "reinforce" else 1.0) and run.pipeline.steps == 1


@pytest.mark.parametrize("name", ["learn", "ode_pairs", "dmd", "teacher_forcing"])
def test_recipes_of_latents_refuse_a_model_of_codes(teacher, name):
    with pytest.raises(UserError, match="is no bidirectional Wan"):
        getattr(sprites, name)(base=str(teacher))


def test_a_network_and_a_tokenizer_of_two_models_are_refused(teacher, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(teacher, folder)
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"levels": [4, 4], "num_vq_embeddings": 16}))
    (tmp_path / "prompts.txt").write_text(PROMPT)
    with pytest.raises(UsageError, match="1,920 codes and its tokenizer 16"):
        ursa_dimo.dimo(str(folder), str(tmp_path / "prompts.txt"))
    with pytest.raises(UserError, match="1,920 codes and its tokenizer 16"):
        pretrained.load(str(folder), CPU)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--frames", "34"], "34 frames cannot be tokenized: use 33 or 65"),
        (["--height", "60"], "height 60 is not a multiple of 8; use 56 or 64"),
        (["--prompt", "big " * 50], "its end is cut off"),
        (["--guidance", "nan"], "guidance is nan"),
    ],
)
def test_bad_input_is_answered_by_a_sentence(teacher, tmp_path, capsys, caplog, words, says):
    rest = ["--prompt", PROMPT, "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "made")]
    code = cli.main(["sample", str(teacher), *words, *rest])
    assert says in capsys.readouterr().err + caplog.text and code == (0 if words[0] == "--prompt" else 2)


def test_a_student_that_holds_its_guidance_is_not_guided_twice_in_silence(student, caplog):
    pretrained.load(str(student), CPU).with_settings(guidance=3.0)
    assert "guided twice" in caplog.text
