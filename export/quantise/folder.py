"""The quantised ONNX folder: another one's UNet in 8 bits, and everything else as it is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from distill.checkpoints.load import load_component
from distill.checkpoints.tensors import component_tensors
from distill.common.errors import UserError, require_between, unknown
from distill.common.files import (
    clone_file,
    exclusive,
    read_json,
    remove_leftovers,
    replacing,
    require_free_disk,
    sha256_file,
    sha256_json,
    write_json,
)
from distill.common.ownership import require_apart
from export.checks.parity import Parity, compare
from export.checks.verify import prepare_again
from export.components import COMPONENTS
from export.folder import check_files, refuse_foreign
from export.graph.wrappers import TORCH_DTYPES, wrap
from export.job import CHECK_BELOW_BYTES, library_versions
from export.prompts import some_text
from export.quantise.calibrate import Drawing, calibrate
from export.quantise.graph import write_pairs
from export.quantise.layers import PRECISIONS, find_layers
from export.quantise.ranges import PERCENTILES, Ranges, read_ranges, require_fit, unet_hash
from export.quantise.scales import find_scales
from export.quantise.sensitivity import RANKING, Sensitivity, write_sensitivity
from export.records import read_about, read_record
from export.write import file_sizes, require_valid, trace_resolution

LEAST_OPSET = 19
"""Below, QuantizeLinear takes no fp16 and knows no fp8."""
MODULES = ("layers", "scales", "graph", "folder")
"""What decides the bytes of a quantised graph."""


@dataclass(frozen=True, kw_only=True)
class QuantiseOptions:
    """`alpha` and `percentile` None are the precision's own; `keep` are patterns of layers that stay beside `KEEP`."""

    precision: str
    alpha: float | None = None
    percentile: float | None = None
    keep: tuple[str, ...] = ()
    check: bool = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.alpha is not None:
            require_between(0, 1, alpha=self.alpha)
        if self.percentile is not None and self.percentile not in PERCENTILES:
            raise UserError(f"--percentile is {self.percentile}; allowed are {', '.join(map(str, PERCENTILES))}")

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides the graph beside its weights and ranges."""
        own = PRECISIONS[self.precision]
        return {
            "precision": self.precision,
            "alpha": own.alpha if self.alpha is None else self.alpha,
            "percentile": own.percentile if self.percentile is None else self.percentile,
            "keep": sorted(self.keep),
        }


def check_source(onnx: Path, out: Path, options: QuantiseOptions) -> dict[str, Any]:
    """The UNet's export.json in the folder to quantise. Raises UserError, before anything heavy, where it or `out` will
    not do."""
    require_apart(out, onnx, ("--out", "--onnx"))
    read_about(onnx)
    refuse_foreign(out)
    if not (onnx / "unet").is_dir():
        raise UserError(f"{onnx} holds no unet; export it first (python -m export onnx)")
    record = read_record(onnx / "unet")
    if "quantised" in record:
        raise UserError(f"{onnx} is in {record['quantised']['precision']} already; give the folder it was made from")
    if record["graphs"]:
        raise UserError(f"{onnx} holds a graph for each size; quantise one with --resolutions dynamic")
    if record["opset"] < LEAST_OPSET:
        raise UserError(f"{onnx} has opset {record['opset']}; 8 bits need {LEAST_OPSET} or later: export it again")
    if options.precision == "fp8" and record["precision"] != "fp16":
        raise UserError(
            f"{onnx} is in {record['precision']}; fp8 is made from an fp16 folder (export --precision fp16)"
        )
    check_files(onnx)
    return record


def source_unet_hash(record: dict[str, Any]) -> str:
    return unet_hash(record["source_sha256"])


def prepare_source(onnx: Path, checkpoint: Path, workdir: Path) -> Path:
    """The checkpoint that `onnx` was made from, LoRAs fused. Raises UserError where `checkpoint` is another, or holds a
    LoRA beside its weights."""
    prepared = prepare_again(onnx, checkpoint, workdir)
    if adapters := [key for key in component_tensors(prepared / "unet") if "lora_" in key]:
        raise UserError(
            f"the UNet of {checkpoint} holds a LoRA that is not fused ({adapters[0]}); fuse it first: python -m export onnx "
            "--lora FILE, then quantise that folder"
        )
    return prepared


def find_ranges(
    prepared: Path, record: dict[str, Any], drawing: Drawing, workdir: Path, device: str, file: Path | None = None
) -> Ranges:
    """Those of `file`, or by calibration. Raises UserError where they are of another UNet."""
    expected = source_unet_hash(record)
    if file is not None:
        ranges = read_ranges(file)
        require_fit(ranges, expected, (), str(file))
        return ranges
    return calibrate(prepared, expected, drawing, workdir, device)


def quantise_folder(
    onnx: Path,
    out: Path,
    prepared: Path,
    ranges: Ranges,
    options: QuantiseOptions,
    *,
    ranking: Sensitivity | None = None,
    progress: Callable[[str], None] = print,
) -> list[Parity]:
    """Writes `out`: the UNet of `onnx` with Q/DQ pairs and 8-bit weights, the rest copied, and the `ranking` that chose the
    layers. What is up to date is kept.

    `prepared` is the checkpoint as it was exported. Returns the comparisons with torch, none where the UNet is large or
    up to date. Raises UserError, and leaves `out` as it was, where the quantised graph is too far from the network.
    """
    record = check_source(onnx, out, options)
    code = [sha256_file(Path(__file__).with_name(f"{name}.py")) for name in MODULES]
    key = sha256_json([record["sha256"], ranges.sha256, options.recipe, code, library_versions()])
    with exclusive(out, progress, out / ".lock"):
        remove_leftovers(out)
        about = read_about(onnx)
        wanted = about | {"quantised": options.recipe | {"ranges": ranges.sha256, "drawn": ranges.drawn}}
        if _is_current(out, key, wanted):
            progress(f"unet: {options.precision}, up to date")
            return []
        require_free_disk(out, _bytes(onnx), "a quantised ONNX folder")
        checked = _write_unet(onnx, out, prepared, record, ranges, options, key, progress)
        _copy_rest(onnx, out, about)
        if ranking is None:
            for name in RANKING:  # of an earlier run
                (out / name).unlink(missing_ok=True)
        else:
            write_sensitivity(out, ranking)
        write_json(out / "slimxl.json", wanted)
    return checked


def _is_current(out: Path, key: str, about: dict[str, Any]) -> bool:
    if not (out / "slimxl.json").is_file() or read_json(out / "slimxl.json") != about:
        return False
    if not (out / "unet" / "export.json").is_file() or read_record(out / "unet").get("key") != key:
        return False
    check_files(out)
    return True


def _bytes(onnx: Path) -> int:
    return sum(path.stat().st_size for path in onnx.rglob("*") if path.is_file())


def _copy_rest(onnx: Path, out: Path, about: dict[str, Any]) -> None:
    """Every component but the UNet, tokenizers and scheduler. Copies share their blocks where the disk can; never hard
    links, which onnx refuses."""
    names = [name for name in COMPONENTS if name != "unet" and (onnx / name / "export.json").is_file()]
    for stale in [name for name in COMPONENTS if name not in (*names, "unet") and (out / name).is_dir()]:
        shutil.rmtree(out / stale)
    for name in names:
        with replacing(out / name) as temporary:
            shutil.copytree(onnx / name, temporary, copy_function=lambda one, two: clone_file(Path(one), Path(two)))
    for path in about["files"]:
        with replacing(out / path) as temporary:
            shutil.copyfile(onnx / path, temporary)


def _write_unet(
    onnx: Path,
    out: Path,
    prepared: Path,
    record: dict[str, Any],
    ranges: Ranges,
    options: QuantiseOptions,
    key: str,
    progress: Callable[[str], None],
) -> list[Parity]:
    started, recipe, precision = time.monotonic(), options.recipe, PRECISIONS[options.precision]
    model = ir.load(onnx / "unet" / "model.onnx")
    layers = find_layers(model.graph, options.keep)
    if not layers:
        raise UserError(f"no layer of {onnx / 'unet'} is left to quantise; keep fewer")
    require_fit(ranges, source_unet_hash(record), [layer.name for layer in layers], "quantise")
    write_pairs(model, layers, find_scales(layers, ranges, precision, recipe["alpha"], recipe["percentile"]), precision)
    nodes, names = len(list(model.graph)), [layer.name for layer in layers]
    config = read_json(onnx / "unet" / "config.json")
    with replacing(out / "unet") as temporary:
        temporary.mkdir()
        ir.save(model, temporary / "model.onnx", external_data="model.onnx.data", max_workers=1)
        del model, layers
        shutil.copyfile(onnx / "unet" / "config.json", temporary / "config.json")
        require_valid(temporary / "model.onnx", "unet")
        checked: list[Parity] = []
        if options.check and sum(file_sizes(temporary).values()) < CHECK_BELOW_BYTES:
            network = load_component(prepared, "unet", TORCH_DTYPES[record["precision"]])
            found = compare(
                "unet",
                temporary / "model.onnx",
                wrap("unet", network),
                config,
                [trace_resolution("unet", config)],
                (2,),
                record["precision"],
                bound=options.precision,
                text=some_text(prepared),
            )
            checked = list(found)
        for one in checked:
            if not one.passed:
                raise UserError(
                    f"the UNet in {options.precision} is too far from the network and was not kept: {one}; keep more layers "
                    "(--keep), calibrate on more prompts, or stay with fp16"
                )
        seconds = round(time.monotonic() - started, 1)
        written = record | {
            "key": key,
            "quantised": recipe | {"layers": names, "ranges_sha256": ranges.sha256, "drawn": ranges.drawn},
            "nodes": nodes,
            "bytes": file_sizes(temporary),
            "sha256": {path.name: sha256_file(path) for path in sorted(temporary.iterdir())},
            "checked": [asdict(one) for one in checked],
            "versions": library_versions(),
            "seconds": seconds,
        }
        write_json(temporary / "export.json", written)
        (out / "slimxl.json").unlink(missing_ok=True)  # until the rest fits too, the folder is not a whole one
    before, after = (sum(one["bytes"].values()) for one in (record, written))
    progress(
        f"unet: {options.precision}, {len(names)} layers, {after / before:.3f} of the bytes, {seconds} s"
        + "".join(f", {one}" for one in checked)
    )
    return checked
