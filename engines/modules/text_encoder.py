"""A text encoder engine, called like transformers' CLIPTextModel and CLIPTextModelWithProjection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from distill.common.errors import UserError
from engines.component import EngineComponent
from engines.modules.base import EngineModule, LacksError, run

_ADVICE = "an engine gives what its pipeline reads, so leave clip_skip unset, or run the checkpoint in torch"


class _Absent:
    """Stands for an output that the engine was built without. Pipelines look at its rank, and may."""

    def __init__(self, name: str, held: Sequence[str], ndim: int) -> None:
        self._why = f"the text encoder engine was built without {name}, it has {' and '.join(held)}; {_ADVICE}"
        self.ndim = ndim

    def __getattr__(self, name: str) -> Any:
        raise LacksError(self._why)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        raise LacksError(next(one for one in tree_leaves((arguments, named)) if isinstance(one, cls))._why)


class _HiddenStates:
    """As transformers' tuple of the embeddings and of every layer's output; an engine has some of them, or none."""

    def __init__(self, held: dict[int, torch.Tensor], layers: int, names: Sequence[str]) -> None:
        self._held, self._layers, self._names = held, layers, names

    def __len__(self) -> int:
        return self._layers + 1

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"the text encoder has hidden states 0 to {self._layers}, not {index}")
        if (found := self._held.get(index % len(self))) is None:
            had = " and ".join(self._names)
            raise UserError(f"the text encoder engine was built without hidden state {index}, it has {had}; {_ADVICE}")
        return found


class TextOutput:
    """The fields of transformers' output in its order, by name or by number. What transformers leaves out where it was not
    asked for is left out here too."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> Any:
        if name in ("hidden_states", "attentions") and name not in self._fields:
            return None
        value = None if name.startswith("_") else self._fields.get(name)
        if isinstance(value, _Absent):
            raise LacksError(value._why)
        if value is None:
            raise AttributeError(f"the output of a text encoder has no {name}")
        return value

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self._fields.values())

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, name: object) -> bool:
        return name in self._fields


class EngineTextEncoder(EngineModule):
    """It has those outputs of the network that its pipeline reads."""

    def __init__(self, component: EngineComponent, config: dict[str, Any]) -> None:
        super().__init__(component, config, component.dtype(next(iter(component.outputs))))

    @torch.compiler.disable
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """`input_ids` (rows, tokens) -> `text_embeds` or `pooler_output` (rows, dim), `last_hidden_state` and one of
        `hidden_states` (rows, tokens, dim), as far as the engine has them.

        Raises UserError for a mask that hides a token, for other positions than 0, 1, 2 … and for attentions.
        """
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise UserError(
                "the text encoder engine reads every token, this attention_mask hides some; pass none (compel: "
                "downweight_mode=DownweightMode.REMOVE), or run the checkpoint in torch"
            )
        if position_ids is not None and not bool((position_ids.cpu() == torch.arange(input_ids.shape[-1])).all()):
            raise UserError("the text encoder engine counts positions from 0; leave position_ids out")
        if output_attentions:
            raise UserError("the text encoder engine keeps no attentions; run the checkpoint in torch for them")
        outputs = run(self.component, {"input_ids": input_ids})
        names = ["last_hidden_state", "pooler_output"]
        if "text_embeds" in self.component.outputs:
            names = ["text_embeds", "last_hidden_state"]
        held = tuple(self.component.outputs)
        fields: dict[str, Any] = {
            name: outputs[name] if name in outputs else _Absent(name, held, 3 if "hidden" in name else 2)
            for name in names
        }
        if output_hidden_states:
            prefix = "hidden_states."
            hidden = {int(n.removeprefix(prefix)): value for n, value in outputs.items() if n.startswith(prefix)}
            fields["hidden_states"] = _HiddenStates(hidden, self.config["num_hidden_layers"], held)
        output = TextOutput(fields)
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> None:
        """What textual inversion would extend."""
        raise UserError("an engine's vocabulary is fixed: textual inversion needs the checkpoint in torch")
