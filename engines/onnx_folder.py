"""Reads the ONNX folder that export wrote: its components, their inputs and outputs, and their hashes.

A component has one graph for all sizes, or (`export onnx --resolutions all` or `WxH,...`) a static graph for each size;
all its graphs share one file of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from distill.checkpoints.folder import read_config
from distill.checkpoints.sampling import Sampling, sampling_of
from distill.common.errors import UserError
from distill.common.files import read_object, sha256_file_once
from distill.models.conditioning import REFINER, Conditioning, TensorSpec, conditioning_named, conditioning_of
from distill.models.resolution import Resolution
from engines.bundle import Engine, TensorInfo
from export.components import COMPONENTS, TEXT_ENCODERS
from export.records import read_about, read_record

OPTIONAL = ("vae_encoder",)
"""Components that are built only if named."""
BUILD_ORDER = tuple(sorted(COMPONENTS, key=OPTIONAL.__contains__))
"""What is built by default comes first."""


def _tensor(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return TensorInfo(name=value.name, dtype=dtype, shape=shape)


@dataclass(frozen=True)
class OnnxComponent:
    """One component folder. Its graph, the file `graph`, is read without its weights."""

    name: str
    folder: Path
    config: dict[str, Any]
    graph: str = "model.onnx"

    @property
    def model(self) -> Path:
        return self.folder / self.graph

    @cached_property
    def static_graphs(self) -> dict[str, str]:
        """The graph's file for each resolution; empty where one graph takes every size."""
        is_recorded = (self.folder / "export.json").is_file()
        return (read_record(self.folder).get("graphs") if is_recorded else None) or {}

    def at(self, resolution: Resolution) -> OnnxComponent:
        """The component with the graph of this size."""
        graph = self.static_graphs.get(str(resolution), self.graph)
        return self if graph == self.graph else replace(self, graph=graph)

    @property
    def files(self) -> list[Path]:
        """The graph first, then its external data."""
        return [self.model, *sorted(self.folder.glob("model.onnx*data"))]

    @cached_property
    def _graph(self) -> onnx.GraphProto:
        try:
            return onnx.load(self.model, load_external_data=False).graph
        except Exception as error:  # protobuf's own DecodeError has no public home that stays put
            raise UserError(f"{self.model} is not a readable ONNX file ({error}); export it again") from None

    @cached_property
    def inputs(self) -> list[TensorInfo]:
        return [_tensor(value) for value in self._graph.input]

    @cached_property
    def outputs(self) -> list[TensorInfo]:
        return [_tensor(value) for value in self._graph.output]

    def input_specs(
        self, resolution: Resolution, rows: int, pick: Callable[[list[int]], int] = min
    ) -> list[TensorSpec]:
        """Names, dtypes and shapes of the inputs; `pick` says which of the lengths of a prompt, where there are several.
        Raises UserError for a size the model cannot take."""
        lengths = self.config.get("text_lengths")
        config = self.config | {"text_length": pick(lengths)} if lengths else self.config
        return COMPONENTS[self.name].inputs(config, resolution, rows, self.precision)

    @property
    def fixed_rows(self) -> int | None:
        """The number of rows that a static graph takes; None where it takes any."""
        rows = self.inputs[0].shape[0]
        return rows if isinstance(rows, int) else None

    @property
    def precision(self) -> str:
        """The type of what goes in and comes out."""
        names = {"float16": "fp16", "float32": "fp32"}
        if self.outputs[0].dtype not in names:
            raise UserError(f"{self.model} computes in {self.outputs[0].dtype}: engines are built from fp16 or fp32")
        return names[self.outputs[0].dtype]

    @cached_property
    def weights_precision(self) -> str:
        """Of what is computed: the same, or int8 or fp8 where `export quantise` made the graph."""
        about = self.folder / "export.json"
        quantised = read_object(about).get("quantised") if about.is_file() else None
        return str(quantised["precision"]) if quantised else self.precision

    @cached_property
    def node_count(self) -> int:
        """What build time depends on."""
        return len(self._graph.node)

    @cached_property
    def weights_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def onnx_sha256(self) -> str:
        return sha256_file_once(self.model)

    @property
    def current_sha256(self) -> set[str]:
        """The hashes of all graphs of the component. An engine built from any other graph is out of date."""
        return {sha256_file_once(self.folder / graph) for graph in {"model.onnx", *self.static_graphs.values()}}

    @property
    def weights_sha256(self) -> str | None:
        """None where the weights are inside model.onnx."""
        data = self.files[1:]
        return sha256_file_once(data[0]) if data else None

    def is_source_of(self, engine: Engine) -> bool:
        """Whether the engine was built from this graph and these weights."""
        return (self.onnx_sha256, self.weights_sha256) == (engine.onnx_sha256, engine.weights_sha256)

    @cached_property
    def needed_outputs(self) -> list[TensorInfo]:
        """Those that a sampler reads; of a text encoder the pipeline's kind says which. Raises UserError where one is
        missing."""
        if self.name not in TEXT_ENCODERS:
            return self.outputs
        wanted = read_conditioning(self.folder.parent).encoder_outputs(self.name, self.config)
        needed = [tensor for tensor in self.outputs if tensor.name in wanted]
        if len(needed) < len(wanted):
            raise UserError(
                f"{self.model} has the outputs {', '.join(t.name for t in self.outputs)} but the pipeline needs "
                f"{', '.join(sorted(wanted))}; export it again with all hidden states"
            )
        return needed


def read_conditioning(root: Path) -> Conditioning:
    """The kind of pipeline that an ONNX folder is of. SDXL saved for pictures has the class of its refiner: the UNet, where
    there is one, tells the two apart. Raises UserError."""
    kind = conditioning_named(str(read_object(root / "model_index.json").get("_class_name")))
    if kind is REFINER and (root / "unet" / "config.json").is_file():
        return conditioning_of(read_config(root, "unet"), root)
    return kind


def weights_for(engine: Engine, root: Path) -> OnnxComponent | None:
    """The ONNX folder's component that the engine can be refitted from; None where the folder lacks it."""
    component = OnnxComponent(engine.component, root / engine.component, {}).at(Resolution.parse(engine.resolutions[0]))
    return component if component.model.is_file() else None


@dataclass(frozen=True)
class OnnxFolder:
    """The whole folder. `source` names the checkpoint and its hash; resolutions are those of the family; `sampling` is how a
    few-step model is drawn with."""

    root: Path
    components: dict[str, OnnxComponent]
    source_name: str
    source_sha256: str
    precision: str
    resolutions: list[Resolution]
    conditioning: Conditioning
    sampling: Sampling | None = None

    @property
    def is_static(self) -> bool:
        """Whether the sizes have graphs of their own."""
        return any(len(component.static_graphs) > 1 for component in self.components.values())

    @property
    def pipeline_files(self) -> list[Path]:
        """Relative paths of everything a diffusers pipeline needs besides the engines."""
        found = [path for part in self.conditioning.parts for path in (self.root / part).rglob("*") if path.is_file()]
        configs = [component.folder / "config.json" for component in self.components.values()]
        index = self.root / "model_index.json"
        return sorted(path.relative_to(self.root) for path in [*found, *configs, index] if path.is_file())


def read_onnx_folder(root: Path) -> OnnxFolder:
    """Raises UserError where `root` is not what `python -m export onnx` leaves."""
    about = read_about(root)
    components = {
        name: OnnxComponent(name, root / name, read_object(root / name / "config.json"))
        for name in BUILD_ORDER
        if (root / name / "model.onnx").is_file()
    }
    if not components:
        raise UserError(
            f"{root} holds no component (none of {', '.join(BUILD_ORDER)} has a model.onnx); export it again"
        )
    return OnnxFolder(
        root=root,
        components=components,
        source_name=about["source"]["name"],
        source_sha256=about["source"]["sha256"],
        precision=about["precision"],
        resolutions=[Resolution.parse(text) for text in about["resolutions"]],
        conditioning=read_conditioning(root),
        sampling=sampling_of(root),
    )
