"""Converts a checkpoint to Orbax, grown by depth up-scaling on the way, and back: time, memory and equality.

    uv run --extra demo python scripts/bench/convert.py --work DIR --source FOLDER [--m 8]

FOLDER is an HF folder, for example the one that scripts/bench/upscale.py makes. DIR needs three times the grown
model's size. The bytes that come back are compared with those of `upscale`, file by file.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import time


def measure(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its wall seconds and peak resident GiB."""
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed.")
    return time.perf_counter() - begin, usage.ru_maxrss / 2**20


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Returns the SHA-256 of every weight file."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            out[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--source", type=pathlib.Path, required=True)
    parser.add_argument("--m", type=int, default=8)
    args = parser.parse_args()
    grown, copied, own, back = (args.work / name for name in ("grown", "copied", "own", "back"))
    for folder in (grown, copied, own, back):
        shutil.rmtree(folder, ignore_errors=True)
    growth = ["--operator=dus", f"--m={args.m}", f"--source={args.source}"]
    python = [sys.executable, "-m"]
    measure([*python, "solar_jax.upscale", *growth, f"--out={grown}"])
    expected = digests(grown)
    copy, _ = measure(["sh", "-c", f"cp -r {grown} {copied} && sync"])
    shutil.rmtree(copied)
    shutil.rmtree(grown)
    there, there_rss = measure([*python, "solar_jax.convert", *growth, f"--out={own}", "--to=orbax"])
    again, again_rss = measure([*python, "solar_jax.convert", f"--source={own}", f"--out={back}", "--to=hf"])
    size = sum(f.stat().st_size for f in back.glob("*.safetensors"))
    same = digests(back) == expected
    print(f"{size / 1e9:.1f} GB         wall s  peak GiB  of a copy's time")
    print(f"plain copy       {copy:8.1f}")
    print(f"HF -> Orbax      {there:8.1f}{there_rss:10.2f}{there / copy:10.1f}")
    print(f"Orbax -> HF      {again:8.1f}{again_rss:10.2f}{again / copy:10.1f}")
    print(f"round trip bitwise equal: {same}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
