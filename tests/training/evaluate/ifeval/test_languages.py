"""Scripts and common words: every language that IFEval asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.evaluate.ifeval.languages import KNOWN_LANGUAGES, could_be, detect

pytestmark = pytest.mark.unit

SENTENCES = {
    "en": "The weather is nice today and we are going to the park with the children.",
    "de": "Das Wetter ist heute schön und wir gehen mit den Kindern in den Park.",
    "fr": "Il fait beau aujourd'hui et nous allons au parc avec les enfants dans la ville.",
    "es": "Hace buen tiempo y los niños juegan en el parque con una pelota que es nueva.",
    "it": "Il tempo è bello oggi e andiamo al parco con i bambini che sono molto felici.",
    "pt": "O tempo está bom hoje e você vai ao parque com as crianças, mas não para correr.",
    "fi": "Sää on kaunis tänään ja me menemme puistoon, mutta lapset eivät ole kotona.",
    "sw": "Hali ya hewa ni nzuri leo na watoto wa shule wako katika bustani kwa michezo.",
    "vi": "Thời tiết hôm nay rất đẹp và chúng tôi đi công viên với những đứa trẻ của mình.",
    "ru": "Сегодня хорошая погода, и мы идём в парк, чтобы дети могли играть на улице.",
    "bg": "Днес времето е хубаво и ние ще отидем в парка, за да може децата да играят там.",
    "hi": "आज मौसम अच्छा है और हम बच्चों के साथ पार्क में जा रहे हैं।",
    "mr": "आज हवामान छान आहे आणि आम्ही मुलांसोबत बागेत जात आहोत, हे खूप छान आहे.",
    "ne": "आज मौसम राम्रो छ र हामी बच्चाहरूसँग पार्कमा जाँदैछौं, यो धेरै राम्रो छ।",
    "ar": "الطقس جميل اليوم ونحن نذهب إلى الحديقة مع الأطفال في هذا الصباح.",
    "fa": "امروز هوا خوب است و ما با بچه‌ها به پارک می رویم که این برای آنها خوب است.",
    "ur": "آج موسم اچھا ہے اور ہم بچوں کے ساتھ پارک میں جا رہے ہیں۔",
    "pa": "ਅੱਜ ਮੌਸਮ ਚੰਗਾ ਹੈ ਅਤੇ ਅਸੀਂ ਬੱਚਿਆਂ ਨਾਲ ਪਾਰਕ ਜਾ ਰਹੇ ਹਾਂ।",
    "gu": "આજે હવામાન સારું છે અને અમે બાળકો સાથે પાર્કમાં જઈ રહ્યા છીએ.",
    "bn": "আজ আবহাওয়া ভালো এবং আমরা বাচ্চাদের সাথে পার্কে যাচ্ছি।",
    "ta": "இன்று வானிலை நன்றாக உள்ளது, நாங்கள் குழந்தைகளுடன் பூங்காவிற்கு செல்கிறோம்.",
    "te": "ఈ రోజు వాతావరణం బాగుంది మరియు మేము పిల్లలతో పార్కుకు వెళ్తున్నాము.",
    "kn": "ಇಂದು ಹವಾಮಾನ ಚೆನ್ನಾಗಿದೆ ಮತ್ತು ನಾವು ಮಕ್ಕಳೊಂದಿಗೆ ಉದ್ಯಾನವನಕ್ಕೆ ಹೋಗುತ್ತಿದ್ದೇವೆ.",
    "th": "วันนี้อากาศดีและเรากำลังจะไปสวนสาธารณะกับเด็กๆ",
    "ko": "오늘 날씨가 좋아서 우리는 아이들과 함께 공원에 가고 있습니다.",
    "ja": "今日は天気がいいので、子供たちと一緒に公園に行きます。",
    "zh": "今天天气很好，我们和孩子们一起去公园。",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_detected_as_its_language(language: str) -> None:
    assert language in KNOWN_LANGUAGES
    assert detect(SENTENCES[language]) == language


def test_names_and_code_in_latin_letters_do_not_change_the_language() -> None:
    assert detect(SENTENCES["ko"] + " Python 3.11 API") == "ko"


def test_nothing_is_said_of_too_little_text_and_it_passes() -> None:
    assert detect("42!") is None
    assert could_be("42!", "th")


def test_another_language_does_not_pass() -> None:
    assert not could_be(SENTENCES["hi"], "mr")
    assert not could_be(SENTENCES["en"], "de")


def test_english_prompts_are_english() -> None:
    """The test set's own prompts: what `change_case` must not refuse."""
    path = Path(__file__).parents[3] / "data" / "eval" / "vicuna_bench.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        assert detect(json.loads(line)["prompt"][0]["content"]) == "en"
