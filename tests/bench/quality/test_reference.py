"""The guard on true models: a UNet that is wrong must fail, where its picture alone would pass."""

import torch

from bench.contestants.pipelines import EagerContestant
from bench.quality.fidelity import FidelityOptions
from bench.quality.guard import MIN_LATENT_COSINE, MIN_PSNR_DB
from bench.quality.reference import draw_for_guard, judge
from bench.workload import Workload
from distill.models.resolution import Resolution

WORKLOAD = Workload(resolution=Resolution(64, 64), steps=2, prompts=("a small red circle",))


def transposed(unet):
    with torch.no_grad():
        for one in unet.modules():
            if isinstance(one, torch.nn.Linear) and one.in_features == one.out_features:
                one.weight.copy_(one.weight.T.clone())


def test_a_wrong_unet_fails_though_its_picture_would_pass(tmp_path):
    contestants, drawn = [], {}
    for name, spoil in (("right", None), ("transposed", transposed)):
        one = EagerContestant(name, "random:mini-vega", precision="bf16" if spoil is None else "fp32", workdir=tmp_path)
        if spoil is not None:
            spoil(one.pipe.unet)
        drawn[name] = draw_for_guard(one, WORKLOAD, FidelityOptions())
        one.unload()
        contestants.append(one)
    found = judge(drawn, contestants, WORKLOAD, True, "cpu")
    assert found["right"]["passed"] and len(found["right"]["noise_errors"]) == 2
    wrong = found["transposed"]
    assert wrong["passed"] is False and len(wrong["words"]) == 1 and "noise_pred of step 1" in wrong["words"][0]
    assert wrong["psnr_db"] > MIN_PSNR_DB and wrong["latent_cosine"] > MIN_LATENT_COSINE
    assert found["right"]["control"]["caught"] and found["right"]["control"]["noise_error"] > 0.2
    assert judge(drawn, contestants, WORKLOAD, True, "cpu") == found, "from the pictures that were kept"


def test_where_the_control_passes_a_pass_says_nothing():
    from bench.quality.guard import Quality, with_control

    blind = with_control(Quality(True), Quality(True, noise_errors=[0.01]), "that is wrong")
    assert blind.passed is None and "passes a UNet too that is wrong" in blind.words[0]
    assert with_control(Quality(False, ["x"]), Quality(True), "that is wrong").passed is False
