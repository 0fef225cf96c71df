"""Results of fake contestants, made by the real road once for all tests that read them."""

import pytest

from bench.options import RunOptions
from bench.run import run_bench


def fake_options(out, **changes):
    values = {
        "contestants": ["teacher=fake:denoise=4,vae_decode=2", "vega=fake:denoise=2,vae_decode=2"],
        "out": out,
        "resolutions": "1024x1024,1152x896",
        "steps": "3,6",
        "seconds": 1e6,  # the rounds decide, not how busy the machine is
        "min_rounds": 6,
        "max_rounds": 8,
        "pictures": 0,
        "device": "cpu",
    }
    return RunOptions(**(values | changes))


class VirtualTime:
    """A clock that moves a nanosecond a look, and by whole delays where a fake waits."""

    def __init__(self, monkeypatch):
        self.now_ns = 0
        monkeypatch.setattr("bench.measure.clock.time.perf_counter_ns", self.look)
        monkeypatch.setattr("bench.contestants.fake.busy_wait", self.wait)

    def look(self):
        self.now_ns += 1
        return self.now_ns

    def wait(self, milliseconds):
        self.now_ns += int(milliseconds * 1e6)


@pytest.fixture
def virtual_time(monkeypatch):
    return VirtualTime(monkeypatch)


@pytest.fixture(scope="session")
def results_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "results.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        VirtualTime(monkeypatch)
        run_bench(fake_options(path))
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP model of the true class, small and with random weights, as a user would give its folder."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from distill.checkpoints.tokenizer import merges_of, tokenizer_from_merges

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"vocab_size": 1024, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 1023}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    ids = {"bos_token_id": 1022, "eos_token_id": 1023}
    tokenizer = tokenizer_from_merges(merges_of(["light"]), **ids, max_length=16, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    return folder
