"""Captions from files, with what is unclear refused; batches of codes and of prompts alone."""

import pytest
import torch

from kinema import seeds
from kinema.data.codes import CaptionFiles, CodePrompts, SpriteCodes, told
from kinema.data.prompts import SpritePrompts
from kinema.data.sprites import World
from kinema.errors import UserError
from kinema.models.ursa.codec import FSQTraining, URSACodec
from kinema.models.ursa.text import QwenText
from kinema.models.ursa.tokenizer import FSQSize, FSQVideoTokenizer

CPU = torch.device("cpu")
SIZE = FSQSize(block_out_channels=(4, 6, 6), layers_per_block=1, latent_channels=4, levels=(4, 3, 5), sample_frames=33)
TEXT = QwenText("sprites-wan", length=24)


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> URSACodec:
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    FSQTraining(SIZE).export(FSQVideoTokenizer(SIZE), folder)
    return URSACodec(str(folder))


def keys(samples) -> seeds.Keys:
    return seeds.keys(0, "train", list(samples))


def test_captions_of_a_folder_come_in_the_order_of_its_files(tmp_path):
    (tmp_path / "a.csv").write_text('id,caption,flow\n1,"a red, round thing",5.5\n2,a cat,\n3,,1\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a dog", "flow": 2}\n\n{"text": "a fox"}\n')
    (tmp_path / "c.txt").write_text("a bird\n\n a fish \n")
    (tmp_path / "ignored.md").write_text("# not captions")
    wanted = [
        ("a red, round thing", 5.5),
        ("a cat", None),
        ("a dog", 2.0),
        ("a fox", None),
        ("a bird", None),
        ("a fish", None),
    ]
    assert list(CaptionFiles(str(tmp_path), motion="flow").read()) == wanted
    assert list(CaptionFiles(str(tmp_path)).prompts()) == [caption for caption, _ in wanted]
    assert CaptionFiles(str(tmp_path / "a.csv"), column="id").read()[0] == ("1", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,prompt\na,b\n", "which column of .* text, prompt"),
        ("a.jsonl", '{"words": "a"}\n', "which column of .* words"),
        ("a.jsonl", '{"text": \n', "cannot read the captions"),
        ("a.csv", "caption\n", "has no captions"),
        ("a.md", "x", "there are no captions"),
    ],
)
def test_what_is_unclear_about_captions_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        CaptionFiles(str(tmp_path)).read()


def test_a_motion_score_is_said_as_it_was_in_training():
    assert told("a cat", 9.0, True) == "motion=9.0, a cat"
    assert told("a cat", None, True) == told("a cat", 9.0, False) == "a cat"


def test_codes_of_a_clip_are_the_codecs_and_its_text_is_sometimes_dropped(codec):
    data = SpriteCodes((World(),), codec, TEXT, clips=4, dropout=0.5, block=2)
    source = data.open(0, CPU)
    batch = source(range(4), keys(range(4)))
    assert batch.video.shape == (4, 9, 8, 8) and batch.video.dtype == torch.int64 and batch.video.max() < 60
    assert batch.cond["text"].shape == batch.uncond["text"].shape == (4, 24)
    dropped = [(source(range(4), keys(range(n, n + 4))).cond["text"] == 0).all(1) for n in range(0, 800, 4)]
    assert torch.cat(dropped).float().mean().item() == pytest.approx(0.5, abs=0.06)
    again = data.open(0, CPU)(range(4), keys(range(4)))
    assert torch.equal(again.video, batch.video) and torch.equal(again.cond["text"], batch.cond["text"])


def test_prompts_alone_have_the_shape_of_codes_and_need_no_video(codec):
    data = CodePrompts(SpritePrompts((World(),), clips=6), codec, TEXT, 33, 64, 64)
    batch = data.open(0, CPU)(range(6), keys(range(6)))
    assert batch.video.shape == (6, 9, 8, 8) and len(set(batch.captions)) > 1
    read = TEXT.load("cpu")
    assert torch.equal(batch.cond["text"], read.ids(batch.captions))
    assert torch.equal(batch.uncond["text"], read.ids([""] * 6))
    assert sorted(batch.captions) == sorted(SpritePrompts((World(),), clips=6).prompts())


def test_the_rate_of_prompts_that_were_cut_is_told(codec, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\n" + "a red star moves left " * 9)
    data = CodePrompts(CaptionFiles(str(tmp_path / "prompts.txt")), codec, TEXT, 33, 64, 64)
    source = data.open(0, CPU)
    assert [source(pair, keys(pair)).told for pair in (range(2), range(2, 4))] == [{"truncated": 0.5}] * 2
