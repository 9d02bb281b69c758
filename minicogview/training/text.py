"""Train a text model, and the words that the toy's text model is trained on.

The idea: a small vocabulary is worth most when every word of a caption is one piece, and the same piece in every
sentence. So names, tags and the words of templates are separate lines of the training text: no piece can then
reach across the border between a name and its template.

    python -m minicogview.training.text [PATH]

writes the toy's model. Nothing is random: the same captions give the same file.

Follows: T. Kudo, "Subword regularization" (2018), the unigram model of SentencePiece, with byte fallback.
Simplified: Chinese is not segmented into words first; its pieces are strings that several names share.
"""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from minicogview.config import PAD_PIECE, PRESETS
from minicogview.data import captions as emoji_captions
from minicogview.data.emoji import load_emoji
from minicogview.errors import MiniCogViewError
from minicogview.tokenizer import CHINESE, EOS, UNK, Tokenizer

# Every model that we train can spell these characters, even if its captions do not contain them.
ALWAYS_SPELLED = "".join(map(chr, range(33, 127))) + "’“”、。！（），：；？"
BORDER = "\u241f"  # marks in the training text a border that no piece may cross; never part of a model

NAME_WEIGHT = 8  # how often a name is repeated; a tag stands once
MIN_TAGS = 3  # words that are in fewer tags, and in no name, are spelled in parts or bytes
WORD = re.compile(f"[A-Za-z]+|{CHINESE.pattern}")

# Always one piece. Half of all captions name a skin tone, which decides what is drawn; the other words combine with
# any word ("woman astronaut", "the man who ..."), so no piece may reach across their borders.
TONES = (" medium-light", " medium-dark", " skin tone", *emoji_captions.TONE_PHRASES["zh"].values())
JOINING = ("的", "男", "女", "男人", "女人", "男生", "女生", "男孩", "女孩", "男性", "女性", "男子", "女子")

# Some everyday language, so that a user's own words are not spelled in bytes.
COMMON_EN = """
a an the this that these those some any no not one two three four five six seven eight nine ten many few
more most and or but with without of in on at to from by for as like over under above below behind between
beside near inside left right top bottom middle up down here there is are was be has have do make made draw
drawn drawing show shows please I you he she it we they my your his her its our want need see look looking
give take put go come sit sitting stand standing run running walk walking jump sleep sleeping eat eating
drink play playing read write smile smiling cry crying laugh wearing holding flying swimming dancing waving
riding cooking red orange yellow green blue purple pink brown black white grey gray gold silver bright dark
light medium pale colorful colour color big large small little tiny huge tall short long wide round square
flat thin fat old young new happy sad angry funny cute beautiful hot cold warm wet dry soft hard fast slow
good bad nice simple picture photo image icon emoji symbol sign logo cartoon painting sketch sticker flat
style background scene face head eye eyes nose mouth ear hair hand arm leg foot body heart man woman person
people boy girl child baby mother father family friend doctor teacher farmer king queen cat dog bird fish
horse cow pig sheep mouse rabbit bear lion tiger monkey elephant snake frog bee butterfly dragon tree flower
leaf grass plant forest mountain river lake sea ocean beach island desert field garden sky sun moon star
cloud rain snow wind fire water ice earth day night morning evening spring summer autumn winter house home
door window room bed table chair kitchen school hospital shop street road bridge city town village car bus
train bicycle boat ship plane rocket ball game music book pen paper phone computer clock lamp key box bag
cup plate knife fork apple banana orange grape lemon cherry strawberry bread cake cheese egg meat rice soup
coffee tea milk juice beer wine very really so too also just only again always never now then when where who
what which how why if because while than about around through into out off after before during both each
every all another other same different him them us me our own can could will would should may must let like
love hate think know say tell open close closed full empty half first second last next best great strong
cool lovely sleepy tired hungry angry surprised wooden golden shiny colored striped long-haired red-haired
dark-skinned light-skinned pair group lots bit kind type wine hat shirt shoes dress glasses ring crown
circle square triangle rectangle cross arrow line dot
"""
COMMON_ZH = """
的 了 是 在 有 和 与 或 不 没有 我 你 他 她 它 我们 你们 他们 这 那 这个 那个 一个 一只 一张 一幅 一位
一名 一条 一朵 一片 一些 两个 三个 四个 五个 六个 七个 八个 九个 十个 很多 几个 请 画 画一个 给我 看 想 要
做 拿 拿着 戴着 穿着 坐着 站着 跑步 走路 跳 睡觉 吃 喝 玩 读 写 笑 微笑 哭 飞 游泳 跳舞 挥手 骑 做饭
上面 下面 左边 右边 中间 里面 外面 旁边 前面 后面 上 下 左 右 前 后 红色 橙色 黄色 绿色 蓝色 紫色 粉色
棕色 黑色 白色 灰色 金色 银色 红 橙 黄 绿 蓝 紫 粉 黑 白 灰 深 浅 亮 暗 大 小 大的 小的 高 矮 长 短
圆 方 老 年轻 新 旧 快乐 开心 难过 伤心 生气 可爱 漂亮 美丽 有趣 热 冷 温暖 简单 图片 照片 图像 图标 表情
表情符号 符号 标志 卡通 绘画 素描 贴纸 风格 背景 脸 头 眼睛 鼻子 嘴 耳朵 头发 手 手臂 腿 脚 身体 心 男人
女人 人 男孩 女孩 孩子 婴儿 妈妈 爸爸 家庭 朋友 医生 老师 农民 国王 女王 男 女 猫 狗 鸟 鱼 马 牛 猪 羊
老鼠 兔子 熊 狮子 老虎 猴子 大象 蛇 青蛙 蜜蜂 蝴蝶 龙 树 花 叶子 草 植物 森林 山 河 湖 海 海洋 沙滩 岛
沙漠 花园 天空 太阳 月亮 星星 云 雨 雪 风 火 水 冰 地球 白天 夜晚 早上 晚上 春天 夏天 秋天 冬天 房子 家
门 窗户 房间 床 桌子 椅子 厨房 学校 医院 商店 街道 路 桥 城市 村庄 汽车 公共汽车 火车 自行车 船 飞机 火箭
球 游戏 音乐 书 笔 纸 手机 电脑 时钟 灯 钥匙 盒子 包 杯子 盘子 刀 叉子 苹果 香蕉 橙子 葡萄 柠檬 樱桃 草莓
面包 蛋糕 奶酪 非常 很 太 真 好 也 都 还 就 只 再 又 正在 已经 总是 从来 因为 所以 如果 但是 而且 什么
谁 哪里 怎么 为什么 现在 今天 明天 昨天 时候 时间 东西 地方 事情 问题 世界 生活 工作 学习 喜欢 爱 恨 知道
觉得 认为 说 告诉 看见 听 闻 开 关 来 去 回 进 出 起来 下来 每个 所有 其他 同样 不同 第一 最后 最好 强壮
酷 困 累 饿 惊讶 木头 金色的 闪亮 条纹 一双 一对 一群 一杯 一碗 一本 一座 一辆 一架 一棵 一件 一顶 一块
一把 一根 一颗 一头 一匹 一间 帮我 可以 能 会 应该 必须 让 把 被 给 对 从 到 跟 像 鸡蛋 肉 米饭 汤 咖啡
茶 牛奶 果汁 啤酒 酒 帽子 衬衫 鞋子 裙子 眼镜 戒指 皇冠 圆形 方形 三角形 长方形 十字 箭头 线 点
"""


def train_text_tokenizer(
    captions: Iterable[str],
    path: str | Path,
    n_pieces: int,
    whole: Sequence[str] = (),
    max_piece_length: int = 16,
) -> None:
    """Train a SentencePiece unigram model and write it to ``path``.

    Decoding returns the text exactly: there is no Unicode normalisation, every space is kept, and characters that
    are in none of the captions are spelled in bytes. The one exception is SentencePiece's own: U+2581 stands for a
    space and is decoded as one.

    Args:
        captions: texts in all languages that the model should know.
        path: where the model is written.
        n_pieces: number of pieces, including 4 control pieces and 256 bytes.
        whole: phrases that always become one piece, such as skin tones; a space is written as it is.
        max_piece_length: longest piece, in characters.

    Raises:
        MiniCogViewError: if SentencePiece cannot make this many pieces from these captions, or ``path`` cannot be
            written.
    """
    model = io.BytesIO()
    # A space before Chinese is a piece of its own, so that a word is the same piece in every place.
    lines = [re.sub(f"(?:^|(?<= ))(?={CHINESE.pattern})", BORDER, line) for line in captions]
    # SentencePiece only considers strings that occur in two different words: "apple." makes "apple" one of them.
    lines += sorted({f"{word}." for line in lines for word in re.findall("[!-~]+", line)})
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=n_pieces,
            character_coverage=1.0,
            byte_fallback=True,
            required_chars=ALWAYS_SPELLED,
            pretokenization_delimiter=BORDER,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,  # "apple" is the same piece at the start and after a space
            user_defined_symbols=[phrase.replace(" ", "\u2581") for phrase in whole],
            max_sentencepiece_length=max_piece_length,
            unk_id=UNK,
            bos_id=1,
            eos_id=EOS,
            pad_id=PAD_PIECE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]  # the part before it is a line of SentencePiece's source
        raise MiniCogViewError(f"no text model of {n_pieces} pieces from these captions: {reason}") from None
    try:
        Path(path).write_bytes(model.getvalue())
    except OSError as error:
        raise MiniCogViewError(f"cannot write {path} ({error.strerror}): choose another folder") from None


def toy_lines() -> list[str]:
    """All lines that the toy's text model is trained on: names, tags, templates and common words."""
    emoji = load_emoji("names")
    lines = [name for one in load_emoji("train") if one.tone for name in (one.en, one.zh)]
    lines += [name for one in emoji for name in (one.en, one.zh)] * NAME_WEIGHT
    lines += _common_tags([tag for one in emoji for tag in (*one.tags_en, *one.tags_zh)], lines)
    for template in (*emoji_captions.TEMPLATES["en"], *emoji_captions.TEMPLATES["zh"]):
        lines += [part.strip() for part in template.split("{}") if part.strip()] * NAME_WEIGHT
    lines += [*COMMON_EN.split(), *COMMON_ZH.split()] * NAME_WEIGHT
    return lines + [f"{word}。" for word in COMMON_ZH.split()]  # "word。" is the second word that contains it


def _common_tags(tags: list[str], names: list[str]) -> list[str]:
    """Tags without rare words and characters; those that are in a name count as common."""
    known = set(WORD.findall(" ".join(names)))
    count = Counter(WORD.findall(" ".join(tags)))
    return [tag for tag in tags if all(w in known or count[w] >= MIN_TAGS for w in WORD.findall(tag))]


def train_toy(path: str | Path) -> None:
    """Train the toy's text model and write it to ``path``."""
    train_text_tokenizer(toy_lines(), path, PRESETS["toy"].n_text_pieces, whole=TONES + JOINING)


def lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Number of tokens of some texts: ``mean``, ``p95`` (95 % of the texts have at most this many) and ``max``."""
    counts = sorted(len(tokenizer.encode(text)) for text in texts)
    p95 = counts[int(0.95 * (len(counts) - 1))]
    return {"mean": round(sum(counts) / len(counts), 2), "p95": p95, "max": counts[-1]}


def main(arguments: Sequence[str]) -> None:
    """Train the toy's text model, write it into the package or to the given path, and print how long names are."""
    shipped = Path(__file__).parents[1] / "weights" / "toy" / "text.model"
    path = Path(arguments[0]) if arguments else shipped
    train_toy(path)
    tokenizer = Tokenizer(path, PRESETS["toy"].vqvae.codebook_size)
    print(f"{path}: {tokenizer.n_text} pieces, {path.stat().st_size} bytes")
    for split in ("names", "all"):
        emoji = load_emoji(split)
        print(f"English names, {split}:", lengths(tokenizer, [one.en for one in emoji]))
        print(f"Chinese names, {split}:", lengths(tokenizer, [one.zh for one in emoji]))


if __name__ == "__main__":
    main(sys.argv[1:])
