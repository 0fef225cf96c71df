"""Sizes as every command reads them."""

import pytest

from distill.common.errors import UserError
from distill.models.resolution import NINE, Resolution, parse_resolutions


def test_sizes_are_named_one_by_one_or_by_a_word_for_the_familys() -> None:
    assert (parse_resolutions("all", NINE), parse_resolutions("first", NINE)) == (NINE, NINE[:1])
    assert parse_resolutions("128x128, 224X96,128x128", NINE) == (Resolution(128, 128), Resolution(224, 96))
    malformed = ("1024", "x", "1024x", "axb", "-1x8", "big", ",", "")
    for text, family in (*((text, NINE) for text in malformed), ("all", ())):
        with pytest.raises(UserError, match="is not of the form WIDTHxHEIGHT"):
            parse_resolutions(text, family)
