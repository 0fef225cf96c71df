"""`python -m export`: a checkpoint into an ONNX folder, and the proof that the two compute the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from distill.checkpoints.sources import WORKDIR
from distill.common.errors import UserError, exit_on_user_error, parse_counts, require_above
from distill.common.launcher import program
from distill.common.options import parse_names
from distill.models.resolution import Resolution, parse_resolutions
from distill.training.options import Workdir

app = tyro.extras.SubcommandApp()
Paths = Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="(default: none)")]


@app.command
def onnx(
    *,
    model: str,
    out: Path,
    precision: Literal["fp16", "fp32"] = "fp16",
    opset: int = 23,
    components: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(default: all)")] = None,
    resolutions: str = "dynamic",
    batch: int = 1,
    guidance: Literal["always", "never"] = "always",
    tokens: str = "",
    vae: str = "stock",
    vae_precision: Literal["auto", "fp16", "fp32"] = "auto",
    lora: Paths = (),
    lora_scale: Annotated[tuple[float, ...], tyro.conf.arg(help_behavior_hint="(default: 1 for each)")] = (),
    controlnet: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = (),
    reuse: Paths = (),
    check: bool = True,
    workdir: Workdir = WORKDIR,
) -> None:
    """Export a checkpoint. What is up to date is kept.

    Args:
        model: A Hugging Face id, a diffusers folder, a .safetensors file, random:NAME, mini:sdxl or mini:sd.
        out: The ONNX folder to write.
        precision: Of everything but SDXL's stock VAE, which stays in fp32.
        opset: 23 keeps Attention and GroupNormalization whole; 18 to 22 spell them out for older runtimes.
        components: Which ones, separated by commas.
        resolutions: dynamic (one graph for all sizes), all (one static graph for each of the family's), or WxH,...
        batch: Images at once, of static graphs: rows of the VAE and the text encoders.
        guidance: Of static graphs: always gives the UNet two rows for each image, never gives it one.
        tokens: Lengths of prompts that the UNet takes, in tokens, e.g. 77,154,231: for long and weighted prompts. Empty: its
            own length only.
        vae: stock, fp16-fix, tiny, or a folder with a VAE.
        vae_precision: auto is fp32 for SDXL's stock VAE and one for it that says force_upcast, else as the rest.
        lora: LoRA files to fuse, in order.
        lora_scale: One for each LoRA, in the same order; those left out are 1.
        controlnet: Folders or Hugging Face ids of ControlNets: each is a component, and the UNet takes what they add.
        reuse: Other ONNX folders to take equal components from.
        check: Compare with torch before a component gets its name.
    """
    from distill.checkpoints.folder import find_family
    from distill.checkpoints.sources import resolve
    from distill.common.progress import say
    from export.folder import export_checkpoint
    from export.job import ExportOptions

    if len(lora_scale) > len(lora):
        raise UserError(f"{len(lora_scale)} values of --lora-scale for {len(lora)} of --lora; give at most one each")
    checkpoint = resolve(model, workdir)
    sizes: tuple[Resolution, ...] = ()
    if resolutions != "dynamic":
        sizes = parse_resolutions(resolutions, find_family(checkpoint).resolutions)
    options = ExportOptions(
        precision=precision,
        opset=opset,
        components=None if components is None else tuple(parse_names(components)),
        resolutions=sizes,
        batch=batch,
        guidance=guidance,
        tokens=tuple(parse_counts("--tokens", tokens)) if tokens else (),
        vae=vae,
        vae_precision=vae_precision,
        loras=tuple(zip(lora, [*lora_scale, *[1.0] * (len(lora) - len(lora_scale))], strict=True)),
        controlnets=controlnet,
        reuse=reuse,
        check=check,
    )
    export_checkpoint(checkpoint, out, options=options, source_name=model, workdir=workdir, progress=say)


@app.command
def quantise(
    *,
    onnx: Path,
    model: str,
    precision: Literal["int8", "fp8"],
    out: Path,
    prompts: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: a list of our own)")] = None,
    count: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    resolutions: str = "all",
    seed: int = 0,
    device: str = "cpu",
    ranges: Path | None = None,
    alpha: float | None = None,
    percentile: float | None = None,
    keep: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = (),
    max_error: float | None = None,
    check: bool = True,
    workdir: Workdir = WORKDIR,
) -> None:
    """Put the UNet of an ONNX folder into 8 bits, by the ranges that its inputs take while the checkpoint draws.

    Args:
        onnx: The ONNX folder, with open dimensions; fp16 for TensorRT, fp32 for ONNX Runtime on the CPU.
        model: The checkpoint that it was made from; its LoRAs are fused again.
        precision: int8 runs on every GPU, fp8 on compute capability 8.9 (RTX 4090) and later.
        out: The quantised ONNX folder to write.
        prompts: A file with a prompt a line.
        count: Draw only the first so many.
        steps: Of each drawing. None: those that a few-step model was taught, else 20.
        guidance_scale: Of each drawing. None: that of a few-step model, else 5.
        resolutions: all of the family's in turn, or WxH,....
        seed: Of the first drawing.
        device: That draws: cpu (in fp32) or cuda (in fp16).
        ranges: A file of ranges to take in place of drawing.
        alpha: Of SmoothQuant, 0 to 1. None: 0.8 for int8, 0 for fp8.
        percentile: That a convolution's range holds: 99, 99.9, 99.99, 99.999, 100. None: 99.999 for int8, 100 for fp8.
        keep: More layers that stay in half precision, as patterns: up_blocks.2.*
        max_error: Of noise_pred, relative: put in only as many layers as stay within it. None: all that may go.
        check: Compare with torch before the UNet gets its name.
    """
    from dataclasses import replace

    from distill.checkpoints.folder import find_family
    from distill.checkpoints.sampling import Sampling, sampling_of
    from distill.checkpoints.sources import resolve
    from distill.common.progress import say
    from export.prompts import read_prompts
    from export.quantise.calibrate import Drawing
    from export.quantise.folder import QuantiseOptions, check_source, find_ranges, prepare_source, quantise_folder
    from export.quantise.sensitivity import find_sensitivity

    if max_error is not None:
        require_above(0, max_error=max_error)
    options = QuantiseOptions(precision=precision, alpha=alpha, percentile=percentile, keep=keep, check=check)
    record = check_source(onnx, out, options)
    checkpoint = resolve(model, workdir)
    sizes = parse_resolutions(resolutions, find_family(checkpoint).resolutions)
    sampling = sampling_of(checkpoint) or Sampling()
    called = {"num_inference_steps": 20, "guidance_scale": 5.0} | sampling.call_arguments
    drawing = Drawing(
        prompts=tuple(read_prompts(prompts, checkpoint, count)),
        resolutions=tuple(sizes),
        steps=called["num_inference_steps"] if steps is None else steps,
        guidance_scale=called["guidance_scale"] if guidance_scale is None else guidance_scale,
        seed=seed,
    )
    sampling.check(drawing.steps)
    prepared = prepare_source(onnx, checkpoint, workdir)
    found = find_ranges(prepared, record, drawing, workdir, device, ranges)
    ranking = None
    if max_error is not None:
        ranking = find_sensitivity(onnx, prepared, found, drawing, options.recipe, max_error, workdir)
        say(f"sensitivity: {ranking.low} of {len(ranking.errors)} layers in {precision}, together {ranking.error:.2e}")
        options = replace(options, keep=(*keep, *ranking.kept))
    quantise_folder(onnx, out, prepared, found, options, ranking=ranking, progress=say)


@app.command
def judge(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    out: Path,
    model: str | None = None,
    count: int = 270,
    steps: int | None = None,
    rounds: int = 10,
    workdir: Workdir = WORKDIR,
) -> None:
    """Hold UNets in 8 bits against that of the first folder, all of one mini checkpoint: bytes, error of noise_pred,
    pictures, captions followed, CPU time in ONNX Runtime.

    Args:
        folders: ONNX folders with open dimensions; what `quantise` made, behind what it was made from.
        out: A JSON file to write.
        model: The checkpoint, where it is no longer found under the name it was exported from.
        count: Pictures by each, as many of each resolution of the family.
        steps: Denoising steps of each picture. None: those that a few-step model was taught, else 8.
        rounds: UNet calls of each that are timed.
    """
    from dataclasses import asdict

    from distill.checkpoints.sampling import Sampling, sampling_of
    from distill.checkpoints.sources import resolve
    from distill.common.files import write_json
    from distill.common.ownership import require_writable_file
    from distill.mini.judge import GUIDANCE_SCALE
    from export.job import library_versions
    from export.quantise.judge import judge_folders, table
    from export.records import read_about

    require_writable_file(out, ("judged", "settings"))
    if not folders:
        raise UserError("no folder to judge: give two or more, the first is what the others are held against")
    checkpoint = resolve(model or read_about(folders[0])["source"]["name"], workdir)
    sampling = sampling_of(checkpoint) or Sampling()
    called = {"num_inference_steps": 8, "guidance_scale": GUIDANCE_SCALE} | sampling.call_arguments
    steps, scale = called["num_inference_steps"] if steps is None else steps, called["guidance_scale"]
    sampling.check(steps)
    rows = judge_folders(folders, checkpoint, workdir, count=count, steps=steps, guidance_scale=scale, rounds=rounds)
    settings = {"count": count, "steps": steps, "guidance_scale": scale, "rounds": rounds}
    judged = [asdict(row) for row in rows]
    write_json(out, {"settings": settings, "judged": judged, "versions": library_versions()})
    print(table(rows, count))


@app.command
def verify(
    folder: Annotated[Path, tyro.conf.Positional],
    *,
    model: str | None = None,
    components: str = "",
    resolutions: str = "",
    batch: int = 2,
    seed: int | None = None,
    out: Path | None = None,
    workdir: Workdir = WORKDIR,
) -> int:
    """Run every component in ONNX Runtime and in torch on random inputs, in every resolution; exit code 1 on a failure.

    Args:
        folder: The ONNX folder.
        model: The checkpoint, where it is no longer found under the name it was exported from.
        components: Only these, separated by commas; all if not given.
        resolutions: Only at these WxH,...; all if not given. A graph with open dimensions takes any others too.
        batch: Rows of every component; a static graph takes what it takes.
        seed: Of the inputs; drawn afresh where not given, and reported.
        out: A JSON file to write: every comparison, its bounds, the versions.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from distill.checkpoints.sources import resolve
    from distill.common.files import write_json
    from distill.common.ownership import require_writable_file
    from export.checks.parity import BOUNDS
    from export.checks.verify import verify_folder
    from export.job import library_versions
    from export.records import read_about

    if out is not None:
        require_writable_file(out, ("parity", "bounds"))
    about = read_about(folder)
    checkpoint = resolve(model or about["source"]["name"], workdir)
    sizes = parse_resolutions(resolutions) if resolutions else ()
    results = verify_folder(
        folder,
        checkpoint,
        components=parse_names(components),
        sizes=sizes,
        batch=batch,
        seed=seed,
        workdir=workdir,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    table = Table("component", "output", "worst at", title="ONNX Runtime against torch in float32")
    for column in ("relative error", "cosine", "bound"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name, rows in results.items():
        for output in dict.fromkeys(row.output for row in rows):
            here = [row for row in rows if row.output == output]
            worst = max(here, key=lambda row: (not row.passed, row.relative))
            bound = f"{worst.precision} {BOUNDS[worst.precision].relative:.0e}"
            figures = (f"{worst.relative:.1e}", f"{worst.cosine:.8f}", bound, "ok" if worst.passed else "FAILED")
            table.add_row(name, output, worst.resolution, *figures)
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    every = [row for rows in results.values() for row in rows]
    print(f"seed {every[0].seed}")
    if out is not None:
        figures_of = {name: [asdict(row) for row in rows] for name, rows in results.items()}
        bounds = {precision: asdict(bound) for precision, bound in BOUNDS.items()}
        source = about["source"] | {"opset": about["opset"]}
        write_json(out, {"source": source, "bounds": bounds, "parity": figures_of, "versions": library_versions()})
    return int(not all(row.passed for row in every))


@app.command
def bench(*, model: str, out: Path, rounds: int = 3, latency_rounds: int = 20, workdir: Workdir = WORKDIR) -> None:
    """Export with this and with `optimum-cli export onnx`, in turn, and compare time, memory, graphs and latency.

    Args:
        model: The checkpoint, as `onnx` takes it.
        out: A JSON file to write; the exports themselves stay beside it.
        rounds: Exports by each.
        latency_rounds: UNet calls in ONNX Runtime by each.
    """
    from distill.checkpoints.sources import resolve
    from distill.common.files import write_json
    from distill.common.ownership import require_writable_file
    from distill.common.progress import say
    from export.bench import bench_export

    require_writable_file(out, ("runs", "ratios"))
    scratch = out.parent / f"{out.stem}-exports"
    result = bench_export(resolve(model, workdir), scratch, rounds=rounds, latency_rounds=latency_rounds, progress=say)
    write_json(out, result)
    for measure, ratio in result["ratios"].items():
        say(f"optimum / this, {measure}: {ratio:.2f}")


def main() -> int:
    return exit_on_user_error(lambda: app.cli(prog=program("export"), description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
