"""A bundle is pushed to a hub and loaded from it by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import engines
from distill.common.errors import UserError
from engines.__main__ import main
from engines.bundle import Manifest
from tests.local_hub import Hub

NAME = "org/bundle"


@pytest.fixture(autouse=True)
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is the one of this machine, its cache is no user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def push(bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str = NAME) -> int:
    monkeypatch.setattr("sys.argv", ["engines", "push", str(bundle), name])
    return main()


def test_what_is_pushed_is_loaded_by_name_and_only_what_runs_here_is_fetched(
    hub: Hub, toy_bundle: Path, toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models[NAME] = {"README.md": b"a card", "unet/of_an_older_build.plan": b"old"}
    assert push(toy_bundle, monkeypatch) == 0
    named = {"manifest.json", *(file.path for file in toy_manifest.all_files)}
    assert hub.models[NAME].keys() == named | {"README.md"}
    assert all((toy_bundle / name).read_bytes() == hub.models[NAME][name] for name in named)
    pipe = engines.load(NAME, device="cpu")
    plans = {file.path for one in toy_manifest.engines if one.flavor != "onnxruntime" for file in one.files}
    there = {path.relative_to(pipe.bundle).as_posix() for path in pipe.bundle.rglob("*") if path.is_file()}
    assert plans and there == named - plans and not plans & {path for _, path, _ in hub.sent}
    draw = {"num_inference_steps": 1, "width": 128, "height": 128, "output_type": "np"}
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", **draw).images.shape == (1, 128, 128, 3)
    with pytest.raises(UserError, match=r"is not whole \(it lacks .*\.plan\).*hf download"):
        pipe.save_pretrained("copy")
    hub.sent.clear()
    engines.load(NAME, device="cpu")
    assert not hub.sent, "all of it is in the cache"


def test_a_file_that_the_hub_has_otherwise_is_refused(
    hub: Hub, toy_bundle: Path, toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes decide, and they are the manifest's."""
    push(toy_bundle, monkeypatch)
    path = next(one for one in toy_manifest.engines if one.flavor == "onnxruntime").files[0].path
    hub.models[NAME][path] = hub.models[NAME][path][:-1] + b"?"
    with pytest.raises(UserError, match=f"{path} has sha256 .*, the manifest says"):
        engines.load(NAME, device="cpu")


def test_what_cannot_be_pushed_or_fetched_is_one_line(
    hub: Hub, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(toy_bundle, monkeypatch, "a/b/c") == 2
    assert "'a/b/c' is not a name on the hub: give one like org/name" in capsys.readouterr().err
    damaged = shutil.copytree(toy_bundle, tmp_path / "damaged")
    (damaged / "scheduler/scheduler_config.json").write_text(json.dumps({}))
    assert push(damaged, monkeypatch) == 2
    assert "scheduler_config.json has" in capsys.readouterr().err and not hub.models
    with pytest.raises(UserError, match="bundle 'org/bundle' is neither a local folder nor on the hub"):
        engines.load(NAME)
    hub.models[NAME] = {"README.md": b"a card"}
    with pytest.raises(UserError, match=r"'org/bundle' has no manifest\.json on the hub: push one with"):
        engines.load(NAME)
