import errno
import importlib
import signal
import subprocess
import sys
import threading

import pytest
import torch
from world import tiny

from kinema import cli
from kinema.commands import execute
from kinema.config import recipes
from kinema.errors import UsageError, UserError
from kinema.training import budget
from kinema.training.trainer import Trainer

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def kinema(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def one_line(err: str) -> str:
    assert err.startswith("kinema: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_help_loads_nothing_heavy():
    code = "import sys; from kinema.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(
        word in done.stdout for word in ("train", "plan", "sample", "evaluate", "report", "doctor", "demo", "examples:")
    )


def test_help_of_train_lists_the_recipes(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out and line in out for name, line in recipes("Run"))
    assert not any(name in out for name, _ in recipes("Preparation"))


def test_help_of_prepare_lists_what_prepares(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    out = capsys.readouterr().out
    assert all(name in out and line in out for name, line in recipes("Preparation"))
    assert "sprites:wan" not in out


def test_no_command_shows_the_help(capsys):
    code, out, _ = kinema(capsys)
    assert code == 2 and "commands:" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("trian sprites:wan", "did you mean train?"),
        ("--bogus", "no option --bogus"),
        ("sample", "required: MODEL"),
        ("sample sprites-wan", "needs prompts"),
        ("sample sprites-wan --prompt x --stories s.json", "leave --prompt and --prompts out, or --stories"),
        (
            "sample sprites-ttt --stories s.json --frames 65",
            "say themselves how long videos are and how they begin; leave",
        ),
        ("sample sprites-ttt --stories s.json --image i.png", "leave out --image"),
        (
            "sample sprites-wan --prompt x --compute bfloat16",
            "--compute is of long videos; give --stories, or leave it",
        ),
        ("bench vae --fp8", "8 bits are of the fast paths of stream"),
        ("bench stream --path plain --fp8-attention", "8 bits are of the fast paths of stream"),
        ("bench vae --graded-at-once 3", "bench vae grades no rollouts; leave out --graded-at-once"),
        ("sample sprites-wan --promt x", "did you mean --prompt?"),
        ("sample sprites-wan --prompt x --batch 0", "from 1 upwards"),
        ("sample sprites-wan --prompt x --seed one", "invalid int"),
        ("sample sprites-wan --prompt x --device gpu", "did you mean cpu?"),
        ("sample sprites-wan --prompt x --st 4", "no option --st"),
        ("sample sprites-wan extra --prompt x", "no use for 'extra'"),
        ("evaluate sprites-wan --split valid", "invalid choice"),
        ("evaluate sprites-wan --teacher sprites-wan --starts 1", "--starts: must be a number from 2 upwards"),
        ("evaluate sprites-wan-4step --fp8", "8 bits are of the fast paths; add --fast"),
        ("stream sprites-wan-4step --prompt a --fp8-attention", "8 bits are of the fast paths; add --fast"),
        ("evaluate sprites-wan-4step --fast --teacher sprites-wan", "--fast is for one model alone"),
        ("evaluate sprites-wan --starts 4", "--starts is for comparisons"),
        ("train", "required: RECIPE"),
        ("train sprites:wam", "did you mean sprites:wan?"),
        ("train sprites:text --run.stps 3", "did you mean run.steps?"),
        ("train sprites:text --run.steps", "needs a value"),
        ("train sprites:text --run.steps 0", "must be 1 or more"),
        ("train sprites:ursa_dimo --student_steps 0", "0 steps make no video; take 1 step or more"),
        ("train sprites:text --devcie cpu", "did you mean --device?"),
        ("train sprites:text --run.plan.compute float16", "one of float32, bfloat16"),
        ("train sprites:text --device cuda0", "did you mean cuda?"),
        ("train wan:sft", "wan:sft needs --model and --data; give --model VALUE --data VALUE"),
        ("train cogvideox:lora --data x", "cogvideox:lora needs --model; give --model VALUE"),
    ],
)
def test_a_wrong_command_line_ends_with_one_sentence(capsys, words, says):
    code, out, err = kinema(capsys, *words.split())
    assert code == 2 and not out
    assert says in one_line(err)


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        ("shipping", "", "required: what"),
        ("shipping", "base text vae", "base takes TEXT_RUN VAE_RUN FOLDER, not 2 names"),
        ("shipping", "model sprites-wan out parent", "there is no model 'parent'"),
        ("shipping", "codes nowhere out", "nowhere is not the folder of a run"),
        ("bench.steps", "", "required: RECIPE"),
        ("bench.steps", "bench:wan_sf", "did you mean bench:wan_sft?"),
        ("bench.tokens", "--clip 18x256x256", "frames must be 1 + a multiple of 4"),
        ("bench.tokens", "--steps 2,x", "from 1 upwards, not 'x'"),
        ("ablations", "sprites-wan runs", "sprites-wan is no URSA"),
        ("ablations", "sprites-ursa runs --knobs kb", "did you mean kd?"),
        ("evaluation.cost", "--seconds 4", "in segments of 3"),
        ("evaluation.drift", "a=nowhere", "nowhere is no folder of kinema evaluate, nor of kinema probe; give one"),
        ("evaluation.switched", "sprites-wan --n 0", "from 1 upwards, not '0'"),
        ("evaluation.switched", "no-such-model", "there is no model 'no-such-model'"),
        ("evaluation.wording", "sprites-wan --times 0", "--times has 0; times lie above 0"),
        ("evaluation.wording", "sprites-wa", "there is no model 'sprites-wa'"),
        ("evaluation.wording", "sprites-wan --words sizes", "invalid choice: 'sizes'"),
        pytest.param("evaluation.cost", "", "sees no GPU", marks=WITHOUT_GPU),
    ],
)
def test_modules_that_are_commands_say_what_is_wrong_as_kinema_does(capsys, tmp_path, monkeypatch, module, words, says):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"kinema.{module}").main
    assert execute(main, words.split()) in (1, 2) and not list(tmp_path.iterdir())
    assert says in one_line(capsys.readouterr().err)


def test_a_missing_model_ends_with_one_sentence(capsys):
    code, _, err = kinema(capsys, "sample", "no-such-model", "--prompt", "x", "--device", "cpu")
    assert code == 1 and "no-such-model" in one_line(err)


def test_a_missing_folder_ends_with_one_sentence(capsys, tmp_path):
    code, _, err = kinema(capsys, "report", str(tmp_path / "none"))
    assert code == 1 and "none is not a folder" in one_line(err)


@WITHOUT_GPU
def test_a_missing_gpu_is_named_with_what_was_found(capsys):
    for command in (["sample", "sprites-wan", "--prompt", "x"], ["train", "sprites:text"], ["demo"]):
        code, _, err = kinema(capsys, *command, "--device", "cuda")
        assert code == 1
        assert torch.__version__ in one_line(err) and "--device cpu" in err


def test_captions_that_are_not_utf8_are_named_by_line_and_byte(capsys, tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes("a red star\na bléu star\n".encode("latin1"))
    code, _, err = kinema(capsys, "evaluate", "sprites-wan", "--captions", str(path))
    assert code == 1
    assert "byte 5 of line 2 is 0xe9" in one_line(err) and "iconv" in err


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_captions_is_refused(capsys, tmp_path, content):
    (tmp_path / "captions.txt").write_bytes(content)
    code, _, err = kinema(capsys, "sample", "sprites-wan", "--prompts", str(tmp_path / "captions.txt"))
    assert code == 1 and "no captions" in one_line(err)


def test_an_unreadable_captions_file_is_refused(capsys, tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        code, _, err = kinema(capsys, "sample", "sprites-wan", "--prompts", str(path))
        assert code == 1 and "cannot read" in one_line(err)


def test_lines_are_read_without_blanks_and_byte_order_mark(tmp_path):
    (tmp_path / "captions.txt").write_bytes("\ufeffune étoile\r\n\r\n  ein Kreis \n".encode())
    assert cli.read_lines(tmp_path / "captions.txt") == ["une étoile", "ein Kreis"]


class OutOfMemoryError(RuntimeError):
    """Called as torch calls its own."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("a\nb"), 2, "a b"),
        (UserError("c"), 1, "c"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "x.mp4"), 1, "the disk is full: x.mp4; free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "the disk is full; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 1, "Permission denied: runs"),
        (MemoryError(), 1, "--run.micro_batch"),
        (OutOfMemoryError("CUDA out of memory"), 1, "recompute"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 1, "micro_batch"),
        (ModuleNotFoundError("No module named 'lightning'", name="lightning"), 1, "pip install 'kinema[lightning]'"),
        (ModuleNotFoundError("No module named 'x'", name="x.y"), 1, "pip install x"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "ZeroDivisionError: division by zero; this is not expected, --debug",
        ),
    ],
)
def test_whatever_happens_ends_with_one_sentence(capsys, monkeypatch, error, code, says):
    def fail(words):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["doctor"]) == code
    assert says in one_line(capsys.readouterr().err)
    with pytest.raises(type(error)):
        cli.main(["doctor", "--debug"])


def test_a_failing_thread_of_a_library_ends_the_command_with_one_sentence(capsys, monkeypatch):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(words):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return 0

    monkeypatch.setattr(cli, "_run", run)
    hook = threading.excepthook
    assert cli.main(["doctor"]) == 1
    assert "the disk is full" in one_line(capsys.readouterr().err)
    assert threading.excepthook is hook


def test_a_plan_writes_nothing_and_counts_parameters(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = kinema(capsys, "plan", "sprites:text", "--run.steps", "7", "--batch_size", "32", "--card", "4090")
    assert code == 0 and not list(tmp_path.iterdir())
    assert "steps: 7" in out and "batch_size: 32" in out and "parameters" in out and "fits: " in out
    code, out, _ = kinema(capsys, "plan", "sprites:text", "--batch_size", "2", "--card", "0.001")
    assert code == 1 and "does not fit: " in out.splitlines()[-1]
    code, _, err = kinema(capsys, "plan", "sprites:text", "--card", "H10")
    assert code == 2 and "H100" in one_line(err)


@pytest.mark.parametrize(
    ("words", "processes", "context"),
    [("bench:ttt_video", 8, 4), ("bench:ttt_video --processes 2", 2, 2), ("sprites:text --processes 2", 2, 1)],
)
def test_a_plan_is_for_as_many_processes_as_it_is_told_or_the_recipe_is_for(
    capsys, monkeypatch, words, processes, context
):
    def budgeted(run, count, tell):
        raise UserError(f"{count} processes, context {run.plan.context}")

    monkeypatch.setattr(budget, "budget", budgeted)
    _, _, err = kinema(capsys, "plan", *words.split())
    assert one_line(err) == f"kinema: {processes} processes, context {context}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_training_that_is_stopped_saves_says_how_to_go_on_and_is_not_taken_for_done(
    capsys, tmp_path, monkeypatch, number, code
):
    advance = Trainer.advance

    def interrupted(self, *args):
        advance(self, *args)
        if self.step == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "advance", interrupted)
    words = ["train", "world:tiny", "--out", str(tmp_path), "--device", "cpu"]
    ended, out, _ = kinema(capsys, *words)
    assert ended == code and "stopped at step 2 of 8; the same command goes on from here" in out
    ended, out, _ = kinema(capsys, *words)
    assert ended == 0 and "going on from step 2" in out and out.endswith(f"{tmp_path}\n")
    with pytest.raises(KeyboardInterrupt):  # the demo does not go on with half a training
        Trainer(tiny(), tmp_path / "again", torch.device("cpu")).finish()


def test_doctor_finds_everything_it_needs(capsys):
    code, out, _ = kinema(capsys, "doctor")
    assert code == 0
    assert torch.__version__ in out and "everything kinema needs is here" in out
