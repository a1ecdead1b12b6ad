"""Stages of the long curriculum chain, their tables are the published ones, and what they make tells stories."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cogvideox_world import CPU, write_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kinema import config, pretrained, storytelling
from kinema.data import convert
from kinema.data.batch import Source
from kinema.data.prepared_videos import PreparedStories
from kinema.data.sprites import World
from kinema.data.stories import PublicSegments, SpriteStories, stories_of
from kinema.data.targets import Target
from kinema.errors import UserError
from kinema.evaluation import memory
from kinema.models.cogvideox.transformer import SIZES
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.text import SCENES, T5
from kinema.recipes import sprites_ttt, ttt_video
from kinema.run import Run
from kinema.seeds import keys
from kinema.training.trainer import Trainer

TINY = ["--run.batch_size", "2", "--run.plan.compute", "float32", "--run.plan.shard", "1", "--run.log_every", "1"]


def write_stories(folder: Path, model: str) -> Path:
    """Three videos of 3 segments of 2 + 1 latent frames, as `kinema prepare --for ttt` leaves them."""
    folder.mkdir()
    lines = []
    for n in range(3):
        draw = torch.Generator().manual_seed(n)
        torch.save(torch.randn(7, 32, 4, 6, generator=draw).bfloat16(), folder / f"video{n}.pt")
        texts = [f"text{n}.{i}.pt" for i in range(3)]
        for i, name in enumerate(texts):
            torch.save(torch.randn(2 + i, 24, generator=draw).bfloat16(), folder / name)
        lines.append(json.dumps({"vid_emb": f"video{n}.pt", "text_chunk_emb": texts}) + "\n")
    (folder / "list.jsonl").write_text("".join(lines))
    codec, text = CogVideoXVAE(model), T5(model, 16, unconditional="")
    target = Target("ttt", model, codec, text, 9, 32, 48, 3)  # 3 frames a second: 2 latent frames in 3 seconds
    assert convert.ttt_video(folder / "list.jsonl", target, folder / "prepared", CPU, quietly).samples == 3
    return folder / "prepared"


@contextmanager
def quietly(what, count):
    yield lambda done: None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ttt")
    model = str(write_model(folder / "model", "5B"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "LATENTS", 2)
        data = write_stories(folder / "stories", model)
    return model, str(data), folder


def run_of(name: str, world, steps: int, **options) -> Run:
    model, data, _ = world
    words = ["--model", model, "--data", data, "--held_out", data, "--processes", "1", *TINY]
    words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    heads = ["--run.objective.student.spec.edits.0.mixer.heads", "2"]
    return config.configure(f"ttt_video:{name}", [*words, *heads, "--run.steps", str(steps)])


@pytest.fixture(scope="module")
def first(world):
    """Stage 1, trained for two steps in `one`."""
    run = run_of("3s", world, 2)
    run = replace(run, validation=replace(run.validation, samples=2, every=1))
    Trainer(run, world[2] / "one", CPU).train()
    return run


def test_stages_chain_from_finished_runs_and_say_so(world, first, capsys):
    folder = world[2]
    assert config.load(folder / "one" / "run.yaml") == first
    rows = [json.loads(line) for line in (folder / "one" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row[f"validation/{t}"] < 10 for row in rows for t in (0.1, 0.5, 0.9))
    second = run_of("9s", world, 1, previous=folder / "one")
    trainer = Trainer(second, folder / "two", CPU)
    before = {name: p.detach().clone() for name, p in trainer.actors["student"].module.named_parameters()}
    raw = Trainer(first, folder / "one", CPU)._state()
    assert all(torch.equal(raw[f"student.model.{name}"], p) for name, p in before.items())
    trainer.train()
    assert "starting from" in capsys.readouterr().out
    after = dict(trainer.actors["student"].module.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".mixer." in name or ".attn." in name for name in moved)
    assert {name for name, p in after.items() if p.requires_grad} == {
        name for name in after if ".mixer." in name or ".attn." in name
    }


def test_a_missing_or_unfinished_predecessor_is_named(world):
    folder = world[2]
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        Trainer(run_of("9s", world, 1, previous=folder / "nowhere"), folder / "three", CPU)
    trainer = Trainer(run_of("3s", world, 5), folder / "half", CPU)
    trainer.step = 3
    trainer.save()
    trainer.checkpoints.wait()
    with pytest.raises(UserError, match="is at step 3 of 5; finish that run first"):
        Trainer(run_of("9s", world, 1, previous=folder / "half"), folder / "four", CPU)
    assert not (folder / "three").exists() and not (folder / "four").exists()  # what cannot begin leaves nothing


def test_the_table_is_the_published_one():
    table = {stage.seconds: stage for stage in ttt_video.STAGES}
    assert [(s.seconds, s.segments, s.steps, s.warmup) for s in table.values()] == [
        (3, 1, 5000, 100),
        (9, 3, 5000, 100),
        (18, 6, 1000, 50),
        (30, 10, 1000, 50),
        (63, 21, 250, 25),
    ]
    optim = ttt_video.mixer_optim(table[3], ttt_video.BACKBONE, ttt_video.DECAYS["public"])
    mixer = {s: 1e-4 * optim.scale_at(s) for s in (0, 50, 99, 100, 2550, 4999)}
    expected = {0: 1e-6, 50: 5.1e-5, 99: 1e-4, 100: 1e-4, 2550: 5.5e-5, 4999: 1e-5}
    assert mixer == pytest.approx(expected, rel=1e-4)
    assert optim.scale_at(4999, anneals=False) == 1
    for seconds, processes, axes in ((9, 8, (1, 8, 1)), (30, 8, (1, 4, 2)), (63, 64, (8, 2, 4)), (63, 1, (1, 1, 1))):
        plan = ttt_video.plan(table[seconds], processes)
        assert (plan.replicate, plan.shard, plan.context) == axes
        plan.sizes(processes)


@pytest.mark.parametrize("mixer", ["ttt_mlp", "lact", "gated_deltanet"])
def test_every_parameter_is_in_one_group(mixer):
    from kinema.models.cogvideox.spec import CogVideoX
    from kinema.models.ttt.edit import KINDS, TTT

    size = replace(SIZES["5B"], layers=1, heads=8)
    module = CogVideoX(size, edits=(TTT(KINDS[mixer]()),)).build()
    kind = "public" if mixer == "ttt_mlp" else "new"
    optim = ttt_video.mixer_optim(ttt_video.STAGES[1], ttt_video.BACKBONE, ttt_video.DECAYS[kind])
    groups = optim.split(module.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    names = {p: name for name, p in module.named_parameters()}
    for group in groups:
        for p in group["params"]:
            assert group["anneals"] == (".mixer." in names[p])
    spared = {names[p].rpartition("mixer.")[2] for g in groups if not g["weight_decay"] for p in g["params"]}
    plain = {
        "ttt_mlp": {"b1", "b2", "target_norm.weight"},
        "lact": {"W0", "W1", "W2", "lr.weight", "gate.forward_text"},
    }
    assert plain.get(mixer, {"beta.weight", "decay.weight", "A_log"}) <= spared
    assert not spared & ({"W1", "lr.weight", "gate.forward_text"} if kind == "public" else {"to_q.weight"})


def test_quick_trains_adapters_and_mixers_alone(world):
    run = ttt_video.quick_3s(world[0], world[1], steps=1, rank=2)
    heads = ["--run.objective.student.spec.edits.1.mixer.heads", "2"]
    run = config.parse(run, ["--run.batch_size", "1", "--run.plan.compute", "float32", *heads])
    trainer = Trainer(run, world[2] / "quick", CPU)
    learning = trainer.actors["student"].learning
    assert all(".lora_" in name or ".mixer." in name for name in learning)
    assert any(".lora_" in name for name in learning) and any(".mixer." in name for name in learning)


# --- data ------------------------------------------------------------------------------------------------------------


def opened(data) -> Source:
    return data.open(0, CPU)


def prepared(world, pieces: int, dropout: float) -> Source:
    model, data, _ = world
    return opened(PreparedStories(data, CogVideoXVAE(model), T5(model, 16, unconditional=""), pieces, dropout))


def test_prepared_stories_are_cut_padded_and_dropped_with_their_mask(world):
    batch = prepared(world, 2, 0.0)([0, 1], keys(0, "t", [0, 1]))
    assert batch.video.shape == (2, 5, 16, 4, 6) and batch.cond["text"].shape == (2, 2, 8, 24)
    assert batch.cond["valid"].sum(-1).tolist() == [[2, 3], [2, 3]]
    dropped = prepared(world, 2, 1.0)([0, 1], keys(0, "t", [0, 1]))
    assert dropped.cond["valid"].sum(-1).eq(1).all() and torch.equal(dropped.video, batch.video)
    assert all(torch.equal(dropped.cond[name], batch.uncond[name]) for name in ("text", "valid"))
    with pytest.raises(UserError, match="no window of 4 pieces"):
        prepared(world, 4, 0.1)


def test_dropout_happens_as_often_as_it_says(world):
    source, dropped = prepared(world, 1, 0.1), 0
    for start in range(0, 2000, 500):
        numbers = list(range(start, start + 500))
        dropped += int((source(numbers, keys(0, "t", numbers)).cond["valid"].sum((1, 2)) == 1).sum())
    assert dropped / 2000 == pytest.approx(0.1, abs=0.02)


def test_files_of_the_public_code_are_read(tmp_path):
    torch.save(torch.randn(5, 32, 4, 6).bfloat16(), tmp_path / "video.pt")
    for n in range(2):
        torch.save(torch.randn(6, 24).bfloat16(), tmp_path / f"text{n}.pt")
    line = {"vid_emb": "video.pt", "text_chunk_emb": ["text0.pt", "text1.pt"]}
    index = tmp_path / "train.jsonl"
    index.write_text(json.dumps(line) + "\n")
    batch = opened(PublicSegments(str(index), 2, stride=2))([0], keys(0, "t", [0]))
    assert batch.video.shape == (1, 5, 16, 4, 6) and batch.cond["text"].shape == (1, 2, 6, 24)
    assert "valid" not in batch.cond
    with pytest.raises(UserError, match="2 texts and 5 latent frames, not 3 and 7"):
        opened(PublicSegments(str(index), 3, stride=2))([0], keys(0, "t", [0]))
    (tmp_path / "text1.pt").write_bytes(b"no tensor")
    with pytest.raises(UserError, match=r"line 1 of .*text1\.pt"):
        opened(PublicSegments(str(index), 2, stride=2))([0], keys(0, "t", [0]))


def test_scenes_of_sprites_stories_share_a_frame():
    world = World(size=16, frames=5)
    pixels, stories, captions = stories_of(world, [3], 3)
    assert pixels.shape == (1, 13, 3, 16, 16) and len(captions[0]) == 3
    assert stories[0].characters[0] == stories[0].characters[-1] == 0
    assert "first one" in captions[0][2]


def test_kept_stories_are_read_and_not_made_again(world, tmp_path, monkeypatch):
    model, small = world[0], World(size=32, frames=9)
    stories = SpriteStories(small, CogVideoXVAE(model), T5(model, 40), 2, clips=2, block=2, kept=str(tmp_path))
    made = opened(stories)([0, 1], keys(0, "t", [0, 1]))
    monkeypatch.setattr(CogVideoXVAE, "load", None)
    read = opened(stories)([0, 1], keys(0, "t", [0, 1]))
    assert torch.equal(read.video, made.video) and torch.equal(read.cond["text"], made.cond["text"])
    with pytest.raises(TypeError):  # other stories are made
        opened(replace(stories, world=World(size=32, frames=9, seed=1)))
    assert len(list(tmp_path.iterdir())) == 1


# --- stories ---------------------------------------------------------------------------------------------------------


def test_stories_are_told_resumed_and_streamed(world, first, tmp_path, monkeypatch):
    model = pretrained.load(str(world[2] / "one"), CPU).with_settings(steps=3)
    story = storytelling._story(["a red circle", {"text": "a blue circle", "neg_text": "left"}], "it")
    conds = storytelling.conditions(model.studio, [story])
    calls = []
    forward = type(model.module).forward
    monkeypatch.setattr(type(model.module), "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))

    def latents(kept=None, each=lambda done: None):
        return storytelling.sample_latents(model.studio, model.spec, model.denoiser, conds, 0, [0], kept, each)

    straight = latents()
    assert straight.shape == (1, 5, 16, 4, 6) and len(calls) == 6

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents(tmp_path / "kept", stop)
    calls.clear()
    assert torch.equal(latents(tmp_path / "kept"), straight) and len(calls) == 2
    streamed = torch.cat(list(model.studio.codec.stream(straight)), dim=1)
    torch.testing.assert_close(streamed, model.studio.codec.decode(straight), atol=1e-5, rtol=0)
    files = storytelling.tell(model, [story], tmp_path / "out")
    assert [file.name for file in files] == ["000.mp4"] and not (tmp_path / "out" / "000.estimates").exists()
    calls.clear()
    assert storytelling.tell(model, [story], tmp_path / "out") == files and not calls
    with pytest.raises(UserError, match="other stories"):
        storytelling.tell(model, [story, story], tmp_path / "out")
    with pytest.raises(UserError, match="other negatives"):
        storytelling.tell(model, [tuple(replace(scene, negative="x") for scene in story)], tmp_path / "out")
    with pytest.raises(UserError, match="other upscale"):
        storytelling.tell(model, [story], tmp_path / "out", upscale=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.json").write_text("[1]")
    with pytest.raises(UserError, match="is not what kinema keeps of its settings; choose another folder with --out"):
        storytelling.tell(model, [story], tmp_path / "mine")


def test_a_damaged_estimate_is_made_again(world, first, tmp_path):
    model = pretrained.load(str(world[2] / "one"), CPU).with_settings(steps=2)
    conds = storytelling.conditions(model.studio, [storytelling._story(["a red circle"], "it")])

    def latents():
        return storytelling.sample_latents(model.studio, model.spec, model.denoiser, conds, 0, [0], tmp_path / "kept")

    straight = latents()
    kept = sorted((tmp_path / "kept").iterdir())
    kept[-1].write_bytes(kept[-1].read_bytes()[:100])
    assert torch.equal(latents(), straight)


def test_memory_is_measured_and_goes_on(world, first, tmp_path, monkeypatch):
    model = pretrained.load(str(world[2] / "one"), CPU).with_settings(steps=1)
    scores = memory.probe(model, 2, 1, tmp_path / "probe")
    assert scores["persistence"].n == 1 and 0 <= scores["rendered: persistence"].value <= 1
    monkeypatch.setattr(storytelling, "sample_latents", None)  # nothing is sampled again
    assert memory.probe(model, 2, 1, tmp_path / "probe").to_json() == scores.to_json()
    found = memory.probe(model, 2, 1, tmp_path / "probe", rendered=False)  # loses nothing
    assert found.to_json() == scores.to_json() and "rendered: persistence" in found.scores
    with pytest.raises(UserError, match="of other n"):
        memory.probe(model, 2, 2, tmp_path / "probe")


def test_transitions_are_tokens_of_both_neighbours(tmp_path):
    path = tmp_path / "stories.json"
    scenes = [{"text": "a", "requires_scene_transition": True}, "b", {"text": "c", "requires_scene_transition": True}]
    path.write_text(json.dumps([scenes, "alone"]))
    told, alone = storytelling.read_stories(path)
    assert storytelling.texts_of(told) == ["a", f"b {SCENES[0]}", f"{SCENES[1]} c"]
    assert storytelling.texts_of(alone) == ["alone"]
    for wrong, said in {
        '[[{"prompt": "a"}]]': 'scene 1 of story 1 .* has no text; write "…" or',
        '[["a", {"text": "a", "prompt": "b"}]]': "scene 2 of story 1 .* has 'prompt'; it can have text, requires_scene",
        '[[{"text": 1}]]': "text of scene 1 .* is 1; it must be a text in quotes",
        '[[{"text": "a", "neg_text": 5}]]': "neg_text of scene 1 .* is 5; it must be a text in quotes",
        '[[{"text": "a", "requires_scene_transition": "false"}]]': 'is "false"; it must be true or false',
    }.items():
        path.write_text(wrong)
        with pytest.raises(UserError, match=said):
            storytelling.read_stories(path)


def test_tokens_of_scenes_are_rows_that_no_word_uses(world):
    words = Tokenizer(models.WordLevel({str(n): n for n in range(32100)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.add_tokens(list(SCENES))
    assert tokenizer.convert_tokens_to_ids(list(SCENES)) == [32100, 32101]
    encoder = T5(world[0], 8, scene_tokens=True, padded=False).load(CPU)
    assert encoder(["a red circle", "a"])["valid"].sum(1).tolist() == [4, 2]
    with pytest.raises(UserError, match="none left for <end_scene>"):
        encoder([f"a red circle {SCENES[0]}"])


def test_sprites_stages_are_runs():
    assert [stage.scenes for stage in sprites_ttt.STAGES.values()] == [1, 3, 6, 12, 21]
    listed = dict(config.recipes("Run"))
    assert {f"sprites:ttt_{name}" for name in sprites_ttt.STAGES} <= listed.keys()
    assert {f"ttt_video:{stage.seconds}s" for stage in ttt_video.STAGES} <= listed.keys()
