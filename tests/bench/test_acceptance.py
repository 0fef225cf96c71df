import multiprocessing

from bench import acceptance


def test_a_target_that_takes_its_process_down_leaves_the_others(tmp_path, monkeypatch):
    (tmp_path / "crashes_at_import.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = [("absent", "no"), ("plugin", "crashes_at_import"), ("provider", "CUDAExecutionProvider")]
    monkeypatch.setattr(acceptance, "targets", lambda: asked)
    rows = acceptance.measure_acceptance(lambda _rows: None)
    assert [row["target"] for row in rows] == ["tensorrt-rtx", "crashes_at_import", "CUDAExecutionProvider"]
    assert "took its process down (exit code -6)" in rows[1]["messages"][0]


def test_a_target_that_does_not_answer_leaves_the_others(tmp_path, monkeypatch):
    (tmp_path / "hangs_at_import.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(acceptance, "targets", lambda: [("plugin", "hangs_at_import"), ("absent", "no")])
    monkeypatch.setattr(acceptance, "ANSWER_S", 0.5)
    rows = acceptance.measure_acceptance(lambda _rows: monkeypatch.setattr(acceptance, "ANSWER_S", 60.0))
    assert [row["messages"] for row in rows] == [["did not answer in 0.5 s"], ["no"]]
    assert not multiprocessing.active_children()


def test_a_gpu_provider_is_asked_with_the_libraries_that_torch_brings(tmp_path, monkeypatch):
    tells = "import sys\ndef get_ep_name(): raise RuntimeError('torch' in sys.modules)\n"
    (tmp_path / "tells.py").write_text(tells)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(acceptance, "targets", lambda: [("plugin", "tells")])
    monkeypatch.setattr(acceptance, "ANSWER_S", 300.0)  # however busy the machine
    [row] = acceptance.measure_acceptance(lambda _rows: None)
    assert row["messages"] == ["RuntimeError: True"]
