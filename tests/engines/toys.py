"""Makes an ONNX folder whose graphs are a handful of nodes: enough for structure, building and damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from distill.models.families import MINI_FAMILY

TEXT_LENGTH = MINI_FAMILY.networks["text_encoder"]["max_position_embeddings"]
CROSS = MINI_FAMILY.unet["cross_attention_dim"]
POOLED = MINI_FAMILY.networks["text_encoder_2"]["projection_dim"]
HIDDEN = MINI_FAMILY.networks["text_encoder"]["hidden_size"]
LAYERS = MINI_FAMILY.networks["text_encoder"]["num_hidden_layers"]


def _save(folder: Path, config: dict, graph: onnx.GraphProto) -> None:
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save_model(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    (folder / "config.json").write_text(json.dumps(config))
    record_hashes(folder)


def record_hashes(folder: Path, graphs: dict[str, str] | None = None) -> None:
    """As export leaves them: of the graphs as they are now."""
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("model*.onnx*")}
    sizes = {name: (folder / name).stat().st_size for name in hashes}
    record = {"sha256": hashes, "bytes": sizes, "graphs": graphs or {}, "opset": 18, "versions": {}}
    (folder / "export.json").write_text(json.dumps(record))


def _value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _weight(name: str, array: np.ndarray, kind: int) -> onnx.TensorProto:
    return numpy_helper.from_array(array.astype(np.float16 if kind == TensorProto.FLOAT16 else np.float32), name)


def make_toy_unet(folder: Path, kind: int, seed: int) -> None:
    """noise_pred = conv(sample) + a little of every other input, so that none of them is without effect."""
    rng = np.random.default_rng(seed)
    wide = TensorProto.FLOAT
    nodes = [
        helper.make_node("Conv", ["sample", "kernel"], ["mixed"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes12"], ["text"], keepdims=1),
        helper.make_node("ReduceMean", ["text_embeds", "axes1"], ["pooled"], keepdims=1),
        helper.make_node("ReduceMean", ["time_ids", "axes1"], ["sizes"], keepdims=1),
        helper.make_node("Add", ["pooled", "sizes"], ["both"]),
        helper.make_node("Add", ["both", "timestep"], ["micro"]),
        helper.make_node("Mul", ["micro", "small"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["typed"], to=kind),
        helper.make_node("Unsqueeze", ["typed", "axes23"], ["micro4"]),
        helper.make_node("Unsqueeze", ["text", "axes3"], ["text4"]),
        helper.make_node("Add", ["mixed", "micro4"], ["sum"]),
        helper.make_node("Add", ["sum", "text4"], ["out_sample"]),
    ]
    inputs = [
        _value("sample", kind, "batch", 4, "height", "width"),
        _value("timestep", wide, 1),
        _value("encoder_hidden_states", kind, "batch", TEXT_LENGTH, CROSS),
        _value("text_embeds", wide, "batch", POOLED),
        _value("time_ids", wide, "batch", 6),
    ]
    weights = [
        _weight("kernel", rng.normal(0, 0.1, (4, 4, 3, 3)), kind),
        _weight("small", np.array(1e-4), wide),
        numpy_helper.from_array(np.array([1, 2]), "axes12"),
        numpy_helper.from_array(np.array([1]), "axes1"),
        numpy_helper.from_array(np.array([2, 3]), "axes23"),
        numpy_helper.from_array(np.array([3]), "axes3"),
    ]
    graph = helper.make_graph(
        nodes, "unet", inputs, [_value("out_sample", kind, "batch", 4, "height", "width")], weights
    )
    _save(
        folder,
        {**MINI_FAMILY.unet, "time_cond_proj_dim": None, "text_length": TEXT_LENGTH, "vae_scale_factor": 8},
        graph,
    )


def make_toy_vae_decoder(folder: Path, seed: int) -> None:
    """A transposed convolution from 4 channels to 3, eight times as large."""
    kernel = np.random.default_rng(seed).normal(0, 0.1, (4, 3, 8, 8))
    node = helper.make_node("ConvTranspose", ["latent_sample", "kernel"], ["sample"], strides=[8, 8])
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "vae_decoder",
        [_value("latent_sample", kind, "batch", 4, "height", "width")],
        [_value("sample", kind, "batch", 3, "8*height", "8*width")],
        [_weight("kernel", kernel, kind)],
    )
    _save(folder, {**MINI_FAMILY.vae, "out_channels": 3, "scaling_factor": 0.18215}, graph)


def make_toy_text_encoder(folder: Path, name: str, kind: int, seed: int) -> None:
    """Embeddings, and each further hidden state the one before plus one; the pooled embedding is a mean."""
    rng = np.random.default_rng(seed)
    config = MINI_FAMILY.networks[name]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["hidden_states.0"])]
    nodes += [helper.make_node("Add", [f"hidden_states.{i}", "one"], [f"hidden_states.{i + 1}"]) for i in range(LAYERS)]
    outputs = [_value(f"hidden_states.{i}", kind, "batch", TEXT_LENGTH, HIDDEN) for i in range(LAYERS + 1)]
    if name == "text_encoder_2":
        nodes.append(helper.make_node("ReduceMean", [f"hidden_states.{LAYERS}", "axes1"], ["text_embeds"], keepdims=0))
        outputs.insert(0, _value("text_embeds", kind, "batch", POOLED))
    weights = [
        _weight("table", rng.normal(0, 1, (config["vocab_size"], HIDDEN)), kind),
        _weight("one", np.array(1.0), kind),
        numpy_helper.from_array(np.array([1]), "axes1"),
    ]
    if name == "text_encoder":
        weights.pop()
    inputs = [_value("input_ids", TensorProto.INT64, "batch", TEXT_LENGTH)]
    _save(folder, config, helper.make_graph(nodes, name, inputs, outputs, weights))


def make_toy_onnx(root: Path, precision: str = "fp32", seed: int = 0, source: str = "toy") -> Path:
    """A whole ONNX folder in the form that export leaves."""
    from diffusers import EulerDiscreteScheduler

    from distill.checkpoints.tokenizer import merges_of, tokenizer_from_merges

    kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    make_toy_unet(root / "unet", kind, seed)
    make_toy_vae_decoder(root / "vae_decoder", seed)
    for name in ("text_encoder", "text_encoder_2"):
        make_toy_text_encoder(root / name, name, kind, seed)
        tokenizer = tokenizer_from_merges(
            merges_of(["a", "red", "circle"]),
            bos_token_id=1022,
            eos_token_id=1023,
            max_length=TEXT_LENGTH,
            pad_token="<|endoftext|>",
        )
        tokenizer.save_pretrained(root / name.replace("text_encoder", "tokenizer"))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **betas).save_pretrained(root / "scheduler")
    index = {"_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    (root / "model_index.json").write_text(json.dumps(index))
    about = {
        "source": {"name": source, "sha256": hashlib.sha256(source.encode()).hexdigest()},
        "precision": precision,
        "resolutions": [str(resolution) for resolution in MINI_FAMILY.resolutions],
    }
    (root / "slimxl.json").write_text(json.dumps(about))
    return root


def make_static(root: Path, sizes: list[str], batch: int) -> Path:
    """Turns a toy folder into what `export --resolutions A,B --batch N` leaves: a graph for each size, fixed rows."""
    about = json.loads((root / "slimxl.json").read_text())
    (root / "slimxl.json").write_text(json.dumps(about | {"resolutions": sizes}))
    for component in ("unet", "vae_decoder", "text_encoder", "text_encoder_2"):
        folder = root / component
        opened = onnx.load(folder / "model.onnx", load_external_data=False)
        graphs = {}
        for position, size in enumerate(sizes[:1] if component.startswith("text") else sizes):
            width, height = (int(side) // 8 for side in size.split("x"))
            fixed = onnx.ModelProto()
            fixed.CopyFrom(opened)
            for value in fixed.graph.input:
                for dim in value.type.tensor_type.shape.dim:
                    if dim.dim_param:
                        dim.dim_value = {"batch": batch, "height": height, "width": width}[dim.dim_param]
            graphs[size] = "model.onnx" if position == 0 else f"model.{size}.onnx"
            (folder / graphs[size]).write_bytes(fixed.SerializeToString())
        record_hashes(folder, graphs)
    return root
