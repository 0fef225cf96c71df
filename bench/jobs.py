"""What `python -m bench gpu` runs: a list of slimxl's own commands, in the order of their worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.models.architectures import find_architecture
from export.components import required_components

LAYOUTS = {  # of each flavor that has some; the first is the one its models are compared in
    "tensorrt": ("per-resolution", "shared", "ranged"),
    "tensorrt-rtx": ("ranged", "shared", "per-resolution"),
}
COMPILED_LOOP = "sub-block, compiled"
LOOPS_ON_CPU = ("published", "sub-block, no cache", "output only", "sub-block")


@dataclass(frozen=True)
class Job:
    """A command of `python -m`. Those it `needs` run before it, and keep what is up to date."""

    name: str
    command: tuple[str, ...]
    needs: tuple[Job, ...] = ()
    hide_gpus: bool = False


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """The jobs of some `models` of one family, the largest first. `gpu` is the name under which plans for the GPU at hand
    can be built with none in sight, `eight_bits` are the precisions that it has arithmetic for."""

    out: Path
    models: Sequence[str]
    resolutions: Sequence[str]
    steps: int
    device: str
    flavors: Sequence[str]
    gpu: str | None = None
    eight_bits: Sequence[str] = ()

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def precision(self) -> str:
        return "fp16" if self.device == "cuda" else "fp32"

    def in_order(self) -> list[Job]:
        largest, *middle, smallest = self.models
        student, *other_students = self.models[1:]
        tensorrt = [flavor for flavor in LAYOUTS if flavor in self.flavors]
        others = [flavor for flavor in self.flavors if flavor not in LAYOUTS]
        eager, compiled = ([f"{model} {runtime}" for model in self.models] for runtime in ("eager", "compiled"))
        every_size = ",".join(self.resolutions)
        return [
            self.run("eager", eager[0], eager[-1], resolutions=every_size),
            *(self.flavor(flavor, model) for flavor in tensorrt for model in (smallest, largest)),
            self.compared("compiled", smallest),
            self.training(student),
            self.compared("compiled", largest),
            *([self.run("eager-all", *eager, resolutions=every_size)] if middle else []),
            *(self.compared("compiled", model) for model in middle),
            self.training(student, checkpointing=False),
            self.run("eager-batch", *eager, batches="4"),
            *(self.in_8_bits(flavor, model) for flavor in tensorrt for model in (smallest, largest) if self.eight_bits),
            *(self.flavor(flavor, model) for flavor in others for model in (smallest, largest)),
            *(self.flavor(flavor, model) for flavor in self.flavors for model in middle),
            *(self.training(model) for model in other_students),
            *(self.layouts(flavor) for flavor in tensorrt),
            self.run("compiled-batch", *compiled, batches="4"),
            self.run("eager-bf16", *eager, precision="bf16"),
            self.run("compiled-bf16", *compiled, precision="bf16"),
            *(self.run(f"compiled-{size}", *compiled, resolutions=size) for size in self.resolutions[1:]),
        ]

    def compared(self, runtime: str, model: str, **changes: str) -> Job:
        """`model` on `runtime`, beside the same model in eager diffusers and the smallest one on `runtime`. The last
        contestant is the one that needs most memory."""
        smaller = [f"{self.models[-1]} {runtime}"] if model != self.models[-1] else []
        name = f"{runtime.partition('+')[0]}-{model}"
        return self.run(name, f"{model} eager", *smaller, f"{model} {runtime}", **changes)

    def flavor(self, flavor: str, model: str) -> Job:
        return self.compared(self.way(flavor), model, **self.workloads(flavor))

    def in_8_bits(self, flavor: str, model: str) -> Job:
        """`model` in half precision and in 8 bits."""
        each = [f"{model} {self.way(flavor)}{one}" for one in ("", *(f" {name}" for name in self.eight_bits))]
        return self.run(f"{flavor}-{model}-8-bits", *each, **self.workloads(flavor))

    def way(self, flavor: str) -> str:
        return "+".join((flavor, *LAYOUTS.get(flavor, ())[:1]))

    def workloads(self, flavor: str) -> dict[str, str]:
        """Every size, and four pictures at once too; for TensorRT, which builds for minutes, the first size alone."""
        return {} if flavor == "tensorrt" else {"resolutions": ",".join(self.resolutions), "batches": "1,4"}

    def layouts(self, flavor: str) -> Job:
        """The smallest model in every layout; without CUDA graphs; and by plans that were built with no GPU in sight."""
        each = [f"{self.models[-1]} {flavor}+{layout}" for layout in LAYOUTS[flavor]]
        ahead = [f"{each[0]}@{self.gpu}"] if self.gpu and flavor == "tensorrt-rtx" else []
        sizes = ",".join(self.resolutions)
        return self.run(f"layouts-{flavor}", *each, f"{each[0]}+no-graphs", *ahead, resolutions=sizes)

    def run(
        self,
        name: str,
        *contestants: str,
        resolutions: str | None = None,
        batches: str = "1",
        precision: str | None = None,
    ) -> Job:
        """`bench run` of contestants named MODEL RUNTIME[+LAYOUT][+no-graphs][@GPU][ int8| fp8]; the first is the
        baseline."""
        resolutions, specs, artifacts, needs = resolutions or self.resolutions[0], [], [], []
        for one in contestants:
            model, _, way = one.partition(" ")
            way, _, eight_bits = way.partition(" ")
            way, _, gpu = way.partition("@")
            if way in ("eager", "compiled"):
                specs.append(f"{one}={way}@{precision or self.precision}:random:{model}")
                continue
            build, folders = self.build(model, way.removesuffix("+no-graphs"), gpu, resolutions, batches, eight_bits)
            needs.append(build)
            specs.append(f"{one}=bundle@{way}:{folders[-1]}")
            artifacts += [f"{one}={folder}" for folder in folders]
        seconds, energy_seconds = (45, 10) if self.device == "cuda" else (5, 0)
        flags = _flags(resolutions=resolutions, batches=batches, steps=self.steps, seconds=seconds, max_rounds=40)
        flags += _flags(max_warmup=2, pictures=0, energy_seconds=energy_seconds, device=self.device)
        flags += ("--kernels", *(["--no-reference"] if batches == "4" else []))  # each was compared one by one
        flags += _flags(workdir=self.work, out=self.out / f"{name}.json")
        named = ("--artifacts", *artifacts) if artifacts else ()
        return Job(name, ("bench", "run", "--contestants", *specs, *flags, *named), tuple(needs))

    def build(
        self, model: str, way: str, gpu: str, resolutions: str, batches: str, eight_bits: str
    ) -> tuple[Job, list[Path]]:
        """The job that builds a bundle, for the GPU at hand or for a named one with none in sight; and the checkpoint, the
        ONNX folder and the bundle that are there then."""
        flavor, _, layout = way.partition("+")
        name = "-".join(filter(None, (model, flavor, layout, gpu, f"batch-{batches.replace(',', '-')}", eight_bits)))
        folders = [self.work / f"random-{model}", self.work / f"onnx-{model}", self.work / name]
        export = _flags(model=f"random:{model}", workdir=self.work, out=folders[1], vae_precision=self.precision)
        components = required_components(find_architecture(model).family.conditioning)
        export += _flags(precision=self.precision, components=",".join(components))
        needs = (Job(f"export-{model}", ("export", "onnx", *export, "--no-check")),)
        if eight_bits:
            needs = (self.quantise(model, folders[1], eight_bits, needs),)
            folders[1] = Path(f"{folders[1]}-{eight_bits}")
        flags = _flags(onnx=folders[1], out=folders[2], flavor=flavor, gpus=gpu or "auto", batches=batches)
        flags += ("--resolutions", resolutions, "--replace", *(["--layout", layout] if layout else []))
        return Job(f"build-{name}", ("engines", "build", *flags), needs, hide_gpus=bool(gpu)), folders

    def quantise(self, model: str, onnx: Path, precision: str, needs: tuple[Job, ...]) -> Job:
        """By the ranges of a few short drawings: how fast a graph runs does not hang on its scales."""
        out = Path(f"{onnx}-{precision}")
        flags = _flags(onnx=onnx, model=f"random:{model}", precision=precision, out=out, count=8, steps=2)
        flags += _flags(resolutions=self.resolutions[0], device=self.device, workdir=self.work)
        return Job(f"quantise-{model}-{precision}", ("export", "quantise", *flags, "--no-check"), needs)

    def training(self, student: str, checkpointing: bool = True) -> Job:
        """The distillation step of the largest model into `student`, in every way that `distill bench` knows; without
        gradient checkpointing the step of our own alone, as it is and compiled."""
        on_gpu = self.device == "cuda"
        name = f"training-{student}" + ("" if checkpointing else "-no-checkpointing")
        flags = _flags(model=f"random:{self.models[0]}", student=student, batch=4 if on_gpu else 1, rounds=6)
        flags += _flags(mixed_precision="bf16" if on_gpu else "no", workdir=self.work, out=self.out / f"{name}.json")
        flags += ("--kernels", *(["--gradient-checkpointing"] if checkpointing else []))
        loops: tuple[str, ...] = () if on_gpu else LOOPS_ON_CPU
        if not checkpointing:
            loops = ("sub-block", COMPILED_LOOP) if on_gpu else ("sub-block",)
        return Job(name, ("distill", "bench", *flags, *(("--loops", *loops) if loops else ())))


def _flags(**values: Any) -> tuple[str, ...]:
    """`--name value` for each."""
    return tuple(word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value)))
