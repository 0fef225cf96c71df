from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.common.errors import UserError
from distill.data.pictures import PictureSource, open_source
from distill.data.rows import Found, Row
from distill.data.samples import Fitting
from distill.models.families import MINI_FAMILY
from tests.distill.pictures import save_picture


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "--data is empty: is a variable of the shell not set?"),
        (" ", "--data is empty"),
        ("hf:", "needs the name of a dataset"),
        *((f"shapes:{n}", "needs a whole number") for n in ("", "0", "-1", "²", "٣", "1e3", "nan", "inf", "9" * 5000)),
    ],
)
def test_what_is_no_data_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        open_source(spec, MINI_FAMILY, 0)


def test_photographs_are_turned_as_the_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = BytesIO()
    Image.new("RGB", (300, 200)).save(data, "JPEG", exif=exif)
    row = Row("turned", lambda: Image.open(data), lambda: "a thing")
    sample = PictureSource(Found([row], None), MINI_FAMILY, 0, Fitting()).read(0)
    assert sample.original_size == (300, 200) and sample.resolution.height > sample.resolution.width


def test_variants_are_samples_of_their_own(tmp_path: Path) -> None:
    for name in "ab":
        save_picture(tmp_path, name, (400, 160), "a thing")
    one, three = (open_source(str(tmp_path), MINI_FAMILY, 0, Fitting(variants=n)) for n in (1, 3))
    samples = [three.read(index) for index in range(len(three))]
    assert [sample.key for sample in samples] == ["a.png", "b.png", "a.png#1", "b.png#1", "a.png#2", "b.png#2"]
    assert all(np.array_equal(one.read(i).image, samples[i].image) for i in range(len(one)))
    assert len({sample.crop_top_left for sample in samples}) == 6
    with pytest.raises(UserError, match="shapes:9 makes every picture anew"):
        open_source("shapes:9", MINI_FAMILY, 0, Fitting(variants=2))


def test_how_pictures_are_fitted_makes_other_data(tmp_path: Path) -> None:
    save_picture(tmp_path, "a", (160, 160), "a thing")
    fittings = [Fitting(), Fitting(flip=False), Fitting(small_pictures="skip"), Fitting(variants=2)]
    identities = [open_source(str(tmp_path), MINI_FAMILY, 0, fitting).identity for fitting in fittings]
    assert all(identities.count(identity) == 1 for identity in identities)
    assert open_source(str(tmp_path), MINI_FAMILY, 0).identity == identities[0]
