"""What the UNet reads of captions, where a batch is at work: as cached, or encoded there from the captions' tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.checkpoints.folder import find_family
from distill.checkpoints.load import load_component
from distill.models.conditioning import TOKENS, Conditioning


@dataclass(frozen=True)
class TextEncoders:
    """The frozen text encoders of a checkpoint by their names, on the device."""

    conditioning: Conditioning
    networks: Mapping[str, Any]

    @classmethod
    def load(cls, checkpoint: Path, half: torch.dtype, device: torch.device) -> TextEncoders:
        """Loads them from a pipeline folder, in fp32 where `half` is, else in fp16 as caches hold text (bf16 is coarser)."""
        dtype = half if half == torch.float32 else torch.float16
        conditioning = find_family(checkpoint).conditioning
        networks = {name: load_component(checkpoint, name, dtype) for name in conditioning.encoders}
        return cls(conditioning, {name: net.to(device).requires_grad_(False) for name, net in networks.items()})

    @torch.no_grad()
    def encoded(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with its tokens replaced by the text inputs that they encode to, in float32."""
        text = self.conditioning.encode_tokens(self.networks, batch)
        left = {name: value for name, value in batch.items() if name not in TOKENS.values()}
        return left | {name: value.float() for name, value in text.items()}


def with_text(
    batch: Mapping[str, torch.Tensor], encoders: TextEncoders | None, unconditional: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A batch with its text, `unconditional` in place of that of captions that were `dropped` (n,). A batch of tokens needs
    `encoders`."""
    batch = encoders.encoded(batch) if encoders and not batch.keys().isdisjoint(TOKENS.values()) else dict(batch)
    dropped = batch.pop("dropped")
    for name, nothing in unconditional.items():
        batch[name] = torch.where(dropped.view(-1, *[1] * nothing.dim()), nothing, batch[name])
    return batch
