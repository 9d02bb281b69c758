"""The shared vocabulary: ids of the original and of the toy, text that comes back, pictures at three rates."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto
from test_pictures import gradient

from minicogview.config import PRESETS, VQVAEConfig
from minicogview.data import captions
from minicogview.data.emoji import load_emoji
from minicogview.errors import MiniCogViewError
from minicogview.pictures import to_pil
from minicogview.tokenizer import CHINESE, Tokenizer
from minicogview.training.text import main, toy_lines, train_text_tokenizer
from minicogview.vqvae import VQVAE

TEXT_MODEL = Path(__file__).parents[1] / "minicogview" / "weights" / "toy" / "text.model"
TOY = PRESETS["toy"]
SMALL_VQVAE = VQVAEConfig(
    channels=8,
    encoder_multipliers=(1, 1, 1),
    encoder_blocks=1,
    codebook_size=32,
    codebook_dim=8,
    decoder_multipliers=((1, 1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
    n_groups=4,
)


def original_like(n_common: int, n_english: int, n_chinese: int, n_pieces: int) -> bytes:
    """A SentencePiece model in the original's order: controls and punctuation, English, Chinese, bytes, the rest."""
    model = proto.ModelProto()
    Piece = proto.ModelProto.SentencePiece

    def add(piece: str, score: float = -10.0, kind: int = Piece.NORMAL) -> None:
        model.pieces.add(piece=piece, score=score, type=kind)

    add("<unk>", 0, Piece.UNKNOWN)
    for control in ("<s>", "</s>", "<pad>"):
        add(control, 0, Piece.CONTROL)
    for mark in [".", ",", ":", "▁", *(f"\ue000{i}" for i in range(n_common))][: n_common - 4]:
        add(mark)
    words = ["▁a", "▁red", "▁apple", *"abcdefghijklmnopqrstuvwxyz"]
    for word in [*words, *(f"▁word{i}" for i in range(n_english - len(words)))]:
        add(word, -5.0)
    words = ["红", "苹果", "苹", "果"]
    for word in [*words, *(f"词{i}" for i in range(n_chinese - len(words)))]:
        add(word, -5.0)
    for byte in range(256):
        add(f"<0x{byte:02X}>", 0, Piece.BYTE)
    for i in range(n_pieces - len(model.pieces)):
        add(f"\ue001{i}")
    model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = n_pieces
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.pad_id = 3
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


@pytest.fixture(scope="module")
def original() -> Tokenizer:
    """The original's sizes: 20000 codes, 130000 pieces of which 100 are common and 63723 English."""
    return Tokenizer(original_like(100, 63723, 61830, 130000), PRESETS["cogview2"].vqvae.codebook_size)


@pytest.fixture(scope="module")
def toy() -> Tokenizer:
    return Tokenizer(TEXT_MODEL, TOY.vqvae.codebook_size)


@pytest.fixture(scope="module")
def pictures() -> Tokenizer:
    torch.manual_seed(0)
    vqvae = VQVAE(SMALL_VQVAE).eval()
    return Tokenizer(TEXT_MODEL, codebook_size=32, vqvae=vqvae, level=1)


# ---- ids ----


def test_original_ids(original: Tokenizer) -> None:
    assert (original.unk, original.pad) == (20000, 20003)
    assert (original.boi, original.boe, original.boc) == (150000, 150001, 150002)
    assert original.vocab_size == 150003
    assert original.is_picture(0) and original.is_picture(19999) and not original.is_picture(20000)
    assert original.encode("a red apple") == [20100, 20101, 20102]
    assert original.encode("a红苹果") == [20100, 83823, 83824]
    assert original.token(83822).startswith("▁word") and original.token(145652).startswith("词")
    assert original.token(150002) == "<start_of_chinese>"


def test_original_language_goes_by_the_block(original: Tokenizer) -> None:
    assert original.language([20100, 83822]) == "en"
    assert original.language([20100, 83823]) == "zh"
    assert original.language([20100, 145653]) == "zh"  # rare pieces lie beyond the Chinese ones
    assert original.language_token(torch.tensor([20100])) == 150001
    assert original.language_token(torch.tensor([83823])) == 150002


@pytest.mark.parametrize("text", ["a red apple", "a 红苹果", "zebra 🦓", "  two  spaces", "\n"])
def test_original_like_text_comes_back(original: Tokenizer, text: str) -> None:
    assert original.decode(original.encode(text)) == text


def test_small_model_of_the_original_structure() -> None:
    tokenizer = Tokenizer(original_like(10, 50, 20, 400), codebook_size=30, first_chinese=90)
    assert tokenizer.n_text == 400 and tokenizer.boi == 430
    assert tokenizer.language(tokenizer.encode("red apple")) == "en"
    assert tokenizer.language(tokenizer.encode("红苹果")) == "zh"


def test_toy_agrees_with_its_preset(toy: Tokenizer) -> None:
    assert toy.n_text == TOY.n_text_pieces
    assert toy.vocab_size == TOY.coglm.transformer.vocab_size
    assert dataclasses.asdict(TOY.coglm.ids) == {name: getattr(toy, name) for name in ("pad", "boi", "boe", "boc")}
    assert (toy.unk, toy.eos, toy.pad) == (1024, 1026, 1027)
    assert [toy.token(i) for i in (17, toy.pad, toy.boi)] == ["picture 17", "<pad>", "<start_of_image>"]


def test_is_picture_of_a_tensor(toy: Tokenizer) -> None:
    ids = torch.tensor([[-1, 0], [1023, 1024]])
    assert torch.equal(torch.as_tensor(toy.is_picture(ids)), torch.tensor([[False, True], [True, False]]))


# ---- text ----


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@example("")
@example("  two  spaces, and one behind ")
@example("tab\tand\r\nnewline\x00zero")
@example("ﬀ ﬁ Å Å é é ½ ① Ⅳ ｆｕｌｌ ，。")
@example("👩🏽‍🚀 🏳️‍🌈 1️⃣ 🇨🇳 \u200d \ufe0f \ufeff")
@example("العربية हिन्दी ไทย 한국어 日本語 \u202eright to left")
@example("龘𠮷㐀 \U0010ffff \ue000")
@example("<s> </s> <pad> <unk> <0x41> <start_of_image>")
@example("\u2581low line")
def test_text_comes_back(toy: Tokenizer, text: str) -> None:
    ids = toy.encode(text)
    assert all(toy.unk < i < toy.boi and i not in (toy.pad, toy.eos) for i in ids)
    assert toy.decode(ids) == text.replace("\u2581", " ")  # the one documented exception


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_come_back_are_short_and_know_their_language(toy: Tokenizer, language: str) -> None:
    lengths = []
    for emoji in load_emoji("all"):
        name = captions.name(emoji, language)
        ids = toy.encode(name)
        assert toy.decode(ids) == name
        assert toy.language(ids) == ("zh" if CHINESE.search(name) else "en")
        lengths.append(len(ids))
    assert max(lengths) <= 12 and sum(lengths) / len(lengths) < 5.0


def test_each_skin_tone_is_told_by_one_piece(toy: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [toy.token(i) for i in toy.encode(text)]

    for tone, phrase in captions.TONE_PHRASES["en"].items():
        assert pieces(phrase) == [f"▁{tone}", "▁skin▁tone"]
        assert pieces(f"woman cook: {phrase}") == ["▁woman", "▁cook", ":", f"▁{tone}", "▁skin▁tone"]
    for phrase in captions.TONE_PHRASES["zh"].values():
        assert pieces(f"{phrase}的女人") == ["▁", phrase, "的", "女人"]


def test_a_word_is_the_same_piece_everywhere(toy: Tokenizer) -> None:
    [apple] = toy.encode("apple")
    assert toy.encode("a picture of a red apple")[-1] == apple
    chinese = toy.encode("苹果")[-1]
    assert chinese in toy.encode("红苹果") and chinese in toy.encode("一张苹果的图片")


def test_decode_leaves_out_special_tokens(toy: Tokenizer) -> None:
    ids = [toy.boe, *toy.encode("red apple"), toy.eos, toy.pad, toy.pad]
    assert toy.decode(ids) == toy.decode(torch.tensor(ids)) == "red apple"
    assert toy.decode([]) == "" and toy.language([]) == "en"


def test_decode_refuses_pictures_and_foreign_ids(toy: Tokenizer) -> None:
    with pytest.raises(MiniCogViewError, match=r"id 5 is no text.*decode_picture"):
        toy.decode([5])
    with pytest.raises(MiniCogViewError, match="id 5527 is no text"):
        toy.decode([toy.vocab_size])
    with pytest.raises(MiniCogViewError, match=r"ids are 0\.\.5526"):
        toy.token(toy.vocab_size)


def test_text_that_is_no_unicode(toy: Tokenizer) -> None:
    with pytest.raises(MiniCogViewError, match="not valid Unicode at character 4"):
        toy.encode("red \udcff")


# ---- loading ----


class Malicious:
    """Unpickling this would call a function."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a text model ran code",)


def test_missing_and_damaged_text_models(tmp_path: Path) -> None:
    path = tmp_path / "text.model"
    with pytest.raises(MiniCogViewError, match=r"text\.model cannot be read .*check the path"):
        Tokenizer(path, 1024)
    with pytest.raises(MiniCogViewError, match="cannot be read"):
        Tokenizer(tmp_path, 1024)
    whole = TEXT_MODEL.read_bytes()
    for content in (b"", b"no model", whole[:1000], whole[: len(whole) // 2], pickle.dumps(Malicious())):
        path.write_bytes(content)
        with pytest.raises(MiniCogViewError, match=r"text\.model is damaged .*reinstall"):
            Tokenizer(path, 1024)


def test_wrong_codebook_size() -> None:
    with pytest.raises(MiniCogViewError, match=r"32 codes.* 1024"):
        Tokenizer(TEXT_MODEL, 1024, vqvae=VQVAE(SMALL_VQVAE))


# ---- training ----


def test_train_text_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "new.model"
    lines = ["a red apple", "a green pear", "two red pears", "红苹果", "绿苹果"] * 5
    train_text_tokenizer(lines, path, n_pieces=376, whole=(" red apple",))
    tokenizer = Tokenizer(path, codebook_size=10)
    assert tokenizer.n_text == 376
    assert [tokenizer.token(i) for i in (10, 11, 12, 13)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.token(tokenizer.encode("a red apple")[-1]) == "▁red▁apple"
    assert tokenizer.decode(tokenizer.encode("ein Ärger 梨 🍐")) == "ein Ärger 梨 🍐"
    with pytest.raises(MiniCogViewError, match=r"no text model of 100 pieces.*small"):
        train_text_tokenizer(lines, path, n_pieces=100)
    with pytest.raises(MiniCogViewError, match="cannot write"):
        train_text_tokenizer(lines, tmp_path / "none" / "new.model", n_pieces=376)


def test_the_toy_can_be_trained_again(
    tmp_path: Path, toy: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path / "text.model")])
    assert "4500 pieces" in capsys.readouterr().out
    again = Tokenizer(tmp_path / "text.model", 1024)
    ours, new = ({t.token(i) for i in range(t.unk, t.boi)} for t in (toy, again))
    assert len(ours & new) > 0.99 * len(ours)  # another machine may round a score differently
    heldout = {name for emoji in load_emoji("heldout") for name in (emoji.en, emoji.zh)}
    assert not heldout & set(toy_lines())


# ---- pictures ----


@pytest.mark.parametrize("level", [0, 1, 2])
def test_three_rates_from_file_pil_and_tensor(tmp_path: Path, pictures: Tokenizer, level: int) -> None:
    tensor = gradient(32, 48)
    image = to_pil(tensor)
    image.save(tmp_path / "picture.png")
    rate = SMALL_VQVAE.rates[level]
    codes = pictures.encode_picture(tensor, level)
    assert codes.shape == (32 // rate, 48 // rate) and codes.dtype == torch.int64
    assert bool(torch.as_tensor(pictures.is_picture(codes)).all())
    for same in (image, tmp_path / "picture.png", str(tmp_path / "picture.png"), (tensor * 255).byte()):
        assert torch.equal(pictures.encode_picture(same, level), codes)
    back = pictures.decode_picture(codes, level)
    assert back.size == (48, 32) and back.mode == "RGB"
    assert pictures.vqvae is not None
    assert to_pil(pictures.vqvae.decode(codes[None], level)[0]).tobytes() == back.tobytes()


def test_default_level_and_sizes(pictures: Tokenizer) -> None:
    picture = gradient(30, 45)
    assert pictures.encode_picture(picture).shape == (4, 6)  # level 1: 8 pixels a token, rounded
    assert pictures.encode_picture(picture, size=32).shape == (4, 4)
    assert pictures.encode_picture(picture, size=(16, 100)).shape == (2, 12)
    assert pictures.encode_picture(gradient(1, 1)).shape == (1, 1)
    embedding = torch.nn.Embedding(32, 4)  # the codes can be trained on
    embedding(pictures.encode_picture(picture)).sum().backward()


def test_bad_pictures(tmp_path: Path, pictures: Tokenizer, toy: Tokenizer) -> None:
    with pytest.raises(MiniCogViewError, match=r"none\.png does not exist"):
        pictures.encode_picture(tmp_path / "none.png")
    with pytest.raises(MiniCogViewError, match=r"shape \(8, 8, 5\): give \(3, H, W\)"):
        pictures.encode_picture(torch.zeros(8, 8, 5))
    with pytest.raises(MiniCogViewError, match="size 0 is no picture size"):
        pictures.encode_picture(gradient(8, 8), size=0)
    with pytest.raises(MiniCogViewError, match=r"no level 3: choose 0 \(finest\) to 2"):
        pictures.encode_picture(gradient(8, 8), level=3)
    with pytest.raises(MiniCogViewError, match=r"give one picture as \(h, w\)"):
        pictures.decode_picture(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(MiniCogViewError, match=r"picture codes are 0\.\.31"):
        pictures.decode_picture(torch.full((2, 2), 32))
    with pytest.raises(MiniCogViewError, match="no picture half"):
        toy.encode_picture(gradient(8, 8))
