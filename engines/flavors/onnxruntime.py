"""ONNX Runtime, on the CPU or CUDA. Its engines are ONNX files beside a copy of the exported weights; one serves
every resolution."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.common.errors import UserError
from distill.common.files import clone_file
from engines.bundle import Engine, Options, Profile, TensorInfo, rebuild_command
from engines.flavors import BuildRequest, LoadOptions, Report
from engines.gpus import gpu_of_device
from engines.integrity import locate

if TYPE_CHECKING:
    import numpy as np
    import torch

    from engines.flavors.weights import Added

FULL_GPU = re.compile("out of memory|Failed to allocate memory")
"""Messages of CUDA and of ONNX Runtime's allocator; ONNX Runtime has no exception type for it."""


def import_onnxruntime() -> Any:
    """The runtime's module. Raises UserError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"onnxruntime cannot be imported ({error}); pip install onnxruntime") from None
    return onnxruntime


class OnnxRuntimeEngine:
    """An inference session. On the CPU its inputs and outputs share memory with the torch tensors."""

    def __init__(self, model: Path, outputs: list[str], options: LoadOptions) -> None:
        self._model, self._outputs, self._device = model, outputs, options.device
        self._index = int(options.device.partition(":")[2] or 0)
        self._changed: dict[str, np.ndarray] = {}  # the session reads them as long as it lives
        self.session = self._open({})

    def _open(self, changed: dict[str, np.ndarray]) -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        # else its threads keep spinning after a call, on cores that torch and the other components need
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        if changed:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in changed.values()]
            settings.add_external_initializers(list(changed), values)
        on_cuda = self._device.startswith("cuda")
        provider = "CUDAExecutionProvider" if on_cuda else "CPUExecutionProvider"
        chosen: Any = (provider, {"device_id": self._index}) if on_cuda else provider
        session = onnxruntime.InferenceSession(str(self._model), settings, providers=[chosen])
        if provider not in session.get_providers():
            raise RuntimeError(f"{provider} did not start, and {', '.join(session.get_providers())} took its place")
        return session

    def require_exchangeable(self) -> None:
        """Any weight can be: a session is made with others in the place of the file's."""

    def add_to_weights(self, added: Added) -> None:
        """Opens the session anew."""
        from engines.flavors.weights import with_added

        if not added and not self._changed:
            return
        changed = with_added(self._model, added)
        self.session = self._open(changed)
        self._changed = changed

    def run(self, inputs: dict[str, torch.Tensor], profile: Profile) -> dict[str, torch.Tensor]:
        import torch

        if not self._device.startswith("cuda"):
            arrays = self.session.run(self._outputs, {name: tensor.numpy() for name, tensor in inputs.items()})
            return {name: torch.from_numpy(array) for name, array in zip(self._outputs, arrays, strict=True)}
        with torch.cuda.device(self._index):  # torch hands out only tensors of the current device
            binding = self.session.io_binding()
            for name, tensor in inputs.items():
                binding.bind_ortvalue_input(name, _as_ortvalue(tensor))
            for name in self._outputs:
                binding.bind_output(name, "cuda", self._index)
            torch.cuda.current_stream().synchronize()  # ONNX Runtime works on a stream of its own
            self.session.run_with_iobinding(binding)
            values = zip(self._outputs, binding.get_outputs(), strict=True)
            return {name: torch.from_dlpack(value) for name, value in values}


def _as_ortvalue(tensor: torch.Tensor) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.from_dlpack(tensor.detach())


@dataclass(frozen=True)
class OnnxRuntimeFlavor:
    """See `engines.flavors.Flavor`."""

    name: str = "onnxruntime"
    targets: None = None

    def version(self) -> str:
        return str(import_onnxruntime().__version__)

    def default_device(self) -> str:
        """The list of providers says what the package was compiled with, so the GPU is asked for too."""
        providers = import_onnxruntime().get_available_providers()
        able = "CUDAExecutionProvider" in providers and gpu_of_device("cuda:0") is not None
        return "cuda:0" if able else "cpu"

    def check_build(self, compute_capabilities: tuple[str, ...], options: Options) -> None:
        self.version()
        if options:
            asked = ", ".join(f"--{name.replace('_', '-')}" for name in options)
            raise UserError(f"{asked} is for TensorRT's plans, flavor onnxruntime has none: leave it out")

    def build(self, request: BuildRequest, report: Report) -> list[TensorInfo]:
        """Writes the graph with its group norms in the form that is fastest here, beside a copy of the weights, and opens it
        once to see that it loads. No hard link: onnx refuses to read weights that have a second one, the user's too."""
        import onnx_ir as ir

        from export.graph.passes import spell_group_norms

        request.out.mkdir()
        graph, *weights = request.onnx_files
        for file in weights:
            report("copying", 0.1)
            clone_file(file, request.out / file.name)
        model = ir.load(graph)
        spell_group_norms(model)
        ir.save(model, request.out / graph.name)
        report("opening", 0.9)
        engine = OnnxRuntimeEngine(request.out / graph.name, request.outputs, LoadOptions(device="cpu"))
        outputs = [value for value in engine.session.get_outputs() if value.name in request.outputs]
        return [TensorInfo(name=v.name, dtype=_DTYPES[v.type], shape=list(v.shape)) for v in outputs]  # type: ignore[arg-type]

    def check_load(self, engine: Engine, device: str) -> None:
        """An ONNX file runs on any version of the runtime, so only the device is checked."""
        providers = import_onnxruntime().get_available_providers()
        if device.startswith("cuda") and "CUDAExecutionProvider" not in providers:
            raise UserError(
                f"device {device} needs ONNX Runtime's CUDAExecutionProvider, this one has {', '.join(providers)}; "
                "pip uninstall onnxruntime, then pip install onnxruntime-gpu, or use device cpu"
            )
        if device.startswith("cuda") and gpu_of_device(device) is None:
            raise UserError(f"device {device}: no such NVIDIA GPU answers here; use device cpu")

    def check_room(self, engines: list[Engine], options: LoadOptions) -> None:
        if options.vram_bytes is not None:
            raise UserError(
                "vram_gb is for TensorRT's plans, ONNX Runtime keeps its weights: leave it out, or build plans"
            )

    def open_bundle(self, options: LoadOptions) -> LoadOptions:
        return options

    def settle(self, shared: LoadOptions) -> None: ...

    def load(self, bundle: Path, engine: Engine, shared: LoadOptions) -> OnnxRuntimeEngine:
        rebuild = f"rebuild it with: {rebuild_command(bundle, engine)}"
        paths = [locate(bundle, record, rebuild) for record in engine.files]
        try:
            opened = OnnxRuntimeEngine(paths[0], [tensor.name for tensor in engine.outputs], shared)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of its own
            if FULL_GPU.search(str(error)):
                import torch

                raise torch.OutOfMemoryError(f"{engine.files[0].path}: {error}") from error
            raise UserError(f"ONNX Runtime cannot open {engine.files[0].path} ({error}); {rebuild}") from error
        for stated, values in (
            (engine.inputs, opened.session.get_inputs()),
            (engine.outputs, opened.session.get_outputs()),
        ):
            found = {value.name: _DTYPES.get(value.type) for value in values}
            if wrong := next((tensor for tensor in stated if found.get(tensor.name) != tensor.dtype), None):
                raise UserError(
                    f"{engine.files[0].path} has {', '.join(f'{name} ({dtype})' for name, dtype in found.items())}, the "
                    f"manifest says {wrong.name} ({wrong.dtype}); {rebuild}"
                )
        return opened


_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


def make(name: str) -> OnnxRuntimeFlavor:
    return OnnxRuntimeFlavor()
