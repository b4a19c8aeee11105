"""Texts on which two encoders that differ are likely to show it."""

from __future__ import annotations

import json.decoder
import random
from functools import cache
from pathlib import Path

from data.tokenization.special import ASSISTANT, END, END_OF_TEXT, PAD, SYSTEM, USER

# The first article of the Universal Declaration of Human Rights, or its first sentence.
LANGUAGES = (
    "All human beings are born free and equal in dignity and rights. They aren't, they'll say; it's 1948's.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "'Ολοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由,在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።",
)

EDGES = (
    "",
    " ",
    "\n",
    "\0\0a\0",
    "a  b   c \n \n\n\t\t x \r\n\r\n y\u00a0\u2003\u3000z \u2028\u200b",
    "    def f(x):\n        return x\n\n\n\tif x:  # tab\n" + " " * 300 + "end",
    "1 12 123 1234 12345 3.14 1e-9 ٣٤٥ ²³ Ⅷ ½ १२३",
    "'s 'S 'll 'LL 'Ve don't DON'T ’s 'ſ it''s",
    "😀👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇫🇷 e\u0301 n\u0303 \u0301",
    "▁ a▁b ▁▁ <0x41> <unk> <s> </s> [PAD]",
    "ıİſK\u212aÅ ﬁ ǅ \u200d\ufeff\ufffd\U0010ffff\ue000",
    "".join([END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END]),
    f"text {END_OF_TEXT} in {USER}the middle{END}\n{END_OF_TEXT}{END_OF_TEXT} <|end <|endoftext |>",
    "a" * 5000 + "ab" * 500 + "=" * 500 + "\n" * 100,
    # Letters that came with Unicode 16 and 17: libraries built on older tables take them for punctuation.
    *(f"a{letter}'s{letter}1 {letter}\n" for letter in "\u1c89\ua7cb\U000105c0\u088f\ua7ce\U00016ea0\U000323b0"),
)

FUZZ_STRINGS = 2000
CODE_POINT_STRIDE = 257


@cache
def probe_texts() -> list[str]:
    """Prose in many scripts, code, edge cases, a sweep over Unicode, and strings of random pieces; always the same."""
    code = Path(json.decoder.__file__).read_text(encoding="utf-8")
    return [*LANGUAGES, "\n".join(LANGUAGES), *EDGES, code, _code_points(), *_fuzz(random.Random(0))]


def _code_points() -> str:
    points = [point for point in range(1, 0x110000, CODE_POINT_STRIDE) if not 0xD800 <= point < 0xE000]
    return "\n".join(f"a{chr(point)}'s {chr(point)}1" for point in points)


def _fuzz(random_source: random.Random) -> list[str]:
    words = [*EDGES[4:12], *" ".join(LANGUAGES).split(), *"aeiou 012'.,\n\t <|>_-", " ", "  ", "\n\n", END_OF_TEXT, END]
    texts = []
    for _ in range(FUZZ_STRINGS):
        pieces = [word[: random_source.randrange(1, 9)] for word in random_source.choices(words, k=6)]
        pieces += [
            chr(random_source.choice((random_source.randrange(0xD800), random_source.randrange(0xE000, 0x110000))))
        ]
        random_source.shuffle(pieces)
        texts.append("".join(pieces))
    return texts
