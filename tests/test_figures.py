"""
Figures: names are plain text, sizes are bounded, a failed figure costs no result.

    python -m pytest -q tests/test_figures.py
"""
import json
import struct
import sys
import warnings

import numpy as np
import pytest
from conftest import run

from reports import figures

NAMES = ["Ba$$in", "$x$", "a_b^c", "\\frac{1}{2}", "日本語", "🎵 emoji", "line\nbreak", "x" * 300,
         "{", "", "a\x00b", "a\U000e0041b", "caf\udce9"]    # unknown characters, invalid UTF-8


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def size_of(path):
    """(width, height) in pixels of a PNG."""
    return struct.unpack(">II", path.read_bytes()[16:24])


def write(path, result):
    path.write_text(json.dumps(result))
    return str(path)


def tagger(names):
    rng = np.random.default_rng(0)
    rows = [{"class": name, "clips": int(rng.integers(1, 99)), "ROC-AUC": float(rng.random()),
             "PR-AUC": float(rng.random())} for name in names]
    return {"kind": "classifier", "checkpoint": "none.pt", "per_class": rows, "classes": names}


def genres(names):
    confusion = np.random.default_rng(0).integers(0, 9, (len(names),) * 2).tolist()
    return {**tagger(names), "confusion": confusion}


@pytest.mark.parametrize("count", [1, 2, 500])
def test_sizes_are_bounded_for_any_number_of_classes(tmp_path, count):
    names = [f"class {k}" for k in range(count)]
    assert figures.draw(write(tmp_path / "t.json", tagger(names))) == []
    assert figures.draw(write(tmp_path / "g.json", genres(names))) == []
    for name in ("t_classes.png", "g_confusion.png"):
        assert max(size_of(tmp_path / name)) < 3000


def table(names):
    entries = [{"task": "tags", "labels": fraction, "row": name, "runs": 2,
                "metrics": {"ROC-AUC": [0.6, 0.7]}, "chance": {"ROC-AUC": 0.5},
                "differences": {names[0]: {"ROC-AUC": [0.1, 0.0, 0.2, [0.1, 0.1]]}}}
               for name in names for fraction in (0.5, 1.0)]
    return {"kind": "table", "checkpoint": "", "baselines": names[:1], "entries": entries}


@pytest.mark.parametrize("make, ending", [
    (tagger, "_classes"), (genres, "_confusion"), (table, "")])
def test_any_name_is_drawn_as_text_without_a_warning(tmp_path, capfd, make, ending):
    assert figures.draw(write(tmp_path / "x.json", make(NAMES))) == []
    assert max(size_of(tmp_path / f"x{ending}.png")) < 2000
    output = capfd.readouterr()
    assert output.out.count("\n") == 1 and not output.err


def test_the_first_installed_font_with_a_glyph_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FONTS", ["No Such Font", "DejaVu Sans Mono"])
    assert figures.draw(write(tmp_path / "a.json", tagger(["wide"]))) == []
    monkeypatch.setattr(figures, "FONTS", ["DejaVu Sans"])
    assert figures.draw(write(tmp_path / "b.json", tagger(["wide"]))) == []
    a, b = (tmp_path / f"{name}_classes.png" for name in "ab")
    assert a.read_bytes() != b.read_bytes()


def test_long_names_lose_their_middle():
    short = figures.shorten("begin" + "x" * 300 + "end")
    assert short.startswith("begin") and short.endswith("end") and len(short) <= figures.LONGEST
    assert len(figures.shorten("日本語" * 20)) <= figures.LONGEST // 2


def test_malformed_lines_of_a_log_are_reported_and_left_out(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n\0\0\0\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    training, validation = figures.draw_curves(str(path)).axes[0].lines
    assert training.get_xydata().tolist() == [[1, 2], [3, 1]] and len(validation.get_xdata()) == 0
    note, = capsys.readouterr().out.splitlines()
    assert str(path) in note and " 2 " in note


def test_a_failed_figure_is_reported(tmp_path, capsys):
    result = {"kind": "separator", "checkpoint": "none.pt", "sources": ["vocals"]}
    path = write(tmp_path / "s.json", result)           # without its .npz
    assert figures.draw(path) == [str(tmp_path / "s.png")]
    assert str(tmp_path / "s.png") in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize("text", ["[", "{}", "[1]", "1"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json"):
        figures.draw(str(tmp_path / "x.json"))


def test_command_draws_all_files_and_fails_if_one_figure_fails(tmp_path, monkeypatch):
    bad = {"kind": "separator", "checkpoint": "none.pt", "sources": ["vocals"]}
    bad, good = write(tmp_path / "s.json", bad), write(tmp_path / "t.json", tagger(["a", "b"]))
    monkeypatch.setattr(sys, "argv", ["figures", bad, good])
    assert figures.main() == 1 and size_of(tmp_path / "t_classes.png")[0] > 100
    (tmp_path / "t_classes.png").unlink()
    assert str(tmp_path / "t_classes.png") in run(["-m", "reports.figures"], good)
    assert (tmp_path / "t_classes.png").exists()
    run(["-m", "reports.figures"], ok=False)
