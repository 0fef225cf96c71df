"""`python -m engines build|verify|inspect|list|prune|bench|triton|serve|load`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from distill.errors import exit_on_user_error
from engines.triton_options import Serving

Flavors = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
Layouts = Literal["per-resolution", "shared", "ranged"]
Bundle = Annotated[Path, tyro.conf.Positional]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def build(
    onnx: Path,
    out: Path,
    gpus: str = "",
    flavor: Flavors = "tensorrt-rtx",
    layout: Layouts | None = None,
    resolutions: str = "all",
    batches: str = "1",
    guidance: Literal["always", "never", "any"] = "always",
    components: str = "",
    memory_gb: float | None = None,
    replace: bool = False,
    refit: bool = False,
    strip: bool = False,
    version_compatible: bool = False,
    hardware_compatible: Literal["none", "same", "ampere+"] = "none",
) -> int:
    """Build engines into a bundle; what is there and unchanged is kept.

    Args:
        onnx: ONNX folder left by `python -m export onnx`.
        out: The bundle, made or added to.
        gpus: Names separated by commas (a100, rtx4090, ...), `auto` for the one at hand, `rtx` for one portable plan.
        flavor: tensorrt (built on the GPU that runs it), tensorrt-rtx (also with no GPU), onnxruntime.
        layout: Default: shared for tensorrt, ranged for tensorrt-rtx.
        resolutions: `all`, or sizes such as 1024x1024,1152x896.
        batches: Numbers of images at once, separated by commas.
        guidance: What exact profiles of the UNet are for: with it, without it (LCM, Turbo), or either.
        components: Only these, separated by commas (vae_encoder is built only when named).
        memory_gb: Memory a build may use; default: what is free.
        replace: Drop engines of another checkpoint from the bundle.
        refit: Plans whose weights can be exchanged (needs a GPU).
        strip: Plans without weights, refitted at load (needs a GPU).
        version_compatible: Plans for newer TensorRT versions too (tensorrt only).
        hardware_compatible: Plans for other GPUs too (tensorrt only).
    """
    from engines.build import build_bundle
    from engines.plan import plan_options

    options = plan_options(flavor, refit, strip, version_compatible, hardware_compatible)
    build_bundle(
        onnx,
        out,
        gpus=_names(gpus),
        flavor=flavor,
        layout=layout,
        resolutions=resolutions,
        batches=parse_counts("--batches", batches),
        guidance=guidance,
        components=_names(components) or None,
        options=options,
        memory_gb=memory_gb,
        replace=replace,
    )
    return 0


def parse_counts(option: str, text: str) -> list[int]:
    """Positive numbers separated by commas. Raises UserError for anything else."""
    from distill.errors import UserError

    parts = _names(text)
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} {text!r} is not a list of numbers from 1 up, e.g. 1 or 1,4")
    return [int(part) for part in parts]


def verify(bundle: Bundle) -> int:
    """Check every file of a bundle against its manifest."""
    from engines.reports import print_verification

    return print_verification(bundle)


def inspect(bundle: Bundle, json: bool = False) -> int:
    """Show a bundle's engines with their profiles, inputs and outputs."""
    from engines.reports import print_inspection

    return print_inspection(bundle, json)


def list_(folder: Annotated[Path, tyro.conf.Positional] = Path("out")) -> int:
    """List the bundles below a folder, or the engines of one bundle."""
    from engines.reports import print_list

    return print_list(folder)


def prune(
    bundle: Bundle,
    keep_gpus: str = "",
    keep_flavors: str = "",
    keep_resolutions: str = "",
    keep_newest: bool = False,
    dry_run: bool = False,
) -> int:
    """Remove engines that match none of what is to be kept, and files that no manifest names.

    Args:
        bundle: The bundle.
        keep_gpus: What serves one of these, separated by commas (a100, rtx4090, ...).
        keep_flavors: Of these flavors, separated by commas.
        keep_resolutions: What serves one of these sizes, separated by commas.
        keep_newest: Of engines that differ only in the version that built them, the newest.
        dry_run: Say what would be removed.
    """
    from engines.prune import prune_bundle

    gpus, flavors, resolutions = map(_names, (keep_gpus, keep_flavors, keep_resolutions))
    return prune_bundle(bundle, gpus, flavors, resolutions, keep_newest, dry_run)


def bench(
    onnx: Path,
    out: Path,
    gpus: str = "a100,rtx4090",
    flavor: Flavors = "tensorrt-rtx",
    layouts: str = "per-resolution,shared,ranged",
    components: str = "unet,vae_decoder",
    resolutions: str = "all",
    keep: bool = False,
) -> int:
    """Build every layout and compare time, memory and disk, as ratios to one static plan for each resolution.

    Args:
        onnx: ONNX folder left by `python -m export onnx`.
        out: Where layouts.json goes, and the bundles while they are compared; none may be there already.
        gpus: As for build.
        flavor: As for build.
        layouts: Some of per-resolution, shared, ranged.
        components: Which ones.
        resolutions: As for build.
        keep: Keep the bundles.
    """
    from engines.compare import compare_layouts

    compare_layouts(
        onnx,
        out,
        gpus=_names(gpus),
        flavor=flavor,
        layouts=_names(layouts),  # type: ignore[arg-type]
        components=_names(components),
        resolutions=resolutions,
        keep=keep,
    )
    return 0


def triton(bundle: Path, out: Path, serving: Annotated[Serving, tyro.conf.OmitArgPrefixes]) -> int:
    """Write a Triton model repository that serves the bundle.

    Args:
        bundle: The bundle; it is checked, and read again by the server.
        out: The model repository, a folder of its own.
    """
    from engines.bundle import read_manifest
    from engines.reports import console
    from engines.triton import backend_flags, write_repository

    names = write_repository(bundle, out, serving)
    flags = backend_flags(read_manifest(bundle), serving)
    line = " ".join([f"tritonserver --model-repository={out} --model-control-mode=none", *flags])
    console.print(f"{out}: {', '.join(names)}; serve with: {line} (what else is wise: engines/SERVING.md)")
    return 0


def serve(
    bundle: Path,
    serving: Annotated[Serving, tyro.conf.OmitArgPrefixes],
    workdir: Path = Path("out/triton"),
    address: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    allow_exposed: bool = False,
) -> int:
    """Serve a bundle by Triton, on this machine, until Ctrl-C or SIGTERM; installs the server if there is none.

    Args:
        bundle: What to serve.
        workdir: Where the server's environment goes, and in a folder of the HTTP port's name the model and the log.
        address: IPv4 number or a name that has one. Loopback unless told otherwise; there is no authentication.
        http_port: For HTTP.
        grpc_port: For gRPC.
        allow_exposed: Let a server listen to other machines that whoever reaches it can crash.
    """
    from engines import triton_server
    from engines.bundle import read_manifest
    from engines.triton import backend_flags, choose_place, parse_devices, write_repository

    where = triton_server.Address.resolve(address, http_port, grpc_port)
    if not allow_exposed:
        triton_server.require_unexposed(where)
    where.require_free()
    if serving.plans:
        triton_server.require_plans_backend()
    manifest = read_manifest(bundle)
    flavor, gpus = choose_place(manifest, serving.flavor, parse_devices(serving.gpus))
    environment = triton_server.find_environment(workdir)
    if environment and not serving.execution_env:
        serving = replace(serving, execution_env=environment.folder)
    folder = workdir / str(http_port)
    with triton_server.alone_in(folder):
        write_repository(bundle, folder / "models", serving)
        on = f"GPU {', '.join(map(str, gpus))}" if gpus else "the CPU"
        first = "a picture of every size is drawn first" if serving.warm_up else "nothing is drawn first"
        print(f"starting Triton with {bundle} ({flavor}) on {on}; {first}", flush=True)
        flags = backend_flags(manifest, serving)
        return triton_server.serve(folder / "models", environment, where, folder / "log", flags)


def load(
    out: Path,
    server: str = "127.0.0.1:8001",
    concurrency: str = "1,2,4",
    minutes: float = 0.5,
    rate: float | None = None,
    size: str | None = None,
    steps: int = 25,
    guidance: float = 5.0,
    images: int = 1,
    workdir: Path = Path("out/triton"),
) -> int:
    """Measure a running server: pictures a second and latencies at each number of clients at once.

    Args:
        out: The JSON file with every latency.
        server: Its gRPC address.
        concurrency: Numbers of clients that each have one request under way, separated by commas, in this order.
        minutes: For each of them.
        rate: At most so many requests a second, all clients together; for a soak that leaves the machine room.
        size: Of the pictures, e.g. 1024x1024; default: the first that is served.
        steps: Denoising steps.
        guidance: Guidance scale.
        images: Pictures for each request.
        workdir: Where tritonclient's environment is, or goes.
    """
    from engines.triton_load import Workload, measure_load

    workload = Workload(size=size, steps=steps, guidance=guidance, images=images)
    levels = parse_counts("--concurrency", concurrency)
    return measure_load(out, server, workload, levels, minutes * 60, rate, workdir)


COMMANDS: dict[str, Callable[..., int]] = {
    "build": build,
    "verify": verify,
    "inspect": inspect,
    "list": list_,
    "prune": prune,
    "bench": bench,
    "triton": triton,
    "serve": serve,
    "load": load,
}


def main() -> int:
    def run() -> int:
        return int(tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m engines") or 0)

    return exit_on_user_error(run)


if __name__ == "__main__":
    sys.exit(main())
