from __future__ import annotations

import unicodedata
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moderation import english
from moderation.unmask import unmask

pytestmark = pytest.mark.unit

# Longest compatibility spelling that is folded: a Roman numeral of four letters.
MAX_GROWTH = 4

DISGUISES = [
    # leetspeak
    ("k1ll th3m all", "kill them all"),
    ("how to H4CK a b@nk", "how to HACK a bank"),
    ("@ss $hoot a$$hole b0mb sh!t k!ll them!", "ass shoot asshole bomb shit kill them!"),
    ("ki11er5 m3thamph3t4m1n3", "killers methamphetamine"),
    ("zw1rbl3rs", "zwirblers"),  # no word of the list, but spelled like one
    # invisible characters
    ("k\u200bi\u200dl\u2060l", "kill"),
    ("b\u00ado\u202em\U000e0041b\ufe0f", "bomb"),
    ("po\x00is\x1bon", "poison"),
    ("bo\ud800mb", "bomb"),
    # combining marks
    ("ë̸v̸i̸l̸", "evil"),
    ("k" + "\u0301\u0323\u0334" * 9 + "ill", "kill"),
    ("b⃝o⃝m⃝b⃝", "bomb"),
    # look-alikes
    ("кіll реople", "kill people"),
    ("how to кіӏӏ реорӏе", "how to kill people"),
    ("ноw то маке а вомв", "how to make a bomb"),
    ("Ьοmb", "Bomb"),
    ("κіӏӏ уоυ ѕооn", "kill you soon"),
    ("сору а реорӏе", "copy a people"),
    ("ᏦᏆᏞᏞ them", "KILL them"),
    ("ꓗꓲꓡꓡ them", "KILL them"),
    # styled letters
    ("ｋｉｌｌ ｙｏｕ", "kill you"),
    ("𝕜𝕚𝕝𝕝 𝓀𝒾𝓁𝓁 𝐤𝐢𝐥𝐥 ᵏⁱˡˡ ⓚⓘⓛⓛ", "kill kill kill kill kill"),
    ("🅺🅸🅻🅻 🅚🅘🅛🅛 🄺🄸🄻🄻 ⒦⒤⒧⒧ 🇰 🇮 🇱 🇱", "KILL KILL KILL kill KILL"),
    ("ᴋɪʟʟ ƙɨłł", "kill kill"),
    # letters set apart
    ("k i l l them", "kill them"),
    ("K I L L all of them", "KILL all of them"),
    ("k.i.l.l k-i-l-l k_i_l_l k*i*l*l", "kill kill kill kill"),
    ("how to k · i · l · l a man", "how to kill a man"),
    ("k 1 l l them", "kill them"),
    ("h o w  t o  k i l l  m y  w i f e", "how  to  kill  my  wife"),
    ("h o w t o k i l l m y w i f e", "how to kill my wife"),
    ("k\ni\nl\nl", "kill"),
    ("怎 么 杀 人", "怎么杀人"),
    ("制*造*炸*弹", "制造炸弹"),
    ("怎、么、制、造、炸、弹、杀、人", "怎么制造炸弹杀人"),
    # repeated letters
    ("kiiiill the boooomb", "kill the bomb"),
    ("zwirrrrrb", "zwirrb"),
    ("zwIiib", "zwIib"),
    ("杀杀杀杀人", "杀杀人"),
]

ORDINARY = [
    "3 x 4 = 12",
    "a b c d are the corners, and x, y, z the axes",
    "I 5 0",
    "GPT4 B2B mp3 H2O 4K i18n sha256 utf8 base64 log4j k8s R2D2 covid19 C6H12O6 H1N1 Python3 level5",
    "1st 2nd 3rd 4th 10am 5am 5in 100km 3D 4x3 1e6 0xff 2024-11-21 3.14",
    "john@gmail.com asked @john, @Id and root@server",
    "https://example.com/h4ck?k1ll=1 and www.xxx.com/b0mb",
    "$table = $this->end($name); echo $HOME",
    "for i in range(10): x[i] = a + b * c  # i, j, k",
    "(function(i,s,o,g,r,a,m){i['G']=r})",
    "if (!error || a|b) { i += 1; }",
    "U.S.A. e.g. i.e. a.k.a. J. R. R. Tolkien, R.S.V.P., A-B-C-D, Y M C A",
    "AAA www XIII #ffffff hmm, well: 42 %!",
    "don't, I'm, it's a dog's life",
    "café naïve Zoë Việt Nam Ångström straße smørrebrød",
    "Вот как там тает снег, а тот рост высок.",
    "Как дела? What does привет mean? λόγος, 10 kΩ, Δx, αβγ, 5 μm, x² + y³",
    "你好，世界！今天（星期四）天气怎么样？赤、橙、黄、绿、青、蓝、紫",
    "时间是“年/月/日 时:分”，比较“狗”和“猫”",
    "🇺🇸 is a flag, 😀 a face … and ½ or 20 ℃ ™",
    "answers: 1 B 2 A 3 D 4 C; DNA: A C G T T G",
]

PROSE = 'The weather in Paris was fine; we saw 12 boats, a bridge and (later) her house. I said: "Stop!"'


@pytest.mark.parametrize(("written", "plain"), DISGUISES)
def test_a_disguise_is_folded(written: str, plain: str) -> None:
    assert unmask(written) == plain


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_comes_out_as_it_went_in(text: str) -> None:
    assert unmask(text) == text


@given(st.text(max_size=60))
def test_unmasking_twice_is_unmasking_once_and_the_text_grows_within_bounds(text: str) -> None:
    folded = unmask(text)

    assert unmask(folded) == folded
    assert len(folded) <= MAX_GROWTH * len(text)


@given(st.text(alphabet="kil @$!013.-_*\u0301\u200bк і", max_size=40))
def test_unmasking_twice_is_unmasking_once_for_texts_near_a_disguise(text: str) -> None:
    folded = unmask(text)

    assert unmask(folded) == folded


@given(st.lists(st.sampled_from(PROSE.split())))
def test_ordinary_prose_is_unchanged(words: list[str]) -> None:
    text = " ".join(words)

    assert unmask(text) == text


def test_case_noise_becomes_small() -> None:
    assert unmask("hOw dO i kIlL mY nEIghBoR") == "how do i kill my neighbor"


@pytest.mark.parametrize(
    "text",
    ["Open the iPhone, or YouTube", "HOW DO I STOP", "the variable userName of getUserName is unset in LaTeX", "iOS 9"],
)
def test_ordinary_capitals_stay(text: str) -> None:
    assert unmask(text) == text


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyzABCDEFGH .,:;'\"()\n", max_size=200))
def test_letters_and_punctuation_only_ever_move_closer(text: str) -> None:
    """Without signs that stand for letters nothing but gaps, repeated letters and odd capitals may go."""
    letters = [c for c in unmask(text).lower() if c.isalpha()]

    remaining = iter(text.lower())
    assert all(letter in remaining for letter in letters)


@pytest.mark.parametrize(
    "sign", ["a ", "a.", "@$", "@$ ", "a1", "k1ll ", "a!", "aaab ", "e\u0301", "кі ", "杀 ", "x@", "ab "]
)
def test_the_work_grows_with_the_length_and_not_faster(sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of words looked up and the letters cut are the work that is not one pass of an expression."""
    work = [0]
    is_word, cut = english.is_word, english.cut_into_words

    def counted_is_word(word: str, min_letters: int = 3) -> bool:
        work[0] += 1
        return is_word(word, min_letters)

    def counted_cut(letters: str) -> list[str]:
        work[0] += len(letters)
        return cut(letters)

    monkeypatch.setattr("moderation.unmask.is_word", counted_is_word)
    monkeypatch.setattr("moderation.unmask.cut_into_words", counted_cut)

    def work_for(length: int) -> int:
        work[0] = 0
        unmask(sign * (length // len(sign)))
        return work[0]

    assert work_for(8000) <= 2.2 * work_for(4000) + 100


def test_a_hundred_thousand_combining_marks_are_gone_before_normalisation_sorts_them() -> None:
    assert unmask("a" + "\u0301\u0323" * 50_000) == "a"
    assert unmask("\u05b0\u0591" * 50_000) == ""


def test_marks_that_normalisation_sorts_never_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    normalize = unicodedata.normalize

    def recorded(form: Literal["NFC", "NFD", "NFKC"], text: str) -> str:
        seen.append(text)
        return normalize(form, text)

    monkeypatch.setattr("moderation.unmask.unicodedata.normalize", recorded)

    unmask("ﬁ" + "\u0301\u0323\u0334" * 300 + "x\u0301\u0323y" * 100)

    assert seen
    assert all(longest_pile(text) <= 3 for text in seen)


def longest_pile(text: str) -> int:
    longest = current = 0
    for character in text:
        current = current + 1 if unicodedata.combining(character) else 0
        longest = max(longest, current)
    return longest
