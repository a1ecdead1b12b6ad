"""A report is whole (nothing is loaded from elsewhere), well formed, safe to open, and does not overstate a score."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from kinema.data.video import mp4_bytes, write_video
from kinema.errors import UserError
from kinema.evaluation.chart import POINTS
from kinema.evaluation.report import (
    Card,
    Cell,
    Code,
    Curves,
    Facts,
    Report,
    Score,
    ScoreRow,
    ScoreTable,
    Series,
    Text,
    VideoRow,
    Videos,
    read_metrics,
    render,
    write,
)
from kinema.evaluation.summary import from_folder

EVIL = """</script><script>alert("it's & me")</script>"""
VOID = {"meta", "input", "br", "circle", "path"}


class Page(HTMLParser):
    """Collects what a document holds, and fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.data = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.data += data

    def find(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def everything(tmp_path, text: str = EVIL) -> Report:
    clip = torch.zeros(4, 3, 16, 16)
    write_video(tmp_path / "clip.mp4", clip, 8)
    cells = [
        Cell(text, mp4_bytes(clip, 8), {text: True, "motion": False, "size": None}),
        Cell("after", tmp_path / "clip.mp4"),
        Cell("reference", None),
    ]
    scores = [Score(0.4, 0.3, 0.5, 64), Score(0.9, 0.85, 0.95, 64), None]
    sections = [
        Videos(text, [VideoRow(text, cells)]),
        ScoreTable(text, ["before", text, "reference"], [ScoreRow(text, scores, ".1%")], ("before", text), text),
        Curves(text, [Series(text, [1, 2, 3], [0.5, math.nan, 0.1]), Series("lr", [1], [1e-4])], log=True),
        Facts(text, {text: text, "threads": 2}),
        Text(text, text),
        Code(text, text),
    ]
    return Report(text, text, sections, [Card(text, text, text)])


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = render(everything(tmp_path, "a red square"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]+", "", text))
    page = Page(text)
    assert not page.find("link") and not page.find("iframe")
    assert all("src" not in attrs for attrs in page.find("script"))
    videos = page.find("video")
    assert len(videos) == 2
    assert all(v["src"].startswith("data:video/mp4;base64,") for v in videos)
    assert all({"autoplay", "muted", "loop", "playsinline"} <= v.keys() for v in videos)


def test_texts_are_shown_and_never_run(tmp_path):
    page = Page(render(everything(tmp_path)))
    assert len(page.find("script")) == 2  # the page's own, and the points of the chart
    assert page.data.count(EVIL) >= 14
    assert json.loads(page.scripts[0])["series"][0]["name"] == EVIL


def test_curves_keep_spikes_and_name_what_is_not_finite():
    values = [1.0] * 5000
    values[1234], values[3000] = 50.0, math.inf
    page = Page(render(Report("t", "", [Curves("loss", [Series("loss", range(5000), values)])])))
    line = json.loads(page.scripts[0])["series"][0]
    assert len(line["steps"]) <= POINTS + 2
    assert line["raw"][line["steps"].index(1234)] == 50.0
    assert "1 not finite" in page.data
    assert 'd="M' in render(Report("t", "", [Curves("loss", [Series("one", [7], [0.0])])]))
    assert "Nothing was logged" in render(Report("t", "", [Curves("loss", [Series("none", [], [])])]))


def test_only_noise_is_smoothed():
    steps = range(400)
    ramp = [s / 100 for s in steps]
    noisy = [v + (-1) ** s for s, v in zip(steps, ramp, strict=True)]
    series = [Series("ramp", steps, ramp), Series("noisy", steps, noisy)]
    page = Page(render(Report("t", "", [Curves("loss", series)])))
    calm, smoothed = json.loads(page.scripts[0])["series"]
    assert calm["smooth"] == []
    assert max(abs(a - b) for a, b in zip(smoothed["smooth"][40:-40], ramp[40:-40], strict=True)) < 0.1  # and no lag


@pytest.mark.parametrize("values", [[1e-4, 1e-4], [0.0, 0.0], [-3.0, 5.0], [1e-9, 1e6], [0.93, 0.94], [1e300, 1e-300]])
def test_axes_hold_every_curve(values):
    page = Page(render(Report("t", "", [Curves("c", [Series("s", [1, 2], values)])])))
    for attrs in page.find("path"):
        y = [float(pair.split()[1]) for pair in re.findall(r"-?[\d.]+ -?[\d.]+", attrs["d"])]
        assert all(-1 <= v <= 1001 for v in y)


@pytest.mark.parametrize(
    ("after", "better", "tone"),
    [
        (Score(0.9, 0.8, 0.95), "higher", "good"),
        (Score(0.9, 0.8, 0.95), "lower", "bad"),
        (Score(0.5, 0.4, 0.6), "higher", "none"),
        (Score(0.9), "higher", "none"),
    ],
)
def test_a_change_is_praised_only_if_intervals_part(after, better, tone):
    row = ScoreRow("shape", [Score(0.4, 0.3, 0.5), after], better=better)
    text = render(Report("t", "", [ScoreTable("scores", ["before", "after"], [row], ("before", "after"))]))
    assert f'<b class="{tone}">+' in text


def test_a_table_with_holes_is_refused():
    with pytest.raises(ValueError, match="'shape' has 1 scores for 2 columns"):
        ScoreTable("scores", ["before", "after"], [ScoreRow("shape", [Score(1)])])
    with pytest.raises(ValueError, match="'later'"):
        ScoreTable("scores", ["before", "after"], [], ("before", "later"))


def test_a_page_of_24_clips_is_small_and_written_whole(tmp_path):
    draw = torch.Generator().manual_seed(0)
    clip = torch.nn.functional.interpolate(torch.randn(16, 3, 16, 16, generator=draw), 64) * 0.2
    cells = [Cell("after", mp4_bytes(clip, 8, upscale=2))] * 3
    write(Report("t", "", [Videos("v", [VideoRow("noise", cells)] * 8)]), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 3 * 2**20
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_metrics_of_a_killed_run_can_be_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 0.5, "lr": 1e-4}\n{"step": 20, "loss": NaN}\n{"step": 30, "lo')
    metrics = read_metrics(path)
    assert metrics["lr"] == ([10], [1e-4])
    assert metrics["loss"][0] == [10, 20] and math.isnan(metrics["loss"][1][1])


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 0.5}\nwhat\n{"step": 30, "loss": 0.1}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl"):
        read_metrics(path)
    with pytest.raises(UserError, match="no metrics"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_a_run_that_logged_nothing_yet_has_no_report(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="logged nothing yet"):
        from_folder(tmp_path)
