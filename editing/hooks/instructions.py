"""Instructions of the prompting baseline, such as "Respond in French.", in the source or the target language."""

from __future__ import annotations

# "Respond in <this language>." in the language itself.
IN_TARGET = {
    "ar": "أجب باللغة العربية.",
    "cs": "Odpověz česky.",
    "da": "Svar på dansk.",
    "de": "Antworte auf Deutsch.",
    "el": "Απάντησε στα ελληνικά.",
    "en": "Respond in English.",
    "es": "Responde en español.",
    "fa": "به فارسی پاسخ بده.",
    "fi": "Vastaa suomeksi.",
    "fr": "Réponds en français.",
    "he": "ענה בעברית.",
    "hi": "हिन्दी में उत्तर दो।",
    "id": "Jawab dalam bahasa Indonesia.",
    "it": "Rispondi in italiano.",
    "ja": "日本語で答えてください。",
    "ko": "한국어로 대답하세요.",
    "nl": "Antwoord in het Nederlands.",
    "no": "Svar på norsk.",
    "pl": "Odpowiedz po polsku.",
    "pt": "Responde em português.",
    "ro": "Răspunde în română.",
    "ru": "Ответь по-русски.",
    "sv": "Svara på svenska.",
    "sw": "Jibu kwa Kiswahili.",
    "th": "ตอบเป็นภาษาไทย",
    "tr": "Türkçe cevap ver.",
    "uk": "Відповідай українською.",
    "vi": "Trả lời bằng tiếng Việt.",
    "zh": "请用中文回答。",
}
ENGLISH_NAMES = {
    "ar": "Arabic",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "sw": "Swahili",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
# source -> (sentence, language -> its name in it); other sources get English instructions.
IN_SOURCE = {
    "fr": (
        "Réponds en {}.",
        {"ar": "arabe", "de": "allemand", "en": "anglais", "es": "espagnol", "zh": "chinois"},
    ),
    "de": (
        "Antworte auf {}.",
        {"ar": "Arabisch", "en": "Englisch", "es": "Spanisch", "fr": "Französisch", "zh": "Chinesisch"},
    ),
    "es": (
        "Responde en {}.",
        {"ar": "árabe", "de": "alemán", "en": "inglés", "fr": "francés", "zh": "chino"},
    ),
    "zh": (
        "请用{}回答。",
        {"ar": "阿拉伯语", "de": "德语", "en": "英语", "es": "西班牙语", "fr": "法语"},
    ),
    "ar": (
        "أجب باللغة {}.",
        {"de": "الألمانية", "en": "الإنجليزية", "es": "الإسبانية", "fr": "الفرنسية", "zh": "الصينية"},
    ),
}


def in_english(target: str, thinks: bool = False) -> str:
    """The instruction to answer, or to think and answer, in ``target``, in English."""
    return f"{'Think and respond' if thinks else 'Respond'} in {ENGLISH_NAMES.get(target, target)}."


def instructions(source: str, target: str) -> dict[str, str]:
    """Language of the instruction -> the instruction to answer in ``target``.

    In the source language if the table has it, else in English, and in the target language.  A language
    without a name in the table is called by its code.
    """
    texts = {}
    sentence, names = IN_SOURCE.get(source, ("", {}))
    if target in names:
        texts[source] = sentence.format(names[target])
    else:
        texts["en"] = in_english(target)
    if target in IN_TARGET:
        texts[target] = IN_TARGET[target]
    return texts
