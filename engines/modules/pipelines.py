"""The pipeline that a bundle is loaded as: diffusers' class, with the methods that act on the bundle as a whole."""

from __future__ import annotations

from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from distill.checkpoints.sampling import Sampling
from distill.common.errors import UserError
from distill.common.files import clone_file, replacing, require_free_disk
from distill.models.conditioning import conditioning_named
from engines.bundle import MANIFEST, read_manifest
from engines.modules.lora import Adapters


class BundlePipeline:
    """Stands before diffusers' class. Its networks can be shared with other pipelines; these methods are here alone."""

    bundle: Path

    def save_pretrained(self, save_directory: str | Path, *_: Any, push_to_hub: bool = False, **__: Any) -> None:
        """Copies the bundle, as it stands on the disk. Raises UserError for a folder that holds something, and where LoRAs
        are loaded, which a bundle cannot hold."""
        if push_to_hub:
            self.push_to_hub()
        if self.loras:
            raise UserError(
                f"a bundle has no place for the LoRAs {', '.join(self.loras)}: unload_lora_weights() first, or "
                "build a bundle with them: python -m export onnx --lora FILE"
            )
        copy_bundle(self.bundle, Path(save_directory))

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError("a bundle is uploaded by python -m engines push BUNDLE org/name; save_pretrained copies it")

    def set_ip_adapter_scale(self, scale: Any) -> NoReturn:
        raise UserError("an engine takes no IP-Adapter: IP-Adapters run with the checkpoint in torch only")

    def enable_model_cpu_offload(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            "an engine keeps its weights where it was loaded; for a small GPU engines.load(bundle, vram_gb=8), where they "
            "take turns, an int8 UNet (python -m export quantise), or device='cpu'"
        )

    enable_sequential_cpu_offload = enable_group_offload = enable_model_cpu_offload

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UserError("a pipeline of engines is not pickled: open the bundle in each process, engines.load(bundle)")

    def unload_ip_adapter(self) -> None:
        """Nothing to undo: an engine takes none."""

    def unload_textual_inversion(self, *_: Any, **__: Any) -> None:
        """As above."""

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """As above."""

    @cached_property
    def adapters(self) -> Adapters:
        """Made when the first LoRA is loaded."""
        return Adapters(self, conditioning_named(read_manifest(self.bundle).source.pipeline))

    @property
    def _has_adapters(self) -> bool:
        return "adapters" in self.__dict__

    @property
    def loras(self) -> list[str]:
        """Names of the LoRAs that are loaded."""
        return self.adapters.names if self._has_adapters else []

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **named: Any
    ) -> None:
        """Adds a LoRA and switches it on, see `Adapters.load`."""
        self.adapters.load(pretrained_model_name_or_path_or_dict, adapter_name, **named)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Switches these LoRAs on, each with its weight, and all others off. Raises UserError for a name that is not
        loaded."""
        self.adapters.change("set_adapters", adapter_names, adapter_weights)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Forgets LoRAs."""
        self.adapters.change("delete_adapters", adapter_names)

    def disable_lora(self) -> None:
        """Switches all LoRAs off."""
        self._change_if_any("disable_lora")

    def enable_lora(self) -> None:
        """Switches them on again."""
        self._change_if_any("enable_lora")

    def unload_lora_weights(self, *_: Any, **__: Any) -> None:
        """Forgets all LoRAs; the engines have their own weights again."""
        self._change_if_any("unload_lora_weights")

    def _change_if_any(self, method: str) -> None:
        if self._has_adapters:
            self.adapters.change(method)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The LoRAs of each component."""
        return self.adapters.by_part if self._has_adapters else {}

    def get_active_adapters(self) -> list[str]:
        """Those that are on."""
        return self.adapters.active if self._has_adapters else []

    def fuse_lora(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            "an engine's LoRAs are always fused: set_adapters(names, weights) sets how much of each, unload_lora_weights() "
            "takes them out"
        )

    unfuse_lora = fuse_lora


def bundle_class(kind: type, bundle: Path) -> type:
    """diffusers' class `kind`, under its own name, for a bundle."""
    return type(kind.__name__, (BundlePipeline, kind), {"bundle": bundle, "__doc__": kind.__doc__})


def drawing_as(kind: type, sampling: Sampling | None) -> type:
    """A class of pipelines that takes steps and guidance scale from `sampling` where a call does not state them, and refuses
    more steps than that has by UserError."""
    if sampling is None:
        return kind
    known = sampling

    class FewSteps(kind):
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            stated = signature(kind.__call__).bind_partial(self, *arguments, **named).arguments
            named |= {name: value for name, value in known.call_arguments.items() if name not in stated}
            known.check(stated.get("num_inference_steps") or known.steps or 1)
            return super().__call__(*arguments, **named)

    FewSteps.__name__ = kind.__name__  # what diffusers writes into a config
    return FewSteps


def copy_bundle(bundle: Path, target: Path) -> None:
    """Copies what the manifest names, whole or not at all. Raises UserError where `target` holds something, and where files
    were left on the hub."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} holds something; give a new or an empty folder for the copy of the bundle")
    files = read_manifest(bundle).all_files
    if missing := [file.path for file in files if not (bundle / file.path).is_file()]:
        raise UserError(
            f"{bundle} is not whole (it lacks {missing[0]}): of a bundle on the hub only what runs here is fetched; get all "
            "of it with hf download org/name --local-dir FOLDER"
        )
    require_free_disk(target, sum(file.size_bytes for file in files), "the copy of the bundle", "folder")
    with replacing(target) as temporary:
        for path in [MANIFEST, *(file.path for file in files)]:
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            clone_file(bundle / path, temporary / path)
