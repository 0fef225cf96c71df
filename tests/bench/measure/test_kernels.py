import pytest

from bench.contestants.spec import Spec, make_contestant
from bench.measure.kernels import profile_denoise
from bench.workload import Workload
from distill.common.kernels import by_kind, kernel_kind
from distill.models.resolution import Resolution


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "gemm"),
        ("ampere_fp16_s16816gemm_fp16_128x128_ldg8_f2f_stages_32x5_tn", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16>", "gemm"),
        ("triton_tem_fused_addmm_12", "gemm"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half, float, int>", "norm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half, float>", "norm"),
        ("triton_red_fused_native_group_norm_silu_3", "norm"),
        ("triton_poi_fused_add_mul_7", "elementwise"),
        ("triton_poi_fused_add_convolution_native_layer_norm_5", "elementwise"),
        ("triton_poi_fused__scaled_dot_product_flash_attention__to_copy_9", "elementwise"),
        ("triton_red_fused_add_convolution_native_group_norm_4", "norm"),
        ("triton_per_fused_native_layer_norm_backward_2", "norm"),
        ("cutlass_tensorop_f16_s16816wgrad_optimized_f16_128x128_32x4_nhwc_align8", "convolution"),
        ("cutlass_tensorop_f16_s16816dgrad_optimized_f16_256x64_32x4_nhwc_unity_stride_align8", "convolution"),
        ("void at::native::(anonymous namespace)::ComputeInternalGradientsCUDAKernel<c10::BFloat16>", "norm"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float>", "norm"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor<float>>", "optimizer"),
        ("void gemvx::kernel<int, int, __half, float>", "gemm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "elementwise"),
        ("__myl_AddMulSigmMul_0x1234", "elementwise"),
        ("__myl_MeaSubMulMeaAddSqrDivMul_0x1234", "norm"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<c10::Half>", "copy"),
        ("Memcpy HtoD (Pageable -> Device)", "copy"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float>", "copy"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_told_by_name(kernel, family):
    assert kernel_kind(kernel) == family


def test_what_no_kernel_explains_is_idle():
    found = by_kind({"flash_fwd": 6000.0, "nvjet_x": 3000.0}, steps=3, step_ms=5.0)
    assert found["families_ms"] == {"attention": 2.0, "idle": 2.0, "gemm": 1.0}
    assert found["kernels"][0] == {"name": "flash_fwd", "ms": 2.0, "family": "attention"}
    assert by_kind({"flash_fwd": 6000.0}, steps=1, step_ms=5.0)["families_ms"]["idle"] == 0
    assert "idle" not in by_kind({"flash_fwd": 6000.0}, steps=1, step_ms=None)["families_ms"]


def test_a_real_denoise_loop_is_profiled():
    contestant = make_contestant(Spec.parse("vega=eager@fp32:random:mini-vega"), "cpu")
    contestant.load()
    workload = Workload(resolution=Resolution(64, 64), steps=30, prompts=("a small red circle",))
    found = profile_denoise(contestant, workload, None)
    assert {"attention", "convolution", "gemm", "norm", "elementwise"} <= set(found["families_ms"])
    assert all(milliseconds > 0 for milliseconds in found["families_ms"].values())
    assert found["kernels"][0]["ms"] >= found["kernels"][-1]["ms"]
