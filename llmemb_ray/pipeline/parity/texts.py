"""Texts on which engines have been seen to differ, for a comparison without a corpus. Data, and no more.

Each stands for a way to go wrong: quotes that merge with the template's own, names of special tokens, white space that a
tokenizer treats in its own way at a border, scripts outside the common vocabulary, texts that differ in their last token alone,
a text that is cut.
"""

from __future__ import annotations

TEXTS: tuple[str, ...] = (
    "A man is playing a guitar.",
    "A man is playing a flute.",
    "A man is playing a",
    "a man is playing a guitar.",
    "A man is playing a guitar",
    '"I never said that," she said.',
    '"',
    "'single', \"double\", “curly” and «angled»",
    'means in one word:"',
    'This sentence : "A dog barks." means in one word:"',
    'This sentence : "',
    " a space in front",
    "a space behind ",
    "\n\nlines in front, and\nlines\r\nbetween",
    "\ttabs\tbetween\twords\t",
    "many      spaces       inside",
    "a no-break\u00a0space, an ideographic\u3000space, a thin\u2009one",
    "zero\u200bwidth\u200dcharacters\ufeff and a soft\u00adhyphen",
    "</s>",
    "<s> at the front and </s> in the middle, <pad><unk>",
    "<|endoftext|> then <|im_start|>user then [INST] and [/INST]",
    "{text} {0} {} %s $name \\n",
    "x",
    "7",
    ".",
    "no final full stop",
    "WHY ARE YOU SHOUTING?!",
    "1234567890 3.14159265358979 -7e-9 0x1F 1,000,000.00",
    "2026-11-21T18:45:05+00:00",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    '{"key": [1, 2.0, null, "value"], "nested": {"a": "b"}}',
    "SELECT * FROM t WHERE a <> 'b' AND c IS NOT NULL;",
    "https://example.org/a/b?c=d&e=%20#f",
    "naïve café, déjà vu, Straße, Łódź, İstanbul",
    "e\u0301 is é, and a\u0323\u0302 has two marks; Z͑ͫa̴l̶g͓o̚",
    "数据科学很有趣，机器学习也是。",
    "日本語の文章には空白がありません",
    "한국어 문장입니다.",
    "هذه جملة باللغة العربية",
    "זהו משפט בעברית with English inside",
    "यह हिन्दी में एक वाक्य है",
    "😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 emoji of one and of many code points",
    "∀x∈ℝ: x² ≥ 0 ⇒ √(x²) = |x|",
    "a" * 200,
    "na " * 60,
)
"""Not one is cut under a limit of 512 tokens by a common vocabulary."""


def texts(max_tokens: int) -> list[str]:
    """TEXTS, and in second place one that is cut to ``max_tokens``."""
    words = ("The quick brown fox jumps over the lazy dog, again and again,", "until it is tired and lies down beside the river.")
    count = max_tokens // sum(len(part.split()) for part in words) + 1  # A word is a token at least.
    return [TEXTS[0], " ".join(words * count), *TEXTS[1:]]
