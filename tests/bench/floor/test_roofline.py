import json
from dataclasses import replace
from shutil import copytree

import pytest

from bench.floor.peaks import PEAKS, PUBLISHED, find_peak
from bench.floor.predict import Known, check_predictions, find_shares, floor_ms, predict, published_known
from bench.floor.roofline import (
    Cost,
    ModelConfigs,
    architecture_configs,
    component_costs,
    count_cost,
    measure_cpu_peak,
    total_floor_ms,
    total_flops,
)
from bench.workload import Workload
from distill.models.architectures import ARCHITECTURES
from distill.models.resolution import Resolution

SQUARE = Workload(resolution=Resolution(1024, 1024), steps=30)


@pytest.mark.parametrize(("name", "step_tflop", "image_tflop"), [("sdxl", 13.52, 416), ("vega", 5.645, 180)])
def test_full_size_counts_are_the_known_ones(name, step_tflop, image_tflop):
    costs = component_costs(architecture_configs(name), SQUARE)
    calls, unet = costs["unet"]
    assert calls == 30
    assert unet.flops / 1e12 == pytest.approx(step_tflop, rel=1e-3)
    assert unet.parameters == ARCHITECTURES[name].parameters[0]
    assert costs["vae_decoder"][1].flops / 1e12 == pytest.approx(10.47, rel=1e-3)
    assert total_flops(costs) / 1e12 == pytest.approx(image_tflop, rel=2e-3)
    # the published floors of a 30-step SDXL picture: 1.33 s on an A100, 2.52 s on an RTX 4090, 0.42 s on an H100
    if name == "sdxl":
        for gpu, seconds in (("a100-sxm", 1.33), ("rtx4090", 2.52), ("rtx4090-fp16acc", 1.26), ("h100-sxm", 0.42)):
            assert total_floor_ms(costs, PEAKS[gpu]) == pytest.approx(1e3 * seconds, rel=0.01)


def test_a_unet_in_8_bits_has_a_lower_floor_and_none_where_the_board_cannot():
    costs = component_costs(architecture_configs("vega"), SQUARE)
    half = total_floor_ms(costs, PEAKS["a100-sxm"])
    whole = total_floor_ms(costs, PEAKS["a100-sxm"], "int8")
    calls, unet = costs["unet"]
    assert half is not None and half - whole == pytest.approx(calls * unet.flops / 624e12 * 1e3)
    assert total_floor_ms(costs, PEAKS["a100-sxm"], "fp8") is None
    assert total_floor_ms(costs, PEAKS["rtx4090"], "fp8") < total_floor_ms(costs, PEAKS["rtx4090"])


@pytest.mark.parametrize("resolution", [Resolution(224, 96), Resolution(96, 160)])
def test_the_polynomial_gives_what_counting_gives(resolution):
    configs = architecture_configs("mini-vega")
    costs = component_costs(configs, Workload(resolution=resolution, steps=1, batch=1))
    height, width = resolution.height // 8, resolution.width // 8
    for component, config, batch in (("unet", configs.text("unet"), 2), ("vae_decoder", configs.text("vae"), 1)):
        counted = count_cost(component, config, 32, height, width, batch)
        assert costs[component][1].flops == pytest.approx(counted.flops, rel=1e-9)


def test_a_tiny_vae_is_counted_too():
    from diffusers import AutoencoderTiny

    narrow = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    vae = json.dumps(dict(narrow.config) | {"_class_name": "AutoencoderTiny"})
    networks = dict(architecture_configs("mini-vega").texts) | {"vae": vae}
    costs = component_costs(ModelConfigs(tuple(networks.items())), SQUARE)
    counted = count_cost("vae_decoder", vae, 32, 16, 16, 1)
    assert counted.parameters == sum(one.numel() for one in narrow.decoder.parameters())
    assert costs["vae_decoder"][1].flops == pytest.approx(64 * counted.flops)


def test_guidance_and_batch_double_the_unet():
    configs = architecture_configs("mini-vega")
    plain = component_costs(configs, Workload(resolution=Resolution(128, 128), steps=1, guidance_scale=1.0))
    guided = component_costs(configs, Workload(resolution=Resolution(128, 128), steps=1))
    assert guided["unet"][1].flops == pytest.approx(2 * plain["unet"][1].flops)
    assert guided["vae_decoder"][1].flops == plain["vae_decoder"][1].flops


@pytest.mark.parametrize(("zeros", "calls"), [(True, 1), (False, 2)])
def test_an_empty_prompt_is_encoded_where_the_checkpoint_says_so(mini_vega, tmp_path, zeros, calls):
    folder = copytree(mini_vega, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (folder / "model_index.json").write_text(json.dumps(index))
    costs = component_costs(ModelConfigs.of_folder(folder), Workload(resolution=Resolution(128, 128), steps=1))
    assert [costs[name][0] for name in ("text_encoder", "text_encoder_2")] == [calls, calls]


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    assert Cost(0, flops=2e12, bytes=1e9).floor_ms(1.0, 1.0) == pytest.approx(2000)
    assert Cost(0, flops=1e9, bytes=3e12).floor_ms(1.0, 1.0) == pytest.approx(3000)


def test_boards_are_known_by_nvmls_name_and_unknown_ones_have_no_floor():
    assert find_peak("NVIDIA H200").name == "H200 SXM"
    assert find_peak("NVIDIA A100-SXM4-80GB").terabytes_per_s == pytest.approx(2.039)
    assert find_peak("NVIDIA GeForce RTX 4090").tflops > 300  # the faster accumulation: a floor must not be too high
    assert find_peak("NVIDIA GeForce GTX 1080") is None
    assert find_peak("NVIDIA A100-SXM4-40GB") is None
    assert find_peak("NVIDIA A100-SXM4-80GB MIG 1g.10gb") is None
    assert find_peak(None) is None


@pytest.mark.parametrize(
    "name",
    ["H200 NVL", "GH200 480GB", "H100 PCIe", "H100 NVL", "GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D", "L40"],
)
def test_a_board_is_not_known_by_a_part_of_its_name(name):
    assert find_peak(f"NVIDIA {name}") is None


def test_a_board_cut_up_by_mig_has_no_floor():
    assert find_peak("NVIDIA H200", mig_mode=True) is None
    assert find_peak("NVIDIA H200", mig_mode=False) is not None


def test_no_published_figure_is_below_its_floor():
    for one in published_known():
        assert 0.1 < one.efficiency < 0.78, one


def test_predictions_state_their_error_against_what_was_published():
    checks = check_predictions(published_known())
    assert len(checks) == sum(one.precision == "fp16" for one in PUBLISHED), "8 bits are known of one GPU alone"
    by_figure = {(one.known.gpu, one.known.model, one.known.steps, one.known.runtime): one for one in checks}
    assert abs(by_figure["rtx4090-fp16acc", "sdxl", 30, "TensorRT"].error) < 0.10
    assert abs(by_figure["a100-sxm", "ssd-1b", 30, "compiled"].error) < 0.10
    assert sorted(abs(one.error) for one in checks)[len(checks) // 2] < 0.10
    assert sum(abs(one.error) for one in checks) < sum(abs(one.blind_error or 0.0) for one in checks)


def test_a_prediction_leaves_its_own_gpu_model_and_runtime_out():
    known = published_known()
    wrong = [replace(one, total_ms=9 * one.total_ms) if one.gpu == "h100-sxm" else one for one in known]
    alone, other = (
        next(
            one for one in check_predictions(figures) if (one.known.gpu, one.known.runtime) == ("h100-sxm", "TensorRT")
        )
        for figures in (known, [*wrong[:2], known[2], *wrong[3:]])
    )
    assert known[2].runtime == "TensorRT" and alone.calibrated_on == len(known) - 1
    assert other.predicted_ms > 5 * alone.predicted_ms, "what another runtime does there counts"
    assert other.blind_error == pytest.approx(alone.blind_error), "and blind, it does not"


def test_shares_are_a_factor_of_the_runtime_times_one_of_the_generation_and_one_of_the_model():
    def known(gpu, runtime, share, model="sdxl"):
        return Known(gpu, model, 30, runtime, 100.0 / share, 100.0, "x")

    figures = [known("a100-sxm", "a", 0.5), known("a100-sxm", "b", 0.25), known("h100-sxm", "a", 0.3)]
    shares = find_shares(figures)
    assert shares.share("h100-sxm", "b") == pytest.approx(0.15)
    assert shares.share("h200", "b") == pytest.approx(0.15), "the same generation"
    assert 0.15 < shares.share("l40s", "b") < 0.25, "one that nothing is known of lies between"
    shares = find_shares([*figures, known("a100-sxm", "a", 0.4, "vega"), known("l40s", "c", 0.3, "vega")])
    assert shares.share("h100-sxm", "b", "sdxl") == pytest.approx(0.15)
    assert shares.share("l40s", "c", "vega") == pytest.approx(0.3, rel=0.15), "nobody else ran that"


def test_torch_is_held_against_the_rate_of_its_accumulation():
    ours = find_peak("NVIDIA GeForce RTX 4090")
    assert (ours.tflops_for(accumulates_fp32=True), ours.tflops_for(accumulates_fp32=False)) == (165.2, 330.3)
    assert find_peak("NVIDIA L40S").tflops_for(accumulates_fp32=True) == 362.0
    assert all(one.url.startswith("https://") for one in PUBLISHED)


def test_8_bits_are_predicted_by_a_factor_of_their_own_and_calibrate_nothing_else():
    known = published_known()
    half = predict("a100-sxm", "sdxl", 30, "TensorRT", known)
    assert predict("a100-sxm", "sdxl", 30, "TensorRT", [one for one in known if one.precision == "fp16"]).total_ms == (
        half.total_ms
    )
    eight = predict("a100-sxm", "sdxl", 30, "TensorRT, int8", known, "int8")
    assert eight.floor_ms < 0.55 * half.floor_ms, "by arithmetic nearly half"
    assert eight.total_ms == pytest.approx(half.total_ms * 2060 / predict(*ADA, "TensorRT", known).total_ms, rel=0.02)


ADA = ("rtx4090-fp16acc", "sdxl", 30)


def test_without_a_calibration_there_is_a_floor_and_no_prediction():
    found = predict("l40s", "vega", 30, "no such runtime", published_known())
    assert found.total_ms is None and found.low_ms is None
    assert found.floor_ms > 0


def test_shares_of_one_peak_say_nothing_of_the_boards_other():
    """All that is known of the RTX 4090 is told as a share of its fp16 accumulation: twice the other peak."""
    found = predict("rtx4090", "sdxl", 30, "TensorRT", published_known())
    assert found.total_ms is None and found.floor_ms > 2000
    assert predict("rtx4090-fp16acc", "sdxl", 30, "TensorRT", published_known()).total_ms


def test_the_cpus_yardstick_is_of_a_real_machines_size():
    peak = measure_cpu_peak(seconds=0.1)
    assert peak.name == "this CPU (measured, fp32)"
    fastest = measure_cpu_peak(("bf16", "as exported"), 0.1)
    assert fastest.name in ("this CPU (measured, fp32)", "this CPU (measured, bf16)") and 1e-3 < fastest.tflops < 50
    assert 1e-3 < peak.tflops < 50
    assert 1e-4 < peak.terabytes_per_s < 5


def test_a_model_is_predicted_at_its_familys_own_size() -> None:
    known = [Known("a100-sxm", "sdxl", 30, "TensorRT", total_ms=200.0, floor_ms=100.0, origin="here")]
    found = predict("a100-sxm", "tiny-sd", 30, "TensorRT", known)
    assert found.floor_ms == floor_ms("a100-sxm", "tiny-sd", 30, Resolution(512, 512))
    assert found.total_ms == pytest.approx(2 * found.floor_ms)
