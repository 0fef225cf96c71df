from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import torch
from diffusers import UNet2DConditionModel

from distill.checkpoints.surgery import make_student_unet, student_modules
from distill.data.make_cache import make_cache
from distill.models.architectures import ARCHITECTURES, find_architecture
from distill.models.depth import Depth
from distill.models.families import MINI_FAMILY
from distill.models.module_map import make_module_map, read_layer_map
from distill.studies.importance import BlockScore, measure_importance, propose_layer_map, report_importance


def test_a_block_that_does_nothing_scores_nothing_and_is_dropped() -> None:
    architecture = ARCHITECTURES["mini-vega"]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**architecture.unet_config).eval()
    idle = unet.get_submodule("down_blocks.2.attentions.0.transformer_blocks.0")
    for layer in (idle.attn1.to_out[0], idle.attn2.to_out[0], idle.ff.net[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    batch = {
        "latents": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 4, 128),
        "text_embeds": torch.randn(2, 64),
        "time_ids": torch.zeros(2, 6),
    }
    scores = measure_importance(unet, architecture.depth, batch, torch.linspace(0.99, 0.01, 1000), (100, 900))
    assert len(scores) == architecture.depth.transformer_blocks
    by_place = {(score.path, score.index): score.score for score in scores}
    assert by_place["down_blocks.2.attentions.0", 0] == 0
    assert all(score > 0 for place, score in by_place.items() if place != ("down_blocks.2.attentions.0", 0))
    shorter = Depth.parse("-/1,1/1,1:0:2,2,2/1,1,1/-")
    modules = make_module_map("first", architecture.depth, shorter)
    assert propose_layer_map(scores, modules)["down_blocks.2.attentions.0"] == (1,)


def test_the_proposed_map_keeps_the_order_of_the_teacher() -> None:
    teacher, student = ARCHITECTURES["sdxl"].depth, ARCHITECTURES["ssd-1b"].depth
    scores = [BlockScore(p, i, (float(i),)) for p, n in teacher.transformers.items() for i in range(n)]
    proposed = propose_layer_map(scores, make_module_map("first", teacher, student))
    assert proposed["up_blocks.0.attentions.0"] == (6, 7, 8, 9)


def test_the_report_ranks_every_block_and_proposes_a_map_that_surgery_takes(
    mini_vega: Path, tmp_path: Path, capsys
) -> None:
    make_cache(mini_vega, "shapes:9", tmp_path / "cache")
    depth = "-/1,1/1,1:0:2,2,2/1,1,1/-"
    report_importance(mini_vega, tmp_path / "cache", depth, tmp_path / "out", samples=1, timesteps=2)
    table = capsys.readouterr().out.splitlines()
    ranked = [line for line in table if ".transformer_blocks." in line]
    assert len(ranked) == 15 and sum(" * " in line for line in ranked) == 13
    layer_map = read_layer_map(str(tmp_path / "out" / "importance.json"))
    student = find_architecture(depth, MINI_FAMILY)
    modules, _ = student_modules(mini_vega, student, layer_map)
    assert make_student_unet(mini_vega, student, modules, tmp_path / "unet").unused
    assert ElementTree.parse(tmp_path / "out" / "importance.svg").getroot().tag.endswith("svg")
