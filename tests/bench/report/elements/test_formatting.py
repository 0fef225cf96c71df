from bench.report.elements.formatting import count, interval, milliseconds, signed_percent, size, times
from bench.results import Estimate


def test_numbers_are_written_one_way():
    assert [milliseconds(value) for value in (0.123, 12.34, 1234.5, 54_321.0, None)] == [
        "0.12 ms", "12.3 ms", "1,234 ms", "54.3 s", "–",
    ]  # fmt: skip
    assert [size(value) for value in (900, 1_500, 2_000_000, 5.182e9)] == ["900 B", "1.5 kB", "2 MB", "5.18 GB"]
    assert [count(value) for value in (745_225_604, 2_567_463_684, 13.52e12)] == ["745 M", "2.57 B", "13.5 T"]
    assert times(1.996) == "2.00×" and signed_percent(-0.001) == "0 %" and signed_percent(0.217) == "+22 %"
    assert interval(Estimate(value=5.0)) == "too few runs"
    assert interval(Estimate(value=2.0, low=1.9, high=2.1), "x") == "1.90–2.10×"
    assert interval(Estimate(value=132_594.6, low=131_043.0, high=134_326.0)) == "131.0–134.3 s"
