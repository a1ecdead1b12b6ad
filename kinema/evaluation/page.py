"""What every report looks like (HTML frame and CSS) and does (a little JavaScript): text only, no logic.

The policy in its head forbids the page to load anything. Colours follow the reader's light or dark setting.
"""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; media-src data:; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header class="top"><h1>$title</h1><p>$summary</p></header>
$cards
$body
<footer>made by kinema</footer>
</main>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --paper: #fff; --ink: #1d1d21; --soft: #6a6a73; --line: #e4e3df; --well: #f1f0ed;
  --accent: #2f6fde;
  --good: #14753d; --good-paper: #e0f3e6; --bad: #b3261e; --bad-paper: #fbe7e5;
  --c0: #8a8a94; --c1: #2f6fde; --c2: #c96a12; --c3: #11866f; --c4: #b0398a; --c5: #7352cf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131316; --paper: #1c1c20; --ink: #ececf0; --soft: #a0a0ab; --line: #323238; --well: #26262b;
    --accent: #6ea2ff;
    --good: #6fd492; --good-paper: #173524; --bad: #ff938a; --bad-paper: #451d1b;
    --c0: #9a9aa6; --c1: #6ea2ff; --c2: #f0a04b; --c3: #45c8ab; --c4: #ec86c6; --c5: #b19cff;
  }
}
.chart { --c0: #2f6fde; --c1: #c96a12; --c2: #11866f; --c3: #b0398a; --c4: #7352cf; --c5: #8a8a94; }
@media (prefers-color-scheme: dark) {
  .chart { --c0: #6ea2ff; --c1: #f0a04b; --c2: #45c8ab; --c3: #ec86c6; --c4: #b19cff; --c5: #9a9aa6; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 24px; display: grid; gap: 20px; }
main > *, .charts > * { min-width: 0; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; font-weight: 650; letter-spacing: -0.005em; }
.top p { margin: 8px 0 4px; color: var(--soft); font-size: 17px; max-width: 75ch; }
section, .card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }
section { padding: 18px 20px; }
section > h2 { margin-bottom: 12px; }
section > header {
  display: flex; justify-content: space-between; align-items: center; flex-wrap: wrap; gap: 8px 16px;
  margin-bottom: 12px;
}
small, .label, .legend, .axis, .note, dt, footer { color: var(--soft); font-size: 12.5px; }
.none { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.text p { margin: 0 0 8px; max-width: 80ch; }

.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(45%, 190px), 1fr)); }
.card { padding: 14px 18px; display: grid; }
.card span { color: var(--soft); font-size: 13px; }
.card b { font-size: 25px; line-height: 1.3; letter-spacing: -0.02em; font-weight: 650; }

.rows {
  display: grid; gap: 22px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--cells) * (var(--width) + 8px))), 1fr));
}
figure { margin: 0; }
.cells { display: grid; gap: 8px; grid-template-columns: repeat(var(--cells), minmax(0, 1fr)); }
figcaption { margin-top: 6px; line-height: 1.4; overflow-wrap: anywhere; }
.label { display: block; margin-bottom: 3px; }
video, .missing { display: block; width: 100%; border-radius: 6px; background: var(--well); }
video { image-rendering: pixelated; }
.missing { aspect-ratio: 1; display: grid; place-items: center; color: var(--soft); }
.chip {
  display: inline-block; margin: 5px 4px 0 0; padding: 0 7px; border-radius: 99px; background: var(--well);
  color: var(--soft); font-size: 12px; line-height: 19px; white-space: nowrap;
}
.chip.good { background: var(--good-paper); color: var(--good); }
.chip.bad { background: var(--bad-paper); color: var(--bad); }
.player { display: flex; gap: 12px; align-items: center; }
button {
  font: inherit; font-size: 13px; color: var(--ink); background: var(--well); border: 1px solid var(--line);
  border-radius: 7px; padding: 3px 12px; cursor: pointer;
}
button:hover { border-color: var(--soft); }
input { accent-color: var(--accent); vertical-align: middle; }
.play { min-width: 84px; } .scrub { width: 150px; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 9px 22px 9px 0; text-align: left; vertical-align: top; white-space: nowrap; }
tr > :last-child { padding-right: 0; }
thead th { font-weight: 500; color: var(--soft); font-size: 13px; padding-top: 0; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; }
td b { font-weight: 650; }
td small, th small { display: block; font-weight: 400; }
th i, .legend i {
  display: inline-block; width: 9px; height: 9px; border-radius: 9px; background: var(--c); margin-right: 6px;
}
.bars { display: block; margin-top: 2px; }
.bars path { stroke: var(--c); stroke-width: 3; stroke-linecap: round; }
.bars .track { stroke: var(--well); }
.bars circle { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; }
.note { margin: 10px 0 0; }

.charts { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.charts > :last-child:nth-child(odd) { grid-column: 1 / -1; }
.chart label { color: var(--soft); font-size: 13px; cursor: pointer; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-bottom: 12px; }
.plot { position: relative; height: 230px; margin: 6px 8px 24px 52px; touch-action: pan-y; }
.plot svg { width: 100%; height: 100%; overflow: visible; display: block; }
.plot path {
  fill: none; stroke: var(--c); stroke-width: 2; stroke-linecap: round; stroke-linejoin: round;
  vector-effect: non-scaling-stroke;
}
.plot .raw { stroke-width: 1; opacity: 0.32; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .x, .plot .y { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap; }
.plot .x { top: calc(100% + 9px); transform: translateX(-50%); }
.plot .y { right: calc(100% + 9px); transform: translateY(-50%); }
.chart:has(input:checked) .lin, .chart:not(:has(input:checked)) .log { display: none; }
.axis { text-align: center; }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.tip {
  position: absolute; top: 4px; z-index: 1; pointer-events: none; padding: 5px 9px; white-space: pre;
  background: var(--paper); border: 1px solid var(--line); border-radius: 7px; font-size: 12.5px; line-height: 1.45;
  box-shadow: 0 3px 12px rgb(0 0 0 / 0.14);
}

dl {
  margin: 0; display: grid; gap: 10px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(45%, 210px), 1fr));
}
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; } summary h2 { display: inline; }
.code { position: relative; margin-top: 12px; }
pre {
  margin: 0; padding: 14px 16px; background: var(--well); border-radius: 8px; overflow: auto; max-height: 480px;
  white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 84px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 2;
}
.copy { position: absolute; top: 8px; right: 8px; }
footer { text-align: center; padding: 8px; }
@media (max-width: 600px) {
  main { padding: 24px 12px; gap: 14px; } section { padding: 14px; } h1 { font-size: 25px; }
  .player { width: 100%; } .scrub { flex: 1; }
}
"""

SCRIPT = """
for (const section of document.querySelectorAll(".videos")) {
  const videos = [...section.querySelectorAll("video")];
  const button = section.querySelector(".play"), scrub = section.querySelector(".scrub");
  const play = on => {
    button.textContent = on ? "Pause all" : "Play all";
    videos.forEach(video => on ? video.play().catch(() => {}) : video.pause());
  };
  button.onclick = () => play(button.textContent === "Play all");
  scrub.oninput = () => {
    play(false);
    videos.forEach(video => { video.currentTime = Math.min(0.999, scrub.value / 1000) * (video.duration || 0); });
  };
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) play(false);
}

for (const chart of document.querySelectorAll(".chart")) {
  const { first, last, series } = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor"), tip = chart.querySelector(".tip");
  const show = value => value === null ? "not finite" : Number(value.toPrecision(4)).toString();
  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect();
    const step = first + (last - first) * (event.clientX - box.left) / box.width;
    const far = s => Math.abs(s - step);
    const nearest = steps => steps.reduce((best, s, i) => far(s) < far(steps[best]) ? i : best, 0);
    const lines = series.filter(s => s.steps.length).map(s => {
      const i = nearest(s.steps), smooth = s.smooth.length ? "  (smooth " + show(s.smooth[i]) + ")" : "";
      return { at: s.steps[i], text: s.name + "  " + show(s.raw[i]) + smooth };
    });
    const at = lines.reduce((a, b) => far(b.at) < far(a.at) ? b : a).at;
    const x = (at - first) / (last - first) * box.width;
    tip.textContent = ["step " + at.toLocaleString("en"), ...lines.map(line => line.text)].join("\\n");
    cursor.hidden = tip.hidden = false;
    cursor.style.left = x + "px";
    tip.style.left = (x > box.width / 2 ? x - tip.offsetWidth - 10 : x + 10) + "px";
  };
  plot.onpointerleave = () => { cursor.hidden = tip.hidden = true; };
}

for (const button of document.querySelectorAll(".copy")) {
  button.onclick = async () => {
    const text = button.parentElement.querySelector("code");
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(text); }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
}
"""
