"""How anything is measured here: by a clock that asks nothing of the device before the end, beside what the same device
reached in the same minute on products, attention and copies that are as large as it likes."""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.models.attention import attend, backends
from kinema.training.parallel import local


class Clock:
    """Marks moments on a device's own time line, and tells the seconds between them when all is done."""

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> Any:
        """This moment: on CUDA, when what was launched so far is done."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds. Waits for `end`."""
        if self.device.type != "cuda":
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Ledger:
    """Seconds of the device by what it did; what is done within something else counts as that, too, only once."""

    def __init__(self, clock: Clock):
        self.clock, self._spans, self._open = clock, [], 0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if self._open:
            yield
            return
        self._open, begin = 1, self.clock.mark()
        try:
            yield
        finally:
            self._open = 0
            self._spans.append((name, begin, self.clock.mark()))

    def read(self) -> dict[str, float]:
        """The seconds so far; starts anew."""
        sums: dict[str, float] = {}
        for name, begin, end in self._spans:
            sums[name] = sums.get(name, 0.0) + self.clock.between(begin, end)
        self._spans = []
        return sums


def seconds_of(work: Callable[[], Any], clock: Clock, times: int = 10) -> float:
    """The median time of `work`, after two that do not count."""
    for _ in range(2):
        work()
    marks = [clock.mark()]
    for _ in range(times):
        work()
        marks.append(clock.mark())
    each = sorted(clock.between(a, b) for a, b in pairwise(marks))
    return each[len(each) // 2]


def ceilings(device: torch.device, dtype: torch.dtype, eight: bool = False) -> dict[str, float]:
    """What the device reaches now: TFLOP/s of a large product and of attention of a late chunk, copies in TB/s."""
    clock, gpu = Clock(device), device.type == "cuda"
    n, queries, keys, size = (8192, 4680, 32760, 2**30) if gpu else (512, 64, 256, 2**24)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    found = {"gemm_tflops": 2 * n**3 / seconds_of(lambda: a @ b, clock) / 1e12}
    if eight:
        from kinema.models import fp8

        x, w, bias = fp8.quantised(a), fp8.quantised(b), torch.zeros(n, device=device, dtype=dtype)
        found["gemm_fp8_tflops"] = 2 * n**3 / seconds_of(lambda: fp8.linear(x, w, bias), clock) / 1e12
    q, k, v = (torch.randn(1, 12, m, 128, device=device, dtype=dtype) for m in (queries, keys, keys))
    found["attention_tflops"] = 4 * 12 * 128 * queries * keys / seconds_of(lambda: attend(q, k, v), clock) / 1e12
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_tb_per_s"] = 2 * size / seconds_of(lambda: target.copy_(source), clock) / 1e12
    return {name: round(value, 3) for name, value in found.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """What it runs on and what of."""
    facts = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "attention": backends(device)["order"],
    }
    if device.type == "cuda":
        versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        return {"device": torch.cuda.get_device_name(device), **versions, **facts}
    return {"device": f"{_cpu()}, {torch.get_num_threads()} threads", **facts}


def report(what: str, settings: Any, device: torch.device, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """One result: what was measured, of what settings (and their hash), where, and what came out."""
    config = asdict(settings)
    words = json.dumps([what, config], sort_keys=True).encode()
    return {
        "bench": what,
        "config": config,
        "config_hash": hashlib.blake2b(words, digest_size=6).hexdigest(),
        "machine": machine(device),
        **numbers,
    }


def table(result: Mapping[str, Any], indent: str = "") -> str:
    """A result in lines for people."""
    lines = []
    for name, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", table(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:24}{value}")
    return "\n".join(lines)


REASONS = {  # why a card is slower than it could be, by NVML's bits
    0x1: "idle",
    0x2: "applications' clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat, by software",
    0x40: "heat, by hardware",
    0x80: "power brake",
    0x100: "display's clocks",
}


class Watch:
    """What the card's clock and power are while something is timed, asked of nvidia-smi five times a second.

    A card that is too hot or draws too much slows down, by a third and more, and which it did cannot be told from its
    times. `read` is None where there is no card or no nvidia-smi, or it answered nothing.
    """

    FIELDS = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")

    def __init__(self, device: torch.device):
        self._seen: list[dict[str, float | int]] = []
        self._over = threading.Event()
        self._command: list[str] | None = None
        if device.type == "cuda" and (program := shutil.which("nvidia-smi")):
            asked = ",".join((*self.FIELDS, "clocks_event_reasons.active"))
            card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._command = [program, f"--query-gpu={asked}", "--format=csv,noheader,nounits", f"--id={card}"]

    def __enter__(self) -> "Watch":
        self._over.clear()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if self._command is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        if self._command is not None:
            self._thread.join()

    def read(self) -> dict[str, Any] | None:
        """Least, middle and greatest of each, and the share of looks that found each reason to be slow."""
        return self.told(self._seen)

    def _look(self) -> None:
        while self._command is not None:
            try:
                asked = subprocess.run(self._command, capture_output=True, text=True, timeout=5)
            except (OSError, subprocess.TimeoutExpired):
                return
            if (seen := self.parsed(asked.stdout)) is None:
                return
            self._seen.append(seen)
            if self._over.wait(0.2):
                return

    @classmethod
    def parsed(cls, line: str) -> dict[str, float | int] | None:
        """One look; what the card does not tell is left out."""
        parts = [part.strip() for part in line.strip().split(",")]
        if len(parts) != len(cls.FIELDS) + 1:
            return None
        found: dict[str, float | int] = {}
        for name, part in zip(cls.FIELDS, parts, strict=False):
            with suppress(ValueError):
                found[name] = float(part)
        with suppress(ValueError):
            found["reasons"] = int(parts[-1], 16)
        return found

    @classmethod
    def told(cls, seen: list[dict[str, float | int]]) -> dict[str, Any] | None:
        if not seen:
            return None
        found: dict[str, Any] = {"looks": len(seen)}
        for name in cls.FIELDS:
            if values := sorted(look[name] for look in seen if name in look):
                found[name] = [values[0], values[len(values) // 2], values[-1]]
        if clocks := [look["clocks.sm"] for look in seen if "clocks.sm" in look]:
            found["clocks.sm in time"] = clocks[:: -(-len(clocks) // 20)]
        slowed = {
            name: round(sum(bool(look.get("reasons", 0) & bit) for look in seen) / len(seen), 2)  # type: ignore[operator]
            for bit, name in REASONS.items()
        }
        return found | {"slowed by": {name: share for name, share in slowed.items() if share}}


def warmed(work: Callable[[], Any], device: torch.device, least: int = 2, seconds: float = 5.0) -> None:
    """The rule before anything is timed: the same work `least` times and, on CUDA, for so many seconds, so that kernels
    are chosen and the card has the clock that it keeps under this work. Nothing rests in between."""
    begin, done = time.perf_counter(), 0
    while done < least or (device.type == "cuda" and time.perf_counter() - begin < seconds):
        work()
        synchronised(device)
        done += 1


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie, by the nearest."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def peak(device: torch.device) -> float | None:
    """The most memory that tensors had since `forget_peak`, in GiB; None on the CPU, where nobody counts."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def random_weights(module: torch.nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Fills a module of the meta device, whole or in shards, where it is to run: weights that keep activations near 1,
    norms of ones, buffers of zeros."""
    module = (module if dtype is None else module.to(dtype)).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "norm" in name or name.endswith("gamma"):
                local(p).fill_(1.0 if name.endswith(("weight", "gamma")) else 0.0)
            else:
                local(p).normal_(0, p.shape[1:].numel() ** -0.5 if p.ndim > 1 else 0.02, generator=generator)
        for buffer in module.buffers():
            buffer.zero_()
    return module


KINDS = {
    "elementwise": r"^triton",  # whose names say what they fuse
    "attention": r"sdpa|fmha|flash|attention|softmax",
    "conv": r"fprop|conv|implicit_gemm|cutlass.*nhwc|xmma.*ndhwc|nchwToNhwc|nhwcToNchw|dgrad|wgrad",
    "gemm": r"gemm|nvjet|cutlass|splitK|gemv|cublas",
    "copy": r"memcpy|memset|copy|CatArray",
}


def kernels(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """How many kernels `work` launches and what they do for how long, by a profiler. Of the CPU: its operators."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        work()
        if gpu:
            torch.cuda.synchronize(device)
    if not gpu:
        return {"operators": sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))}
    events = [event for event in profiler.events() or () if str(event.device_type).endswith("CUDA")]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    found: dict[str, list[float]] = {}
    names: dict[str, list[float]] = {}
    for event in events:
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, event.name, re.I)), "elementwise")
        for table, key in ((found, kind), (names, event.name[:100])):
            count = table.setdefault(key, [0, 0.0])
            count[0], count[1] = count[0] + 1, count[1] + (event.time_range.end - event.time_range.start) / 1e3
    busy, last = 0.0, 0.0
    for begin, end in spans:
        busy, last = busy + max(0.0, end - max(begin, last)), max(last, end)
    wall = (last - spans[0][0]) if spans else 0.0
    longest = sorted(names.items(), key=lambda item: -item[1][1])[:25]
    return {
        "kernels": len(events),
        "wall_ms": round(wall / 1e3, 2),
        "idle_ms": round((wall - busy) / 1e3, 2),
        "ms": {kind: round(ms, 2) for kind, (_, ms) in found.items()},
        "count": {kind: n for kind, (n, _) in found.items()},
        "longest": [[name, n, round(ms, 3)] for name, (n, ms) in longest],
    }


def _commit() -> str | None:
    """The commit of the source this is, if it is in a repository."""
    root = Path(__file__).parents[2]
    try:
        asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def synchronised(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def like(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normal numbers that are the same each time."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
