"""Adapters on a finished student: what is trained, what is kept, what is left, and who can read it."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile

from distill.__main__ import main
from distill.checkpoints.folder import checkpoint_hash
from distill.checkpoints.load import load_component
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.models.module_map import make_module_map
from distill.training.accelerator import check_fsdp, trained_parameters
from distill.training.memory import count_memory
from distill.training.objectives import Distill
from distill.training.objectives.interface import Nets
from distill.training.options import TrainOptions
from distill.training.output.card import _usage
from distill.training.recipes import find_recipe, peek_teacher, stage_modules
from distill.training.recipes.sdxl import SDXL_BASE
from distill.training.step import predict
from distill.training.student import Lora
from distill.training.student.lora import KOHYA_FILE, LORA_FILE, adapters_off
from distill.training.trainer import train
from export.checkpoint.prepare import with_loras
from tests.distill.small_runs import curve, lora_recipe, run
from tests.processes import exit_codes, kill, start, start_ranks, wait_for

VEGA = ARCHITECTURES["mini-vega"]


@pytest.fixture(scope="module")
def adapter(mini_vega: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that was not disturbed leaves."""
    out = tmp_path_factory.mktemp("adapters") / "lora"
    options = TrainOptions(checkpoint_every=2, log_every=1)
    train(lora_recipe(str(mini_vega)), cache=cache, out=out, workdir=out, options=options)
    return out


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {spec.name: spec.shape for spec in VEGA.family.unet_inputs(VEGA.family.resolutions[0], 1)}
    batch = {name: torch.randn(shape, generator=generator) for name, shape in drawn.items()}
    return batch | {"timestep": torch.tensor([500]), "time_ids": torch.zeros(1, 6)}


@pytest.mark.parametrize(
    ("name", "of_rank_1", "rank", "published"),
    [("sdxl", 3_074_240, 64, 197e6), ("ssd-1b", 1_639_104, 64, 105e6), ("vega", 934_080, 128, 119e6)],
)
def test_adapters_are_as_large_as_the_published_ones(name: str, of_rank_1: int, rank: int, published: float) -> None:
    """lcm-lora-sdxl, lcm-lora-ssd-1b and Segmind-VegaRT, by parameters."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**ARCHITECTURES[name].unet_config)
        Lora(rank=1).prepare(unet)
    assert sum(parameter.numel() for parameter in trained_parameters(unet)) == of_rank_1
    assert rank * of_rank_1 == pytest.approx(published, rel=5e-3)


def test_the_base_is_its_own_teacher_and_stays_as_it_was(adapter: Path, mini_vega: Path, cache: Path) -> None:
    first, *_, last = map(json.loads, (adapter / "losses.jsonl").read_text().splitlines())
    apart = {name: value for name, value in first["terms"].items() if name != "task"}
    assert not any(apart.values()) and first["gradient_norm"] > 0, "B is zero, so the student is the teacher"
    assert last["terms"]["output"] > 0
    about = json.loads((adapter / "slimxl.json").read_text())
    assert about["teachers"] == {str(mini_vega): checkpoint_hash(mini_vega)}
    assert about["parameters"] == 4 * 61_280 and about["student"] == "LoRA of rank 4"


def test_what_is_left_is_adapters_alone_and_a_card(adapter: Path) -> None:
    assert {path.name for path in adapter.iterdir()} - {".lock"} == {
        LORA_FILE, KOHYA_FILE, "README.md", "losses.jsonl", "run.json", "samples", "slimxl.json",
    }  # fmt: skip
    assert (adapter / LORA_FILE).stat().st_size < 1.1 * 4 * 4 * 61_280
    card = (adapter / "README.md").read_text()
    assert "base_model_relation: adapter" in card and "pipe.load_lora_weights(FOLDER)" in card


def test_diffusers_kohyas_readers_and_export_see_the_same_student(
    adapter: Path, mini_vega: Path, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """α is twice the rank here, which no reader is told."""
    ours = predict(Lora().load(adapter, mini_vega, torch.float32), inputs)
    assert (ours - predict(load_component(mini_vega, "unet", torch.float32), inputs)).abs().max() > 1e-3
    pipe = StableDiffusionXLPipeline.from_pretrained(mini_vega)
    pipe.load_lora_weights(adapter)
    torch.testing.assert_close(predict(pipe.unet, inputs), ours)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(adapter, weight_name=KOHYA_FILE)
    torch.testing.assert_close(predict(pipe.unet, inputs), ours)
    for name in (LORA_FILE, KOHYA_FILE):
        fused = with_loras(mini_vega, "of the checkpoint", [(adapter / name, 1.0)], tmp_path)
        torch.testing.assert_close(
            predict(load_component(fused, "unet", torch.float32), inputs), ours, atol=1e-5, rtol=1e-4
        )
    with safe_open(adapter / KOHYA_FILE, "pt") as file:
        layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        assert {f"{layer}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= set(file.keys())


def test_killed_and_gone_on_with_it_ends_in_the_same_bytes(
    adapter: Path, mini_vega: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = start(run, lora_recipe(str(mini_vega)), cache, out)
    wait_for("state/*/progress.json", out, [process])
    kill([process])
    [state] = (out / "state").glob("[0-9]*")
    held = {name for name in dcp.FileSystemReader(state).read_metadata().state_dict_metadata if "student." in name}
    assert held and all(".lora_A." in name or ".lora_B." in name for name in held), "the base is in no checkpoint"
    run(lora_recipe(str(mini_vega)), cache, out)
    for name in (LORA_FILE, KOHYA_FILE, "samples/01-adapt.png", "README.md"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes(), name
    assert curve(out) == curve(adapter)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"gradient_checkpointing": True, "accumulation": 2}, 1e-3), ({"mixed_precision": "bf16"}, 0.1)],
)
def test_how_it_is_run_changes_no_loss(
    options: dict, tolerance: float, adapter: Path, mini_vega: Path, cache: Path, tmp_path: Path
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = replace(lora_recipe(str(mini_vega)), validation_prompts=())
    train(recipe, cache=cache, out=tmp_path / "out", workdir=tmp_path, options=TrainOptions(log_every=1, **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert curve(tmp_path / "out") == pytest.approx(curve(adapter), rel=tolerance)


def test_two_processes_lose_as_one(adapter: Path, mini_vega: Path, cache: Path, tmp_path: Path) -> None:
    """Under DDP, whose wrapper holds a base without gradients that is the teacher too."""
    assert exit_codes(start_ranks(run, lora_recipe(str(mini_vega)), cache, tmp_path / "two")) == [0, 0]
    assert curve(tmp_path / "two") == pytest.approx(curve(adapter), rel=1e-3)


def test_another_teacher_stands_beside_the_base(finished: Path, mini_vega: Path, cache: Path, tmp_path: Path) -> None:
    """On a student of that teacher, and compared with it by the student's own map."""
    recipe = replace(lora_recipe(str(mini_vega)), validation_prompts=())
    out = tmp_path / "out"
    train(recipe, cache=cache, out=out, workdir=tmp_path, start=finished, options=TrainOptions(log_every=1))
    first = json.loads((out / "losses.jsonl").read_text().splitlines()[0])
    assert first["terms"]["output"] > 0
    assert json.loads((out / "slimxl.json").read_text())["start"] == checkpoint_hash(finished)
    assert len(trained_parameters(Lora().load(out, finished, torch.float32))) < 488


def test_what_cannot_be_is_refused_before_anything_is_loaded(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"stage adapt: unknown LoRA target 'to_qq': known are .* did you mean 'to_q'"):
        stage_modules(lora_recipe(str(mini_vega), student=Lora(targets=("to_k", "to_qq"))), VEGA)
    with pytest.raises(UserError, match="a LoRA's are fp32 beside a base in half precision; leave --fsdp out"):
        check_fsdp(2, "bf16", "adamw", adapters=True)
    (tmp_path / "mine.json").write_text(json.dumps(lora_recipe(str(mini_vega)).as_dict()))
    monkeypatch.setattr("sys.argv", ["distill", "memory", "--recipe", str(tmp_path / "mine.json"), "--fsdp"])
    assert main() == 2
    assert "leave --fsdp out" in capsys.readouterr().err


def test_the_published_recipes_are_adapters_of_their_sizes_drawn_in_four_steps() -> None:
    for name, teacher, rank in (
        ("lcm-lora-sdxl", SDXL_BASE, 64),
        ("lcm-lora-ssd-1b", "segmind/SSD-1B", 64),
        ("vega-rt", "segmind/Segmind-Vega", 128),
    ):
        recipe = find_recipe(name)
        [stage] = recipe.stages
        assert (recipe.name, stage.teacher, stage.student) == (name, teacher, Lora(rank=rank))
        assert peek_teacher(recipe).name == name.removeprefix("lcm-lora-").replace("vega-rt", "vega")
        assert (recipe.weight_decay, recipe.ema_decay, stage.learning_rate_at(999)) == (0.0, None, 1e-4)
    sampling = stage.objective.sampling(None)
    assert _usage("StableDiffusionXLPipeline", "a/b", sampling).splitlines()[1:-1] == [
        "from diffusers import LCMScheduler, StableDiffusionXLPipeline",
        "",
        'pipe = StableDiffusionXLPipeline.from_pretrained("a/b")',
        "pipe.load_lora_weights(FOLDER)",
        "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config"
        ", original_inference_steps=50, timestep_scaling=10.0)",
        "image = pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0).images[0]",
    ]


def _allocated_peak(unet: UNet2DConditionModel, batch: int) -> int:
    """Most bytes that a step with the base as teacher took from the CPU allocator, by its own record."""
    objective = Distill(feature=0.0)
    depth = VEGA.depth
    nets = Nets(
        student=unet,
        teacher=unet,
        modules=make_module_map("first", depth, depth),
        alphas_cumprod=torch.linspace(0.99, 0.01, 1000),
        unconditional={},
    )
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, objective.prepare(nets) as terms_of:
        part = {
            spec.name: torch.zeros(spec.shape) for spec in VEGA.family.unet_inputs(VEGA.family.resolutions[0], batch)
        }
        part |= {"timestep": torch.full((batch,), 500), "noise": torch.randn(batch, 4, 16, 16)}
        teaching = torch.no_grad()(adapters_off(unet)(partial(predict, unet)))
        torch.stack(list(terms_of(partial(predict, unet), teaching, part, 0).values())).sum().backward()
    live = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_the_plan_holds_the_base_once_and_only_adapters_in_full() -> None:
    student, objective = Lora(rank=8), Distill(feature=0.0)
    options = {"resolution": VEGA.family.resolutions[0], "micro_batch": 4, "ema": True}
    with torch.device("meta"):
        whole = UNet2DConditionModel(**VEGA.unet_config).num_parameters()
    half = count_memory(VEGA, student, objective, half=torch.bfloat16, **options)
    apart = count_memory(VEGA, student, objective, half=torch.bfloat16, taught_by_base=False, **options)
    adapters = 4 * 8 * 61_280
    assert (half.frozen, apart.frozen) == (2 * whole, 2 * 2 * whole)
    assert (half.student, half.ema, half.optimizer) == (adapters, adapters, 2 * adapters)
    unet = UNet2DConditionModel(**VEGA.unet_config)
    student.prepare(unet)
    plan = count_memory(VEGA, student, objective, **options)
    assert plan.gradients + plan.work == pytest.approx(_allocated_peak(unet, 4), rel=0.02)
