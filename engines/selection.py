"""Which engines of a bundle are loaded: the flavor that runs on this device, one layout of each component, and a task."""

from __future__ import annotations

from collections.abc import Sequence

from distill.common.errors import UserError, unknown
from distill.models.conditioning import Conditioning, conditioning_named
from distill.models.networks import CONTROLNETS
from engines.building.layouts import DEFAULT_LAYOUTS
from engines.bundle import Engine, Manifest
from engines.choices import EIGHT_BITS, TASKS, Task
from engines.flavors import FLAVORS, Flavor, find_flavor
from engines.gpus import gpu_count
from export.components import required_components


def choose_flavor(manifest: Manifest, flavor: str | None, device: str | None = None) -> Flavor:
    """The named flavor, or the first of tensorrt, tensorrt-rtx, onnxruntime that the bundle has and this machine runs.

    Raises UserError where there is none, with the reason for each flavor of the bundle.
    """
    if flavor is not None:
        found = find_flavor(flavor)
        if flavor not in manifest.flavors:
            raise UserError(
                f"the bundle has no {flavor} engines, it has {', '.join(manifest.flavors) or 'none'}; "
                f"add them with: python -m engines build --onnx ONNX --out BUNDLE --flavor {flavor}"
            )
        return found
    reasons = []
    for name in FLAVORS:
        if name not in manifest.flavors:
            continue
        candidate = find_flavor(name)
        try:
            choose_device(manifest, candidate, device)
            return candidate
        except UserError as error:
            reasons.append(str(error))
    raise UserError("; ".join(reasons) or "the bundle has no engines; build some with python -m engines build")


def choose_device(manifest: Manifest, flavor: Flavor, device: str | None = None) -> str:
    """`device`; where none is named the flavor's own, and of several GPUs the first that its engines fit.

    Raises UserError where they fit none, with the reason for the first.
    """
    devices = [device or flavor.default_device()]
    if device is None and devices[0].startswith("cuda"):
        devices += [f"cuda:{index}" for index in range(1, gpu_count())]
    refusals = []
    for one in devices:
        try:
            select_engines(manifest, flavor, one)
            return one
        except UserError as error:
            refusals.append(error)
    raise refusals[0]


def select_engines(
    manifest: Manifest,
    flavor: Flavor,
    device: str,
    layout: str | None = None,
    with_weights: bool = False,
    precision: str | None = None,
) -> dict[str, list[Engine]]:
    """The engines to load for each component, of those of this flavor that fit the device.

    `precision`: of the UNet; by default not in 8 bits, where there is another. `layout`: only the UNet must have it; by
    default the layout that serves most sizes is taken, and of several the flavor's own default. With weights (of another
    ONNX folder) engines built with --refit are preferred, without weights those that were not built with --strip.

    Raises UserError where a component has no engine, or none that fits GPU, driver and version. No file is opened.
    """
    selected: dict[str, list[Engine]] = {}
    refusal: UserError | None = None
    for engine in manifest.engines:
        if engine.flavor != flavor.name:
            continue
        try:
            flavor.check_load(engine, device)
        except UserError as error:
            refusal = error
            continue
        selected.setdefault(engine.component, []).append(engine)
    required = required_components(conditioning_named(manifest.source.pipeline))
    missing = [name for name in required if name not in selected]
    if missing:
        raise refusal or UserError(
            f"the bundle has no {flavor.name} engine for {', '.join(missing)}; build it with: python -m engines build "
            f"--onnx ONNX --out BUNDLE --flavor {flavor.name} --components {','.join(missing)}"
        )
    selected["unet"] = _of_precision(selected["unet"], precision)
    return {name: _select_layout(engines, flavor.name, layout, with_weights) for name, engines in selected.items()}


def _of_precision(engines: list[Engine], precision: str | None) -> list[Engine]:
    """The UNet's engines of one precision. By default what is not in 8 bits, else what was built first: it is quicker only
    where somebody has measured it so. Raises UserError where there is none of the one asked for."""
    found = list(dict.fromkeys(engine.precision for engine in engines))
    if precision is not None and precision not in found:
        raise UserError(
            f"the bundle's unet is in {', '.join(found)}, not in {precision}; add it with: python -m export quantise "
            f"--precision {precision} …, then python -m engines build --onnx ONNX --out BUNDLE"
        )
    if precision is None and not any(one in EIGHT_BITS for one in found):
        return engines
    chosen = precision or min(found, key=EIGHT_BITS.__contains__)
    return [engine for engine in engines if engine.precision == chosen]


def _select_layout(engines: list[Engine], flavor: str, layout: str | None, with_weights: bool) -> list[Engine]:
    """The engines of one component in one layout, without those that `_drop_covered` drops."""
    layouts = {engine.layout for engine in engines}
    if layout and engines[0].component == "unet" and layout not in layouts:
        raise UserError(
            f"the bundle's unet has no engine in layout {layout}, it has {', '.join(sorted(layouts))}; "
            f"add it with: python -m engines build --onnx ONNX --out BUNDLE --layout {layout}"
        )
    engines = [engine for engine in engines if engine.layout == layout] or engines
    able = [e for e in engines if (e.options.get("refit") if with_weights else not e.options.get("strip"))]
    engines = able or engines

    def worth(name: str) -> tuple[int, bool]:
        sizes = {text for engine in engines if engine.layout == name for text in engine.resolutions}
        return len(sizes), name == DEFAULT_LAYOUTS[flavor]

    chosen = max((engine.layout for engine in engines), key=worth)
    return _drop_covered([engine for engine in engines if engine.layout == chosen])


def _drop_covered(engines: list[Engine]) -> list[Engine]:
    """Each plan holds the weights in memory once more, so a plan is left out where others serve all that it does. Of two
    that serve the same the newer is kept; the manifest names the oldest first."""
    kept: list[Engine] = []
    for position, engine in enumerate(engines):
        others = [profile for other in (*kept, *engines[position + 1 :]) for profile in other.profiles]
        if not all(any(other.covers(profile) for other in others) for profile in engine.profiles):
            kept.append(engine)
    return kept


def choose_task(kind: Conditioning, task: Task | None, found: Sequence[str], flavor: str) -> tuple[Task, list[str]]:
    """What is drawn from, by default the first that a kind of pipeline can do, and the ControlNets among the components
    `found` that take part. Raises UserError for a task that it cannot do, and where a component for it is missing."""
    tasks = [name for name in TASKS if name != "text-to-image" or kind.draws_from_text]
    wanted = task or tasks[0]
    if wanted not in tasks:
        raise unknown("task of this model" if wanted in TASKS else "task", wanted, tasks)
    if TASKS[wanted].endswith(("Img2Img", "Inpaint")) and "vae_encoder" not in found:
        raise missing_encoder(flavor)
    controlnets = [name for name in CONTROLNETS if name in found] if "ControlNet" in TASKS[wanted] else []
    if "ControlNet" in TASKS[wanted] and not controlnets:
        raise UserError(
            f"the bundle has no {flavor} engine for a ControlNet: export the checkpoint with python -m export onnx "
            "--controlnet FOLDER, and build that folder"
        )
    return wanted, controlnets


def missing_encoder(flavor: str) -> UserError:
    return UserError(
        f"the bundle has no {flavor} engine for vae_encoder, which image-to-image and inpainting need; add it with: python "
        f"-m engines build --onnx ONNX --out BUNDLE --flavor {flavor} --components vae_encoder"
    )
