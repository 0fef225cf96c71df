from bench.report.elements.tables import Cell, Column, make_table, measured


def test_what_has_nothing_in_it_is_left_out():
    table = make_table(
        ["a", "bb", ""],
        Column("name", str),
        Column("length", lambda text: measured(str(len(text)), "letters") if text else None),
        Column("never", lambda text: "–", "wrap"),
    )
    assert [head.text for head in table.heads] == ["name", "length"] and table.aligns == ["left", "right"]
    assert table.rows == [[Cell(text), Cell(str(len(text)), "measured", ("letters",))] for text in ("a", "bb")]
    assert not make_table([], Column("name", str))
