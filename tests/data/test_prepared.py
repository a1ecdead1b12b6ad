"""Prepared data: made in any order and after any kill the same, read back as written, refused with the fix."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from kinema import seeds
from kinema.data import public_lmdb
from kinema.data.latents import Latents
from kinema.data.ode_pairs import MakeOdePairs, OdePairs
from kinema.data.prompts import EmbeddedPrompts, EmbedPrompts, PromptFile, Prompts, SpritePrompts
from kinema.data.public_lmdb import ConvertLMDB, PublicLMDB
from kinema.data.shards import Item, Shards, prepare
from kinema.data.sprites import World
from kinema.errors import UsageError, UserError
from kinema.models.text import UMT5
from kinema.models.wan.spec import Wan

CPU = torch.device("cpu")
TEXT = UMT5("sprites-wan")
WORLD = World(seed=3)


@dataclass(frozen=True)
class Noise:
    """Videos drawn from their number, of a kind that `Latents` reads."""

    items: int = 5
    per_shard: int = 2
    stop: int = 99  # dies there

    def header(self):
        return {"kind": "latents", "items": self.items}

    def open(self, device):
        def make(numbers):
            if self.stop in numbers:
                raise KeyboardInterrupt
            draws = seeds.keys(0, "noise", list(numbers))
            return [
                Item(f"clip {n}", {"clean": video, "text": torch.full((1 + n, 4), float(n))})
                for n, video in zip(numbers, draws.normal(3, 4, 2, 2), strict=True)
            ]

        return make, torch.zeros(2, 4)


def pairs(folder, **changes):
    made = replace(
        MakeOdePairs(
            SpritePrompts((WORLD,), clips=5), TEXT, Wan(weights="sprites-wan", shift=3.0), (2, 16, 8, 8), 8, 4, 3.0
        ),
        **{"batch": 2, "per_shard": 2} | changes,
    )
    prepare(made, folder, CPU)
    return made


def taken(data, samples, seed=0):
    return data.open(seed, CPU)(samples, seeds.keys(seed, "train", samples))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_preparation_goes_on_to_the_same_bytes(tmp_path):
    prepare(Noise(), tmp_path / "straight", CPU)
    with pytest.raises(KeyboardInterrupt):
        prepare(Noise(stop=3), tmp_path / "killed", CPU)
    assert (tmp_path / "killed" / "000000.safetensors").exists()
    with pytest.raises(UserError, match="1 of 3 shards"):
        Shards(tmp_path / "killed", "latents")
    done = []
    prepare(Noise(), tmp_path / "killed", CPU, each=done.append)
    assert done == [2, 4, 5] and files(tmp_path / "killed") == files(tmp_path / "straight")


def test_processes_share_out_the_shards(tmp_path):
    prepare(Noise(), tmp_path / "straight", CPU)
    for i in (1, 0):
        prepare(Noise(), tmp_path / "shared", CPU, part=(i, 2))
    assert files(tmp_path / "shared") == files(tmp_path / "straight")


def test_folder_of_other_data_is_refused(tmp_path):
    prepare(Noise(), tmp_path, CPU)
    with pytest.raises(UserError, match="items 5, not 6"):
        prepare(Noise(items=6), tmp_path, CPU)
    with pytest.raises(UserError, match="holds latents, not ode_pairs"):
        OdePairs(str(tmp_path), (1.0,)).open(0, CPU)
    with pytest.raises(UserError, match="no prepared data"):
        Latents(str(tmp_path / "nowhere")).open(0, CPU)


@pytest.mark.parametrize("resident", [False, True])
def test_latents_come_back_with_their_prompts_every_one_once_a_pass(tmp_path, resident):
    prepare(Noise(), tmp_path, CPU)
    data = Latents(str(tmp_path), dropout=0.0, rows=8, resident=resident)
    batch = taken(data, range(5))
    assert sorted(batch.captions) == [f"clip {n}" for n in range(5)]
    for video, text, caption in zip(batch.video, batch.cond["text"], batch.captions, strict=True):
        n = int(caption.split()[1])
        assert torch.equal(video, seeds.keys(0, "noise", [n]).normal(3, 4, 2, 2)[0])
        assert torch.equal(text[: 1 + n], torch.full((1 + n, 4), float(n))) and not text[1 + n :].any()
    assert batch.captions != taken(data, range(5, 10)).captions  # another order in the next pass
    assert batch.captions != taken(data, range(5), seed=1).captions


def test_dropped_text_is_the_unconditional_one(tmp_path):
    prepare(Noise(), tmp_path, CPU)
    batch = taken(Latents(str(tmp_path), dropout=1.0), range(5))
    assert torch.equal(batch.cond["text"], batch.uncond["text"]) and batch.cond["text"].shape == (5, 8, 4)


def test_ode_pairs_are_states_of_the_ode_that_ends_in_the_teachers_video(tmp_path):
    from kinema.diffusion.guidance import guided
    from kinema.diffusion.samplers import DDIM

    made = pairs(tmp_path)
    times = made.teacher.times(8)
    assert made.times() == (times[0], times[2], times[4], times[6], 0.0)
    batch = taken(OdePairs(str(tmp_path), made.times()[:-1], rows=40), range(5))
    assert batch.trajectory.shape == (5, 5, 2, 16, 8, 8) and torch.equal(batch.video, batch.trajectory[:, -1])
    teacher = made.teacher.read(made.teacher.load(made.teacher.build(), CPU))
    noise, prompts = batch.trajectory[:, 0], list(batch.captions)
    encoder = TEXT.load(CPU)
    denoise = guided(teacher, encoder(prompts), encoder([""] * 5), 3.0)
    with torch.no_grad():
        video = DDIM()(denoise, teacher.path, noise, times)
    torch.testing.assert_close(batch.video, video, atol=1e-2, rtol=1e-2)  # kept in float16, from which this starts
    numbers = [list(made.prompts.prompts()).index(prompt) for prompt in prompts]
    torch.testing.assert_close(
        noise, seeds.keys(0, "ode", numbers).fold("noise").normal(2, 16, 8, 8), atol=2e-3, rtol=1e-3
    )


def test_ode_pairs_kept_at_other_times_are_refused(tmp_path):
    made = pairs(tmp_path)
    with pytest.raises(UserError, match=r"keeps its trajectories at 1, 0\.9, .* steps at 1, 0\.5, 0"):
        OdePairs(str(tmp_path), (1.0, 0.5)).open(0, CPU)
    with pytest.raises(UserError, match=r"guidance 3\.0, not 4\.0"):
        pairs(tmp_path, guidance=4.0)
    with pytest.raises(UsageError, match="use 48"):
        replace(made, steps=50)


def test_prompts_online_and_embedded_are_the_same_batches(tmp_path):
    source = SpritePrompts((WORLD, World(seed=4)), clips=6)
    prepare(EmbedPrompts(source, TEXT, per_shard=4, dtype="float32"), tmp_path, CPU)
    online = taken(Prompts(source, TEXT, rows=40), range(4))
    kept = taken(Prompts(source, TEXT, rows=40, resident=True), range(4))
    embedded = taken(EmbeddedPrompts(str(tmp_path), rows=40), range(4))
    for other in (kept, embedded):
        assert other.captions == online.captions and other.video.shape == (4, 0)
        torch.testing.assert_close(other.cond["text"], online.cond["text"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other.uncond["text"], online.uncond["text"], atol=1e-5, rtol=1e-5)
    assert len(taken(EmbeddedPrompts(str(tmp_path)), [0]).cond["text"][0]) < 40


def test_prompt_files_are_read_line_by_line_and_refused_where_they_do_not_match(tmp_path):
    (tmp_path / "p.txt").write_text("a cat  \n\nein Hund ☂\n", encoding="utf-8")
    (tmp_path / "q.txt").write_text("a long cat\nnothing\nein langer Hund\n", encoding="utf-8")
    (tmp_path / "r.txt").write_text("one\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert list(PromptFile(str(tmp_path / "p.txt")).prompts()) == ["a cat", "", "ein Hund ☂"]
    assert list(PromptFile(str(tmp_path / "p.txt"), str(tmp_path / "q.txt"), 2).prompts()) == ["a long cat", "nothing"]
    with pytest.raises(UserError, match=r"1 lines and .* has 3"):
        PromptFile(str(tmp_path / "p.txt"), str(tmp_path / "r.txt")).prompts()
    with pytest.raises(UserError, match="has no prompts"):
        PromptFile(str(tmp_path / "empty.txt")).prompts()
    with pytest.raises(UserError, match="cannot read"):
        PromptFile(str(tmp_path / "none.txt")).prompts()


def rows(count, shape=(2, 3, 4, 2, 2)):
    return [(f"prompt {i % 4} ☂", seeds.keys(0, "rows", [i]).normal(*shape)[0]) for i in range(count)]


def test_public_lmdb_round_trip_with_a_duplicate_last_row(tmp_path):
    assert public_lmdb.write(tmp_path, rows(5)) == 4
    there = PublicLMDB(tmp_path)
    assert len(there) == 4 and there.prompt(3) == "prompt 3 ☂" and there.states(0).shape == (2, 3, 4, 2, 2)
    for i, (_, row) in enumerate(rows(4)):
        assert torch.equal(there.states(i), row.half())


def test_public_lmdb_shards_are_one_dataset(tmp_path):
    for name, part in (("b", rows(3)[2:]), ("a", rows(2))):
        public_lmdb.write(tmp_path / name, part)
    there = PublicLMDB(tmp_path)
    assert [there.prompt(i) for i in range(3)] == [prompt for prompt, _ in rows(3)]
    assert len(PublicLMDB(tmp_path, limit=2)) == 2
    with pytest.raises(IndexError):
        there.prompt(3)


def test_public_lmdb_of_latents_has_one_state(tmp_path):
    public_lmdb.write(tmp_path, rows(2, (3, 4, 2, 2)))
    assert PublicLMDB(tmp_path).states(1).shape == (1, 3, 4, 2, 2)


def test_public_lmdb_with_rows_of_two_shapes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"are \[1, 3, 4, 2, 2\], not \[2"):
        public_lmdb.write(tmp_path, [rows(1)[0], ("other", torch.zeros(1, 3, 4, 2, 2))])
    with pytest.raises(UserError, match="no latents_shape"):
        PublicLMDB(tmp_path)


def test_public_lmdb_is_converted_to_shards(tmp_path):
    torch.save({prompt: row[None] for prompt, row in rows(3)}, tmp_path / "made.pt")
    public_lmdb.write(tmp_path / "lmdb", public_lmdb.dictionaries([tmp_path / "made.pt"]))
    convert = ConvertLMDB(str(tmp_path / "lmdb"), TEXT, times=(1.0,))
    prepare(convert, tmp_path / "shards", CPU)
    batch = taken(OdePairs(str(tmp_path / "shards"), (1.0,)), range(3))
    told = dict(rows(3))
    for caption, states in zip(batch.captions, batch.trajectory, strict=True):
        assert torch.equal(states, told[caption].half().float())
    with pytest.raises(UserError, match="list the other 1"):
        prepare(replace(convert, times=(1.0, 0.5)), tmp_path / "wrong", CPU)
    prepare(replace(convert, kind="latents", times=()), tmp_path / "clean", CPU)
    assert taken(Latents(str(tmp_path / "clean")), range(3)).video.shape == (3, 3, 4, 2, 2)


def test_damaged_shard_is_named(tmp_path):
    prepare(Noise(), tmp_path, CPU)
    path = tmp_path / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"000001\.safetensors is damaged"):
        taken(Latents(str(tmp_path)), range(5))
    (tmp_path / "header.json").write_text(json.dumps({})[:1])
    with pytest.raises(UserError, match=r"header\.json is damaged"):
        Shards(tmp_path, "latents")
