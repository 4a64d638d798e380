"""
Configuration, the wrapper around every script, files that are complete or not there.

    python -m pytest -q tests/test_runtime.py
"""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

import finetune_cls
import pretrain_sep
import runtime
import table
import training


def configure(*argv, **more):
    scope = {"__file__": pretrain_sep.__file__, "__doc__": ""}
    return runtime.configure(scope, [str(arg) for arg in argv], **more)[0]


def python(code, **env):
    """What a process with this code printed and its exit status."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          errors="replace", timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    return done.stdout + done.stderr, done.returncode


# -----------------------------------------------------------------------------
# configuration

def test_the_command_line_wins_over_files_and_files_over_defaults(tmp_path):
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
def test_values_get_the_type_of_their_default(option, key, value):
    found = configure(option)[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("option, words", [
    ("--batchsize=4", "did you mean 'batch_size'"), ("--steps=many", "int"), ("--steps", "--key="),
    ("--compile=1", "True or False"), ("missing.py", "no config file"), ("--steps=1.5", "int"),
    ("--widths=a,b", "widths must be int"), ("--widths=1.5,2", "int"), ("-steps=3", "--key=value")])
def test_a_wrong_option_is_an_error_of_one_line(option, words):
    with pytest.raises(SystemExit) as e:
        configure(option)
    assert str(e.value).startswith("error: ") and words in str(e.value)


@pytest.mark.parametrize("text, words", [
    ("step = 5\n", "'steps'"), ("1/0\n", "ZeroDivisionError"),
    ("from pathlib import Path\ndata = Path('x')\n", "data must be str")])
def test_a_wrong_config_file_is_named(tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(SystemExit) as e:
        configure(tmp_path / "c.py")
    assert words in str(e.value) and "c.py" in str(e.value)


@pytest.mark.parametrize("script", [
    "pretrain_sep.py", "finetune_cls.py", "eval.py", "prepare_data.py", "report.py"])
def test_help_lists_every_key_with_its_comment(script, capsys):
    with pytest.raises(SystemExit):
        runtime.configure({"__file__": str(ROOT / script), "__doc__": ""}, ["--help"])
    text, keys = capsys.readouterr().out, runtime.documented_keys(str(ROOT / script))
    assert len(keys) > 5 or script == "report.py"
    for key, (_, comment) in keys.items():
        assert f"  {key} = " in text and comment and comment in text


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_every_config_is_known_to_its_script(config):
    separates = {"vocals.py", "bass.py", "drums.py", "other.py", "multisource.py", "demo_sep.py"}
    script = pretrain_sep if config in separates else finetune_cls
    script = table if config.startswith("table") else script
    runtime.configure({"__file__": script.__file__, "__doc__": ""}, [str(ROOT / "config" / config)])


# -----------------------------------------------------------------------------
# the wrapper

@pytest.mark.parametrize("body, words", [
    ("raise MemoryError", "out of memory: lower --batch_size or --workers"),
    ("raise RuntimeError('CUDA out of memory. Tried to')", "out of memory: lower --batch_size"),
    ("raise ValueError('is odd')", "error: is odd"),
    ("open('/nowhere/x')", "error: /nowhere/x: No such file"),
    ("import torch_of_tomorrow", "pip install -r requirements.txt"),
    ("raise KeyboardInterrupt", "error: stopped")])
def test_what_goes_wrong_on_a_users_machine_is_one_line(body, words):
    code = f"import runtime\nbatch_size = workers = 1\ndef main():\n    {body}\n"
    code += "runtime.script(main)"
    said, status = python(code)
    assert words in said and "Traceback" not in said and status == 1


def test_a_mistake_in_the_program_keeps_its_traceback():
    said, status = python("import runtime\ndef main():\n    {}['x']\nruntime.script(main)")
    assert "Traceback" in said and status == 1


def test_a_console_that_knows_few_letters_is_no_reason_to_stop():
    code = "import runtime\ndef main():\n    print('日本 \\udcff é')\n    return 3\n"
    code += "runtime.script(main)"
    said, status = python(code, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert "\\u65e5" in said and status == 3


def test_a_scheduler_may_leave_world_size_in_the_environment():
    said, status = python("import runtime\nprint(runtime.start('cpu'))", WORLD_SIZE="4")
    assert "note: WORLD_SIZE=4 is ignored" in said and "('cpu', 0, 1)" in said and status == 0


# memory on a CPU, see runtime.keep_freed_memory()
MEMORY = """
import resource, runtime, torch
def kib(what):
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps") if what in line)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
runtime.keep_freed_memory()
"""


def large_pages():
    """Their size in bytes, and whether a program may ask for them."""
    folder = "/sys/kernel/mm/transparent_hugepage"
    try:
        with open(f"{folder}/enabled") as state, open(f"{folder}/hpage_pmd_size") as size:
            return int(size.read()), "[never]" not in state.read()
    except FileNotFoundError:
        return 0, False


def test_tensors_lie_in_large_pages():
    size, allowed = large_pages()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if allowed else 0
    if size != 2 << 20 or memory < runtime.HEAP:
        pytest.skip("there are no large pages of 2 MiB here, or less than 4 GiB of memory")
    code = MEMORY + "x = torch.ones(1 << 26)\nprint(kib('AnonHugePages'))"      # 256 MiB
    said, status = python(code)
    assert status == 0 and int(said) > 100 << 10, said


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told")
@pytest.mark.parametrize("room", [0, 2 << 30])      # no limit; less than is reserved
@pytest.mark.parametrize("threads", ["1", "2"])
def test_freed_memory_is_used_again(room, threads):
    limit = f"""
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
if {room}:
    resource.setrlimit(resource.RLIMIT_AS, (used + {room},) * 2)
runtime.keep"""
    code = MEMORY.replace("runtime.keep", limit) + """
for k in range(20):
    if k == 5:
        before = faults()
    large = [torch.ones(1 << 24 + n % 2) for n in range(4)]     # 64 and 128 MiB
    small = [torch.ones(1000) for n in range(10)]               # these lie in between
    del large
print(faults() - before, kib("Rss:") >> 10)"""
    said, status = python(code, OMP_NUM_THREADS=threads)
    assert status == 0, said
    new_pages, mib = map(int, said.split())
    # given back, in each turn there would be 192 large or 98,304 small ones
    most = 2000 if large_pages()[1] and not room else 150_000
    assert new_pages < most and mib < 1600, said


# -----------------------------------------------------------------------------
# files

def test_a_full_disk_names_the_path_and_leaves_nothing(tmp_path):
    code = f"""
import resource, runtime, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def main():
    if {{kind!r}} == "save":
        runtime.save_atomically({{{{"x": torch.zeros(1_000_000)}}}}, "{tmp_path}/big.pt")
    runtime.write_atomically("x" * 1_000_000, "{tmp_path}/big.txt")
runtime.script(main)"""
    for kind, name in (("save", "big.pt"), ("write", "big.txt")):
        said, status = python(code.format(kind=kind))
        assert f"{tmp_path}/{name}: File too large" in said and status == 1
        assert "Traceback" not in said and not os.listdir(tmp_path)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    runtime.write_atomically("old", str(tmp_path / "a"))
    with pytest.raises(TypeError):
        runtime.write_atomically(3, str(tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    for name in ("a.pt.123.tmp", "a.resume.9.tmp", "b.pt.123.tmp"):
        (tmp_path / name).write_text("half")
    config = {"track": "", "report": False}
    training.Run(str(tmp_path / "a.pt"), False, False).begin(config)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.pt.123.tmp"]


def test_weights_that_are_not_finite_are_never_saved():
    net = torch.nn.BatchNorm1d(3)
    net.running_var[1] = float("nan")
    with pytest.raises(SystemExit, match="no longer finite .running_var"):
        runtime.finite_weights(net)


def lines(*steps):
    return [json.dumps({"step": step, "loss": 1.0}) for step in steps]


def test_a_log_goes_on_at_the_saved_step(tmp_path):
    path, again = tmp_path / "a.jsonl", json.dumps({"step": 2, "val_loss": 1.0})
    path.write_text("\n".join([*lines(1, 2), again, *lines(3)]) + "\n")
    kept = training.log_until(str(path), 2).splitlines()
    assert kept == lines(1, 2)  # validation follows saving: it comes again


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', "\0" * 80, '[1, 2]', '"text"'])
def test_a_damaged_line_of_a_log_is_told_and_left_out(tmp_path, capsys, damage):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines(1), damage, *lines(2)]) + "\n")
    assert training.log_until(str(path), 5).splitlines() == lines(1, 2)
    assert f"{path}: 1 damaged lines" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# what stands where a run wants to write

def test_a_run_that_exists_is_not_written_over(tmp_path):
    out = str(tmp_path / "a.pt")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(SystemExit, match="a.jsonl exists: --resume=True"):
        training.Run(out, resume=False, overwrite=False)
    training.Run(out, resume=False, overwrite=True)
    with pytest.raises(SystemExit, match="to go on from"):
        training.Run(out, resume=True, overwrite=False)


def test_a_link_to_nowhere_and_a_folder_that_cannot_be_are_told_at_once(tmp_path):
    (tmp_path / "a.pt").symlink_to("nowhere")
    with pytest.raises(SystemExit, match="a link to nowhere, which does not exist"):
        training.Run(str(tmp_path / "a.pt"), False, False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        training.Run(str(tmp_path / "file" / "a.pt"), False, False)
    with pytest.raises(SystemExit, match="must end in .pt"):
        training.Run(str(tmp_path / "a"), False, False)


def test_a_missing_best_checkpoint_is_told_before_training(tmp_path):
    state = {"kind": "separator", "model": {}, "args": {}, "config": {}, "step": 4, "best": 0.5,
             "optimizer": {}, "scaler": {}}
    torch.save(state, tmp_path / "a.resume")
    with pytest.raises(SystemExit, match="a.pt is missing, the best checkpoint of this run"):
        training.Run(str(tmp_path / "a.pt"), resume=True, overwrite=False)


def test_one_dataset_must_be_named():
    assert "name one dataset" in run("prepare_data.py", "demos", ok=False)
