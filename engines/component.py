"""One component's engines behind one call: which engine and profile runs a batch, and how batches are padded or split."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from distill.common.errors import UserError
from engines.bundle import Engine, Profile
from engines.flavors import LoadedEngine

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class EngineComponent:
    """All loaded engines of one component. Each call runs on the engine and profile that fit it best.

    A batch that fits no profile is padded or run in pieces, so every batch works with every bundle.
    """

    def __init__(self, engines: list[tuple[Engine, LoadedEngine]], device: str) -> None:
        self.device = torch.device(device)
        self.engines = engines
        self._choices: dict[tuple[str | None, Shapes], tuple[LoadedEngine, Profile]] = {}
        first = engines[0][0]
        self.name = first.component
        self.inputs = {tensor.name: tensor for tensor in first.inputs}
        self.outputs = {tensor.name: tensor for tensor in first.outputs}
        self._batched = [name for name in self.inputs if name != "timestep"]  # one timestep is for all rows

    @property
    def resolutions(self) -> list[str]:
        return list(dict.fromkeys(text for engine, _ in self.engines for text in engine.resolutions))

    def dtype(self, name: str) -> torch.dtype:
        """Of an input or output."""
        return (self.inputs.get(name) or self.outputs[name]).torch_dtype

    def run(self, inputs: dict[str, torch.Tensor], resolution: str | None = None) -> dict[str, torch.Tensor]:
        """`inputs` have any float type and the engine's names; rows are the first dimension of all but the timestep.

        `resolution` is the image size for components that see it. Raises UserError where the bundle lacks it, and for inputs
        of other shapes than the engine takes.
        """
        ready = {name: tensor.to(self.device, self.dtype(name)).contiguous() for name, tensor in inputs.items()}
        rows = ready[self._batched[0]].shape[0]
        shapes: Shapes = tuple((name, tuple(tensor.shape)) for name, tensor in ready.items())
        if (choice := self._choices.get((resolution, shapes))) is None:
            choice = self._choose(resolution, shapes, rows)
            self._check_shapes(shapes, rows, choice[1])
            self._choices[resolution, shapes] = choice
        loaded, profile = choice
        least, most = profile.least_rows, profile.most_rows
        if rows < least:
            _warn_of_padding(self.name)
            padded = {
                name: torch.cat([tensor, tensor[-1:].expand(least - rows, *tensor.shape[1:])])
                if name in self._batched
                else tensor
                for name, tensor in ready.items()
            }
            return {name: tensor[:rows] for name, tensor in loaded.run(padded, profile).items()}
        if rows <= most:
            return loaded.run(ready, profile)
        pieces = []
        for start in range(0, rows, most):
            chunk = {name: ready[name][start : start + most] for name in self._batched}
            pieces.append(self.run(ready | chunk, resolution))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _choose(self, resolution: str | None, shapes: Shapes, rows: int) -> tuple[LoadedEngine, Profile]:
        """The profile that takes all rows with the least padding, else the one that takes the most at once. A size that none
        names runs on a range that it is in."""
        named, around = [], []
        for engine, loaded in self.engines:
            for profile in engine.profiles:
                if resolution is None or resolution in profile.resolutions:
                    named.append((loaded, profile))
                elif engine.layout == "ranged" and all(_fits(name, shape, profile, 2) for name, shape in shapes):
                    around.append((loaded, profile))
        if not (found := named or around):
            ranged = "" if {engine.layout for engine, _ in self.engines} != {"ranged"} else " and what lies between"
            raise UserError(
                f"resolution {resolution} is not in the bundle's {self.name}: it has {', '.join(self.resolutions)}{ranged}; "
                "ask for one of them; a size that the model has is added by building into the same bundle with --resolutions"
            )
        enough = [choice for choice in found if choice[1].most_rows >= rows]
        if not enough:
            return max(found, key=lambda choice: choice[1].most_rows)
        return min(enough, key=lambda choice: (max(0, choice[1].least_rows - rows), choice[1].most_rows))

    def _check_shapes(self, shapes: Shapes, rows: int, profile: Profile) -> None:
        """All but the rows, which are padded or split. Raises UserError."""
        for name, shape in shapes:
            if name in self._batched and shape[:1] != (rows,):
                raise UserError(f"{name} has {list(shape)[:1]} rows, the other inputs of the {self.name} have {rows}")
            if _fits(name, shape, profile, 1):
                continue
            least, most = profile.shapes[name].min[1:], profile.shapes[name].max[1:]
            taken = f"{least}" if least == most else f"{least} to {most}"
            advice = "; for longer prompts export with --tokens and build again" if name == LONGER else ""
            raise UserError(f"{name} is {list(shape)[1:]}, the {self.name} engine takes {taken} a row{advice}")


LONGER = "encoder_hidden_states"


def _fits(name: str, shape: tuple[int, ...], profile: Profile, start: int) -> bool:
    """Whether the dimensions from `start` on are in the profile's range."""
    if (taken := profile.shapes.get(name)) is None:
        return True
    return len(shape) == len(taken.max) and all(
        low <= size <= high for low, size, high in zip(taken.min[start:], shape[start:], taken.max[start:], strict=True)
    )


@cache
def _warn_of_padding(component: str) -> None:
    """Warns once for each component."""
    warnings.warn(
        f"the {component} plan was built for a larger batch: this call is padded. For sampling without guidance build with "
        "--guidance never (or any); for fewer images at once, with --batches",
        stacklevel=2,
    )
