"""What `verify`, `inspect` and `list` print about a bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distill.common.errors import UserError
from distill.common.files import size_text
from engines.bundle import MANIFEST, Engine, Manifest, read_manifest, rebuild_command
from engines.integrity import unnamed_files, verify_bundle

console = Console(highlight=False, markup=False, soft_wrap=True)


def wide_console(width: int) -> Console:
    """For tables: at least `width` characters."""
    return Console(highlight=False, markup=False, width=max(console.width, width))


def print_verification(bundle: Path) -> int:
    """Exit code 0 for a sound bundle; else one line per fault and 2."""
    manifest = read_manifest(bundle)
    faults = verify_bundle(bundle) + unnamed_files(bundle, manifest)
    if not manifest.engines:
        faults.append(f"{bundle} holds no engine; build some with: {rebuild_command(bundle)}")
    for fault in faults:
        console.print(f"fault: {fault}")
    if faults:
        console.print(f"{bundle}: {len(faults)} fault(s)")
        return 2
    total = sum(record.size_bytes for record in manifest.all_files)
    counts = f"{len(manifest.all_files)} files, {size_text(total)}, {len(manifest.engines)} engines"
    console.print(f"{bundle}: {counts}, every hash as recorded")
    return 0


def engine_table(manifest: Manifest) -> Table:
    """One row per engine."""
    table = Table(title=f"engines of {manifest.source.name} ({manifest.source.sha256[:12]})", title_justify="left")
    costs = ("size", "x weights", "built in")
    for column in ("component", "flavor", "for", "layout", "profiles", "batch", "precision", *costs):
        table.add_column(column, overflow="fold")
    for engine in manifest.engines:
        table.add_row(
            engine.component,
            f"{engine.flavor} {engine.flavor_version}",
            target_text(engine),
            engine.layout if len(engine.resolutions) > 1 else engine.resolutions[0],
            str(len(engine.profiles)),
            ",".join(map(str, engine.batches)),
            engine.precision,
            size_text(engine.size_bytes),
            f"{engine.size_bytes / engine.weights_bytes:.3f}",
            f"{engine.build.seconds:.0f} s",
        )
    return table


def shape_text(shape: Sequence[int | str]) -> str:
    """`(any, 4, any, any)`: TensorRT's axes without a size have no name either; the profiles tell their range."""
    return f"({', '.join('any' if re.fullmatch(r'dim[0-9]+', str(size)) else str(size) for size in shape)})"


def target_text(engine: Engine) -> str:
    """`a100 rtx4090 (8.0 8.9)`, or `any`."""
    if not engine.compute_capabilities:
        return "any"
    return f"{' '.join(engine.gpus)} ({' '.join(engine.compute_capabilities)})"


def print_inspection(bundle: Path, as_json: bool = False) -> int:
    """The whole manifest as JSON, or a table and then the profiles and tensors of every engine."""
    manifest = read_manifest(bundle)
    if as_json:
        print(manifest.model_dump_json(indent=1))
        return 0
    wide = wide_console(150)
    wide.print(engine_table(manifest))
    for engine in manifest.engines:
        built_with = "".join(f", {name} {value}".removesuffix(" True") for name, value in engine.options.items())
        wide.print(f"\n{engine.files[0].path}{built_with}")
        for side, tensors in (("in ", engine.inputs), ("out", engine.outputs)):
            for tensor in tensors:
                wide.print(f"  {side} {tensor.name}: {tensor.dtype} {shape_text(tensor.shape)}")
        for profile in engine.profiles:
            sizes = " ".join(profile.resolutions)
            wide.print(f"  profile {profile.index}: up to {profile.batch} image(s), {sizes}")
            for name, shape in profile.shapes.items():
                exact = shape.min == shape.max
                text = f"{shape.max}" if exact else f"{shape.min} to {shape.max}, tuned for {shape.opt}"
                wide.print(f"    {name} {text}")
    return 0


def print_list(folder: Path) -> int:
    """The bundles below `folder`, with flavors, GPUs, resolutions and size; a damaged one is named as such."""
    found = sorted(
        path.parent for path in [*folder.glob(MANIFEST), *folder.glob(f"*/{MANIFEST}"), *folder.glob(f"*/*/{MANIFEST}")]
    )
    if not found:
        raise UserError(f"no bundle in {folder} or two folders below it; build one with python -m engines build")
    table = Table()
    for column in ("bundle", "model", "flavors", "for", "resolutions", "engines", "size"):
        table.add_column(column, overflow="fold")
    for bundle in found:
        try:
            manifest = read_manifest(bundle)
        except UserError as error:
            table.add_row(str(bundle), "damaged", str(error), "", "", "", "")
            continue
        gpus = dict.fromkeys(gpu for engine in manifest.engines for gpu in engine.gpus)
        sizes = dict.fromkeys(text for engine in manifest.engines for text in engine.resolutions)
        total = sum(record.size_bytes for record in manifest.all_files)
        cells = [str(bundle), manifest.source.name, " ".join(manifest.flavors), " ".join(gpus) or "any"]
        table.add_row(*cells, str(len(sizes)), str(len(manifest.engines)), size_text(total))
    wide_console(120).print(table)
    return 0
