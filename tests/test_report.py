"""
Pictures from files: user text is never markup, sizes are bounded, nothing is worth a result.

    python -m pytest -q tests/test_report.py
"""
import json
import struct
import warnings

import numpy as np
import pytest
from conftest import ROOT, run

import report

ODD = ["Ba$$in", "$x$", "a_b^c", "\\frac{1}{2}", "日本語", "🎵 emoji", "line\nbreak",
       "x" * 300, "{", ""]


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
def test_pictures_of_any_number_of_classes_are_of_a_bounded_size(tmp_path, count):
    names = [f"class {k}" for k in range(count)]
    assert report.draw(write(tmp_path / "t.json", tagger(names))) == []
    assert report.draw(write(tmp_path / "g.json", genres(names))) == []
    for name in ("t_classes.png", "g_confusion.png"):
        assert max(size_of(tmp_path / name)) < 3000


def test_names_of_users_are_text(tmp_path):
    assert report.draw(write(tmp_path / "t.json", tagger(ODD))) == []
    assert report.draw(write(tmp_path / "g.json", genres(ODD))) == []
    table = [{"run": name, "floor": {}, "values": {"accuracy": [0.1, 0.3]}} for name in ODD]
    assert report.draw(write(tmp_path / "s.json", table)) == []
    assert size_of(tmp_path / "t_classes.png")[0] < 2000


def test_letters_that_no_font_has_are_replaced():
    (drawn,), _ = report.readable(["a\U000e0041b"])
    assert drawn == f"a{report.UNKNOWN}b"


def test_long_names_are_shortened_in_the_middle():
    short = report.shorten("begin" + "x" * 300 + "end")
    assert short.startswith("begin") and short.endswith("end") and len(short) <= report.LONGEST


def test_a_damaged_line_of_a_log_is_told_with_its_place(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n\0\0\0\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    assert report.read_log(str(path))["loss"] == ([1.0, 3.0], [2.0, 1.0])
    assert f"{path}: damaged lines are left out" in capsys.readouterr().out


def test_a_picture_that_fails_costs_the_picture(tmp_path, capsys):
    result = {"kind": "separator", "checkpoint": "none.pt", "sources": ["vocals"]}
    path = write(tmp_path / "s.json", result)  # whose excerpt is not there
    assert report.draw(path) == [str(tmp_path / "s.png")]
    assert "note: no picture" in capsys.readouterr().out


def test_what_is_no_result_is_refused(tmp_path):
    for text, message in (("[", "is damaged"), ("{}", "is not a result"), ("[1]", "is not a")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            report.draw(str(tmp_path / "x.json"))


def test_pictures_are_drawn_again_by_hand(tmp_path):
    path = write(tmp_path / "t.json", tagger(["a", "b"]))
    run("report.py", path)
    assert (tmp_path / "t_classes.png").exists() and (ROOT / "report.py").exists()
