"""What is seen of a diffusers pipeline from outside: its stages, its noise_pred, its weights.

The pipeline's own sampler runs unchanged; the stages are seen at places that diffusers makes public: the tokenizers,
`encode_prompt`, the progress bar, the end of each step, and the image processor.
"""

from __future__ import annotations

import hashlib
from functools import wraps
from typing import Any

from bench.contestants.contestant import Mark


def unet_hash(unet: Any) -> str:
    """sha256 of the weights in the memory of a UNet, compiled or not."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(getattr(unet, "_orig_mod", unet).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class StageHooks:
    """Puts marks around the stages of a diffusers pipeline. `mark` is set anew for every call."""

    def __init__(self, pipe: Any) -> None:
        self.mark: Mark = lambda _: None
        self.noise_preds: list[Any] | None = None  # a list where they are watched
        for name, part in pipe.components.items():
            if name.startswith("tokenizer") and part is not None:
                self._watch_tokenizer(part)
        self._after(pipe, "encode_prompt", "prepare", "text_encoders")
        self._after(pipe, "progress_bar", "prepare", None)
        self._after(pipe.image_processor, "postprocess", "vae_decode", None)

    def _watch_tokenizer(self, tokenizer: Any) -> None:
        hooks, kind = self, type(tokenizer)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            hooks.mark("text_encoders")
            result = kind.__call__(self, *args, **kwargs)
            hooks.mark("tokenise")
            return result

        # special methods are looked up on the class, so the instance gets a subclass of its own
        tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call})

    def watch_noise(self, scheduler: Any) -> None:
        """Keeps what `scheduler.step` is given, guidance applied, where somebody watches: every sampler of diffusers calls
        it so, whatever runs the UNet."""
        step = scheduler.step

        @wraps(step)  # a pipeline reads in its signature whether it takes the generator, as LCM's does for its noise
        def watched(noise_pred: Any, *args: Any, **kwargs: Any) -> Any:
            if self.noise_preds is not None:
                self.noise_preds.append(noise_pred.detach().float().cpu())  # a CUDA graph writes over it
            return step(noise_pred, *args, **kwargs)

        scheduler.step = watched

    def _after(self, owner: Any, method: str, before: str, after: str | None) -> None:
        """Marks `before` when `owner.method` is entered, and `after` when it returns."""
        original = getattr(owner, method)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.mark(before)
            result = original(*args, **kwargs)
            if after is not None:
                self.mark(after)
            return result

        setattr(owner, method, watched)
