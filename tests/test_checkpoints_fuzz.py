"""Fuzzing the readers of weights: whatever files hold, the answer is a model or one line, and nothing else is opened.

A few hundred examples run with the tests; ``make fuzz`` runs many more, new ones every time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoints_importing import write_release
from tiny import TINY, write_tiny

from minicogview.checkpoints.importing import MODELS, check_source, check_vqvae, import_released
from minicogview.checkpoints.models import load_stages, plan_for
from minicogview.checkpoints.sat import SatFolder, open_torch_file
from minicogview.checkpoints.weight_files import FILES, load_coglm, load_config, load_vqvae
from minicogview.cli import doctor
from minicogview.cli.doctor import imported
from minicogview.coglm import CogLM
from minicogview.config import to_json
from minicogview.errors import MiniCogViewError
from minicogview.super_resolution import DirectSR

MANY = int(os.environ.get("MINICOGVIEW_FUZZ", "0"))  # examples of each test
SECONDS = 20.0  # of one example; the slowest takes less than one
BOUNDED = settings(
    max_examples=MANY or 40, derandomize=not MANY, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
SECRET = "outside.safetensors"  # stands beside the folders; no reader may open it

# --- values that people and attackers write

NUMBERS = st.one_of(
    st.integers(-3, 5), st.sampled_from([0, 1, 16, 64, 2**31, 2**63, 10**30, -(2**40)]), st.floats(), st.booleans()
)
NAMES = st.one_of(
    st.sampled_from(
        [f"../{SECRET}", "..", ".", "", "/etc/passwd", "link", "coglm.safetensors", "a\nb", "\x00", "../link"]
    ),
    st.text(max_size=12),
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)
DEEP = st.integers(1, 100_000).map(lambda n: '{"weight_map":' * n)


def paths_in(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in items for found in paths_in(value, (*path, key)))]


def changed(draw: Any, tree: Any) -> Any:
    """The same JSON with one to three values that are replaced or removed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from([path for path in paths_in(tree) if path] or [(None,)]))
        if last is None:
            break
        place = tree
        for key in above:
            place = place[key]
        if isinstance(place, dict) and draw(st.booleans()):
            del place[last]
        else:
            place[last] = draw(VALUES)
    return tree


def damaged(draw: Any, content: bytes) -> bytes:
    """The same bytes, cut, with some replaced, or with some more."""
    content = content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    changes = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        if changes:
            changes[draw(st.integers(0, min(len(changes), 2000) - 1))] = draw(st.integers(0, 255))
    return bytes(changes) + draw(st.binary(max_size=20))


# --- what must hold

seen: list[str] | None = None  # paths that were opened, while somebody watches


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: Python calls it whenever it opens a file. (safetensors opens files by itself, see below.)"""
    if seen is not None and event == "open" and isinstance(arguments[0], str):
        seen.append(arguments[0])


sys.addaudithook(watch)


@contextlib.contextmanager
def nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens within ends in a model or in one line, in bounded time, and opens no file out of the folder."""
    global seen
    from minicogview.checkpoints import reading

    opened: list[str] = []
    real = reading.safe_open
    with monkeypatch.context() as patch:
        patch.setattr(
            reading, "safe_open", lambda path, **options: (opened.append(str(path)), real(path, **options))[1]
        )
        seen, start = [], time.perf_counter()
        try:
            yield
        except MiniCogViewError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        finally:
            opened, seen = opened + seen, None
    assert time.perf_counter() - start < SECONDS
    allowed = (str(folder), "/proc", "/sys", *(entry for entry in sys.path if entry), sys.base_prefix)
    outside = [path for path in opened if not os.path.realpath(path).startswith(allowed)]
    assert not outside, outside
    assert not any(SECRET in path for path in opened)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    coglm = CogLM(TINY.coglm)
    write_release(folder / "release", {"coglm": coglm, "direct": DirectSR(TINY.direct, coglm.transformer)})
    import_released(folder / "release", folder / "index", TINY, limit=100_000)
    write_tiny(folder / "single")
    return folder


@pytest.fixture
def copied(made: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    @contextlib.contextmanager
    def copy(name: str) -> Iterator[tuple[Path, Any]]:
        """A fresh copy of a folder, and the context in which nothing else may happen."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(shutil.copytree(made / name, Path(temporary).resolve() / name))
            save_file({"x": torch.ones(1)}, folder.parent / SECRET)
            (folder / "link").symlink_to(folder.parent / SECRET)
            yield folder, lambda: nothing_else(folder, monkeypatch)

    return copy


def load_everything(folder: Path, calm: Callable[[], Any]) -> None:
    """All readers of a folder of this package's own files."""
    with calm():
        load_coglm(folder / FILES["coglm"])
    with calm():
        load_vqvae(folder / FILES["vqvae"])
    with calm():
        load_stages(folder, plan_for(folder))
    with calm():
        assert all("\n" not in line for line in imported(folder, verify=True)[0])


@BOUNDED
@given(data=st.data())
def test_indexes(copied: Any, data: st.DataObject) -> None:
    with copied("index") as (folder, calm):
        kind = data.draw(st.sampled_from(["coglm", "direct"]))
        path = folder / f"{kind}.safetensors.index.json"
        content, how = json.loads(path.read_text()), data.draw(st.sampled_from(["deep", "names", "values"]))
        if how == "names":  # the checksums are left out, so that nothing but the names is wrong
            weights = data.draw(st.lists(st.sampled_from(sorted(content["weight_map"])), min_size=1, max_size=3))
            content["weight_map"] |= {weight: data.draw(NAMES) for weight in weights}
            content["sha256"] = {}
        elif how == "values":
            content = changed(data.draw, content)
        path.write_text(data.draw(DEEP) if how == "deep" else json.dumps(content))
        load_everything(folder, calm)


@BOUNDED
@given(data=st.data())
def test_configurations(copied: Any, data: st.DataObject) -> None:
    with copied("single") as (folder, calm):
        for kind, config in (("coglm", TINY.coglm), ("vqvae", TINY.vqvae), ("direct", TINY.direct)):
            text = json.dumps(changed(data.draw, json.loads(to_json(config))))
            save_file({"x_norm.weight": torch.ones(2)}, folder / FILES[kind], metadata={"kind": kind, "config": text})
            with calm():
                load_config(folder / FILES[kind], kind)
        load_everything(folder, calm)


@BOUNDED
@given(data=st.data())
def test_bytes_of_weight_files(copied: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["single", "index"]))
    with copied(name) as (folder, calm):
        path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())))
        path.write_bytes(damaged(data.draw, path.read_bytes()))
        load_everything(folder, calm)


@BOUNDED
@given(data=st.data())
def test_names_and_shapes_in_weight_files(copied: Any, data: st.DataObject) -> None:
    with copied("single") as (folder, calm):
        names = data.draw(st.lists(st.one_of(NAMES, st.just("transformer.final_norm.weight")), max_size=4, unique=True))
        shapes = data.draw(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=4, max_size=4))
        dtypes = st.sampled_from([torch.float32, torch.bool, torch.int64, torch.float16, torch.complex64])
        state = {name: torch.ones(shape, dtype=data.draw(dtypes)) for name, shape in zip(names, shapes)}
        metadata = {"kind": "coglm", "config": to_json(TINY.coglm), "base": "x", "same_as_coglm": data.draw(NAMES)}
        save_file(state, folder / FILES["coglm"], metadata=metadata)
        save_file(
            state, folder / FILES["direct"], metadata=metadata | {"kind": "direct", "config": to_json(TINY.direct)}
        )
        load_everything(folder, calm)


@BOUNDED
@given(data=st.data())
def test_released_folders(copied: Any, data: st.DataObject) -> None:
    with copied("release") as (release, calm):
        folder = release / MODELS["coglm"]
        config, latest, file = folder / "model_config.json", folder / "latest", next(folder.glob("*/*.pt"))
        what = data.draw(st.sampled_from(["config", "config bytes", "latest", "file", "module"]))
        if what == "config":
            config.write_text(json.dumps(changed(data.draw, json.loads(config.read_text()))))
        elif what == "config bytes":
            config.write_bytes(damaged(data.draw, config.read_bytes()))
        elif what == "latest":
            latest.write_bytes(data.draw(st.one_of(NAMES.map(lambda n: n.encode(errors="replace")), st.binary())))
        elif what == "file":
            file.write_bytes(damaged(data.draw, file.read_bytes()))
        else:
            module = torch.load(file, weights_only=True)["module"]
            for name in data.draw(st.lists(st.sampled_from(sorted(module)), max_size=2)):
                module[name] = data.draw(st.one_of(VALUES, st.builds(torch.ones, st.integers(0, 3))))
            module[data.draw(st.one_of(NAMES, NUMBERS))] = data.draw(st.one_of(VALUES, st.just(torch.ones(2))))
            torch.save({"module": module}, file)
        with calm():
            check_source("coglm", SatFolder(folder), TINY)
        with calm():
            import_released(release, release / "out", TINY, ignore_unexpected=True)
        with calm():
            doctor.released(release, TINY)


@BOUNDED
@given(data=st.data())
def test_pickles(copied: Any, data: st.DataObject) -> None:
    """Any pickle, and the release's own files with a few bytes changed."""
    with copied("release") as (release, calm):
        file = release / "ice_image.pt"
        how = data.draw(st.sampled_from(["pickle", "legacy", "bytes", "tensors"]))
        value = data.draw(VALUES)
        if how == "pickle":
            file.write_bytes(pickle.dumps(value, protocol=data.draw(st.integers(0, 5))))
        elif how == "tensors":
            shapes = st.lists(st.integers(0, 3), max_size=4)
            torch.save({name: torch.ones(data.draw(shapes)) for name in data.draw(st.lists(NAMES, max_size=4))}, file)
        else:
            buffer = io.BytesIO()
            torch.save({"module": value, "x": torch.ones(3)}, buffer, _use_new_zipfile_serialization=how == "bytes")
            file.write_bytes(damaged(data.draw, buffer.getvalue()))
        with calm():
            open_torch_file(file)
        with calm():
            check_vqvae(file, TINY)


def test_the_watch_sees_what_is_opened(copied: Any) -> None:
    with copied("single") as (folder, calm), pytest.raises(AssertionError), calm():
        (folder.parent / SECRET).read_bytes()
