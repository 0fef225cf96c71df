"""Published figures: peaks of the GPUs, and SDXL latencies others have reported. Nothing here was measured by us.

Peaks are the vendors' dense fp16 tensor rates with fp32 accumulation, unless a name says otherwise, and memory
bandwidths: NVIDIA A100 (2021), Ada (2022), H100 (2023), H200 (2024) and L40S (2023) data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engines.choices import EIGHT_BITS


@dataclass(frozen=True)
class Peak:
    """`tflops` dense fp16; `eight_bits` the dense rates of int8 and fp8, where the board has them, in the same unit;
    `terabytes_per_s` device memory; `nvml_names` the names NVML gives the board, without their "NVIDIA". `floor_only`:
    figures of this board are compared with its other peak, so nothing is predicted from this one.
    `fp32_accumulation_tflops`: the rate with fp32 accumulation, where that is lower."""

    name: str
    tflops: float
    terabytes_per_s: float
    compute_capability: str
    nvml_names: tuple[str, ...] = ()
    floor_only: bool = False
    eight_bits: Mapping[str, float] = field(default_factory=dict)
    fp32_accumulation_tflops: float | None = None

    def tflops_for(self, accumulates_fp32: bool) -> float:
        """The dense fp16 rate, of products that are summed in fp32 where a board is slower at that: torch's are."""
        return self.fp32_accumulation_tflops or self.tflops if accumulates_fp32 else self.tflops

    def tflops_in(self, precision: str) -> float | None:
        """The rate of a precision; None where the board has none of it."""
        return self.eight_bits.get(precision) if precision in EIGHT_BITS else self.tflops


PEAKS = {
    "a100-sxm": Peak("A100 80GB SXM", 312.0, 2.039, "8.0", ("A100-SXM4-80GB",), eight_bits={"int8": 624.0}),
    "a100-pcie": Peak(
        "A100 80GB PCIe", 312.0, 1.935, "8.0", ("A100 80GB PCIe", "A100-PCIE-80GB"), eight_bits={"int8": 624.0}
    ),
    "rtx4090": Peak(
        "RTX 4090, fp32 accumulation", 165.2, 1.008, "8.9", floor_only=True, eight_bits={"int8": 660.6, "fp8": 330.3}
    ),
    "rtx4090-fp16acc": Peak(
        "RTX 4090, fp16 accumulation",
        330.3,
        1.008,
        "8.9",
        ("GeForce RTX 4090",),
        eight_bits={"int8": 660.6, "fp8": 660.6},
        fp32_accumulation_tflops=165.2,
    ),
    "l40s": Peak("L40S", 362.0, 0.864, "8.9", ("L40S",), eight_bits={"int8": 733.0, "fp8": 733.0}),
    "h100-sxm": Peak("H100 SXM", 989.4, 3.35, "9.0", ("H100 80GB HBM3",), eight_bits={"int8": 1978.9, "fp8": 1978.9}),
    "h200": Peak("H200 SXM", 989.4, 4.8, "9.0", ("H200",), eight_bits={"int8": 1978.9, "fp8": 1978.9}),
}


def find_peak(nvml_name: str | None, mig_mode: bool | None = None) -> Peak | None:
    """The peak of the board NVML names, at its fastest accumulation; None (and so no floor) for a board that is not in
    the list, be its name ever so near (H200 NVL, RTX 4090 D), and for one cut up by MIG."""
    name = (nvml_name or "").removeprefix("NVIDIA ")
    return next((peak for peak in PEAKS.values() if name in peak.nvml_names and not mig_mode), None)


@dataclass(frozen=True)
class Published:
    """One published end-to-end SDXL-family latency at 1024x1024, batch 1, with classifier-free guidance. `precision` is the
    UNet's; in 8 bits `runtime` names it too, for what software makes of that is a matter of its own."""

    gpu: str  # key of PEAKS
    model: str  # name of an architecture
    steps: int
    runtime: str
    total_ms: float
    source: str
    precision: str = "fp16"

    @property
    def url(self) -> str:
        return SOURCES[self.source]


_TENSORRT = "Stability AI and NVIDIA, model card of SDXL 1.0 TensorRT, A100 and H100"
_DIFFUSERS = "Hugging Face, the table of diffusion-fast, A100 80 GB at 400 W, bf16"
_DIFFUSERS_SSD_1B = "Hugging Face, the same of SSD-1B"
_FAL = "fal.ai, Stable Diffusion benchmarks, A100 80 GB SXM"
_ONEDIFF = "OneDiff, SDXL example, RTX 4090, 31 July 2024 (compiled by its nexfort)"
_MODEL_OPTIMIZER = "NVIDIA TensorRT Model Optimizer, benchmark, RTX 4090 (fp16 derived from the stated speed-up)"

SOURCES = {
    _TENSORRT: "https://huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt",
    _DIFFUSERS: "https://huggingface.co/datasets/sayakpaul/sample-datasets/blob/main/"
    "sdxl_results_patrick/collated_results_sdxl.csv",
    _DIFFUSERS_SSD_1B: "https://huggingface.co/datasets/sayakpaul/sample-datasets/blob/main/"
    "ssd-1b_patrick/collated_results_ssd1b.csv",
    _FAL: "https://github.com/fal-ai/stable-diffusion-benchmarks",
    _ONEDIFF: "https://github.com/siliconflow/onediff/blob/main/onediff_diffusers_extensions/examples/sdxl/README.md",
    _MODEL_OPTIMIZER: "https://github.com/NVIDIA/TensorRT-Model-Optimizer/blob/main/examples/benchmark.md",
}
"""Where each table stands, read there on 29 November 2026."""

PUBLISHED = (
    Published("a100-sxm", "sdxl", 30, "TensorRT", 2742.0, _TENSORRT),
    Published("a100-sxm", "sdxl", 30, "framework", 3704.0, _TENSORRT),
    Published("h100-sxm", "sdxl", 30, "TensorRT", 1471.0, _TENSORRT),
    Published("h100-sxm", "sdxl", 30, "framework", 2496.0, _TENSORRT),
    Published("a100-sxm", "sdxl", 50, "TensorRT", 4102.0, _FAL),
    Published("a100-sxm", "sdxl", 50, "diffusers", 5932.0, _FAL),
    Published("a100-sxm", "sdxl", 50, "compiled", 5217.0, _FAL),
    Published("a100-sxm", "sdxl", 30, "diffusers", 3315.0, _DIFFUSERS),
    Published("a100-sxm", "sdxl", 30, "compiled", 2523.0, _DIFFUSERS),
    Published("a100-sxm", "ssd-1b", 30, "diffusers", 2245.0, _DIFFUSERS_SSD_1B),
    Published("a100-sxm", "ssd-1b", 30, "compiled", 1636.0, _DIFFUSERS_SSD_1B),
    Published("rtx4090-fp16acc", "sdxl", 20, "framework", 2760.0, _ONEDIFF),
    Published("rtx4090-fp16acc", "sdxl", 20, "compiled", 1560.0, _ONEDIFF),
    Published("rtx4090-fp16acc", "sdxl", 30, "TensorRT", 2470.0, _MODEL_OPTIMIZER),
    Published("rtx4090-fp16acc", "sdxl", 30, "TensorRT, int8", 2060.0, _MODEL_OPTIMIZER, "int8"),
    Published("rtx4090-fp16acc", "sdxl", 30, "TensorRT, fp8", 2160.0, _MODEL_OPTIMIZER, "fp8"),
)
