"""No golden file lies idle: each is read by a test in this folder."""

from __future__ import annotations

from pathlib import Path

from golden_data import GOLDEN


def test_every_golden_file_is_compared_with() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py"))
    checkpoints = {path.parents[1] for path in GOLDEN.rglob("mp_rank_00_model_states.pt")}  # fixtures read them whole
    files = [p for p in GOLDEN.rglob("*.*") if p.suffix != ".md" and not checkpoints & set(p.parents)]
    assert len(checkpoints) == 3 and len(files) > 20
    for path in files:
        name = path.relative_to(GOLDEN).as_posix()
        assert f'"{name}"' in source or f'"{path.stem}"' in source, f"no test in tests/parity compares with {name}"
