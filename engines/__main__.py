"""`python -m engines targets|build|verify|inspect|list|prune|compare|check|push|triton|serve|load-test`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from distill.common.errors import exit_on_user_error, parse_counts
from distill.common.launcher import program
from distill.common.options import parse_names
from engines.choices import FlavorName, Guidance, Layout, Precision
from engines.serving.options import Serving, Workload

Bundle = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE", help="The bundle's folder.")]
Bundles = Annotated[
    list[Path],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="BUNDLE", help="Their folders, the one to compare with first."),
]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER]", help="Where to look.")]


def targets(gpus: str = "", flavor: FlavorName = "tensorrt-rtx", precision: Precision = "fp16") -> int:
    """Say what a build for these GPUs serves, before anything is exported; refused in a line where there is none.

    Args:
        gpus: As `build` takes them.
        flavor: As `build` takes it.
        precision: Of the UNet.
    """
    from engines.flavors import find_flavor
    from engines.gpus import require_arithmetic, resolve_targets

    found = resolve_targets(parse_names(gpus.lower()), flavor, find_flavor(flavor).targets)
    require_arithmetic(precision, found)
    for target in found:
        print(f"{precision} by {flavor} for {', '.join(target.gpus) or 'any machine'} ({target.label})")
    return 0


def build(
    onnx: Path,
    out: Path,
    gpus: str = "",
    flavor: FlavorName = "tensorrt-rtx",
    layout: Layout | None = None,
    resolutions: str = "all",
    batches: str = "1",
    guidance: Guidance | None = None,
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
        out: The bundle's folder, made or added to.
        gpus: For TensorRT: names as in a100,rtx4090 or `auto` (the one at hand), `rtx` (one portable plan).
        flavor: tensorrt (built on the GPU that runs it), tensorrt-rtx (also with no GPU), onnxruntime.
        layout: A plan for each size, or one with a profile for each, or for all. None: shared for tensorrt, else ranged.
        resolutions: `all` of the model's, or some of them, e.g. 1024x1024,1152x896.
        batches: Numbers of images at once, 1 or more, separated by commas.
        guidance: What exact profiles of the UNet are for: with it, without it (LCM, Turbo), or either. None: never for a
            model that says so itself, else always.
        components: Only these of unet,vae_decoder,vae_encoder,text_encoder,text_encoder_2. Empty: all but vae_encoder.
        memory_gb: GB (10^9 bytes) of memory that a build may use, above 0. None: what is free.
        replace: Drop engines of another checkpoint from the bundle.
        refit: Plans whose weights can be exchanged (needs a GPU).
        strip: Plans without weights, which are given at load (needs a GPU).
        version_compatible: Plans for newer TensorRT versions too (tensorrt only).
        hardware_compatible: Plans for all GPUs of the same compute capability, or from Ampere on (tensorrt only).
    """
    from engines.building.build import build_bundle
    from engines.building.options import builder_options

    options = builder_options(flavor, refit, strip, version_compatible, hardware_compatible)
    build_bundle(
        onnx,
        out,
        gpus=parse_names(gpus.lower()),
        flavor=flavor,
        layout=layout,
        resolutions=resolutions,
        batches=parse_counts("--batches", batches),
        guidance=guidance,
        components=parse_names(components) or None,
        options=options,
        memory_gb=memory_gb,
        replace=replace,
    )
    return 0


def verify(bundle: Bundle) -> int:
    """Check every file of a bundle against its manifest; exit code 2 on a fault."""
    from engines.building.reports import print_verification

    return print_verification(bundle)


def inspect(bundle: Bundle, json: bool = False) -> int:
    """Show a bundle's engines with their profiles, inputs and outputs.

    Args:
        json: The whole manifest as JSON instead.
    """
    from engines.building.reports import print_inspection

    return print_inspection(bundle, json)


def list_(folder: Folder = Path("out")) -> int:
    """List the bundles in a folder and up to two levels below it."""
    from engines.building.reports import print_list

    return print_list(folder)


def prune(
    bundle: Bundle,
    keep_gpus: str = "",
    keep_flavors: str = "",
    keep_resolutions: str = "",
    keep_newest: bool = False,
    dry_run: bool = False,
) -> int:
    """Remove engines that are not kept, and those that the manifest does not name; files of others stay.

    Args:
        keep_gpus: Only what serves one of these, separated by commas (a100, rtx4090, ...). Empty: all.
        keep_flavors: Only these, separated by commas, of tensorrt, tensorrt-rtx, onnxruntime. Empty: all.
        keep_resolutions: Only what serves one of these sizes, e.g. 1024x1024,1152x896. Empty: all.
        keep_newest: Of engines that differ only in the version that built them, only the newest.
        dry_run: Only say what would be removed.
    """
    from engines.building.prune import prune_bundle

    gpus, flavors, resolutions = map(parse_names, (keep_gpus.lower(), keep_flavors, keep_resolutions))
    return prune_bundle(bundle, gpus, flavors, resolutions, keep_newest, dry_run)


def compare(bundles: Bundles, out: Path | None = None) -> int:
    """Compare what bundles of one checkpoint took to build: time, memory and disk.

    Args:
        out: A JSON file for the figures. None: they are only printed.
    """
    from engines.building.compare import compare_bundles

    return compare_bundles(bundles, out)


def check() -> int:
    """Say which flavors this machine builds and runs, by a tiny engine of each."""
    from engines.building.check import print_checks

    return print_checks()


def push(
    bundle: Bundle,
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ORG/NAME", help="Its name on the hub.")],
    private: bool = False,
) -> int:
    """Upload a bundle to the Hugging Face hub; `engines.load("org/name")` fetches what a machine needs of it.

    Args:
        private: Where it is new there: for those alone who are let in.
    """
    from engines.hub import push_bundle

    return push_bundle(bundle, name, private)


def triton(bundle: Path, out: Path, serving: Annotated[Serving, tyro.conf.OmitArgPrefixes]) -> int:
    """Write a Triton model repository that serves the bundle.

    Args:
        bundle: The bundle's folder; it is checked, and read again by the server.
        out: The model repository, a folder of its own.
    """
    from engines.serving.repository import write_repository

    write_repository(bundle, out, serving)
    line = f"tritonserver --model-repository={out} --model-control-mode=none"
    print(f"{out}: serve it with: {line} (what else is wise: engines/SERVING.md)")
    return 0


def plans(bundle: Path, out: Path) -> int:
    """Write a bundle's plans of TensorRT as models of Triton's TensorRT backend, for a pipeline of your own around them.

    Args:
        bundle: The bundle's folder.
        out: The model repository to write.
    """
    from engines.serving.plans import write_plans

    print("\n".join(write_plans(bundle, out)))
    return 0


def serve(
    bundle: Path,
    serving: Annotated[Serving, tyro.conf.OmitArgPrefixes],
    workdir: Path = Path("out/serving"),
    address: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    allow_exposed: bool = False,
) -> int:
    """Serve a bundle by Triton on this machine, until Ctrl-C or SIGTERM.

    Takes the tritonserver on the PATH, or installs one into the workdir.

    Args:
        bundle: The bundle's folder.
        workdir: Where the server's environment goes, and in a folder of the HTTP port's name the model and the log.
        address: To listen on: IPv4 number, or a name that has one. There is no authentication.
        http_port: TCP port for HTTP.
        grpc_port: TCP port for gRPC.
        allow_exposed: Let a server listen to other machines that whoever reaches it can crash.
    """
    from engines.serving.serve import serve_bundle
    from engines.serving.server import Address, require_unexposed

    where = Address.resolve(address, http_port, grpc_port)
    if not allow_exposed:
        require_unexposed(where)
    return serve_bundle(bundle, serving, workdir, where)


def load_test(
    out: Path,
    workload: Annotated[Workload, tyro.conf.OmitArgPrefixes],
    server: str = "127.0.0.1:8001",
    concurrency: str = "1,2,4,8",
    minutes: float = 1.0,
    rate: float | None = None,
    workdir: Path = Path("out/serving"),
) -> int:
    """Measure a running server: pictures a second, and latencies in milliseconds.

    Args:
        out: The JSON file to write, with every latency.
        server: HOST:PORT of its gRPC endpoint.
        concurrency: Numbers of clients, separated by commas, taken in turn; each client has one request under way.
        minutes: For each of these numbers, above 0.
        rate: At most so many requests a second, all clients together, above 0. None: no bound.
        workdir: Where the environment of Triton's client is, or goes.
    """
    from engines.serving.load_test import measure_load

    levels = parse_counts("--concurrency", concurrency)
    return measure_load(out, server, workload, levels, minutes * 60, rate, workdir)


COMMANDS: dict[str, Callable[..., int]] = {
    "targets": targets,
    "build": build,
    "verify": verify,
    "inspect": inspect,
    "list": list_,
    "prune": prune,
    "compare": compare,
    "check": check,
    "push": push,
    "triton": triton,
    "plans": plans,
    "serve": serve,
    "load-test": load_test,
}


def main() -> int:
    def run() -> int:
        return int(tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=program("engines")) or 0)

    return exit_on_user_error(run)


if __name__ == "__main__":
    sys.exit(main())
