"""What kinema found on this machine: versions, devices, optional parts, shipped checkpoints, and what replaces what."""

import importlib.metadata
import os
import platform
import re

NEEDED = (
    "numpy",
    "safetensors",
    "transformers",
    "diffusers",
    "tokenizers",
    "jsonargparse",
    "av",
    "rich",
    "lmdb",
    "tensorboard",
)


def examine() -> int:
    """Prints the findings and returns 0, or 1 if something that kinema needs is broken."""
    broken: list[str] = []
    print(f"kinema {_version('kinema') or '(not installed: run from source)'}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        import torch
    except (ImportError, OSError) as error:
        print(f"torch cannot be imported: {error}\nbroken: install it with: pip install 'torch>=2.11,<3'")
        return 1
    _devices(torch)
    _packages(broken)
    _extras()
    _checkpoints(broken)
    _fallbacks(torch)
    for problem in broken:
        print(f"broken: {problem}")
    print("something kinema needs is broken, see above" if broken else "everything kinema needs is here")
    return 1 if broken else 0


def _devices(torch) -> None:
    from kinema.models.attention import backends

    cuda = (
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}" if torch.version.cuda else "built for CPUs"
    )
    print(f"torch {torch.__version__}, {cuda}")
    print("\ndevices")
    _row("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, {_memory()}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for n in range(gpus):
        p = torch.cuda.get_device_properties(n)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
        _row(f"cuda:{n}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}, {bf16}")
    if not gpus:
        _row("cuda", "no GPU found; --device auto is the CPU")
    print("\nattention")
    for device in [torch.device("cpu"), *(torch.device("cuda", n) for n in range(gpus))]:
        _row(str(device), ", ".join(f"{name} {value}" for name, value in backends(device).items() if name != "device"))


def _packages(broken: list[str]) -> None:
    print("\npackages")
    for name in NEEDED:
        version = _version(name)
        _row(name, version or "missing")
        if not version:
            broken.append(f"{name} is not installed; pip install {name}")


def _extras() -> None:
    print("\noptional")
    try:
        requires = importlib.metadata.requires("kinema") or []
    except importlib.metadata.PackageNotFoundError:
        requires = []
    for line in requires:
        if found := re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line):
            _row(found[1], _version(found[1]) or f"missing; pip install 'kinema[{found[2]}]'")


def _checkpoints(broken: list[str]) -> None:
    from safetensors import SafetensorError, safe_open

    from kinema.models.hub import ASSETS
    from kinema.pretrained import shipped

    print("\nshipped checkpoints")
    for name in shipped():
        folder = ASSETS / name
        files, tensors, size = sorted(folder.rglob("*.safetensors")), 0, 0
        for file in files:
            try:
                with safe_open(file, "pt") as handle:
                    tensors += len(handle.keys())
                size += file.stat().st_size
            except (SafetensorError, OSError) as error:
                broken.append(f"{file} cannot be read ({error}); reinstall kinema")
        _row(name, f"{tensors} tensors in {len(files)} files, {size / 2**20:.1f} MiB")
    if not shipped():
        _row("none", "kinema demo needs one; reinstall kinema")


def _fallbacks(torch) -> None:
    print("\nwhat replaces what")
    gpu = torch.cuda.is_available()
    _row("device auto", "GPU 0" if gpu else "the CPU, in place of a GPU: right, and slow beyond the sprites world")
    _row("attention auto", "the first kernel in the order above that can take the inputs; the last one takes any")
    _row("compute", "float32 unless a run says bfloat16" + ("" if gpu else ", which most CPUs only emulate"))
    _row("progress bars", "lines, where the output is not a terminal")


def _row(name: str, text: str) -> None:
    print(f"  {name:16}{text}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> str:
    """The host's memory, or less where a control group allows less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
        total = min(total, int(limit)) if limit.isdecimal() else total
    except OSError:
        pass
    return f"{total / 2**30:.0f} GiB of memory"
