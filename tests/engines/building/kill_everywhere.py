"""Kills a build at each of its file operations in turn: python kill_everywhere.py WORKDIR ONNX OTHER_ONNX EVERY

A process imports everything once and forks for each attempt. The child builds (in its own process, so that nothing
but the order of operations decides) and ends itself by SIGKILL before its n-th operation inside the bundle. Twice:
into a new bundle, and into one that holds the engines of the weights that are now superseded. After each kill the
bundle is checked, then the build runs to its end and the bundle is checked again. Prints the number of kills.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from engines.building import build as room
from engines.building.build import build_bundle
from engines.bundle import read_manifest
from engines.flavors import BuildRequest, find_flavor
from engines.integrity import verify_bundle

COMPONENTS = ["unet", "text_encoder"]
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.copyfile"}


def build_here(request: BuildRequest, *_: object) -> dict:
    outputs = find_flavor(request.flavor).build(request, lambda phase, part: None)
    dumped = [tensor.model_dump() for tensor in outputs]
    return {"outputs": dumped, "seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1}


def run(work: Callable[[], None]) -> int:
    """Exit status of a forked child: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def build_and_die(onnx: Path, bundle: Path, before: int) -> None:
    left = before

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in OPERATIONS and any(str(bundle) in str(argument) for argument in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    build_bundle(onnx, bundle, gpus=[], components=COMPONENTS, flavor="onnxruntime")


def check(bundle: Path, onnx: Path) -> None:
    """What is there is sound; the next build completes it, and leaves nothing else."""
    if (bundle / "manifest.json").exists():
        faults = verify_bundle(bundle)
        assert not faults, faults
    build_bundle(onnx, bundle, gpus=[], components=COMPONENTS, flavor="onnxruntime")
    manifest = read_manifest(bundle)
    assert verify_bundle(bundle) == [] and len(manifest.engines) == len(COMPONENTS)
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()} - {".lock"}
    left_over = found - {record.path for record in manifest.all_files} - {"manifest.json"}
    assert not left_over, left_over


def main() -> None:
    workdir, onnx, other, every = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    room.run_worker = build_here  # type: ignore[assignment]
    full = workdir / "full"
    assert run(lambda: build_bundle(other, full, gpus=[], components=COMPONENTS, flavor="onnxruntime")) == 0  # type: ignore[func-returns-value]
    kills = 0
    for start in (None, full):
        before = 0
        while True:
            before += every
            bundle = workdir / "bundle"
            shutil.rmtree(bundle, ignore_errors=True)
            if start:
                shutil.copytree(start, bundle)
            status = run(lambda at=before, place=bundle: build_and_die(onnx, place, at))  # type: ignore[misc]
            assert status in (0, -signal.SIGKILL), f"operation {before} of the build failed by itself"
            assert run(lambda place=bundle: check(place, onnx)) == 0, f"killed before operation {before}"  # type: ignore[misc]
            if status == 0:
                break
            kills += 1
    print(kills)


if __name__ == "__main__":
    main()
