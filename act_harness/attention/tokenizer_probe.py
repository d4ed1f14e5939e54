"""What a tokenizer does, as two hashes: the ids of fixed texts, and of a fixed conversation.

Files identify no tokenizer. One GGUF read by two releases of transformers gave another end token
and no pad token, and with them another hash of the files, while every prompt got the same ids. So
identity is the ids: of texts of many kinds, of the strings that models use as special tokens, and
of what the chat template writes. The texts are part of the hash: changing one makes every stored
probe worthless, so they stay as they are.

What it does not see: words that none of the texts holds (the hash of the vocabulary does), tokens
that are added around a text (``adds_bos``), and decoding.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from act_harness.support.provenance import sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_probe", "tokenizer_probe"]

_TEXTS = (
    "",
    " ",
    "The quick brown fox jumps over the lazy dog. It didn't look back; why would it?",
    " the The THE tHe theThe  the   the",
    "Review: a gripping, well-acted film!\nSentiment: positive\n\nReview: dull.\nSentiment:",
    "Question: Which is heavier?\nA. a kilogram of iron\nB. a litre of water\nAnswer: B",
    "I'll he'd they've we're it's John's O'Neill rock'n'roll 'quoted' \"double\"",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "0 1 2 3 10 42 100 1999 2024 31337 1234567890 00012 3.14159 1,000,000 -7 1e-9 50%",
    "12345678901234567890 0xDEADBEEF 192.168.0.1 12:34:56 2026-01-31 £9.99 €5 $3.50",
    "def f(x: int) -> list[int]:\n    return [x**2 for _ in range(10)]  # comment\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b->c[i];\n}\n",
    '{"key": [1, 2.5, null, true], "other": {"a": "b\\n"}}',
    '<div class="x"><a href="https://example.org/?q=1&r=2#s">link</a></div>',
    "SELECT name, COUNT(*) FROM t WHERE a <> 'b' GROUP BY name;",
    r"\frac{a}{b} \sum_{i=0}^{n} x_i^2 $\alpha \neq \beta$ \\",
    "\t\ttabs\t and \n\n\n newlines \r\n and  two   three    four     spaces \n",
    "   leading", "trailing   ", "\n", "\n\n", "\t", "        ", " \n \n ",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~ ... --- === *** ### // /* */ <!-- -->",
    "Àéîõü ß æ œ ø å ñ ç Ž š ő ł đ þ ð ı İ e\u0301 n\u0303 ﬁ ﬂ Ⅷ ½ ²",
    "Le cœur a ses raisons ; où êtes-vous ? « Ça va », répondit-elle.",
    "Die Straße führt über die Brücke. El niño comió mañana. Não há pão.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Zażółć gęślą jaźń.",
    "Съешь ещё этих мягких французских булок. Їжак і ґава.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "שלום עולם، كيف حالك؟ يَوْمٌ جَمِيلٌ",
    "नमस्ते दुनिया। தமிழ் মানুষ ไทยไม่มีช่องว่าง",
    "今日は天気がいいですね。東京タワー、カタカナ、ﾊﾝｶｸ。",
    "你好,世界!简体字与繁體字。人工智能2024年。",
    "안녕하세요 세계! ㄱㄴㄷ 한국어",
    "Xin chào thế giới. Türkçe öğreniyorum. Ég get etið gler.",
    "😀 🎉 👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪 ❤\ufe0f ✨ ☃ ♞ → ⇒ ∀x∈ℝ ≤ ≠ ∞ √ ∫",
    "“curly” ‘single’ – en — em … • · ° © ® ™ § ¶",
    "\u00a0nbsp\u2009thin\u200bzero\ufeffbom\u00adsoft",
    "a\u0000b \u0007 \u001b[31m \u007f \ufffd \U000e0041 \U00010348 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ＦＵＬＬ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "xq zj vkw qqq bfgh tsch ngst ptlm asdfghjkl qwertyuiop zxcvbnm lorem ipsum dolor",
    "camelCase PascalCase snake_case kebab-case SCREAMING_CASE mixedCASEword iPhone eBay",
    "Dr. Smith et al. (2019), pp. 12–15, said: “E = mc²”; cf. https://a.b/c_d?e=f%20g.",
)  # fmt: skip
# Strings that widespread models treat as one token. A tokenizer's own list is no use here, since
# releases disagree about what is on it.
_SPECIAL = (
    "<s>a</s> <pad><unk>b<mask> [CLS]a[SEP][PAD][UNK][MASK]",
    "<|endoftext|>a <|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|end_of_text|>",
    "[INST] a [/INST] <<SYS>>\nb\n<</SYS>>\n\n [TOOL_CALLS] [AVAILABLE_TOOLS]",
    "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n<eos>",
    "<|system|>\na<|end|>\n<|user|>\nb<|end|>\n<|assistant|>\n<|endofprompt|>",
    "<|start|>user<|message|>a<|channel|>final<|return|> <|eom_id|><|python_tag|>",
    "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜><｜end▁of▁sentence｜><think>\n</think>",
    "<repo_name>a<file_sep>b<fim_prefix>c<fim_suffix>d<fim_middle> <tool_call>{}</tool_call>",
    "a<extra_id_0>b<0x0A>▁c <|vision_start|><image> <|audio|> <unused0>",
)
_CONVERSATION = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": " Paris, of course. \n\nAnything else?"},
    {"role": "user", "content": "Describe 東京 in 3 words:\n- one\n- two"},
)
_DATE = "1 Jan 2000"
# Stands before a template and hides the function of that name which transformers gives to it.
_NO_CLOCK = "{% macro strftime_now(form) %}" + _DATE + "{% endmacro %}\n"


def tokenizer_probe(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the token ids of fixed texts, without the tokens added around a text."""
    return _hash([_ids(tokenizer, text) for text in (*_TEXTS, *_SPECIAL)])


def chat_probe(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of the token ids of a fixed conversation under the chat template.

    None without a template, and where it refuses three plain turns. Templates that write the date
    are given a fixed one.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in _CONVERSATION],
            chat_template=_NO_CLOCK + template,
            tokenize=False,
            add_generation_prompt=True,
            date_string=_DATE,
        )
    except (TemplateError, ImportError, LookupError, TypeError, ValueError):
        return None
    return _hash([_ids(tokenizer, text)])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Return the ids of a text; None where the tokenizer cannot encode it."""
    try:
        return [int(one) for one in tokenizer(text, add_special_tokens=False)["input_ids"]]
    except Exception:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        return None


def _hash(ids: list[list[int] | None]) -> str:
    return sha256_text(json.dumps(ids))
