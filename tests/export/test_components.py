from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from distill.common.errors import UserError
from distill.common.files import read_json
from distill.models.networks import CONTROLNETS
from distill.models.resolution import Resolution
from export.components import COMPONENTS

SDXL_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "addition_embed_type": "text_time",
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
    "addition_time_embed_dim": 256,
    "text_length": 77,
    "vae_scale_factor": 8,
}


def test_sdxl_unet_has_the_known_inputs() -> None:
    specs = COMPONENTS["unet"].inputs(SDXL_UNET, Resolution(1536, 640), 2, "fp16")
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
        ("sample", "float16", (2, 4, 80, 192)),
        ("timestep", "float32", (1,)),
        ("encoder_hidden_states", "float16", (2, 77, 2048)),
        ("text_embeds", "float32", (2, 1280)),
        ("time_ids", "float32", (2, 6)),
    ]


def test_a_consistency_unet_takes_the_guidance_embedding() -> None:
    specs = COMPONENTS["unet"].inputs(SDXL_UNET | {"time_cond_proj_dim": 256}, Resolution(1024, 1024), 1)
    assert (specs[-1].name, specs[-1].shape) == ("timestep_cond", (1, 256))


@pytest.mark.parametrize("size", ["1000x1024", "1024x8", "1024x1040"])
def test_a_size_the_unet_cannot_take_is_named(size: str) -> None:
    with pytest.raises(UserError, match=rf"{size}.*multiples of 32"):
        COMPONENTS["unet"].inputs(SDXL_UNET, Resolution.parse(size), 2)


def test_unknown_precision_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"'int4'.*fp16, fp32"):
        COMPONENTS["unet"].inputs(SDXL_UNET, Resolution(1024, 1024), 2, "int4")


@pytest.mark.parametrize("name", [name for name in COMPONENTS if name not in CONTROLNETS])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graphs_have_exactly_these_names_types_and_open_axes(
    name: str, precision: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"onnx_{precision}") / name
    if name.startswith("vae"):
        precision = "fp32"
    config = read_json(folder / "config.json")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    inputs = COMPONENTS[name].inputs(config, Resolution(160, 128), 2, precision)
    outputs = COMPONENTS[name].outputs(config, Resolution(160, 128), 2, precision)
    for value, spec in zip([*graph.input, *graph.output], [*inputs, *outputs], strict=True):
        kind = value.type.tensor_type
        assert value.name == spec.name
        assert onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name == spec.dtype
        for dim, size, axis in zip(kind.shape.dim, spec.shape, spec.axes, strict=True):
            assert bool(dim.dim_param) == (axis is not None)
            assert axis is not None or dim.dim_value == size
