"""
What lies in a folder, and downloads from a local server that does what servers do.

    python -m pytest -q tests/test_files.py
"""
import os
import unicodedata
import zipfile

import pytest
from conftest import sound

from prepare import files

# -----------------------------------------------------------------------------
# what lies in a folder

def test_names_are_compared_in_one_form_of_unicode(tmp_path):
    sound(tmp_path / unicodedata.normalize("NFD", "é") / "a.wav")
    assert list(files.inventory(str(tmp_path))) == [unicodedata.normalize("NFC", "é/a.wav")]


def test_one_name_in_two_forms_is_refused(tmp_path):
    for form in ("NFC", "NFD"):
        sound(tmp_path / unicodedata.normalize(form, "é.wav"))
    if len(os.listdir(tmp_path)) == 2:  # some file systems know one form only
        with pytest.raises(ValueError, match="in two spellings"):
            files.inventory(str(tmp_path))


def test_links_take_nothing_away(tmp_path, capsys):
    sound(tmp_path / "in" / "a" / "0.wav")
    sound(tmp_path / "in" / "b" / "0.wav")
    sound(tmp_path / "elsewhere" / "new.wav")
    (tmp_path / "in" / "a" / "b again").symlink_to(tmp_path / "in" / "b")
    (tmp_path / "in" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "loop").symlink_to("..")
    found = files.inventory(str(tmp_path / "in"))
    assert list(found) == ["a/0.wav", "b/0.wav", "a/linked/new.wav"]
    assert "b again: it leads to files that are there already" in capsys.readouterr().out


def test_hidden_files_and_unfinished_downloads_are_passed_over(tmp_path):
    for name in ("._a.zip", "a.zip.part", ".DS_Store", "a.wav"):
        (tmp_path / name).write_bytes(b"x")
    assert list(files.inventory(str(tmp_path))) == ["a.wav"]


def test_an_archive_in_parts_must_be_complete(tmp_path):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as z:
        z.writestr("f/a.wav", bytes(1000))
    raw = (tmp_path / "whole.zip").read_bytes()
    (tmp_path / "in").mkdir()
    for k in range(3):
        part = raw[k * len(raw) // 3:(k + 1) * len(raw) // 3]
        (tmp_path / "in" / f"a.zip.00{k + 1}").write_bytes(part)
    assert list(files.inventory(str(tmp_path / "in"))) == ["f/a.wav"]
    assert files.inventory(str(tmp_path / "in"), skip=["a.zip"]) == {}
    (tmp_path / "in" / "a.zip").write_bytes(raw)
    with pytest.raises(ValueError, match="lies beside its own parts"):
        files.inventory(str(tmp_path / "in"))
    (tmp_path / "in" / "a.zip").unlink()
    (tmp_path / "in" / "a.zip.002").unlink()
    with pytest.raises(ValueError, match="a part is missing"):
        files.inventory(str(tmp_path / "in"))


def test_an_unpacking_that_broke_off_is_noticed(tmp_path):
    sound(tmp_path / "a.wav")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as z:
        z.write(tmp_path / "a.wav", "f/a.wav")
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:5000])
    found = files.inventory(str(tmp_path))
    with pytest.raises(ValueError, match="two files that differ would be a.wav"):
        files.by_name(found, lambda file: file.split("/")[-1], {"a.wav"})


def test_a_table_says_where_it_is_wrong():
    for raw, message in ((b"a,b\n1", "t: line 2 has 1 cells instead of 2"),
                         ("a\nä".encode("latin-1"), "t: not UTF-8"), (b'a\n"x', "t: line 2")):
        with pytest.raises(ValueError, match=message):
            list(files.table(raw, name="t: "))
