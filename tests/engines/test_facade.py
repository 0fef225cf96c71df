"""Engines take the calls of the torch modules they stand for, and say in a line what they cannot do."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel, DownweightMode, ReturnedEmbeddingsType
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from distill.common.errors import UserError
from export.checks.parity import BOUNDS
from tests.engines.drawing import draw, psnr_db
from tests.engines.features import FEATURES, compare
from tests.engines.in_use import worst_errors

ADDED = {"text_embeds": torch.full((2, 64), 0.5), "time_ids": torch.full((2, 6), 128.0)}
SAMPLE, TEXT = (
    torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 4, 16, 16), (2, 32, 128))
)


def ids_of(pipe: Any, *texts: str) -> torch.Tensor:
    return pipe.tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids


def near(ours: torch.Tensor, wanted: torch.Tensor) -> bool:
    return ours.dtype == wanted.dtype and torch.allclose(ours, wanted, atol=1e-4)


@pytest.mark.parametrize("timestep", [501, torch.tensor(501), torch.tensor([501]), torch.tensor([501, 501])], ids=str)
def test_the_unet_takes_its_arguments_in_order(pipeline: Any, reference: Any, timestep: Any) -> None:
    given = (SAMPLE, timestep, TEXT, None, None, None, None, ADDED, None, None, None, None)
    with torch.no_grad():
        wanted = reference.unet(*given).sample
    assert near(pipeline.unet(*given).sample, wanted) and near(pipeline.unet(*given, False)[0], wanted)


def test_gradients_come_in_and_do_not_come_back(pipeline: Any) -> None:
    sample = SAMPLE.clone().requires_grad_()
    noise = pipeline.unet(sample, 1, TEXT, added_cond_kwargs=ADDED).sample
    assert torch.equal(noise, pipeline.unet(SAMPLE, 1, TEXT, added_cond_kwargs=ADDED).sample)
    with pytest.raises(UserError, match="no gradient passes through an engine"):
        noise.sum().backward()
    with torch.no_grad():
        assert not pipeline.unet(sample, 1, TEXT, added_cond_kwargs=ADDED).sample.requires_grad


def test_text_encoders_give_what_they_have_by_name_and_number(pipeline: Any, reference: Any) -> None:
    ids = ids_of(pipeline, "a red circle", "a star")
    mask = torch.ones_like(ids)
    for name in ("text_encoder", "text_encoder_2"):
        ours, wanted = (getattr(each, name)(ids, mask, None, None, True) for each in (pipeline, reference))
        assert near(ours.hidden_states[-2], wanted.hidden_states[-2])
        assert ours.hidden_states[2] is ours.hidden_states[-2] is ours["hidden_states"][-2] is ours[-1][-2]
        assert len(ours.hidden_states) == len(wanted.hidden_states) and len(ours) == len(wanted)
        assert ours[0].ndim == wanted[0].ndim
        with pytest.raises(
            UserError, match=r"without hidden state -1, it has .*hidden_states\.2; .*leave clip_skip unset"
        ):
            ours.hidden_states[-1]
        with pytest.raises(UserError, match="built without last_hidden_state, it has"):
            _ = ours.last_hidden_state
    assert near(ours.text_embeds, wanted.text_embeds) and ours[0] is ours.text_embeds
    assert not hasattr(ours, "pooler_output") and not hasattr(wanted, "pooler_output")
    first = pipeline.text_encoder(input_ids=ids, return_dict=False)
    assert len(first) == 2 and pipeline.text_encoder(ids).hidden_states is None
    with pytest.raises(UserError, match="built without last_hidden_state"):
        torch.cat([first[0], first[0]])


def test_every_call_of_a_picture_is_as_in_torch(pipeline: Any, reference: Any) -> None:
    """What `tests/gpu` holds plans to, here of ONNX Runtime in fp32."""
    errors = worst_errors(pipeline, reference)
    assert errors.keys() == {"text_encoder", "text_encoder_2", "text_encoder_2, pooled", "unet", "vae"}
    assert all(0 < error <= BOUNDS["fp32"].relative for error in errors.values()), errors


def test_compel_weighs_words(pipeline: Any, reference: Any) -> None:
    """Its own prompt, by way of diffusers' modules and of ours."""
    kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    pictures = []
    for pipe in (pipeline, reference):
        compel = Compel(
            tokenizer=[pipe.tokenizer, pipe.tokenizer_2],
            text_encoder=[pipe.text_encoder, pipe.text_encoder_2],
            returned_embeddings_type=kind,
            requires_pooled=[False, True],
            downweight_mode=DownweightMode.REMOVE,
        )
        with torch.no_grad():
            text, pooled = compel(["a (red)1.5 circle and a (blue)0.6 star", 'a ("ring", "blue star").blend(0.7, 0.3)'])
        pictures.append(draw(pipe, prompt=None, prompt_embeds=text, pooled_prompt_embeds=pooled, guidance_scale=1.0))
    assert psnr_db(*pictures) >= 40
    masking = Compel(pipeline.tokenizer, pipeline.text_encoder, returned_embeddings_type=kind)
    with pytest.raises(UserError, match=r"attention_mask hides some; pass none \(compel: downweight_mode"):
        masking("a (blue)0.6 star")


def test_what_cannot_be_done_is_a_line(pipeline: Any) -> None:
    unet, vae, text, ids = pipeline.unet, pipeline.vae, pipeline.text_encoder, ids_of(pipeline, "a star")
    lines = {
        "one timestep for all rows, got 1, 2": lambda: unet(
            SAMPLE, torch.tensor([1, 2]), TEXT, added_cond_kwargs=ADDED
        ),
        "168x128: both sides must be multiples of 32": lambda: unet(
            torch.zeros(2, 4, 16, 21), 1, TEXT, added_cond_kwargs=ADDED
        ),
        "without class_labels": lambda: unet(SAMPLE, 1, TEXT, torch.zeros(2), added_cond_kwargs=ADDED),
        r"encoder_hidden_states is \[32, 64\], the unet engine takes": lambda: unet(
            SAMPLE, 1, torch.zeros(2, 32, 64), added_cond_kwargs=ADDED
        ),
        r"has \[1\] rows, the other inputs of the unet have 2": lambda: unet(
            SAMPLE, 1, TEXT[:1], added_cond_kwargs=ADDED
        ),
        "counts positions from 0": lambda: text(ids, position_ids=torch.arange(32).flip(0)),
        "keeps no attentions": lambda: text(ids, output_attentions=True),
        r"input_ids is \[64\], the text_encoder engine takes \[32\] a row": lambda: text(torch.cat([ids, ids], 1)),
        "has no attn_processors: .*PAG": lambda: unet.attn_processors,
        "has no set_attn_processor: leave it out": lambda: unet.set_attn_processor({}),
        "has no down_blocks: it is a compiled graph": lambda: unet.down_blocks,
        "has no text_model": lambda: text.text_model,
        "has no parameters: .*`dtype`": lambda: next(unet.parameters()),
        "has no state_dict": unet.state_dict,
        "has no load_state_dict: .*engines.refit": lambda: unet.load_state_dict({}),
        "has no pickle: open the bundle in each process": lambda: pickle.dumps(vae),
        "vae_decoder engine has no pickle": lambda: copy.deepcopy(vae),
        "has no enable_tiling": lambda: vae.enable_tiling,
        "has no tiled_decode": lambda: vae.tiled_decode(SAMPLE),
    }
    for line, call in lines.items():
        with pytest.raises(UserError, match=line):
            call()


REFUSED = {
    "VAE tiling": "it takes whole pictures",
    "fuse_qkv_projections": "leave it out",
    "FreeU": "FreeU changes the network",
    "PAG": "without places for PAG",
    "clip_skip": "leave clip_skip unset",
    "cross_attention_kwargs": "compiled without cross_attention_kwargs",
    "textual inversion": "vocabulary is fixed",
    "ControlNet": "compiled without a ControlNet's residuals",
    "model offload": "keeps its weights where it was loaded",
    "sequential offload": r"engines.load(bundle, vram_gb=8)",
    "group offload": r"engines.load(bundle, vram_gb=8)",
    "attention processors": "attention is compiled and fused",
    "IP-Adapter": "IP-Adapters run with the checkpoint in torch only",
    "pickle": "open the bundle in each process",
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_as_in_diffusers_or_refused(name: str, pipeline: Any, reference: Any) -> None:
    result = compare(name, pipeline, reference)
    if name in REFUSED:
        assert result.startswith("refused: ") and REFUSED[name] in result
    else:
        assert float(result.removesuffix(" dB")) >= 40


def test_save_pretrained_never_leaves_what_cannot_be_loaded(pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="holds something; give a new or an empty folder"):
        pipeline.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no save_pretrained: .*saves the bundle as a whole"):
        StableDiffusionXLImg2ImgPipeline(**pipeline.components).save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_switches_that_change_nothing(pipeline: Any) -> None:
    pipeline.disable_attention_slicing()
    pipeline.enable_xformers_memory_efficient_attention()
    pipeline.disable_freeu()
    pipeline.vae.disable_tiling()
    pipeline.unload_ip_adapter()
    pipeline.unload_lora_weights()
    pipeline.unet.set_default_attn_processor()
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert module.eval() is module and module.half() is module and module.requires_grad_(False) is module
        module.compile_repeated_blocks()
    assert not pipeline.unet.training and pipeline.loras == pipeline.get_active_adapters() == []


SWITCHES = ("attention_slicing", "freeu", "vae_slicing", "vae_tiling", "lora", "xformers_memory_efficient_attention")
CALLS: dict[str, tuple[tuple[Any, ...], str | None]] = {
    **{f"disable_{name}": ((), None) for name in SWITCHES},
    **{f"enable_{name}": ((), None) for name in SWITCHES if name not in ("freeu", "vae_tiling")},
    **dict.fromkeys(
        ("enable_lora_hotswap", "maybe_free_model_hooks", "remove_all_hooks", "reset_device_map"), ((), None)
    ),
    **dict.fromkeys(("unfuse_qkv_projections", "unload_ip_adapter", "unload_lora_weights"), ((), None)),
    **dict.fromkeys(("unload_textual_inversion", "upcast_vae", "get_active_adapters", "get_list_adapters"), ((), None)),
    "set_attention_slice": (("auto",), None),
    "set_use_memory_efficient_attention_xformers": ((True,), None),
    "set_lora_device": ((["style"], "cpu"), None),
    "delete_adapters": (([],), None),
    "to": (("cpu",), None),
    "enable_freeu": ((0.9, 0.2, 1.3, 1.4), "FreeU changes the network"),
    "enable_vae_tiling": ((), "takes whole pictures"),
    "enable_group_offload": (("cpu",), "vram_gb"),
    "enable_model_cpu_offload": ((), "vram_gb"),
    "enable_sequential_cpu_offload": ((), "vram_gb"),
    "fuse_qkv_projections": ((), "compiled and fused"),
    "fuse_lora": ((), "always fused"),
    "unfuse_lora": ((), "always fused"),
    "set_adapters": ((["style"],), "loaded are no LoRAs"),
    "load_lora_into_unet": (({}, None), "loaded by the pipeline that engines.load gave"),
    "set_ip_adapter_scale": ((1.0,), "IP-Adapters run with the checkpoint"),
    "push_to_hub": (("me/mine",), "python -m engines push BUNDLE"),
}
"""How a method of the pipeline is called, and the line that refuses it; None where it has nothing to do, or does it."""
BY_PICTURES = {"load_ip_adapter", "load_lora_weights", "load_textual_inversion", "save_pretrained", "from_pipe"}
"""Tested by what they draw or leave, here and in test_lora.py."""
DIFFUSERS_OWN = {
    "check_inputs", "download", "encode_image", "encode_prompt", "extract_init_dict", "from_config",
    "from_pretrained", "from_single_file", "get_config_dict", "get_guidance_scale_embedding", "load_config",
    "load_lora_into_text_encoder", "lora_state_dict", "maybe_convert_prompt", "numpy_to_pil", "pack_weights",
    "prepare_extra_step_kwargs", "prepare_ip_adapter_image_embeds", "prepare_latents", "progress_bar",
    "register_for_auto_class", "register_modules", "register_to_config", "save_config", "save_lora_weights",
    "set_progress_bar_config", "to_json_file", "to_json_string", "write_lora_layers",
}  # fmt: skip
"""Steps of a call, readers of checkpoints, helpers: they ask nothing of a network that an engine has not."""


def test_no_method_of_diffusers_pipeline_is_forgotten() -> None:
    """A new version of diffusers that brings one fails here."""
    kind = StableDiffusionXLPipeline
    public = {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name, None))}
    assert public <= CALLS.keys() | BY_PICTURES | DIFFUSERS_OWN


@pytest.mark.parametrize("name", [name for name in CALLS if hasattr(StableDiffusionXLPipeline, name)])
def test_a_method_does_what_is_right_or_says_a_line(name: str, pipeline: Any) -> None:
    arguments, line = CALLS[name]
    given = (*arguments, pipeline.unet) if name == "load_lora_into_unet" else arguments
    if line is None:
        getattr(pipeline, name)(*given)
        return
    with pytest.raises(UserError, match=line) as refusal:
        getattr(pipeline, name)(*given)
    assert "\n" not in str(refusal.value)


def test_what_is_counted(pipeline: Any, reference: Any) -> None:
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(pipeline, name), getattr(reference, name)
        for given in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
            assert ours.num_parameters(**given) == theirs.num_parameters(**given) * (given != {"only_trainable": True})
        assert ours.get_memory_footprint() > 2 * ours.num_parameters()
        assert not hasattr(ours, "peft_config")
