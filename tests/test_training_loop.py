"""The training loop: it learns, it resumes exactly, and its messages say what is wrong with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minicogview.errors import MiniCogViewError
from minicogview.scale import machine
from minicogview.training.loop import RunOptions, fit
from minicogview.training.optimizers import learning_rate, make_muon, make_optimizers, updates_in
from minicogview.training.state import EMA, Settings, checksum

SETTINGS = Settings(steps=40, lr=1e-2, warmup=5)
OPTIONS = RunOptions(log_every=4, save_every=5, progress=False, device="cpu")


class Regression:
    """A small regression with dropout, for which the random state matters, and with further state of its own."""

    def __init__(self, width: int = 32, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(8, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 1)]
        self.model = nn.Sequential(*layers)
        self.pause, self.seen, self.validated, self.batch_size = pause, torch.zeros(()), 0, 64

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        return x, x[:, :1] * x[:, 1:2]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        time.sleep(self.pause)
        x, y = self.batch(step)
        loss = (self.model(x) - y).square().mean()
        return loss, {"samples": len(x), "rmse": loss.detach().sqrt()}

    def after_step(self, step: int) -> None:
        self.seen += step

    def validate(self) -> dict[str, float]:
        assert not self.model.training and not torch.is_grad_enabled()
        torch.rand(3)  # must not disturb training
        self.validated += 1
        x, y = self.batch(10**6)
        return {"mse": (self.model(x) - y).square().mean().item()}

    def decides(self) -> dict[str, object]:
        return {"batch_size": self.batch_size, "data": "a1b2"}

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"]


def run(folder: Path, objective: Regression | None = None, **changes: object) -> tuple[Regression, dict]:
    """Train with some fields of SETTINGS and OPTIONS changed."""
    objective = objective or Regression()
    of_settings = {key: changes.pop(key) for key in list(changes) if hasattr(SETTINGS, key)}
    settings, options = dataclasses.replace(SETTINGS, **of_settings), dataclasses.replace(OPTIONS, **changes)
    return objective, fit(objective, folder, settings, options)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(one, other), name


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_learns_and_reports(tmp_path):
    objective, summary = run(tmp_path, steps=300, validate_every=100, ema_decay=0.98)
    assert summary["finished"] and summary["step"] == 300 and summary["start"] == 0
    assert objective.validated == 3
    log = read_log(tmp_path)
    losses = [line["train/loss"] for line in log if "train/loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert log[0]["train/samples_per_s"] > 0 and log[0]["train/rmse"] > 0
    # The model is left with the averaged weights, which were also those that were validated.
    objective.model.eval()
    with torch.no_grad():
        assert objective.validate()["mse"] == summary["validation"]["mse"]


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon")])
def test_resume_after_time_limit_is_exact(tmp_path, precision, optimizer):
    how = {"precision": precision, "optimizer": optimizer}
    whole, _ = run(tmp_path / "whole", validate_every=7, **how)
    for _ in range(SETTINGS.steps):  # every call does at least one step, then runs out of time
        parts, summary = run(tmp_path / "parts", max_seconds=0.0, **how)
        torch.rand(5)  # the random state must come from the checkpoint
    assert summary["finished"] and summary["start"] == SETTINGS.steps - 1
    assert_same_weights(whole.model, parts.model)
    assert torch.equal(whole.seen, parts.seen)
    again, summary = run(tmp_path / "parts", **how)  # a finished run returns its weights at once
    assert summary["start"] == SETTINGS.steps and summary["finished"]
    assert_same_weights(whole.model, again.model)


def stored_precision(folder: Path) -> str:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["settings"]["precision"]


@pytest.mark.parametrize("began", ["fp32", "bf16"])
def test_a_resumed_run_keeps_the_precision_it_began_with(tmp_path, monkeypatch, began):
    monkeypatch.setattr(machine, "bfloat16_pays", lambda device: began == "bf16")
    run(tmp_path, max_seconds=0.0)  # the default is "auto"
    assert stored_precision(tmp_path) == began
    monkeypatch.setattr(machine, "bfloat16_pays", lambda device: began != "bf16")  # as on another machine
    _, summary = run(tmp_path)
    assert summary["start"] == 1 and summary["finished"] and stored_precision(tmp_path) == began
    other = {"fp32": "bf16", "bf16": "fp32"}[began]
    with pytest.raises(MiniCogViewError, match=f"does not fit .precision was {began}, is {other}"):
        run(tmp_path, precision=other)
    run(tmp_path, resume=False, max_seconds=0.0)
    assert stored_precision(tmp_path) == other


def test_resume_after_sigkill_is_exact(tmp_path):
    whole, _ = run(tmp_path / "whole")
    killed = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process = subprocess.Popen([sys.executable, __file__, str(killed)], env=environment)
    deadline = time.monotonic() + 120
    while not (killed / "log.jsonl").exists() or len(read_log(killed)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(killed / "log.jsonl", "a") as file:
        file.write('{"step": 13, "tra')  # as a kill during a write leaves it
    (killed / "checkpoint.tmp").write_bytes(b"half a checkpoint")

    resumed, summary = run(killed)
    assert 0 < summary["start"] < SETTINGS.steps and summary["start"] % 5 == 0
    assert_same_weights(whole.model, resumed.model)
    steps = [line["step"] for line in read_log(killed)]
    assert steps == sorted(set(steps)) and steps[-1] == SETTINGS.steps


def test_damaged_checkpoint(tmp_path):
    run(tmp_path, steps=6)
    path = tmp_path / "checkpoint.pt"
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :]
    for bad in (b"", b"not a checkpoint", good[:middle], flipped):
        path.write_bytes(bad)
        with pytest.raises(MiniCogViewError, match=r"is damaged.*resume=False") as caught:
            run(tmp_path, steps=6)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == bad
    _, summary = run(tmp_path, steps=6, resume=False)
    assert summary["start"] == 0 and summary["finished"]


def test_foreign_checkpoint(tmp_path):
    run(tmp_path, steps=6)
    with pytest.raises(MiniCogViewError, match=r"does not fit \(lr was 0.01, is 0.02\)"):
        run(tmp_path, steps=6, lr=0.02)
    with pytest.raises(MiniCogViewError, match=r"does not fit.*size mismatch") as caught:
        run(tmp_path, Regression(width=16), steps=6)
    assert "\n" not in str(caught.value)
    torch.save({"something": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(MiniCogViewError, match=r"does not fit .it lacks 'settings'"):
        run(tmp_path, steps=6)


def test_everything_that_decides_the_result_is_compared(tmp_path):
    run(tmp_path, steps=6, max_seconds=0.0)
    other = Regression()
    other.batch_size = 8
    with pytest.raises(MiniCogViewError, match=r"lr was 0.01, is 0.02; batch_size was 64, is 8.: give") as caught:
        run(tmp_path, other, steps=6, lr=0.02)
    assert all(word in str(caught.value) for word in ("force=True (--force)", "resume=False (--no-resume)"))
    _, summary = run(tmp_path, other, steps=6, lr=0.02, weight_decay=0.5, force=True)
    assert summary["start"] == 1 and summary["finished"]
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert stored["settings"]["lr"] == 0.02 and stored["decides"]["batch_size"] == 8
    assert stored["optimizers"][0]["param_groups"][0]["weight_decay"] == 0.5  # the new setting is in use
    _, summary = run(tmp_path, steps=6, force=True)  # nothing left to do
    assert summary["start"] == 6 and summary["finished"]


def test_weights_that_are_not_trained_are_compared(tmp_path):
    def half_frozen(value: float) -> Regression:
        objective = Regression()
        objective.model[0].weight.requires_grad_(False).fill_(value)
        return objective

    run(tmp_path, half_frozen(0.1), steps=6, max_seconds=0.0)
    with pytest.raises(MiniCogViewError, match=r"weights that are not trained, such as 0\.weight, are others"):
        run(tmp_path, half_frozen(0.2), steps=6)
    assert run(tmp_path, half_frozen(0.1), steps=6)[1]["start"] == 1


def test_more_steps_extend_a_finished_run(tmp_path):
    run(tmp_path / "whole", steps=10, max_seconds=0.0)
    with pytest.raises(MiniCogViewError, match="steps was 10, is 14"):  # the schedule of an unfinished run is fixed
        run(tmp_path / "whole", steps=14)
    for name in ("whole", "parts"):
        run(tmp_path / name, steps=10)
        with pytest.raises(MiniCogViewError, match="steps was 10, is 9"):
            run(tmp_path / name, steps=9)
    whole, summary = run(tmp_path / "whole", steps=14)
    assert summary["start"] == 10 and summary["step"] == 14 and summary["finished"]
    for _ in range(4):
        parts, summary = run(tmp_path / "parts", steps=14, max_seconds=0.0)
        torch.rand(5)
    assert summary["start"] == 13 and summary["finished"]
    assert_same_weights(whole.model, parts.model)
    assert [line["step"] for line in read_log(tmp_path / "whole")][-1] == 14


def test_checksums_tell_data_apart():
    one, other = torch.arange(6), torch.arange(6).reshape(2, 3)
    assert checksum(one) == checksum(one.clone()) != checksum(other) != checksum(other, one)
    assert checksum(other.T) == checksum(other.T.contiguous()) and checksum(one, None) == checksum(one)
    assert checksum(one.to(torch.bfloat16)) != checksum(one.float()) and len(checksum(torch.zeros(()))) == 16


def test_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, max_seconds=0.0)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(MiniCogViewError, match=r"cannot write checkpoint.*no space left"):
        run(tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_divergence_is_reported_and_not_saved(tmp_path):
    class Diverging(Regression):
        def loss(self, step):
            loss, scalars = super().loss(step)
            return (loss * float("nan") if step >= 7 else loss), scalars

    with pytest.raises(MiniCogViewError, match=r"loss became nan.*lower lr.*no checkpoint was written$"):
        run(tmp_path / "new", Diverging(), save_every=None)
    with pytest.raises(MiniCogViewError, match=r"loss became nan.*lower lr.*the checkpoint of step 7 is still good$"):
        run(tmp_path, Diverging(), save_every=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 7 and all(v.isfinite().all() for v in state["model"].values())


def test_bad_settings_and_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MiniCogViewError, match="cannot make folder"):
        run(tmp_path / "file" / "run")
    with pytest.raises(MiniCogViewError, match="precision 'fp16': choose one of auto, fp32, bf16"):
        run(tmp_path, precision="fp16")
    with pytest.raises(MiniCogViewError, match="optimizer 'sgd': choose one of adamw, muon"):
        run(tmp_path, optimizer="sgd")
    with pytest.raises(MiniCogViewError, match="device 'abacus' cannot be used"):
        run(tmp_path, device="abacus")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("lr", value) for value in (0, -1, float("nan"), float("inf"), 1e30, "1e-3", None)),
        *(("steps", value) for value in (0, -1, 1.5, "9")),
        *(("weight_decay", value) for value in (float("nan"), -1, float("inf"))),
        *((every, value) for every in ("log_every", "save_every", "validate_every") for value in (0, -1, 0.5)),
        ("warmup", -1), ("grad_clip", 0), ("ema_decay", 1.1), ("betas", (0.9, 1.0)), ("betas", (0.9,)),
        ("max_seconds", -1), ("save_every_s", None), ("log_every", None),
    ],
)  # fmt: skip
def test_numbers_outside_of_their_range_are_refused(name: str, wrong: object) -> None:
    with pytest.raises(MiniCogViewError, match=rf"^{name} is .*: give ") as caught:
        dataclasses.replace(SETTINGS if hasattr(SETTINGS, name) else OPTIONS, **{name: wrong})
    assert "\n" not in str(caught.value)
    assert dataclasses.replace(SETTINGS, steps=5.0).steps == 5


def test_works_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(tmp_path, steps=4)
    assert len(read_log(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "tensorboard is not installed" in err


def test_weight_decay_groups_and_frozen_weights():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "norm": nn.LayerNorm(3), "linear": nn.Linear(3, 3)})
    model["frozen"] = nn.Linear(3, 3).requires_grad_(False)
    settings = Settings(steps=10, lr=1e-3, weight_decay=0.1)
    (adamw,) = make_optimizers(model, settings)
    decayed, kept = adamw.param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 3)] and decayed["weight_decay"] == 0.1
    assert len(kept["params"]) == 4 and kept["weight_decay"] == 0.0
    assert not any(name.startswith("frozen") for name in EMA(model, 0.9).names)
    rest, muon = make_optimizers(model, dataclasses.replace(settings, optimizer="muon"))
    assert isinstance(muon, torch.optim.Muon)
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(model["linear"].weight)]
    assert len([p for group in rest.param_groups for p in group["params"]]) == 4


def test_ema_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema, expected = EMA(model, decay=0.3), 0.0
    for step in range(6):
        nn.init.constant_(model.weight, step + 1.0)
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1.0)
    assert ema.shadow[0].item() == pytest.approx(expected)
    with ema.in_model():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 6.0


def test_schedule_depends_on_the_step_only():
    rates = [learning_rate(s, steps=100, lr=2.0, warmup=10) for s in range(101)]
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[0] == pytest.approx(0.2) and rates[55] == pytest.approx(1.0) and rates[100] == 0.0
    assert learning_rate(0, steps=5, lr=1.0, warmup=0) == 1.0


if __name__ == "__main__":
    run(Path(sys.argv[1]), Regression(pause=0.05))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_computes_in_the_precision_of_the_run(precision: str) -> None:
    """Torch's Muon always takes bfloat16, which a plain processor multiplies slowly; in fp32 none may be left."""
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 9), torch.randn(6, 9)
    weight = torch.nn.Parameter(start.clone())
    weight.grad = gradient.clone()
    muon = make_muon([weight], Settings(steps=1, lr=0.1, weight_decay=0.0))
    formats = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            formats.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor) and "mm" in str(func))
            return func(*args, **(kwargs or {}))

    with updates_in(precision), Watch():
        muon.step()
    assert formats == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert torch.equal(weight.grad, gradient)  # the gradient itself is not divided
    a, b, c = muon.param_groups[0]["ns_coefficients"]
    x = (0.05 * gradient + 0.95 * 0.05 * gradient).double()  # Nesterov momentum of the first step
    x = x / x.norm()
    for _ in range(muon.param_groups[0]["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = -0.1 * 0.2 * 9**0.5 * x  # "match_rms_adamw"
    atol = 1e-6 if precision == "fp32" else 5e-3
    torch.testing.assert_close((weight.detach() - start).double(), expected, atol=atol, rtol=0)
