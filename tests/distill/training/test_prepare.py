from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.training.prepare import check_successor

PUBLISHED_UNET = json.loads("""{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0",
"act_fn": "silu", "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64,
"addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
"center_input_sample": false, "class_embed_type": null, "class_embeddings_concat": false, "conv_in_kernel": 3,
"conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": null, "down_block_types":
["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
"dual_cross_attention": false, "encoder_hid_dim": null, "encoder_hid_dim_type": null, "flip_sin_to_cos": true,
"freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": null,
"mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
"num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false, "out_channels": 4,
"projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false,
"resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": null, "time_embedding_act_fn": null,
"time_embedding_dim": null, "time_embedding_type": "positional", "timestep_post_act": null,
"transformer_layers_per_block": [1, 2, 10], "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
"UpBlock2D"], "upcast_attention": null, "use_linear_projection": true}""")
"""SDXL base 1.0's own unet/config.json."""


def _teacher(folder: Path, unet: dict, **scheduler: object) -> Path:
    for name, config in (("unet/config", unet), ("scheduler/scheduler_config", scheduler)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).with_suffix(".json").write_text(json.dumps(config))
    return folder


def test_a_successor_is_known_whichever_diffusers_wrote_its_config(tmp_path: Path) -> None:
    published = _teacher(tmp_path / "published", PUBLISHED_UNET)
    with torch.device("meta"):
        converted = UNet2DConditionModel(**ARCHITECTURES["sdxl"].unet_config)
    (tmp_path / "converted" / "scheduler").mkdir(parents=True)
    (tmp_path / "converted" / "scheduler" / "scheduler_config.json").write_text("{}")
    converted.save_config(tmp_path / "converted" / "unet")
    check_successor(published, tmp_path / "converted")
    check_successor(tmp_path / "converted", published)
    wider = _teacher(tmp_path / "wider", PUBLISHED_UNET | {"cross_attention_dim": 1280})
    with pytest.raises(UserError, match="cross_attention_dim is 1280, was 2048"):
        check_successor(published, wider)
    shorter = _teacher(tmp_path / "shorter", PUBLISHED_UNET | {"transformer_layers_per_block": [1, 2, 4]})
    with pytest.raises(UserError, match=r"transformer_layers_per_block is '-/2,2/4,4:4:.*, was '-/2,2/10,10:10:"):
        check_successor(published, shorter)


@pytest.mark.parametrize("scheduler", [{"_class_name": "EDMEulerScheduler"}, {"rescale_betas_zero_snr": True}])
def test_a_teacher_of_other_noise_levels_is_refused(scheduler: dict, tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher", PUBLISHED_UNET, **scheduler)
    with pytest.raises(UserError, match="trained on other noise levels"):
        check_successor(teacher, teacher)
