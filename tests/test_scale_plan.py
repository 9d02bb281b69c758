"""Plans for little memory: what is chosen, what it means for the numbers, and what is said where nothing fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import ENLARGED
from torch import nn

from minicogview.checkpoints.models import SHIPPED, load_stages, plan_for
from minicogview.checkpoints.random_weights import models, write_random
from minicogview.checkpoints.weight_files import load_config
from minicogview.cli.main import main
from minicogview.config import get_preset
from minicogview.errors import MiniCogViewError
from minicogview.evaluation.cost import count_parameters
from minicogview.lopar import IterativeSR
from minicogview.pipeline import CogView2
from minicogview.scale import plan as plan_module
from minicogview.scale.plan import Formats, Plan, Sizes, Way, bytes_of, choose_formats, choose_plan, parse_memory
from minicogview.scale.quantization import Int4ProductLinear, QuantizedLinear

BIG = get_preset("cogview2")
TOY = SHIPPED / "toy"
BF16 = torch.bfloat16
HALF = Formats(BF16, BF16)  # computed in what it is kept in
PLAIN = Formats(torch.float32, BF16)  # on a CPU that has no bfloat16 instructions


def sizes(mapped: bool = True) -> Sizes:
    return Sizes.of(BIG.coglm, BIG.direct, True, mapped)


@pytest.mark.parametrize("name", ["toy", "small", "cogview2"])
def test_sizes_are_those_of_the_modules(name: str) -> None:
    preset = get_preset(name)
    found = Sizes.of(preset.coglm, preset.direct, iterative=True)
    counted = count_parameters(*models(preset).values())
    assert abs(found.parameters - counted) < 0.02 * counted  # LoPAR's fine positions and norms at the end are left out
    assert Sizes.of(preset.coglm, None, iterative=False).stages == 1


@pytest.mark.parametrize("formats", [HALF, PLAIN])
@pytest.mark.parametrize(
    ("gigabytes", "device", "ways", "one_by_one"),
    [
        (4, "cpu", ("disk", "disk", "disk"), False),
        (6, "cpu", ("int4", "disk", "disk"), False),
        (12, "cpu", ("int8", "disk", "disk"), False),
        (24, "cpu", ("memory", "disk", "disk"), False),
        (40, "cpu", ("memory", "memory", "memory"), False),
        (6, "cuda", ("int4", "disk", "disk"), True),
        (12, "cuda", ("int8", "int8", "int8"), True),
        (24, "cuda", ("memory", "memory", "memory"), True),
        (40, "cuda", ("memory", "memory", "memory"), False),
    ],
)
def test_what_the_6b_model_does_in_so_much_memory(
    gigabytes: float, device: str, ways: tuple[Way, Way, Way], one_by_one: bool, formats: Formats
) -> None:
    plan = choose_plan(sizes(device == "cpu"), int(gigabytes * 1e9), formats, device)
    assert ((plan.coglm, plan.direct, plan.iterative), plan.one_by_one) == (ways, one_by_one)
    assert 0 < plan.needed <= gigabytes * 1e9
    more = bytes_of((*ways, one_by_one), sizes(device == "cpu"), formats, plan.batch or 1)
    assert more <= gigabytes * 1e9  # that many pictures side by side fit as well
    assert f"{plan.needed / 1e9:.1f} GB" in str(plan) and device in str(plan)


def test_number_formats_follow_what_the_machine_does_well(monkeypatch: pytest.MonkeyPatch) -> None:
    single, half, large = torch.float32, torch.float16, 6 * 10**9
    for pays, chosen in ((True, HALF), (False, PLAIN)):
        monkeypatch.setattr(plan_module, "bfloat16_pays", lambda device, pays=pays: pays)
        assert choose_formats("auto", large, "cpu", stored=BF16) == chosen
        assert choose_formats("auto", large, "cpu", stored=single) == chosen
        assert choose_formats("auto", 10**7, "cpu", stored=half) == (single, single)
        assert choose_formats("float32", large, "cpu", stored=half) == (single, half)
        assert choose_formats("float32", large, "cpu", stored=single) == (single, single)
        assert choose_formats("bfloat16", large, "cpu", stored=half) == HALF
    assert choose_formats("auto", large, "cuda", stored=half) == (half, half)  # an older GPU
    assert "float32 with matrices in bfloat16 on cpu" in str(choose_plan(sizes(), 6 * 10**9, PLAIN))


def test_memory_that_cannot_be_found_out_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "free_memory", lambda device: None)
    assert parse_memory("auto") is None
    plan = choose_plan(sizes(), None, HALF)
    assert plan.coglm == plan.direct == plan.iterative == "memory"
    assert CogView2.from_pretrained("toy", memory="auto").coglm.device.type == "cpu"


def test_more_memory_never_gives_a_smaller_plan() -> None:
    needed = [choose_plan(sizes(), int(g * 1e9), HALF).needed for g in range(3, 40)]
    assert needed == sorted(needed) and len(set(needed)) == 5


def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MiniCogViewError, match=r"1.00 GB of memory are not enough: layers from the disk.*about 2\.5"):
        choose_plan(sizes(), 10**9, HALF)
    for wrong in ("6", "lots", "-1GB", "0GB", "GB", "6TB"):
        with pytest.raises(MiniCogViewError, match="auto, or a size such as 6GB"):
            parse_memory(wrong)
    assert [parse_memory(size) for size in ("6GB", "1.5 gb", "80MB")] == [6 * 10**9, 15 * 10**8, 8 * 10**7]
    assert (parse_memory("auto") or 10**9) > 10**8
    with pytest.raises(MiniCogViewError, match="choose auto, float32"):
        choose_formats("int3", 1, "cpu", BF16)
    out = ["--out", str(tmp_path / "pictures")]
    bad = {"--memory": ("1MB", "not enough"), "--dtype": ("x", "choose auto"), "--device": ("x", "cannot be used here")}
    for option, (value, said) in bad.items():
        assert main(["generate", "a red apple", "--n", "1", *out, option, value]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and error.count("\n") == 0, error
    assert not (tmp_path / "pictures").exists()


# --- the toy under every plan ---------------------------------------------------------------------------------------


def toy(**ways: object) -> CogView2:
    return CogView2.from_pretrained("toy", memory=dataclasses.replace(Plan(), **ways))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    fine = CogView2.from_pretrained("toy").generate("a red apple", n=1, seed=0).fine_tokens
    assert fine is not None
    return fine


@pytest.mark.parametrize("one_by_one", [False, True])
def test_layers_from_the_disk_change_nothing(reference: torch.Tensor, one_by_one: bool) -> None:
    model = toy(coglm="disk", direct="disk", iterative="disk", one_by_one=one_by_one)
    for _ in range(2):
        assert torch.equal(model.generate("a red apple", n=1, seed=0).fine_tokens, reference)
    assert model.coglm.transformer.walk is not iter and model.upsampler is not None
    assert model.upsampler.direct.walk is not iter


def linear_kinds(module: nn.Module) -> set[type]:
    return {type(part) for part in module.modules() if hasattr(part, "bias") and not isinstance(part, nn.LayerNorm)}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_eight_bits_draw_almost_the_same_picture(reference: torch.Tensor, dtype: torch.dtype) -> None:
    model = toy(coglm="int8", direct="int8", iterative="int8", dtype=dtype)
    kind = QuantizedLinear if dtype == torch.float32 else Int4ProductLinear
    assert linear_kinds(model.coglm.transformer.layers) == {kind}
    assert model.upsampler and linear_kinds(model.upsampler.direct.fine_layers) == {kind}
    fine = model.generate("a red apple", n=1, seed=0).fine_tokens
    assert fine is not None and (fine == reference).float().mean() > 0.9


def test_four_bits_still_know_an_apple(reference: torch.Tensor) -> None:
    model = toy(coglm="int4", direct="disk", iterative="disk", dtype=BF16)
    scores = model.score(model.generate("a red apple", n=1, seed=0)[0], ["a red apple", "a dog", "blue heart"])
    assert scores.argmax() == 0
    base = load_stages(TOY, Plan()).coglm.transformer
    direct = model.upsampler and model.upsampler.direct
    assert direct and isinstance(direct.base.layers[0].attention.qkv, nn.Linear)  # its own, not CogLM's
    assert direct.base.token_embedding.weight.data_ptr() == model.coglm.transformer.token_embedding.weight.data_ptr()
    assert direct.base.layers[0].mlp.up.weight.shape == base.layers[0].mlp.up.weight.shape


def test_stages_in_few_bits_wait_in_memory_and_come_back() -> None:
    model, whole = toy(coglm="int8", direct="int8", iterative="int8", one_by_one=True), toy(coglm="int8", direct="int8")
    offload, read = model.offload, list[str]()
    assert offload is not None and offload.stands_on == {}  # the direct stage has a quantized base of its own
    for name, bring in offload.bring.items():
        offload.bring[name] = lambda name=name, bring=bring: (read.append(name), bring())
    for _ in range(2):
        one, other = (m.generate("a red apple", n=1, seed=0, stages=2).fine_tokens for m in (model, whole))
        assert one is not None and other is not None and torch.equal(one, other)
    assert read == ["coglm", "direct"]  # once each


def test_bfloat16_halves_the_weights_and_keeps_the_picture(reference: torch.Tensor) -> None:
    model = CogView2.from_pretrained("toy", dtype="bfloat16")
    assert {p.dtype for p in model.coglm.parameters()} == {BF16}
    fine = model.generate("a red apple", n=1, seed=0).fine_tokens
    assert fine is not None and (fine == reference).float().mean() > 0.8


# --- weights that nobody trained ------------------------------------------------------------------------------------


def test_random_weights_have_the_form_of_imported_ones(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "random", ENLARGED)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors*")}
    write_random(folder, ENLARGED)  # again: nothing to do
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors*")}
    assert load_config(folder / "direct.safetensors", "direct") == ENLARGED.direct
    plan = plan_for(folder)
    stages = load_stages(folder, plan)
    assert stages.direct and stages.direct.base is stages.coglm.transformer  # one file's weights serve both
    assert isinstance(stages.iterative, IterativeSR)
    matrix = stages.iterative.base.layers[0].mlp.up.weight.detach()
    assert 0.018 < float(matrix.std()) < 0.022 and len(matrix.unique(dim=0)) == len(matrix)
    pictures = CogView2.from_pretrained(folder, ENLARGED).generate("a red apple", n=1)
    assert pictures[0].size == (36, 36)


def test_the_command_makes_random_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("one", "two"):
        options = ["--weights", "random", "--memory", "4GB", "--n", "1", "--out", str(tmp_path / name)]
        assert main(["generate", "a red apple", *options]) == 0
        said = capsys.readouterr().err
        assert "random-toy" in said and "plan: all weights in memory" in said
    one, two = (Image.open(tmp_path / name / "a-red-apple_0.png").tobytes() for name in ("one", "two"))
    assert one == two


def test_random_weights_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(MiniCogViewError, match=r"1.0 GB free, random weights of cogview2 take 27.3 GB more"):
        write_random(tmp_path / "random", BIG)
    assert not (tmp_path / "random").exists()
