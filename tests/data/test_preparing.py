"""Videos become data: whatever is killed, shared out, broken or changed, the data is that of one undisturbed call."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace

import footage
import pytest
import torch
from cogvideox_world import write_codec, write_encoder
from killing import killed_until_done, values

from kinema import cli, seeds
from kinema.data import on_devices, store
from kinema.data.buckets import Bucket
from kinema.data.convert import ttt_video
from kinema.data.cutting import Cut
from kinema.data.decode import clip_at
from kinema.data.encoding import do
from kinema.data.first_frame import FirstFrame
from kinema.data.latents import Latents
from kinema.data.ledger import verify
from kinema.data.prepared import Prepared
from kinema.data.prepared_videos import PreparedCodes, PreparedStories, PreparedVideos
from kinema.data.preparing import prepare
from kinema.data.targets import Target
from kinema.errors import UserError
from kinema.models.cogvideox.vae import CogVideoXVAE
from kinema.models.text import T5, UMT5
from kinema.models.ursa.codec import FSQTraining, URSACodec
from kinema.models.ursa.text import QwenText
from kinema.models.ursa.tokenizer import FSQSize, FSQVideoTokenizer
from kinema.models.wan.vae import WanVAE

CPU = torch.device("cpu")
WAN = Target("wan", "sprites-wan", WanVAE("sprites-wan"), UMT5("sprites-wan"), 9, 32, 48, 8)
CUT = Cut((Bucket(5, 32, 48), Bucket(9, 32, 48), Bucket(9, 48, 32)))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def quietly(what, total):
    return nullcontext(lambda done: None)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Nine files of which three are broken, one is too short and one too slow, with captions."""
    folder = tmp_path_factory.mktemp("videos")
    footage.write(folder / "a.mp4", 30, 1.3)
    footage.write(folder / "b.mkv", 24, 1.3, size=(97, 131))
    footage.write(folder / "c.webm", 25, 0.8, codec="libvpx-vp9")
    footage.write(folder / "d.avi", 30, 1.3, codec="mpeg4", size=(130, 98))
    footage.write(folder / "short.mp4", 30, 0.2)
    footage.write(folder / "slow.mp4", 5, 2.0)
    footage.cut_off(folder / "a.mp4", folder / "cut.mp4", 0.7)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    rows = [{"video": path.name, "caption": f"a star {path.stem[0]}"} for path in sorted(folder.iterdir())]
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def made(videos, out, target=WAN, cut=CUT, captions=None, **how):
    return prepare(videos, captions or videos / "captions.jsonl", target, cut, out, [CPU], quietly, **how)


@pytest.fixture(scope="module")
def straight(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    return out, made(videos, out)


def read(data, samples, seed=0):
    keys = seeds.keys(seed, "train", samples)
    return data.open(seed, CPU)(samples, keys)


def test_broken_clips_are_reported_and_the_others_made(straight):
    out, report = straight
    assert report.samples == report.made == 4 and not report.missing
    reasons = {said["what"].split("/")[-1]: said["why"] for said in lines(out / store.SKIPPED)}
    assert reasons.keys() == {"short.mp4", "slow.mp4", "cut.mp4", "empty.mp4", "text.mp4"}
    assert "lower --fps" in reasons["slow.mp4"]
    assert "fewer than 5" in reasons["short.mp4"] and "cannot be read" in reasons["cut.mp4"]
    assert store.read_manifest(out)["buckets"] == {"5x32x48": 1, "9x32x48": 2, "9x48x32": 1}
    assert verify(out, quietly) == []


def test_a_sample_is_the_codecs_latents_of_the_nearest_frames(straight, videos):
    data, plain, fast = Prepared(straight[0]), WAN.codec.load(CPU), WAN.open_codec(CPU)
    for number in range(len(data)):
        record = data.record(number)
        b = record["bucket"]
        pixels = clip_at(record["video"], [i / 8 for i in range(b["frames"])], (b["height"], b["width"]))
        clean = data.tensors(number)["clean"]
        assert torch.equal(clean, fast.video(pixels)["clean"])
        expected = plain.encode(pixels[None].float() / 127.5 - 1)[0]
        torch.testing.assert_close(clean.float(), expected, atol=2e-3, rtol=2e-3)  # kept in float16


def test_again_makes_nothing_and_changes_nothing(straight, videos):
    out, before = straight[0], values(straight[0])
    stamps = {path: path.stat().st_mtime_ns for path in (out / "shards").rglob("data.mdb")}
    report = made(videos, out)
    assert (report.samples, report.made) == (4, 0) and values(out) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_killed_at_any_moment_it_ends_with_the_data_of_one_call(straight, videos, tmp_path):
    hit = killed_until_done(lambda: made(videos, tmp_path / "out", threads=1), kills=3, longest=0.35)
    assert hit and values(tmp_path / "out") == values(straight[0])
    theirs, ours = store.read_manifest(straight[0]), store.read_manifest(tmp_path / "out")
    assert ours == theirs and (tmp_path / "out" / store.INDEX).read_bytes() == (straight[0] / store.INDEX).read_bytes()


def test_parts_are_together_the_whole(straight, videos, tmp_path):
    assert made(videos, tmp_path, part=(0, 2)).missing
    with pytest.raises(UserError, match="is not finished"):
        Prepared(tmp_path)
    assert not made(videos, tmp_path, part=(1, 2)).missing
    assert values(tmp_path) == values(straight[0])
    assert store.read_manifest(tmp_path)["digest"] == store.read_manifest(straight[0])["digest"]
    for a, b in zip(*(read(Latents(str(out)), [0, 1]).cond["text"] for out in (tmp_path, straight[0])), strict=True):
        assert torch.equal(a, b)


def test_a_changed_caption_costs_no_video_and_a_new_file_is_taken_up(straight, videos, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    rows = lines(videos / "captions.jsonl")
    rows[0]["caption"] = "a ring"
    extra = footage.write(tmp_path / "e.mp4", 30, 0.7)
    rows.append({"video": str(extra), "caption": "a star"})
    (tmp_path / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = made(videos, tmp_path / "out", captions=tmp_path / "captions.jsonl")
    assert (report.samples, report.made) == (5, 1)
    said = {said["texts"][0]["text"] for said in lines(tmp_path / "out" / store.SAMPLES)}
    assert {"a ring", "a star"} < said and "a star a" not in said


def test_what_the_data_was_not_made_with_is_refused_by_name(straight, videos):
    with pytest.raises(UserError, match="with fps 8, not 6"):
        made(videos, straight[0], replace(WAN, fps=6))
    with pytest.raises(UserError, match=r"with cut .*centre.* not .*random"):
        made(videos, straight[0], cut=replace(CUT, crop="random"))
    with pytest.raises(UserError, match="was prepared for wan, not for cogvideox"):
        PreparedVideos(str(straight[0]), CogVideoXVAE("x"), T5("x")).open(0, CPU)


def test_a_damaged_sample_is_found_taken_out_and_made_again(straight, videos, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    shard = next((tmp_path / "out" / "shards").rglob("data.mdb"))
    data = Prepared(tmp_path / "out")
    value = data._shards.value(data._shard(1), data.key(1))
    content = bytearray(shard.read_bytes())
    content[content.index(value) + len(value) - 3] ^= 1
    shard.write_bytes(content)
    data.close()
    wrong = verify(tmp_path / "out", quietly)
    assert len(wrong) == 1 and data.key(1) in wrong[0]
    assert made(videos, tmp_path / "out").made == 1
    assert values(tmp_path / "out") == values(straight[0]) and verify(tmp_path / "out", quietly) == []


def test_pieces_have_captions_of_their_own(videos, tmp_path):
    (tmp_path / "v").mkdir()
    path = footage.write(tmp_path / "v" / "long.mp4", 24, 2.0)
    row = {"video": path.name, "captions": ["a star", "a ring", "a circle", "never reached"]}
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    report = made(tmp_path / "v", tmp_path / "out", cut=replace(CUT, segment=0.5), captions=tmp_path / "c.jsonl")
    assert report.samples == 3, "the last half second is not whole: its end is not there"
    told = sorted(lines(tmp_path / "out" / store.SAMPLES), key=lambda said: said["start"])
    assert [(line["start"], line["texts"][0]["text"]) for line in told] == [
        (0.0, "a star"),
        (0.5, "a ring"),
        (1.0, "a circle"),
    ]
    data = Prepared(tmp_path / "out")
    later = next(n for n in range(3) if data.record(n)["start"] == 1.0)
    pixels = clip_at(path, [1.0 + i / 8 for i in range(5)], (32, 48))
    assert torch.equal(data.tensors(later)["clean"], WAN.open_codec(CPU).video(pixels)["clean"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The frozen parts of a tiny CogVideoX."""
    folder = tmp_path_factory.mktemp("tiny")
    write_codec(folder)
    write_encoder(folder)
    return str(folder)


def test_cogvideox_reads_what_it_would_have_encoded(videos, tiny, tmp_path):
    codec, text = CogVideoXVAE(tiny, multiple=2), T5(tiny, 6)
    target = Target("cogvideox", tiny, codec, text, 9, 32, 48, 8, image=True)
    made(videos, tmp_path, target, Cut((Bucket(9, 32, 48),)))
    batch = read(PreparedVideos(str(tmp_path), codec, text, dropout=0.0, image=FirstFrame((-40.0, 0.0), 0.0)), [0])
    opened = codec.load(CPU)
    pixels = {path: clip_at(videos / path, [i / 8 for i in range(9)], (32, 48)) for path in ("a.mp4", "b.mkv", "d.avi")}
    with torch.no_grad():
        latents = {p: opened.encode(x[None].float() / 127.5 - 1)[0] for p, x in pixels.items()}
    nearest = min(latents, key=lambda p: float((latents[p] - batch.video[0]).abs().max()))
    torch.testing.assert_close(batch.video[0], latents[nearest], atol=2e-2, rtol=1e-2)  # kept in bfloat16
    image = opened.image_latents(pixels[nearest][:1].float() / 127.5 - 1, 4)
    torch.testing.assert_close(batch.cond["image"], image, atol=1e-4, rtol=1e-4)
    assert batch.cond["text"].shape == (1, 6, 24) and not batch.uncond["text"].any()
    with pytest.raises(UserError, match=r"codec\.chunk '8"):
        read(PreparedVideos(str(tmp_path), replace(codec, chunk="whole"), text), [0])


def test_long_windows_give_shorter_stages_their_beginnings(tiny, tmp_path):
    codec, text = CogVideoXVAE(tiny), T5(tiny, 16, unconditional="")
    target = Target("ttt", tiny, codec, text, 25, 32, 48, 8)
    (tmp_path / "v").mkdir()
    path = footage.write(tmp_path / "v" / "film.mp4", 16, 6.2)
    told = ["a red circle", "a blue circle moves left"]
    (tmp_path / "c.jsonl").write_text(json.dumps({"video": path.name, **{f"text_{i}": t for i, t in enumerate(told)}}))
    cut = Cut((Bucket(25, 32, 48), Bucket(49, 32, 48)))
    assert made(tmp_path / "v", tmp_path / "out", target, cut, tmp_path / "c.jsonl").samples == 1
    two = read(PreparedStories(str(tmp_path / "out"), codec, text, pieces=2, dropout=0.0), [0])
    one = read(PreparedStories(str(tmp_path / "out"), codec, text, pieces=1, dropout=0.0), [0])
    assert two.video.shape == (1, 13, 16, 4, 6) and torch.equal(two.video[:, :7], one.video)
    assert two.cond["text"].shape == (1, 2, 8, 24) and two.cond["valid"].sum(2).tolist() == [[4, 6]]
    tokens = text.load(CPU).tokenizer(told[0]).input_ids
    with torch.no_grad():
        rows = text.load(CPU).network(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    torch.testing.assert_close(two.cond["text"][0, 0, :4], rows, atol=2e-2, rtol=1e-2)
    with pytest.raises(UserError, match="no window of 3 pieces"):
        read(PreparedStories(str(tmp_path / "out"), codec, text, pieces=3), [0])


def test_scene_marks_are_rows_of_t5_and_refused_where_there_are_none(tiny):
    target = Target("ttt", tiny, CogVideoXVAE(tiny), T5(tiny, 16, unconditional=""), 25, 32, 48, 8)
    keep = target.open_text(CPU)
    with pytest.raises(UserError, match="none for marks of scenes"):
        keep({"text": "a red circle", "start": True, "end": False})
    seen = []
    network = keep.encoder.network
    network.resize_token_embeddings(32128)
    network.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"][0].tolist()), with_kwargs=True)
    keep({"text": "a red circle", "start": True, "end": True})
    assert seen[0][0] == 32101 and seen[0][-2:] == [32100, keep.encoder.tokenizer.eos_token_id] and len(seen[0]) == 6


def test_ursa_reads_the_codes_and_says_the_motion(videos, tmp_path):
    size = FSQSize(
        block_out_channels=(4, 6, 6), layers_per_block=1, latent_channels=4, levels=(4, 3, 5), sample_frames=33
    )
    torch.manual_seed(0)
    FSQTraining(size).export(FSQVideoTokenizer(size), tmp_path / "model")
    shutil.copytree(cli_assets() / "tokenizer", tmp_path / "model" / "tokenizer")
    codec, text = URSACodec(str(tmp_path / "model")), QwenText(str(tmp_path / "model"), 24)
    target = Target("ursa", str(tmp_path / "model"), codec, text, 9, 32, 48, 8)
    rows = [{"video": name, "caption": "a red star", "motion": 5} for name in ("a.mp4", "b.mkv")]
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    made(videos, tmp_path / "out", target, Cut((Bucket(9, 32, 48),)), tmp_path / "c.jsonl")
    batch = read(PreparedCodes(str(tmp_path / "out"), codec, text, dropout=0.0, motion_told=1.0), [0, 1])
    opened = codec.load(CPU)
    codes = [
        opened.encode(clip_at(videos / n, [i / 8 for i in range(9)], (32, 48))[None] / 127.5 - 1)
        for n in ("a.mp4", "b.mkv")
    ]
    assert batch.captions == ("motion=5.0, a red star",) * 2
    assert {tuple(x.flatten().tolist()) for x in batch.video} == {tuple(c.flatten().tolist()) for c in codes}


def cli_assets():
    from kinema.models.hub import ASSETS

    return ASSETS / "sprites-wan"


def test_ttt_videos_list_is_converted_to_the_bit(tiny, tmp_path):
    target = Target("ttt", tiny, CogVideoXVAE(tiny), T5(tiny, 16, unconditional=""), 49, 32, 48, 16)
    torch.manual_seed(0)
    video, texts = torch.randn(25, 32, 4, 6).bfloat16(), [torch.randn(5 + i, 24).bfloat16() for i in range(2)]
    torch.save(video, tmp_path / "v.pt")
    for i, text in enumerate(texts):
        torch.save(text, tmp_path / f"t{i}.pt")
    rows = [{"vid_emb": "v.pt", "text_chunk_emb": ["t0.pt", "t1.pt"]}, {"vid_emb": "v.pt", "text_chunk_emb": ["t0.pt"]}]
    (tmp_path / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = ttt_video(tmp_path / "list.jsonl", target, tmp_path / "out", CPU, quietly)
    assert report.samples == 1 and "as 1 texts need" in next(iter(report.left_out.values()))
    assert ttt_video(tmp_path / "list.jsonl", target, tmp_path / "out", CPU, quietly).made == 0
    data = Prepared(tmp_path / "out")
    rows = data.read([0], ("mean", "logvar"))
    assert torch.equal(torch.cat([rows.tensors["mean"], rows.tensors["logvar"]], dim=2)[0], video)
    assert all(torch.equal(a, b) for a, b in zip(rows.texts[0], texts, strict=True))
    batch = read(PreparedStories(str(tmp_path / "out"), target.codec, target.text, pieces=2), [0])
    assert batch.video.shape == (1, 25, 16, 4, 6)


@pytest.fixture
def forked(monkeypatch):
    """Processes that are copies of this one, so that they need not import everything again."""
    context = torch.multiprocessing.get_context("fork")
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda how: context)


def test_processes_share_the_work_and_make_the_same_data(straight, videos, tmp_path, forked):
    captions = videos / "captions.jsonl"
    report = prepare(videos, captions, WAN, CUT, tmp_path, [CPU, CPU], quietly)
    assert report == straight[1] and values(tmp_path) == values(straight[0])
    for part in ("shards", "texts"):
        assert len([*(tmp_path / part).glob("p0of1w*")]) == 2, f"one of them made no {part}"


def test_a_process_that_dies_ends_the_others_and_the_same_command_goes_on(
    straight, videos, tmp_path, forked, monkeypatch
):
    def die_of_the_second(work, device, threads, say):
        if work.part.endswith("w1"):
            os.kill(os.getpid(), signal.SIGKILL)
        do(work, device, threads, say)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="ended with code -9; the same command"):
        patched.setattr(on_devices, "do", die_of_the_second)
        prepare(videos, videos / "captions.jsonl", WAN, CUT, tmp_path, [CPU, CPU], quietly)
    assert made(videos, tmp_path).samples == 4 and values(tmp_path) == values(straight[0])


@pytest.mark.slow
def test_two_processes_make_the_data_of_one(straight, videos, tmp_path):
    words = ["prepare", str(videos), "--captions", str(videos / "captions.jsonl"), "--for", "wan", "-o", str(tmp_path)]
    words += ["--model", "sprites-wan", "--frames", "5,9", "--size", "32x48", "--aspects", "2:3", "--processes", "2"]
    assert cli.main([*words, "--device", "cpu"]) == 0
    assert values(tmp_path) == values(straight[0])
