from bench.report.elements.charts import Axis, Series, line_chart, log_ticks, nice_ticks, number, tick


def test_ticks_are_round_and_within_the_range():
    assert nice_ticks(0, 103) == [0, 50, 100]
    assert nice_ticks(0.2, 1.1, 4) == [0.25, 0.5, 0.75, 1.0]
    assert log_ticks(0.03, 30) == [0.1, 1.0, 10.0] and log_ticks(0.021, 0.047) == [0.03, 0.04]
    assert [number(value) for value in (0, 12_000, 0.0123, 345.6)] == ["0", "12k", "0.0123", "346"]
    assert [tick(value) for value in nice_ticks(15.3, 16.4, 5)] == ["15.5", "15.75", "16", "16.25"]


def test_a_chart_draws_every_point_and_escapes_its_labels():
    series = Series("<x>", 1, [(1.0, 10.0, 9.0, 11.0), (2.0, 20.0, 19.0, 21.0)])
    chart = line_chart([series], Axis("step"), Axis("ms", zero=True), "a & b")
    assert chart.count("<circle") == 2 and chart.count('class="whisker') == 2
    assert "&lt;x&gt;" in chart and "<x>" not in chart and "a &amp; b" in chart
    assert line_chart([Series("empty", 0, [])], Axis("x"), Axis("y"), "none") == ""
