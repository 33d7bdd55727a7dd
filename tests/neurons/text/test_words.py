"""Words, distinct words and openings."""

import pytest

from neurons.text.words import distinct_rate, opening, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, the DOG.", ["the", "cat", "the", "dog"]),
        ("Don't stop l’eau well-known", ["don't", "stop", "l’eau", "well-known"]),
        ("«naïve» — 3 çà", ["naïve", "3", "çà"]),
        ("我喜欢猫。", ["我", "喜", "欢", "猫"]),
        ("日本のカメラ", ["日", "本", "の", "カ", "メ", "ラ"]),
        ("用GPU训练", ["用", "gpu", "训", "练"]),
        ("고양이가 좋아", ["고양이가", "좋아"]),
        ("кот и пёс", ["кот", "и", "пёс"]),
        ("", []),
        (" ... !? \n", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("مُحَمَّد رسول", ["مُحَمَّد", "رسول"]),
        ("cafe\u0301s noirs", ["cafe\u0301s", "noirs"]),
    ],
    ids=["Hindi", "Tamil", "vocalised Arabic", "combining accent"],
)
def test_marks_do_not_cut_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four", 1.0),
        ("One one ONE one!", 0.25),
        ("a b a c a", 3 / 5),
        ("好好好人", 0.5),
        ("", 0.0),
        ("?!", 0.0),
    ],
)
def test_distinct_share(text, expected):
    assert distinct_rate(text) == pytest.approx(expected)


def test_opening_takes_the_first_words_as_they_are():
    text = "The quick, brown fox's  tail was Very long indeed."
    assert opening(text) == "The quick, brown fox's tail was"
    assert opening(text, 2) == "The quick,"
    assert opening("short text") == "short text"
    assert opening("") == ""


def test_opening_takes_characters_where_there_are_no_spaces():
    text = "我今天去北京看我的老朋友。"
    assert opening(text) == text[:9]  # 6 words of 1.5 characters
    assert opening(text, 2) == text[:3]
    assert opening("ความรู้คือแสงสว่างของชีวิต") == "ความรู้คือแสงสว่างของชีวิต"[:9]


def test_opening_goes_by_the_script_of_most_of_the_text():
    assert opening("The word 猫 means cat in both of them", 4) == "The word 猫 means"
    assert opening("用 GPU 训练一个很大的语言模型", 4) == "用 GPU "
    assert opening("나는 오늘 친구를 만나러 서울에 갔다 왔다", 3) == "나는 오늘 친구를"
