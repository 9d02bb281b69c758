"""What running the notebooks cannot show: that they were committed executed, complete, and in the house's form."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HIDES_TRITON = Path(__file__).parent / "no_triton"
FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STEMS = (
    "00_quickstart",
    "01_tokenizer",
    "02_transformer",
    "03_masking",
    "04_coglm",
    "05_sampling",
    "06_local_attention",
    "07_super_resolution",
    "08_lopar",
    "09_editing",
    "10_from_toy_to_6b",
)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def test_all_notebooks_are_there() -> None:
    assert tuple(path.stem for path in NOTEBOOKS) == STEMS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_code_cell_was_executed_in_order(path: Path) -> None:
    counts = [cell["execution_count"] for cell in cells(path, "code") if source(cell).strip()]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks` and commit the outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_hold_no_error_no_noise_and_no_path(path: Path) -> None:
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source(cell)
            assert output.get("name") != "stderr", f"stderr in: {source(cell)}"
            text = json.dumps({k: v for k, v in output.get("data", {}).items() if k != "image/png"})
            text += "".join(output.get("text", []))
            assert not re.search(r"/(home|root|tmp|Users|work)/", text), source(cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_come_first(path: Path) -> None:
    first = cells(path, "code")[0]
    assert "parameters" in tags(first)
    assert 'PRESET = "toy"' in source(first) and "SEED = 0" in source(first)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_three_exercises_with_stub_check_and_hidden_solution(path: Path) -> None:
    code = cells(path, "code")
    solutions = [cell for cell in code if "### BEGIN SOLUTION" in source(cell)]
    assert len(solutions) >= 3
    for cell in solutions:
        assert "### END SOLUTION" in source(cell)
        assert cell["metadata"]["nbgrader"]["solution"] is True
        assert cell["metadata"]["jupyter"]["source_hidden"] is True
    assert sum(bool(re.search(r"return \.\.\.", source(cell))) for cell in code) >= 3
    assert sum("not done yet" in str(cell["outputs"]) for cell in code) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_files(path: Path) -> None:
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#\s]+)", source(cell)):
            if not target.startswith(("http:", "https:")):
                assert (FOLDER / target).exists(), f"{path.name}: {target}"


def imports_triton(path: Path) -> bool:
    return any(re.search(r"^\s*(import|from) triton\b", source(cell), re.MULTILINE) for cell in cells(path, "code"))


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if imports_triton(path)], ids=lambda path: path.stem)
def test_notebook_runs_to_its_end_without_triton(path: Path, tmp_path: Path) -> None:
    """As on macOS and Windows: one line says what is missing, and no cell fails."""
    folders = os.pathsep.join([str(HIDES_TRITON), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", str(tmp_path)]
    ended = subprocess.run([*command, str(path)], env={**os.environ, "PYTHONPATH": folders}, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]
    outputs = [output for cell in cells(tmp_path / path.name, "code") for output in cell["outputs"]]
    said = "".join("".join(output.get("text", [])) for output in outputs)
    assert re.search(r"^Triton is missing: .* pip install triton \(Linux only\)$", said, re.MULTILINE)
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)


def test_only_the_notebook_of_the_kernels_imports_triton() -> None:
    assert [path.stem for path in NOTEBOOKS if imports_triton(path)] == ["06_local_attention"]
