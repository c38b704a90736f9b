# SPDX-License-Identifier: Apache-2.0
"""The rules of docs/design.md that a machine can check: sizes, one-way imports, a cheap plugin import."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "minference_vllm"
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50

# The command line, then the way of a batch, from the process that vLLM starts down to device code, then the values that
# every step shares. A module imports only what stands below it.
LAYERS = (
    "cli",
    "doctor",
    "search",
    "plots",
    "bench",
    "evals",
    "tuning",
    "offline",
    "plugin",
    "backend",
    "cpu",
    "metadata",
    "impl",
    "layers",
    "step",
    "runtime",
    "metrics",
    "record",
    "compat",
    "salt",
    "plan",
    "budget",
    "config",
    "pipeline",
    "reason",
    "debug",
    "repeats",
    "attention",
    "patterns",
    "methods",
    "ops",
    "kernels",
    "reference",
    "scratch",
    "chunk",
    "boxes",
    "index",
    "recall",
    "files",
    "faults",
    "errors",
)
IMPORT_VLLM = {"plugin", "backend", "cpu", "metadata", "impl", "compat"}
# vLLM loads the plugin in every process, `vllm serve --help` included.
HEAVY = {"torch", "triton", "vllm"}
FOR_PEOPLE = ("demo/", "benchmarks/", "setup.py", f"{PACKAGE}/cli/")
# No one else has these folders. (Containers do have /root.)
PERSONAL_PATH = re.compile(r"(?<![\w.])/(?:work|home|Users)/")


@functools.cache
def project_files() -> tuple[Path, ...]:
    """What git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the project's files are known in a git checkout only: {error}")
    return tuple(path for name in listing.splitlines() if (path := ROOT / name).is_file())


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def text_files() -> Iterator[tuple[Path, str]]:
    for path in project_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            yield path, content.decode(errors="replace")


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def layer_of(path: Path) -> str:
    """`plan` for minference_vllm/plan.py, `kernels` for minference_vllm/kernels/attend.py."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def package_modules() -> list[Path]:
    return [
        path for path in python_files() if (ROOT / PACKAGE) in path.parents and path != ROOT / PACKAGE / "__init__.py"
    ]


def imported_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted name and line of every import, those inside functions included; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_device_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = (ast.unparse(decorator).split("(")[0] for decorator in function.decorator_list)
    return any(name in ("triton.jit", "gluon.jit") for name in names)


def test_the_rules_see_the_project() -> None:
    assert ROOT / PACKAGE / "plugin.py" in python_files()
    assert Path(__file__) in python_files()


def test_python_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files() if "csrc" not in path.parts}
    assert [f"{where(path, 1)} has {n} lines" for path, n in lengths.items() if n >= MAX_FILE_LINES] == []


def test_functions_are_short() -> None:
    too_long = []
    for path in python_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_device_code(node):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length >= MAX_FUNCTION_LINES:
                    too_long.append(f"{where(path, node.lineno)} {node.name} has {length} lines")
    assert too_long == []


def test_only_programs_for_people_print() -> None:
    prints = [
        where(path, node.lineno)
        for path in python_files()
        if not path.relative_to(ROOT).as_posix().startswith(FOR_PEOPLE)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


def test_every_python_file_states_its_licence_first() -> None:
    header = "# SPDX-License-Identifier: Apache-2.0"
    files = [path for path in python_files() if path.read_text()]
    assert [where(path, 1) for path in files if path.read_text().splitlines()[0] != header] == []


def test_no_file_names_a_path_of_one_machine() -> None:
    named = [
        where(path, number)
        for path, text in text_files()
        for number, line in enumerate(text.splitlines(), start=1)
        if PERSONAL_PATH.search(line)
    ]
    assert named == []


def test_every_module_has_its_place_in_the_order() -> None:
    assert {layer_of(path) for path in package_modules()} <= set(LAYERS)


def test_imports_flow_one_way() -> None:
    upward = []
    for path in package_modules():
        own = layer_of(path)
        for name, line in imported_names(parse(path)):
            package, _, rest = name.partition(".")
            imported = rest.split(".")[0]
            if package != PACKAGE or imported in (own, "__version__"):
                continue
            if LAYERS.index(imported) < LAYERS.index(own):
                upward.append(f"{where(path, line)} imports {name}")
    assert upward == []


def test_vllm_is_imported_by_the_modules_that_face_it_only() -> None:
    others = [
        f"{where(path, line)} imports {name}"
        for path in package_modules()
        if layer_of(path) not in IMPORT_VLLM
        for name, line in imported_names(parse(path))
        if name.split(".")[0] == "vllm"
    ]
    assert others == []


def test_kernels_and_reference_need_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", PACKAGE} | sys.stdlib_module_names
    others = [
        f"{where(path, line)} imports {name}"
        for path in package_modules()
        if layer_of(path) in ("kernels", "reference")
        for name, line in imported_names(parse(path))
        if name.split(".")[0] not in allowed
    ]
    assert others == []


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.plugin"])
def test_importing_the_plugin_is_cheap(module: str) -> None:
    code = f"import sys, {module}; sys.stdout.write(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert module in loaded.split()
    assert HEAVY.isdisjoint(loaded.split())
