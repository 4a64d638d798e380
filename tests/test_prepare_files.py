"""
Listing the files of a folder and of its archives, and reading tables.
"""
import os
import unicodedata
import zipfile

import pytest
from conftest import sound

from prepare import files


def test_names_are_in_composed_unicode(tmp_path):
    sound(tmp_path / unicodedata.normalize("NFD", "é") / "a.wav")
    assert list(files.inventory(str(tmp_path))) == [unicodedata.normalize("NFC", "é/a.wav")]


def test_one_name_in_two_unicode_forms_is_refused(tmp_path):
    for form in ("NFC", "NFD"):
        sound(tmp_path / unicodedata.normalize(form, "é.wav"))
    if len(os.listdir(tmp_path)) == 2:  # some file systems know one form only
        with pytest.raises(ValueError, match="é.wav.*Unicode"):
            files.inventory(str(tmp_path))


def test_linked_folders_are_listed_once_and_last(tmp_path, capsys):
    sound(tmp_path / "in" / "a" / "0.wav")
    sound(tmp_path / "in" / "b" / "0.wav")
    sound(tmp_path / "elsewhere" / "new.wav")
    (tmp_path / "in" / "a" / "b again").symlink_to(tmp_path / "in" / "b")
    (tmp_path / "in" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "loop").symlink_to("..")
    listed = files.inventory(str(tmp_path / "in"))
    assert list(listed) == ["a/0.wav", "b/0.wav", "a/linked/new.wav"]
    assert "b again: a link to files" in capsys.readouterr().out


def test_hidden_and_partial_files_are_skipped(tmp_path):
    for name in ("._a.zip", "a.zip.part", ".DS_Store", "a.wav"):
        (tmp_path / name).write_bytes(b"x")
    assert list(files.inventory(str(tmp_path))) == ["a.wav"]


def test_split_archive_must_be_complete(tmp_path):
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
    with pytest.raises(ValueError, match="a.zip .*beside its own parts"):
        files.inventory(str(tmp_path / "in"))
    (tmp_path / "in" / "a.zip").unlink()
    (tmp_path / "in" / "a.zip.002").unlink()
    with pytest.raises(ValueError, match="a.zip .*part is missing"):
        files.inventory(str(tmp_path / "in"))


def test_truncated_copy_of_an_archive_member_is_refused(tmp_path):
    sound(tmp_path / "a.wav")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as z:
        z.write(tmp_path / "a.wav", "f/a.wav")
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:5000])
    listed = files.inventory(str(tmp_path))
    with pytest.raises(ValueError, match="a.wav has two copies of different size"):
        files.by_name(listed, lambda file: file.split("/")[-1], [{"name": "a.wav"}])


def test_table_errors_name_the_line():
    for raw, message in ((b"a,b\n1", "t: line 2: 1 cells"),
                         ("a\nä".encode("latin-1"), "t: not UTF-8"), (b'a\n"x', "t: line 2")):
        with pytest.raises(ValueError, match=message):
            list(files.table(raw, name="t: "))
