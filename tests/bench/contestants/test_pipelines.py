from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.contestants.exported import OptimumContestant
from bench.contestants.fake import FakeContestant
from bench.contestants.pipelines import CompiledContestant, EagerContestant
from bench.contestants.spec import Spec, make_contestant
from bench.measure.clock import CpuClock, timed_draw
from bench.workload import Workload
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.models.resolution import Resolution


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mini pipeline of Vega's depth with random weights."""
    from distill.mini.teach import make_mini_pipeline

    torch.manual_seed(0)
    pipe = make_mini_pipeline(ARCHITECTURES["mini-vega"], {})
    path = tmp_path_factory.mktemp("mini") / "vega"
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def eager(folder):
    contestant = make_contestant(Spec.parse(f"vega=eager@fp32:{folder}"), "cpu")
    contestant.load()
    return contestant


WORKLOAD = Workload(
    resolution=Resolution(96, 64), steps=3, prompts=("a small red circle", "a large blue ring"), batch=2
)


def test_every_stage_of_a_real_pipeline_is_seen_and_they_sum_to_the_total(eager):
    sample, pictures = timed_draw(eager, WORKLOAD, CpuClock())
    assert all(milliseconds > 0 for milliseconds in sample.stages_ms.values()), sample.stages_ms
    assert set(sample.stages_ms) == {"prepare", "tokenise", "text_encoders", "denoise", "vae_decode", "post_process"}
    assert len(sample.steps_ms) == WORKLOAD.steps
    assert sample.unaccounted < 0.01
    assert sample.stages_ms["denoise"] > sample.stages_ms["tokenise"]
    assert pictures.images.shape == (2, 64, 96, 3) and pictures.images.dtype == np.uint8
    assert pictures.latents_array().shape == (2, 4, 8, 12)


def test_the_picture_is_diffusers_own(eager, folder):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        WORKLOAD.batch_prompts(),
        width=96,
        height=64,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).images
    found = timed_draw(eager, WORKLOAD, CpuClock())[1].images
    assert (found == (expected * 255).round().astype(np.uint8)).all()


@pytest.mark.parametrize("scheduler", ["lcm", "euler-a"])
def test_a_scheduler_that_adds_noise_takes_it_from_the_seed(eager, scheduler):
    """Each of its steps: else no two pictures of one model agree, and the guard fails what is right."""
    once, again = (eager.draw(replace(WORKLOAD, scheduler=scheduler), lambda _: None) for _ in range(2))
    assert np.array_equal(once.images, again.images)


def test_compiled_fused_and_channels_last_draws_the_same_picture(eager, folder):
    from bench.quality.guard import guard

    compiled = make_contestant(Spec.parse(f"vega=compiled@fp32:{folder}"), "cpu")
    compiled.backend = "eager"  # the capture and the fusion are the pipeline's; what inductor makes of them is torch's
    sample, pictures = timed_draw(compiled, WORKLOAD, CpuClock())
    assert compiled.pipe.unet.mid_block is not None and hasattr(compiled.pipe.unet, "_orig_mod")
    assert any("to_qkv" in name for name, _ in compiled.pipe.unet.named_modules())
    assert len(sample.steps_ms) == WORKLOAD.steps
    verdict = guard(pictures, timed_draw(eager, WORKLOAD, CpuClock())[1])
    assert verdict.passed and (verdict.identical or verdict.psnr_db > 60)


def test_every_shape_is_compiled(monkeypatch):
    """torch's own limit is eight for one function; from the ninth on it would run uncompiled."""
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    net = torch.nn.Conv2d(4, 4, 1)
    net.decode = net.forward
    plain = SimpleNamespace(unet=net, vae=net, fuse_qkv_projections=lambda vae: None)
    monkeypatch.setattr(EagerContestant, "make_pipeline", lambda self: plain)
    config = torch._dynamo.config
    with config.patch(recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=False):  # as it was, after
        pipe = CompiledContestant("x", "somewhere", backend=count).make_pipeline()
        for side in range(8, 20):
            pipe.unet(torch.zeros(1, 4, side, side))
        assert len(graphs) == 12
        config.recompile_limit = 12
        with pytest.raises(Exception, match="recompile_limit"):
            pipe.unet(torch.zeros(1, 4, 20, 20))


def test_seed_scheduler_guidance_and_negative_prompt_reach_the_pipeline(eager):
    def draw(**changes):
        return timed_draw(eager, replace(WORKLOAD, **changes), CpuClock())[1].images

    base = draw()
    assert (draw() == base).all()
    for changes in (
        {"seed": 1},
        {"scheduler": "ddim"},
        {"scheduler": "HeunDiscreteScheduler"},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a large red circle"},
    ):
        assert (draw(**changes) != base).any(), changes
    assert (draw() == base).all()  # and nothing of it stays


def test_a_folder_that_is_no_onnx_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"unet/model\.onnx"):
        OptimumContestant("x", str(tmp_path)).check()


def test_kinds_become_contestants():
    assert isinstance(make_contestant(Spec.parse("a=fake:denoise=1"), "cpu"), FakeContestant)
    bundle = make_contestant(Spec.parse("a=bundle@onnxruntime:some/where"), "cpu")
    assert (bundle.flavor, bundle.device, bundle.source) == ("onnxruntime", "cpu", "some/where")
    assert make_contestant(Spec.parse("a=eager:random:vega"), "cuda").precision == "fp16"
    assert make_contestant(Spec.parse("a=compiled@bf16:random:vega"), "cuda").precision == "bf16"


def test_a_bundle_says_which_flavor_and_engines_it_loaded(monkeypatch):
    def part(name):
        engine = SimpleNamespace(flavor="onnxruntime", precision="fp32", files=[SimpleNamespace(sha256=name)])
        return SimpleNamespace(component=SimpleNamespace(engines=[(engine, None)]))

    parts = {name: part(name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    monkeypatch.setattr("engines.load", lambda *_, **__: SimpleNamespace(**parts, components=parts))
    bundle = make_contestant(Spec.parse("a=bundle:some/where"), "cpu")
    bundle.pipe = bundle.make_pipeline()
    assert bundle.runtime == "slimxl bundle, onnxruntime" and bundle.engines == list(parts)


def test_a_bundle_is_named_with_flavor_layout_and_precision():
    contestant = make_contestant(Spec.parse("a=bundle@tensorrt+int8+shared:somewhere"), "cuda")
    assert (contestant.flavor, contestant.layout, contestant.unet_precision) == ("tensorrt", "shared", "int8")
    assert contestant.runtime == "slimxl bundle, tensorrt, shared", "beside the same in fp16 only the precision differs"
    with pytest.raises(UserError, match="int9"):
        make_contestant(Spec.parse("a=bundle@tensorrt+int9:somewhere"), "cuda")
