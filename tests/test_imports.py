"""The import rules of the package, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import aqdetr_jax

ROOT = Path(aqdetr_jax.__file__).parent

LAYERS = (
    ("host", "io", "paths", "stores", "config_types", "provenance", "trees"),
    ("ops",),
    ("quant",),
    ("losses", "models", "data", "parallel"),
    ("interop", "checkpoint"),
    ("evaluation",),
    ("training", "deploy", "viz"),
    ("reporting", "predicting", "planning", "ptq"),
    ("compress",),
    ("quickstart", "finetune"),
    ("verbs",),
    ("cli",),
    ("__init__", "__main__"),
)
"""From the bottom to the top; a module imports from its own layer and those below it."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(file: Path) -> list[str]:
    """Every imported module of a file by its full name, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


SOURCES = {
    file.relative_to(ROOT): imports(file)
    for file in sorted(ROOT.rglob("*.py"))
    if "assets" not in file.parts
}


def part(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def users(package: str) -> set[str]:
    """The files that import an outside package."""
    return {
        str(path)
        for path, names in SOURCES.items()
        if any(name.split(".")[0] == package for name in names)
    }


def test_arrows_point_downwards():
    wrong = [
        f"{path} imports {name}"
        for path, names in SOURCES.items()
        for name in names
        if name.startswith("aqdetr_jax.") and LEVEL[name.split(".")[1]] > LEVEL[part(path)]
    ]
    assert not wrong


def test_no_circle_of_files():
    """No file is reached again from what it imports, imports for type checkers included."""
    files = {".".join(path.with_suffix("").parts): names for path, names in SOURCES.items()}
    arrows = {
        name: {n.removeprefix("aqdetr_jax.") for n in names if n.startswith("aqdetr_jax.")}
        | {n.removeprefix("aqdetr_jax.").rpartition(".")[0] for n in names}
        for name, names in files.items()
    }
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in sorted(arrows[name] & files.keys() - {name}):
                walk(target, (*way, name))
            done.add(name)

    for name in files:
        walk(name, ())


def test_pure_parts_know_no_module_system():
    assert not {p for p in users("flax") if p.startswith(("ops/", "losses/", "quant/"))}


def test_outside_systems_have_one_door():
    assert {part(Path(p)) for p in users("orbax")} == {"checkpoint"}
    assert users("pycocotools") == {"evaluation/coco.py"}
    assert {part(Path(p)) for p in users("grain")} == {"data"}
    assert users("tensorflow_datasets") == {"data/tfds_builder.py"}
    # Other libraries' weights, and our packed ones.
    assert users("safetensors") == {"interop/checkpoints.py", "deploy/archive.py"}
    for package in ("onnx", "onnxruntime"):
        assert {str(Path(p).parent) for p in users(package)} == {"deploy/onnx"}


def test_pictures_are_opened_by_one_reader():
    opening = {str(p) for p in SOURCES if "Image.open(" in (ROOT / p).read_text()}
    assert opening == {"data/images.py"}


def test_no_heavy_framework():
    assert not users("torch")
    assert not users("tensorflow")


DOOR = ("paths.py", "io.py", "stores/")
"""Who opens files: everybody else gets paths from ``paths.as_path`` and uses their methods."""

LOCAL = {
    "host.py": "the cache of this machine",
    "provenance.py": "the program's own folder",
    "deploy/benchmark.py": "what one process hands to another",
    "deploy/contestant.py": "what one process hands to another",
    "deploy/cpu.py": "/proc",
    "deploy/runner.py": "what one process hands to another",
    "deploy/onnx/runner.py": "what ONNX Runtime writes",
    "deploy/onnx/running.py": "what ONNX Runtime writes",
    "planning/ahead.py": "what a compiler writes",
    "planning/child.py": "what one process hands to another",
    "checkpoint/model_folder.py": "models of the package",
    "training/config_tools.py": "configurations of the package",
    "training/lease.py": "/proc",
    "training/mirror.py": "what grows, before it is sent",
    "training/dump.py": "arrays in memory and in an open file",
    "training/places.py": "the lock of a disk",
    "data/shapes/dataset.py": "the cache of this machine",
    "data/tfds_builder.py": "the folder that TFDS writes to",
}
"""Files that use disks of this machine on purpose, and for what; no path in them is a user's."""

FORBIDDEN = {
    "open",
    *("Path", "pathlib.Path"),
    *(f"os.{name}" for name in ("open", "stat", "listdir", "scandir", "walk", "access", "chmod")),
    *(f"os.{name}" for name in ("mkdir", "makedirs", "remove", "unlink", "rmdir", "rename")),
    *(f"os.{name}" for name in ("replace", "link", "symlink", "utime", "truncate", "readlink")),
    *(f"os.path.{name}" for name in ("exists", "isfile", "isdir", "getsize", "getmtime")),
    *(f"np.{name}" for name in ("save", "savez", "savez_compressed", "load", "fromfile", "memmap")),
    *(f"onnx.{name}" for name in ("load", "save", "load_model", "save_model")),
    *("safe_open", "save_file", "load_file"),
}
FORBIDDEN_MODULES = ("shutil", "tempfile", "glob")


def file_calls(source: str) -> set[str]:
    """What a module calls that opens, lists, moves or removes files other than by the door."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN_MODULES:
                found.add(name)
    return found


def test_files_are_opened_by_one_door():
    calls = {
        str(path): file_calls((ROOT / path).read_text())
        for path in SOURCES
        if not str(path).startswith(DOOR)
    }
    wrong = {path: names for path, names in calls.items() if names and path not in LOCAL}
    assert wrong == {"interop/checkpoints.py": {"safe_open"}}  # within local_file
    assert not [path for path in LOCAL if not calls[path]], "no longer true"


def test_what_opens_a_file_is_found():
    for text in ("open(x)", "Path(x) / 'a'", "shutil.rmtree(x)", "np.load(x)", "os.path.isfile(x)"):
        assert file_calls(text), text
    assert not file_calls("path.open('rb'); as_path(x).exists(); Path.home")


def test_stores_are_known_to_the_door_alone():
    assert {part(Path(p)) for p in users("fsspec") | users("gcsfs")} == {"stores"}
    found = {
        str(path)
        for path, names in SOURCES.items()
        if any(name.startswith("aqdetr_jax.stores") for name in names)
        and part(path) not in ("paths", "io", "stores")
    }
    assert found == {"training/lease.py"}
