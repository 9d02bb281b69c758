"""The files around the code: what is installed, shipped and promised, and what must not creep in."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from rattler import MatchSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minicogview"
CONDA_NAMES = {"torch": "pytorch"}  # name on PyPI -> name in conda, where they differ
CONDA_ONLY = {"python", "pip"}
BY_NAME = ["torch", "jupyterlab", "matplotlib", "ipywidgets", "einops", "sentencepiece", "triton", "nbval"]
SKIPPED_FOLDERS = {"demo", "runs", "out", "build", "dist"}


@lru_cache
def committed() -> tuple[Path, ...]:
    """Files that git tracks or would add; without git, all files outside hidden and generated folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        paths = [ROOT / name for name in names if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [p for p in ROOT.rglob("*") if not generated(p.relative_to(ROOT))]
    return tuple(sorted(p for p in paths if p.is_file()))


def generated(path: Path) -> bool:
    folders = path.parts[:-1]
    hidden = any(name.startswith(".") and name != ".ci" for name in folders)
    by_tools = any(name == "__pycache__" or name.endswith(".egg-info") for name in folders)
    return hidden or by_tools or path.parts[0] in SKIPPED_FOLDERS


def of_kind(*suffixes: str) -> list[Path]:
    """Committed files with these suffixes, reference data left out."""
    return [p for p in committed() if p.suffix in suffixes and "golden" not in p.parts]


def cells(notebook: Path, kind: str) -> list[str]:
    """Sources of a notebook's cells of one kind, "code" or "markdown"."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


@lru_cache
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> dict[str, Requirement]:
    """Requirements of the plain install and of these extras, without the project's references to itself."""
    project = pyproject()["project"]
    lines = project["dependencies"] + [line for e in extras for line in project["optional-dependencies"][e]]
    parsed = [Requirement(line) for line in lines]
    return {canonical(r.name): r for r in parsed if canonical(r.name) != "minicogview"}


@lru_cache
def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def conda_lines() -> list[str]:
    return [line for line in environment()["dependencies"] if isinstance(line, str)]


def pip_lines() -> list[str]:
    (section,) = [entry for entry in environment()["dependencies"] if isinstance(entry, dict)]
    return section["pip"]


def specs(lines: list[str]) -> dict[str, MatchSpec]:
    parsed = [MatchSpec(line) for line in lines]
    return {re.search(r"[\w.-]+", line)[0]: spec for line, spec in zip(lines, parsed)}


# --- Installation -----------------------------------------------------------------------------------------


def test_environment_lines_parse_and_have_bounds() -> None:
    for line in conda_lines() + pip_lines():
        spec = MatchSpec(line)
        assert spec.name is not None, line
        assert spec.version is not None or line in CONDA_ONLY, f"{line}: say which version is the oldest"


@pytest.mark.parametrize("name", BY_NAME)
def test_environment_names(name: str) -> None:
    conda = specs(conda_lines())
    assert CONDA_NAMES.get(name, name) in conda
    assert name in conda.keys() | specs(pip_lines()).keys()


def test_environment_agrees_with_pyproject() -> None:
    wanted = requirements("notebooks")
    found = specs(conda_lines()) | specs(pip_lines())
    to_pypi = {conda: pypi for pypi, conda in CONDA_NAMES.items()}
    assert {to_pypi.get(name, name) for name in found} - CONDA_ONLY == wanted.keys()
    for name, spec in found.items():
        if name not in CONDA_ONLY:
            assert str(spec.version) == str(wanted[to_pypi.get(name, name)].specifier), name
    assert str(found["python"].version) == pyproject()["project"]["requires-python"]


def test_constraints_pin_every_requirement() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    pins = {canonical(r.name): r for r in map(Requirement, filter(None, lines))}
    everything = requirements(*pyproject()["project"]["optional-dependencies"])
    assert pins.keys() == {n for n, r in everything.items() if n != "tomli"}  # tomli: Python 3.10 only
    for name, pin in pins.items():
        (only,) = pin.specifier
        assert only.operator == "==", f"{name}: pin one version"
        assert only.version in everything[name].specifier, f"{name}: pyproject.toml forbids this version"
    assert str(pins["torch"].specifier) == "==2.13.0"
    assert str(pins["triton"].specifier) == "==3.7.1"


def test_triton_is_asked_for_on_linux_only() -> None:
    marker = requirements()["triton"].marker
    assert marker is not None
    assert marker.evaluate({"platform_system": "Linux"})
    assert not marker.evaluate({"platform_system": "Darwin"})


def test_makefile_has_the_promised_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ["demo", "test", "test-plain", "lint", "types", "notebooks", "wheel-check"]:
        assert re.search(rf"^{target}: \$\(VENV\)/\.(plain|dev)$", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", ["run", "wheel-check"])
def test_ci_scripts_can_be_run(name: str) -> None:
    script = ROOT / ".ci" / name
    assert os.access(script, os.X_OK), f"{script} is not executable: chmod +x"
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)


# --- What is shipped --------------------------------------------------------------------------------------


def test_every_subpackage_is_listed() -> None:
    folders = [PACKAGE, *(p.parent for p in PACKAGE.glob("*/__init__.py"))]  # through the link to kernels/ too
    names = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert sorted(names) == pyproject()["tool"]["setuptools"]["packages"]


def test_kernels_are_installed_inside_the_package() -> None:
    """The folder stands at the top level and is linked into the package; a wheel has it as minicogview.kernels only."""
    settings, link = pyproject()["tool"]["setuptools"], PACKAGE / "kernels"
    assert settings["package-dir"] == {"minicogview.kernels": "kernels"}
    assert link.is_symlink() and os.readlink(link) == "../kernels" and link.resolve() == ROOT / "kernels"
    assert not [name for name in settings["packages"] if name.partition(".")[0] != "minicogview"]


def test_every_data_file_is_packaged() -> None:
    patterns = pyproject()["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for package, globs in patterns.items()
        for pattern in globs
        for path in (ROOT / package.replace(".", "/")).glob(pattern.replace("/**", "/**/*"))
    }
    left_out = [p for p in committed() if PACKAGE in p.parents and p.suffix != ".py" and p not in shipped]
    assert not left_out, f"not in the wheel: add a pattern to [tool.setuptools.package-data]: {left_out}"


def test_licences_are_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    for pattern in pyproject()["project"]["license-files"]:
        assert list(ROOT.glob(pattern)), f"no file matches {pattern}: pyproject.toml promises it"
    texts = "\n".join(p.read_text(encoding="utf-8") for p in PACKAGE.glob("data/licenses/*"))
    for holder in ["Microsoft", "Unicode", "Miles Johnson"]:
        assert holder in texts, f"the licence of what comes from {holder} is missing in minicogview/data"


def test_weights_keep_within_their_budget() -> None:
    sizes = {p: p.stat().st_size for p in committed() if PACKAGE / "weights" in p.parents}
    assert sum(sizes.values()) <= 40e6
    assert all(size <= 12e6 for path, size in sizes.items() if path.name.startswith("coglm"))


# --- What is promised -------------------------------------------------------------------------------------


def test_version_is_the_same_everywhere() -> None:
    version = pyproject()["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= citation.keys()
    assert citation["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


def test_readme_is_short_and_starts_with_a_picture() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    first_command = next(i for i, line in enumerate(lines) if "make demo" in line)
    assert any(line.startswith("![") for line in lines[:first_command])


def test_readme_names_every_notebook() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for notebook in ROOT.glob("notebooks/[0-9]*.ipynb"):
        assert f"notebooks/{notebook.name}" in readme


def test_readme_has_every_module_in_its_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## Files")[1].split("```")[1]
    modules = {p.name for folder in (PACKAGE, ROOT / "kernels") for p in folder.rglob("[a-z]*.py")}
    assert modules <= set(re.findall(r"\w+\.py", tree)), "a module is missing in the README's tree"


def test_links_between_files_lead_somewhere() -> None:
    for page in of_kind(".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|#", target):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


# --- What may import what ---------------------------------------------------------------------------------

# A module imports from its own layer and from those before it; CONCEPTS are all others directly in minicogview/.
LAYERS = """errors numbers config < kernels < CONCEPTS < scale < checkpoints < pipeline < variations styles < data
< evaluation < figures training < cli __main__"""


def layer(module: str) -> int:
    room, layers = module.split(".")[1], [names.split() for names in LAYERS.split("<")]
    return next((i for i, names in enumerate(layers) if room in names), layers.index(["CONCEPTS"]))


def runtime_imports(module: str, path: Path) -> dict[str, int]:
    """Dotted names that a file imports, with their lines; in functions too, but not those for type checkers alone."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    guarded = [n.body for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    skipped = {inner for body in guarded for statement in body for inner in ast.walk(statement)}
    package, found = module if path.stem == "__init__" else module.rpartition(".")[0], {}
    for node in (node for node in nodes if node not in skipped):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            found |= dict.fromkeys([source, *(f"{source}.{alias.name}" for alias in node.names)], node.lineno)
    return found


def test_imports_lead_down_and_not_in_circles() -> None:
    paths = {*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")} - {PACKAGE / "__init__.py"}
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    graph = {name: {m: n for m, n in runtime_imports(name, p).items() if m in names} for name, p in names.items()}
    upwards = [(a, line, b) for a, found in graph.items() for b, line in found.items() if layer(b) > layer(a)]
    assert not upwards, "Imports lead down (" + " ".join(LAYERS.split()) + "). " + "; ".join(
        f"{name}, line {line}, imports {other} from a higher layer" for name, line, other in sorted(upwards)
    ) + ". Move what both need down, or pass it as an argument; put what annotations need under `if TYPE_CHECKING:`"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' imports '.join(reversed(error.args[1]))}. Move what both need into a lower module")


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    lines = ["import minicogview.a", "from minicogview import b", "from .c import d"]
    lines += ["if TYPE_CHECKING:", "    import e", "def f():", "    from minicogview.g import h"]
    (tmp_path / "new.py").write_text("\n".join(lines))
    found = runtime_imports("minicogview.data.new", tmp_path / "new.py")
    assert found.items() >= {f"minicogview.{m}": n for m, n in {"a": 1, "b": 2, "data.c": 3, "g": 7}.items()}.items()
    assert "e" not in found and layer("minicogview.errors") < layer("minicogview.vqvae") < layer("minicogview.cli.main")


# --- What must not creep in -------------------------------------------------------------------------------


def imported(source: str) -> set[str]:
    """Top-level names of the modules that Python source imports absolutely."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def python_sources() -> list[tuple[str, str]]:
    """(where, source) of every Python file and of every notebook's code, without lines that only IPython reads."""
    files = [(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in of_kind(".py")]
    for notebook in of_kind(".ipynb"):
        code = "\n".join(cells(notebook, "code"))
        files.append((notebook.name, re.sub(r"^\s*[%!].*$", "", code, flags=re.MULTILINE)))
    return files


def test_nothing_imports_a_top_level_kernels() -> None:
    assert imported("import kernels.a, os\nfrom kernels import b\nfrom . import c") == {"kernels", "os"}
    for where, source in python_sources():
        assert "kernels" not in imported(source), f"{where}: import minicogview.kernels, never kernels"


def test_training_imports_little() -> None:
    """Training can be imported with torch and six small packages alone; all others are hidden from it."""
    allowed = {"torch", "numpy", "einops", "sentencepiece", "safetensors", "pillow", "tqdm"}
    others = requirements(*pyproject()["project"]["optional-dependencies"]).keys() - allowed
    hidden = sorted(name.replace("-", "_") for name in others) + ["IPython", "yaml", "rattler"]
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in PACKAGE.glob("training/*.py")]
    program = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"  # None: "no such module"
    program += "\n".join(f"import {module.removesuffix('.__init__')}" for module in sorted(modules))
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_nothing_is_left_undone() -> None:
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "HA" + "CK", "XX" + "X"]) + r")\b")
    suffixes = (".py", ".md", ".toml", ".txt", ".yml", ".cff", ".cfg")
    texts = [(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in of_kind(*suffixes)]
    for notebook in of_kind(".ipynb"):
        texts.append((notebook.name, "\n".join(cells(notebook, "code") + cells(notebook, "markdown"))))
    for where, text in texts:
        found = marks.search(text)
        assert found is None, f"{where} still says {found[0]}"


def test_no_path_of_this_machine_is_committed() -> None:
    """Absolute paths mean nothing to the next reader: no path of this checkout, of a home or of a temporary folder."""
    for path in of_kind(".py", ".md", ".toml", ".txt", ".yml", ".cfg", ".json", ".ipynb"):
        text = path.read_text(encoding="utf-8")
        if len(ROOT.parts) > 2:  # "/src" alone could stand in any text
            assert str(ROOT) not in text, f"{path.relative_to(ROOT)} mentions {ROOT}"
        if path.suffix == ".ipynb":
            found = re.search(r"(?<![\w/.:])/(home|root|Users|tmp|var)/\w", text)
            assert found is None, f"{path.name} has the path {found[0]}... in it"


def test_modules_are_short_and_explained() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in of_kind(".py")}
    long = [str(path.relative_to(ROOT)) for path, source in sources.items() if len(source.splitlines()) > 400]
    assert not long, f"more than 400 lines, make two files of each: {', '.join(long)}"
    for path, source in sources.items():
        if source.strip() and PACKAGE in path.parents:
            where = path.relative_to(ROOT)
            assert ast.get_docstring(ast.parse(source)), f"{where}: say in a docstring what it is about"
