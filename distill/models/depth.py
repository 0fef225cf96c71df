"""How deep a UNet is, as one line of text: `-/2,2/4,4:0:4,4,10/2,1,1/-` is SSD-1B.

DOWN:MID:UP, the levels of a side between slashes in the order of the forward pass. A level lists, for each of its
ResNets, the transformer blocks behind it; `-` is a level of ResNets alone. MID is its number of transformer blocks: 0
for one ResNet and no attention, `-` for no middle block at all. So it can say fewer layers per level (KOALA,
Small-SD), no middle (BK-SDM-Small) and fewer levels (Tiny-SD).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.common.errors import UserError
from distill.models.unet_config import MOST_LAYERS, PER_LEVEL, per_level, stated_unet

Level = tuple[int, ...]
"""Transformer blocks behind each ResNet of a level, all 0 or none."""
EXAMPLE = "-/2,2/4,4:0:4,4,10/2,1,1/-"
MOST_BLOCKS = 10_000
"""Far beyond any UNet; more would be listed for hours before anything else refused it."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Transformer blocks per ResNet, level by level. `mid` 0 is a middle block with one ResNet and no attention, None
    is no middle block."""

    down: tuple[Level, ...]
    mid: int | None
    up: tuple[Level, ...]

    @property
    def transformers(self) -> dict[str, int]:
        """Module path of each Transformer2DModel -> its number of blocks, in the order of the forward pass."""
        mid = {"mid_block.attentions.0": self.mid} if self.mid else {}
        return self._transformers("down") | mid | self._transformers("up")

    def _transformers(self, side: str) -> dict[str, int]:
        levels: tuple[Level, ...] = getattr(self, side)
        return {
            f"{side}_blocks.{i}.attentions.{j}": n for i, level in enumerate(levels) for j, n in enumerate(level) if n
        }

    @property
    def resnets(self) -> tuple[str, ...]:
        """Module paths of the ResNets of all levels, down then up; those of the middle block are not among them."""
        return tuple(
            f"{side}_blocks.{i}.resnets.{j}"
            for side, levels in (("down", self.down), ("up", self.up))
            for i, level in enumerate(levels)
            for j in range(len(level))
        )

    @property
    def layers(self) -> dict[str, int]:
        """Module path of each level -> the number of its ResNets."""
        mid = {} if self.mid is None else {"mid_block": 2 if self.mid else 1}
        down, up = (
            {f"{side}_blocks.{i}": len(level) for i, level in enumerate(levels)}
            for side, levels in (("down", self.down), ("up", self.up))
        )
        return down | mid | up

    @property
    def transformer_blocks(self) -> int:
        return sum(self.transformers.values())

    def __str__(self) -> str:
        def side(levels: tuple[Level, ...]) -> str:
            plain = max((len(level) for level in levels), default=0)
            return "/".join("-" if level == (0,) * plain else ",".join(map(str, level)) for level in levels)

        return f"{side(self.down)}:{'-' if self.mid is None else self.mid}:{side(self.up)}"

    @classmethod
    def parse(cls, text: str) -> Depth:
        """The inverse of `str`. Raises UserError."""

        def number(digits: str) -> int:
            if not (digits.isascii() and digits.isdecimal()):
                raise ValueError(digits)
            return int(digits)

        def side(text: str) -> tuple[Level, ...]:
            levels = [tuple(number(n) for n in level.split(",")) if level != "-" else None for level in text.split("/")]
            layers = max((len(level) for level in levels if level), default=0)
            return tuple((0,) * layers if level is None else level for level in levels)

        try:
            down, mid, up = text.split(":")
            depth = cls(down=side(down), mid=None if mid == "-" else number(mid), up=side(up))
        except ValueError:
            raise UserError(f"depth {text!r} is not of the form DOWN:MID:UP, e.g. {EXAMPLE} for SSD-1B") from None
        depth.check()
        return depth

    @classmethod
    def from_config(cls, config: Mapping[str, Any], model: object = "the model") -> Depth:
        """The depth that a UNet's config.json states, in any of the forms diffusers accepts.

        Raises UserError, which names the key, for what diffusers or a depth cannot express.
        """
        config = stated_unet(config, model)
        down, up = config["down_block_types"], config["up_block_types"]
        layers = per_level("layers_per_block", config, model)
        stated = per_level("transformer_layers_per_block", config, model)
        reverse = stated[::-1]
        if config["reverse_transformer_layers_per_block"] is not None:
            reverse = per_level("reverse_transformer_layers_per_block", config, model)

        def side(
            key: str, types: Sequence[str], transformers: Sequence[Any], counts: Sequence[int]
        ) -> tuple[Level, ...]:
            levels = []
            for kind, n, count in zip(types, transformers, counts, strict=True):
                level = (n,) * count if isinstance(n, int) else tuple(n)
                if "CrossAttn" not in kind:
                    level = (0,) * count
                if len(level) != count:
                    raise UserError(f"{model}: its UNet's {key} says {list(level)} for a level of {count} layers")
                levels.append(level)
            return tuple(levels)

        last = stated[-1] if isinstance(stated[-1], int) else stated[-1][0]
        depth = cls(
            down=side("transformer_layers_per_block", down, stated, layers),
            mid={"UNetMidBlock2DCrossAttn": last, None: None}.get(config["mid_block_type"], 0),
            up=side("reverse_transformer_layers_per_block", up, reverse, [count + 1 for count in layers[::-1]]),
        )
        depth.check()
        return depth

    def check(self) -> None:
        """Raises UserError where diffusers' UNet2DConditionModel cannot express the pattern."""
        levels = self.down + self.up
        if self.transformer_blocks > MOST_BLOCKS:
            raise UserError(f"the depth has more than {MOST_BLOCKS} transformer blocks; SDXL has 70, SSD-1B {EXAMPLE}")
        if len(self.resnets) > MOST_LAYERS:
            raise UserError(f"the depth has {len(self.resnets)} layers; the most is {MOST_LAYERS}")
        if not any(any(level) for level in levels):
            raise UserError(f"depth {self}: no level has a transformer block, one at least must")
        if any(not level or (0 in level and any(level)) for level in levels):
            raise UserError(
                f"depth {self}: the ResNets of a level all have transformer blocks behind them, one at least, or none has"
            )
        if [len(level) + 1 for level in self.down] != [len(level) for level in self.up[::-1]]:
            raise UserError(
                f"depth {self}: each level has one layer more on the way up than on the way down, e.g. {EXAMPLE}"
            )
        last = self.down[-1][0]
        if last and self.mid not in (None, 0, last):
            raise UserError(
                f"depth {self}: the middle block's {self.mid} transformer blocks must be 0 or equal to the "
                f"{last} of the last down block (a limit of diffusers' UNet config)"
            )

    def applied(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A UNet's config at this depth: what it says of levels beyond the last goes.

        Raises UserError where the config has fewer levels.
        """
        count = len(self.down)
        if count > len(config["block_out_channels"]):
            raise UserError(
                f"depth {self} has {count} levels, this family {len(config['block_out_channels'])}; leave out the lowest"
            )

        def cut(value: Any) -> Any:
            return value[:count] if isinstance(value, list | tuple) else value

        layers = [len(level) for level in self.down]
        kinds = ("UNetMidBlock2DCrossAttn" if self.mid else "UNetMidBlock2D") if self.mid is not None else None
        return {
            **config,
            **{key: cut(config[key]) for key in PER_LEVEL if key in config},
            "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
            "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in self.down],
            "mid_block_type": kinds,
            "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in self.up],
            "transformer_layers_per_block": [
                *(list(level) if any(level) else 1 for level in self.down[:-1]),
                list(self.down[-1]) if any(self.down[-1]) else self.mid or 1,  # which the middle block takes
            ],
            "reverse_transformer_layers_per_block": [list(level) if any(level) else 1 for level in self.up],
        }
