"""
Settings of scripts, and the wrapper around their main().
"""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common import settings


def configure(*argv, script="pretrain_sep.py"):
    scope = {"__file__": str(ROOT / script), "__doc__": ""}
    return settings.configure(scope, [str(arg) for arg in argv])[0]


def python(code, **env):
    """(output, exit status) of a process that runs this code."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          errors="replace", timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    return done.stdout + done.stderr, done.returncode


# -----------------------------------------------------------------------------
# configuration

def test_precedence_of_command_line_config_files_and_defaults(tmp_path):
    (tmp_path / "a.py").write_text("steps = 2 * 500\nbatch_size = 4\n_private = 3\n")
    (tmp_path / "b.py").write_text("batch_size = 6\n")
    config = configure(tmp_path / "a.py", tmp_path / "b.py", "--log_every=7")
    assert (config["steps"], config["batch_size"], config["log_every"]) == (1000, 6, 7)
    assert config["val_mixes"] == 400


@pytest.mark.parametrize("option, key, value", [
    ("--steps=1e4", "steps", 10_000), ("--learning_rate=1", "learning_rate", 1.0),
    ("--widths=1,2", "widths", [1, 2]), ("--widths=[1,2]", "widths", [1, 2]),
    ("--sources=vocals,bass", "sources", ["vocals", "bass"]), ("--compile=False", "compile", False),
    ("--out=a=b.pt", "out", "a=b.pt"), ("--out=~/b.pt", "out", os.path.expanduser("~/b.pt"))])
def test_values_have_the_type_of_the_default(option, key, value):
    configured = configure(option)[key]
    assert configured == value and type(configured) is type(value)


@pytest.mark.parametrize("option, words", [
    ("--batchsize=4", "did you mean 'batch_size'"), ("--steps=many", "int"), ("--steps", "--key="),
    ("--compile=1", "True or False"), ("missing.py", "config file missing.py"),
    ("missing", "--key=value"), ("--steps=1.5", "int"), ("--widths=a,b", "widths must be int"),
    ("--widths=1.5,2", "int"), ("-steps=3", "--key=value")])
def test_invalid_options_are_one_line_errors(option, words):
    with pytest.raises(SystemExit) as e:
        configure(option)
    assert str(e.value).startswith("error: ") and words in str(e.value)


@pytest.mark.parametrize("text, words", [
    ("step = 5\n", "'steps'"), ("1/0\n", "ZeroDivisionError"),
    ("from pathlib import Path\ndata = Path('x')\n", "data must be str")])
def test_error_in_a_config_file_names_it(tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(SystemExit) as e:
        configure(tmp_path / "c.py")
    assert words in str(e.value) and "c.py" in str(e.value)


@pytest.mark.parametrize("script", [
    "pretrain_sep.py", "finetune_cls.py", "eval.py", "prepare_data.py", "listen.py"])
def test_help_lists_every_key_and_comment(script, capsys):
    with pytest.raises(SystemExit):
        settings.configure({"__file__": str(ROOT / script), "__doc__": ""}, ["--help"])
    text, keys = capsys.readouterr().out, settings.documented_keys(str(ROOT / script))
    assert len(keys) > 5
    for key, (_, comment) in keys.items():
        assert f"  {key} = " in text and comment and comment in text


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_every_config_fits_its_script(config):
    separates = {"vocals.py", "bass.py", "drums.py", "other.py", "multisource.py", "demo_sep.py"}
    script = "pretrain_sep.py" if config in separates else "finetune_cls.py"
    script = "table.py" if config.startswith("table") else script
    configure(ROOT / "config" / config, script=script)


@pytest.mark.parametrize("key, hint", settings.MOVED.items())
def test_moved_keys_name_their_replacement(key, hint):
    for script in ("pretrain_sep.py", "finetune_cls.py", "eval.py", "table.py"):
        assert key not in settings.defaults(str(ROOT / script))
    with pytest.raises(SystemExit, match=key) as e:
        configure(f"--{key}=1")
    assert hint in str(e.value)


def test_replacements_of_moved_keys_exist():
    assert "dry_run" in settings.defaults(str(ROOT / "table.py"))
    assert "codec" in settings.defaults(str(ROOT / "listen.py"))


def test_settings_are_imported_without_torch_and_numpy():
    output, _ = python("import sys\nfrom common import download, files, settings\n"
                     "print({'torch', 'numpy'} & set(sys.modules))")
    assert output == "set()\n"


# -----------------------------------------------------------------------------
# the wrapper

@pytest.mark.parametrize("body, words", [
    ("raise MemoryError", "out of memory: lower --batch_size or --workers"),
    ("raise RuntimeError('CUDA out of memory. Tried to')", "out of memory: lower --batch_size"),
    ("raise ValueError('is odd')", "error: is odd"),
    ("open('/nowhere/x')", "error: /nowhere/x: No such file"),
    ("import torch_of_tomorrow", "pip install -r requirements.txt"),
    ("raise KeyboardInterrupt", "error: stopped")])
def test_errors_of_the_machine_are_one_line(body, words):
    code = f"from common import settings\nbatch_size = workers = 1\ndef main():\n    {body}\n"
    code += "settings.script(main)"
    output, status = python(code)
    assert words in output and "Traceback" not in output and status == 1


def test_bugs_keep_their_traceback():
    code = "from common import settings\ndef main():\n    {}['x']\nsettings.script(main)"
    output, status = python(code)
    assert "Traceback" in output and status == 1


def test_console_with_a_limited_encoding():
    code = "from common import settings\ndef main():\n    print('日本 \\udcff é')\n    return 3\n"
    code += "settings.script(main)"
    output, status = python(code, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert "\\u65e5" in output and status == 3
