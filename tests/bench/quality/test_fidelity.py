from pathlib import Path

import numpy as np
import pytest
import torch

from bench.quality.fidelity import (
    FidelityOptions,
    check_references,
    fid,
    frechet_distance,
    measure_fidelity,
    outside_band,
    read_captions,
)
from distill.common.errors import UserError


class MeanColour(torch.nn.Module):
    """A stand-in for Inception: the mean and the spread of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.float() / 255
        return torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)


def draw(caption: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 100 if "dark" in caption else 256, (16, 16, 3), np.uint8)


@pytest.fixture
def references(tmp_path):
    torch.jit.script(MeanColour()).save(str(tmp_path / "net.pt"))
    features = np.concatenate(
        [MeanColour()(torch.from_numpy(draw("light", seed))[None].permute(0, 3, 1, 2)).numpy() for seed in range(64)]
    )
    np.savez(tmp_path / "stats.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    return tmp_path


def options(folder, caption, **changes):
    (folder / "captions.txt").write_text(f"{caption}\n" * 64)
    values = {"fid_reference": folder / "stats.npz", "fid_extractor": folder / "net.pt"}
    return FidelityOptions(captions=folder / "captions.txt", **(values | changes))


def test_the_distance_of_known_gaussians():
    eye = np.eye(3)
    assert frechet_distance(np.zeros(3), eye, np.zeros(3), eye) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(np.zeros(3), eye, np.full(3, 2.0), eye) == pytest.approx(12)
    assert frechet_distance(np.zeros(3), eye, np.zeros(3), 4 * eye) == pytest.approx(3 * (1 + 4 - 2 * 2))
    singular = np.diag([1.0, 0.0, 0.0])
    assert frechet_distance(np.zeros(3), singular, np.zeros(3), eye) == pytest.approx(1 + 3 - 2)


def test_the_same_pictures_score_zero_and_darker_ones_do_not(references):
    same = measure_fidelity(draw, options(references, "light", fid_band=(0.0, 0.01)))
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["words"] == []
    dark = measure_fidelity(draw, options(references, "dark", fid_band=(0.0, 0.01)))
    assert dark["fid"] > 0.1 and "above the band" in dark["words"][0]


def test_fid_of_too_few_pictures_is_told_and_not_judged(references):
    few = measure_fidelity(draw, options(references, "dark", caption_count=3, fid_band=(0.0, 0.01)))
    assert few["fid"] > 0.1 and few["words"] == [] and "3 pictures in 6 dimensions" in few["notes"][0]


def test_an_extractor_is_asked_for_features_where_it_must_be(references):
    class OnRequest(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            values = images.float() / 255
            features = torch.cat([values.mean((2, 3)), values.std((2, 3))], 1)
            return features if return_features else features[:, :1]

    torch.jit.script(OnRequest()).save(str(references / "request.pt"))
    asked = options(references, "light", fid_extractor=references / "request.pt")
    assert measure_fidelity(draw, asked)["fid"] == pytest.approx(0, abs=1e-6)


def test_a_band_has_two_sides():
    assert outside_band("FID", 23.5, (23.01, 23.95)) == []
    assert "below" in outside_band("FID", 20.0, (23.01, 23.95))[0]
    assert "above" in outside_band("FID", 25.0, (23.01, 23.95))[0]
    assert outside_band("FID", 99.0, None) == []


def test_what_was_not_given_is_none_and_says_why(references):
    found = measure_fidelity(draw, options(references, "light", fid_reference=None, fid_extractor=None))
    assert found["fid"] is None and found["clip"] is None
    assert len(found["notes"]) == 2


def test_bad_references_are_one_line(references):
    with pytest.raises(UserError, match="both"):
        check_references(options(references, "light", fid_extractor=None))
    with pytest.raises(UserError, match="mu"):
        check_references(options(references, "light", fid_reference=references / "net.pt"))
    with pytest.raises(UserError, match="TorchScript"):
        check_references(options(references, "light", fid_extractor=references / "stats.npz"))
    with pytest.raises(UserError, match="does not exist"):
        read_captions(references / "none.txt", 3)
    with pytest.raises(UserError, match="CLIP model"):
        check_references(options(references, "light", clip_model=str(references)))
    with pytest.raises(UserError, match="features"):
        fid(np.zeros((4, 3)), (np.zeros(6), np.eye(6)))


def test_broken_files_are_one_line(references):
    for name, content in (("empty", b""), ("zip", b"PK\x03\x04 cut"), ("text", b"\xff\xfe\x80")):
        (references / name).write_bytes(content)
        for what in ("fid_reference", "fid_extractor"):
            with pytest.raises(UserError, match=name):
                check_references(options(references, "light", **{what: references / name}))
    np.save(references / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match="mu"):
        check_references(options(references, "light", fid_reference=references / "array.npy"))
    with pytest.raises(UserError, match="UTF-8"):
        read_captions(references / "text", 3)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"clip_model": "x", "clip_band": (31.0, 32.0)}, "--clip-model judges nothing without --captions"),
        ({"captions": Path("x"), "clip_band": (31.0, 32.0)}, "--clip-band judges nothing without --clip-model"),
        ({"captions": Path("x"), "fid_band": (23.0, 24.0)}, "--fid-band judges nothing without --fid-reference"),
        ({"fid_extractor": Path("x")}, "--fid-extractor judges nothing without --captions"),
        ({"captions": Path("x"), "clip_model": "x", "clip_band": (32.0, 31.0)}, "the low end comes first"),
        ({"captions": Path("x"), "caption_count": 0}, "--caption-count is 0; the least is 1"),
    ],
)
def test_what_would_judge_nothing_is_refused(given, word):
    with pytest.raises(UserError, match=word):
        check_references(FidelityOptions(**given))


def test_the_clip_score_is_a_cosine_times_a_hundred(references, clip_folder):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    found = measure_fidelity(draw, options(references, "light", clip_model=str(clip_folder), caption_count=3))
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(
        images=[draw("light", seed) for seed in range(3)], return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokenizer(["light"] * 3, return_tensors="pt"))
    cosines = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    assert found["clip"] == pytest.approx(100 * cosines.clamp(min=0).mean().item(), abs=1e-3)
    assert found["count"] == 3
