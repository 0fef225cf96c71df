"""Downloads from a hub, seen from a server on this machine that speaks its protocol."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

from distill.checkpoints.sources import resolve
from distill.common.errors import UserError
from tests.local_hub import Hub

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COMMANDS = """
import sys
from distill.common.errors import exit_on_user_error
from distill.checkpoints.sources import resolve
for model in sys.argv[1:]:
    print(exit_on_user_error(lambda: print(resolve(model, "unused"))))
"""


def fetch(endpoint: str, home: Path, *models: str) -> tuple[list[str], list[str]]:
    """What `distill fetch` says of each model: the lines of stdout (a folder and 0, or 2) and of stderr."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[3]), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *models], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.splitlines(), done.stderr.splitlines()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_needed_is_fetched_and_an_interrupted_download_goes_on(
    hub: Hub, mini_vega: Path, tmp_path: Path
) -> None:
    plain = files_of(mini_vega)
    del plain["made.json"]  # no part of a pipeline
    weights = [name for name in plain if name.endswith(".safetensors")]
    half = {name.replace(".safetensors", ".fp16.safetensors"): plain[name] for name in weights}
    unwanted = dict.fromkeys(weights, b"unwanted")  # the fp32 twins
    unwanted |= {name.replace(".safetensors", ".bin"): b"unwanted" for name in weights}
    unwanted |= dict.fromkeys(("sd_xl_base_1.0.safetensors", "unet/model.onnx", "unet/model.onnx_data"), b"unwanted")
    unwanted |= dict.fromkeys(("vae_1_0/config.json", "unet/diffusion_flax_model.msgpack", "pictures.png"), b"unwanted")
    needed = {name: data for name, data in plain.items() if name not in weights}
    beside = {"zavychromaxl.safetensors": b"unwanted", WEIGHTS.replace(".safetensors", ".fp16.bin"): b"unwanted"}
    hub.models = {"org/plain": plain | beside, "org/half": needed | half | unwanted}
    hub.cut = WEIGHTS
    out, told = fetch(f"http://127.0.0.1:{hub.server_port}", tmp_path, "org/plain", "org/plain", "org/half")
    assert out[0] == "2" and out[2] == out[4] == "0" and len(told) == 1 and "'org/plain'" in told[0], told
    assert files_of(Path(out[1])) == plain
    assert files_of(Path(out[3])) == needed | half
    ranges = [wanted for model, path, wanted in hub.sent if (model, path) == ("org/plain", WEIGHTS)]
    assert ranges == [None, f"bytes={DOWNLOAD_CHUNK_SIZE}-"]  # a piece that did not arrive whole is fetched again
    assert {path for model, path, _ in hub.sent if model == "org/half"} <= set(
        needed | half
    )  # equal ones are sent once


def test_a_model_that_cannot_be_had_is_one_line(hub: Hub, mini_vega: Path, tmp_path: Path) -> None:
    whole = files_of(mini_vega)
    pickled = {name.replace("model.safetensors", "model.bin"): data for name, data in whole.items()}
    other = whole | {"unet/config.json": json.dumps({"addition_embed_type": "image"}).encode()}
    part = {name: data for name, data in whole.items() if not name.startswith("text_encoder_2/")}
    hub.models = {"org/gated": whole, "org/pickled": pickled, "org/part": part, "org/other": other}
    models = ("org/missing", "org/gated", "org/pickled", "org/part", "org/other")
    out, told = fetch(f"http://127.0.0.1:{hub.server_port}", tmp_path, *models)
    assert out == ["2"] * len(models) and len(told) == len(models), told
    assert "'org/missing' is neither a local folder nor on the hub, unless it is private" in told[0]
    assert "'org/gated' is gated: accept its terms" in told[1]
    assert "'org/pickled' has no .safetensors weights" in told[2]
    assert "'org/part' is no pipeline folder: it has no text_encoder_2/config.json" in told[3]
    assert "'org/other': its UNet has addition_embed_type 'image'" in told[4]
    assert [path for model, path, _ in hub.sent if model == "org/other"] == ["unet/config.json"]
    hub.server_close()
    out, told = fetch("http://127.0.0.1:9", tmp_path, "org/missing")
    assert out == ["2"] and len(told) == 1, told
    assert "cannot be had from the Hugging Face hub (Connection refused); check the network" in told[0]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), r"does not fit the disk of .*HF_HOME"),
        (RuntimeError("Data processing error: CAS service error"), r"cannot be had .*CAS service.*check the network"),
    ],
)  # the second is xet's
def test_a_full_disk_is_not_told_as_a_lost_network(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", fail)
    monkeypatch.setattr("distill.checkpoints.sources._check_on_hub", lambda _: None)
    with pytest.raises(UserError, match=f"'org/big' {told}"):
        resolve("org/big", tmp_path)
