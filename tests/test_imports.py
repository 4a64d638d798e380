"""
Imports between modules, lazy ones included: only from higher layers to lower ones, no cycles.

    python -m pytest -q tests/test_imports.py
"""
import ast

from conftest import ROOT

FLOORS = [
    ["common.settings", "common.files", "common.download", "common.metrics", "audio.resample",
     "audio.truncation"],
    ["audio.files", "model", "kernels.*"],
    ["data", "weights.*", "common.device", "common.run"],
    ["prepare.*", "reports.*"],
    ["pretrain_sep", "finetune_cls", "eval", "listen"],
    ["prepare_data", "table", "hubconf", "tools.*"]]
ALONE = {"model": {"audio.resample"}, "audio.resample": set(), "common.metrics": set()}


def modules():
    """{name: path} of everything but tests and config files."""
    folders = [ROOT, *(ROOT / name for name in (
        "audio", "common", "kernels", "prepare", "reports", "tools", "weights"))]
    paths = [path for folder in folders for path in folder.glob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)
            if name != "test_model"}


def imports_of(path, known):
    """The modules of ours that a file imports anywhere in its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & known


def floor_of(name):
    for number, floor in enumerate(FLOORS):
        if name in floor or f"{name.split('.')[0]}.*" in floor:
            return number
    assert name in ("audio", "common"), f"{name} is on no floor"    # empty packages
    return 0


def test_imports_only_go_down():
    paths = modules()
    for name, path in paths.items():
        for other in imports_of(path, set(paths)) - {name, "audio", "common"}:
            below = floor_of(other) < floor_of(name)
            neighbour = other.split(".")[0] == name.split(".")[0] and "." in name + other
            same = floor_of(other) == floor_of(name) and neighbour
            assert below or same, f"{name} imports {other}"
        if name in ALONE:
            assert imports_of(path, set(paths)) == ALONE[name], name


def test_imports_have_no_cycle():
    paths = modules()
    graph = {name: imports_of(path, set(paths)) - {name} for name, path in paths.items()}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a cycle: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}
