"""Makes a mini teacher: its VAE, then its UNet and text encoders together, then its decoder once more.

All of it happens once, on the machine of whoever makes a new teacher; the distillation of students is `trainer.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch

from distill.checkpoints.assemble import tokenizers_and_scheduler
from distill.checkpoints.folder import network_folders
from distill.checkpoints.load import load_component
from distill.checkpoints.sources import resolve
from distill.common.errors import UserError, require_above, require_least
from distill.common.files import write_json
from distill.common.ownership import require_our_folder
from distill.common.progress import say
from distill.mini.judge import judge
from distill.mini.teach_unet import teach_unet
from distill.mini.teach_vae import polish_decoder, teach_vae
from distill.models.architectures import ARCHITECTURES, Architecture, find_architecture
from distill.models.families import SHAPES_WORDS
from distill.models.networks import make_network


def teach_mini(
    out: Path,
    *,
    architecture: str,
    start: str | None,
    vae_steps: int,
    vae_whole_steps: int,
    minutes: float,
    learning_rate: float,
    batch: int,
    decoder_steps: int,
    seed: int,
) -> dict[str, float]:
    """The whole making of a mini teacher, stored in fp16. What `start` has of its networks is taught further; a VAE
    already under `out` is kept. Returns what `judge` says of it. Raises UserError for an architecture of another world
    than the shapes', for a `start` that has nothing of it, and for a number out of range."""
    require_least(0, vae_steps=vae_steps, vae_whole_steps=vae_whole_steps, minutes=minutes, decoder_steps=decoder_steps)
    require_least(0, seed=seed)
    require_least(1, batch=batch)
    require_above(0, learning_rate=learning_rate)
    chosen = find_mini_architecture(architecture)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    require_our_folder(out, "a mini teacher", ["teach.json"], ("seed", "vae_steps"))
    networks = {} if start is None else networks_in_common(resolve(start, out), chosen)
    write_json(out / "teach.json", {"seed": seed, "vae_steps": vae_steps, "vae_whole_steps": vae_whole_steps})
    if "vae" not in networks and (out / "vae" / "config.json").exists():
        networks["vae"] = diffusers.AutoencoderKL.from_pretrained(out / "vae")
    elif "vae" not in networks:
        networks["vae"] = teach_vae(out, steps=vae_steps, whole_steps=vae_whole_steps, seed=seed)
    pipe = make_mini_pipeline(chosen, networks)
    pipe.set_progress_bar_config(disable=True)
    if minutes:
        teach_unet(pipe, chosen.family, out, minutes=minutes, learning_rate=learning_rate, batch=batch, seed=seed)
    if decoder_steps:
        polish_decoder(pipe.vae, out, steps=decoder_steps, seed=seed)
    pipe.to(torch.float16).save_pretrained(out, safe_serialization=True)
    return judge(pipe.to(torch.float32), chosen.family.resolutions)


def find_mini_architecture(name: str) -> Architecture:
    """Raises UserError for one whose tokenizer does not have the words of the shapes world."""
    chosen = find_architecture(name)
    if chosen.family.vocabulary is not SHAPES_WORDS:
        names = [known.name for known in ARCHITECTURES.values() if known.family.vocabulary is SHAPES_WORDS]
        raise UserError(
            f"{name} is of no mini family, so the shapes world cannot teach it; these can: {', '.join(names)}"
        )
    return chosen


def networks_in_common(folder: Path, architecture: Architecture) -> dict[str, Any]:
    """The networks that a checkpoint gives an architecture, by folder: those whose weights have the names and shapes of
    its own, and a UNet `begun_from` the checkpoint's where the two differ. Raises UserError where there are none."""
    found, taken = {}, []
    for name in network_folders(folder):
        if name in architecture.configs:
            network = load_component(folder, name, torch.float32)
            wanted = make_network(name, architecture.configs[name])
            if _shapes(network) == _shapes(wanted):
                found[name] = network
                taken.append(name)
            elif name == "unet" and (count := begun_from(network, wanted)):
                found[name] = wanted
                taken.append(f"{count} of the {len(_shapes(wanted))} tensors of its unet")
    if not found:
        raise UserError(f"{folder} has no network of {architecture.name} to start from")
    say(f"begun from {folder}: {', '.join(taken)}")
    return found


def _shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: weights.shape for name, weights in network.state_dict().items()}


@torch.no_grad()
def begun_from(source: Any, unet: Any) -> int:
    """Copies into `unet` what fits of a UNet of another family, and returns how many tensors that is.

    Levels of the same resolution meet: up_blocks are counted from the last. A tensor with as many rows takes the first
    of the source's columns, so cross-attention takes those of the first text encoder, and a linear projection fits a
    1x1 convolution. Branches that find nothing end in zeros, so that they change nothing yet.
    """
    theirs = source.state_dict()
    shift = len(source.up_blocks) - len(unet.up_blocks)
    count = 0
    for name, weights in unet.state_dict().items():
        rows = weights.view(len(weights), -1)
        found = theirs.get(re.sub(r"(?<=^up_blocks\.)\d+", lambda level: str(int(level[0]) + shift), name))
        if found is not None and len(found) == len(rows) and found[0].numel() >= rows.shape[1]:
            rows.copy_(found.view(len(found), -1)[:, : rows.shape[1]])
            count += 1
        elif ".proj_out." in name or ".conv2." in name:
            rows.zero_()
    return count


def make_mini_pipeline(architecture: Architecture, networks: dict[str, Any]) -> Any:
    """A diffusers pipeline of an architecture around the `networks` given; the others are untrained."""
    family = architecture.family
    made = {
        name: networks[name] if name in networks else make_network(name, config)
        for name, config in architecture.configs.items()
    }
    kind = family.conditioning
    return getattr(diffusers, kind.pipeline)(**made, **tokenizers_and_scheduler(family), **kind.load_options)
