"""Each engine beside the network it was made from, on what that is called with while a picture is drawn.

Random numbers excite attention evenly; a taught network's scores and residuals are larger and of all sizes, which is where
an accumulation in too few bits shows.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.engines.drawing import draw


def worst_errors(ours: Any, reference: Any, **arguments: Any) -> dict[str, float]:
    """The largest |engine - network| / |network| (2-norm) of each component's outputs over all its calls while `reference`,
    a pipeline in torch, draws."""
    worst: dict[str, float] = {}

    def note(name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        assert got.shape == wanted.shape
        error = (
            got.detach().double().cpu() - wanted.detach().double().cpu()
        ).norm() / wanted.detach().double().norm().cpu()
        worst[name] = max(worst.get(name, 0.0), float(error))

    def watch_text(name: str) -> Any:
        def look(_: Any, positional: Any, named: Any, wanted: Any) -> None:
            got = getattr(ours, name)(*positional, **named)
            note(name, got.hidden_states[-2], wanted.hidden_states[-2])
            if "text_embeds" in wanted:
                note(f"{name}, pooled", got.text_embeds, wanted.text_embeds)

        return getattr(reference, name).register_forward_hook(look, with_kwargs=True)

    def look_at_unet(_: Any, positional: Any, named: Any, wanted: Any) -> None:
        note("unet", ours.unet(*positional, **named)[0], wanted[0])

    decode = reference.vae.decode

    def look_at_decode(latents: torch.Tensor, *positional: Any, **named: Any) -> Any:
        wanted = decode(latents, *positional, **named)
        note("vae", ours.vae.decode(latents, return_dict=False)[0], wanted[0])
        return wanted

    hooks = [watch_text("text_encoder"), watch_text("text_encoder_2")]
    hooks.append(reference.unet.register_forward_hook(look_at_unet, with_kwargs=True))
    reference.vae.decode = look_at_decode
    try:
        draw(reference, **arguments)
    finally:
        del reference.vae.decode
        for hook in hooks:
            hook.remove()
    return worst
