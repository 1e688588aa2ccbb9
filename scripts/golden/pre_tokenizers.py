#!/usr/bin/env python3
"""Makes crates/gd-model/tests/fixtures/pre_tokenizers.json: the tokens of 150 texts with llama.cpp's pre-tokenizers.

    python3 -m venv venv && venv/bin/pip install gguf numpy xllamacpp
    venv/bin/python scripts/golden/pre_tokenizers.py

The texts have contractions, numbers, white space and marks of many scripts. The vocabulary is byte-level BPE that was
learned from the texts as a whole, so that merges cross the borders of words: a text that is split elsewhere has other
tokens. For each value of tokenizer.ggml.pre the fixture has the number of tokens of each text and a hash of their ids.
"""

import json
import tempfile
import urllib.request
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

OUT = Path(__file__).resolve().parents[2] / "crates/gd-model/tests/fixtures/pre_tokenizers.json"
PRE_TOKENIZERS = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "deepseek-llm", "deepseek-coder", "default"]
MERGES = 700

PARTS = [
    # Contractions, also with letters that fold to ASCII and with other apostrophes.
    "I'm sure he'd've said they're fine, we'll see, it's John's", "I'M SURE HE'D SAY IT'S WE'LL THEY'RE I'VE DON'T",
    "it'\u017f late, 'Tis, rock 'n' roll, o'clock's", "it\u2019s John\u2019s we\u2019ll", "'s't're've'm'll'd", "'S'T'RE'VE'M'LL'D",
    # Numbers.
    "1 12 123 1234 12345 123456 1234567 0.5e-10", "2024-11-30T04:05:06Z", "3.14159, 1,000,000.00 and 50%", "0x1F 0b1010 007",
    "\u0661\u0662\u0663\u0664 \u0967\u0968\u0969 \u0e51\u0e52\u0e53", "x\u00b2 + y\u00b3 = z\u2074, \u00bd \u00be \u2155", "\u2160\u2161\u2162 \u2167\u2168 \u3007 \u3021\u3022", "a1b22c333d4444e55555",
    # White space.
    "a  b   c    d", "  leading and trailing  ", "tab\tone\t\ttwo \t mixed\t ", "line\nbreak\n\nand\n\n\nmore", "dos\r\nline\r\n\r\nends\r",
    "no\u00a0break\u00a0\u00a0space", "ogham\u1680space en\u2002em\u2003thin\u2009hair\u200a", "line\u2028sep\u2029par\u0085next", "ideographic\u3000\u3000space \u3000",
    "zero\u200bwidth\ufeffbom\u2060joiner", "narrow\u202fno-break\u205fmath", "\v vertical \f feed", " \n \n ", "x \n\n  y\n   z", "   \t\n",
    # Words in many scripts.
    "The quick brown fox jumps over the lazy dog", "camelCase PascalCase snake_case SCREAMING_CASE kebab-case", "iPhone XMLHttpRequest myURLParser IOError",
    "\u00dcber die Stra\u00dfe flie\u00dft \u00c4rger", "na\u00efve caf\u00e9 r\u00e9sum\u00e9 \u00e9l\u00e8ve", "cafe\u0301 re\u0301sume\u0301 A\u030angstro\u0308m", "\u0141\u00f3d\u017a, \u0130stanbul, \u0131\u015f\u0131k",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u03ba\u03b5\u03af\u03bc\u03b5\u03bd\u03b1 \u1f08\u03c1\u03c7\u03ae", "\u0412\u043e\u0439\u043d\u0430 \u0438 \u043c\u0438\u0440, \u0442\u043e\u043c \u041f\u0435\u0440\u0432\u044b\u0439", "\u0561\u0580\u0574\u0565\u0576\u056b\u0561 \u0540\u0561\u0575\u0561\u057d\u057f\u0561\u0576",
    "\u10e1\u10d0\u10e5\u10d0\u10e0\u10d7\u10d5\u10d4\u10da\u10dd \u1c90\u1c91 \u10a0\u10a1", "\u13e3\u13b3\u13a9 \uab70\uab71", "\U00010400\U00010428\U00010401 \U00010c80\U00010cc0", "\U0001d400\U0001d44e\U0001d7d8 \u212b \u2126 \u2102",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645 \u0661\u0662", "\u0627\u064e\u0644\u0633\u0651\u064e\u0644\u064e\u0627\u0645\u064f", "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd", "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0932\u093f\u0916\u093e",
    "\u09ac\u09be\u0982\u09b2\u09be \u09ad\u09be\u09b7\u09be", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bae\u0bca\u0bb4\u0bbf", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01", "\u1019\u103c\u1014\u103a\u1019\u102c \u17a2\u1780\u17d2\u179f\u179a",
    "\u4eca\u65e5\u306f\u4e16\u754c\u3001\u3053\u3093\u306b\u3061\u306f\u3002", "\u30ab\u30bf\u30ab\u30ca\u30fc \uff76\uff80\uff76\uff85 \u3072\u3089\u304c\u306a", "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u7b2c1\u7ae0\uff082024\u5e74\uff09", "\u6f22\u5b57 \u9fa6\u9fff \U00020000\U0002a6d6 \u3400",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 \u1112\u1161\u11ab", "\ud558\ub098 2 \uc14b3\ub137", "\u1820\u1821 \u0f40\u0f0b\u0f41 \u1200\u1201",
    # Punctuation and symbols.
    "Hello, world! How are you? Fine; thanks: (really) [ok] {yes}", "...---... !!! ??? ,,, ;;;", "a/b//c\\d\\\\e |f| ~g~ `h` ^i^", "$100 + 5% = \u20ac95 \u00a33 \u00a57 #1 @x &y *z",
    "\u201cquotes\u201d \u2018single\u2019 \u00abguillemets\u00bb \u2013 \u2014 \u2026", "\uff01\uff0f\uff1a\uff5e \uff21\uff22\uff43 \uff11\uff12", "\u3001\u3002\u300c\u300d\u3010\u3011\u30fb \u203b", "<html>&amp;</html> <|x|> [INST]", "=> -> != == <= >= && || ++ --",
    "\u2200x\u2208\u211d: \u221ax\u2260\u221e \u222b\u2211\u220f", "\u2190\u2191\u2192\u2193 \u25a0\u25cf\u2605 \u2713\u2717", "\u00a9\u00ae\u2122 \u00b0C \u00b5m \u2116 \u00a7",
    # Emoji and marks.
    "\U0001f600\U0001f603 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd", "\u2764\ufe0f \U0001f1e9\U0001f1ea 1\ufe0f\u20e3", "Z\u0351\u036ba\u0300\u0301l\u0302g\u0303o", "\u0301\u0302 leading marks", "\ufb01\ufb02 ligatures \u01c4\u01c5\u01c6",
    # Code.
    "def f(x):\n    return x**2  # square\n\n\nprint(f(3))", "for (int i = 0; i < n; ++i) {\n\ta[i] = b[i]*2;\r\n}", "https://example.com/a-b_c?d=1&e=%20#f", "user.name+tag@mail.example.org", "C:\\Users\\x\\file.txt ~/.bashrc",
    "{\"key\": [1, 2.5, null, true], \"k2\": \"v\\n\"}", "SELECT * FROM t WHERE a='b' AND c>=10;", "\x00\x01\x7f control \x1b[0m",
]


def texts():
    """The parts, and pairs of them with borders of several kinds, 150 in all."""
    joints = ["", " ", "\n", "  ", "'s", "1", "\u3000", ".", "\r\n", "\u00a0"]
    result = list(PARTS)
    step = 0
    while len(result) < 150:
        a, b = PARTS[(7 * step) % len(PARTS)], PARTS[(11 * step + 5) % len(PARTS)]
        result.append(a[: len(a) // 2] + joints[step % len(joints)] + b[len(b) // 3 :])
        step += 1
    assert len(set(result)) == 150
    return result


def alphabet():
    """The character of each byte in byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def learn(texts):
    """Tokens and merges: byte-level BPE over whole texts."""
    characters = alphabet()
    tokens, merges = [characters[b] for b in range(256)], []
    sequences = [[characters[b] for b in text.encode()] for text in texts]
    while len(merges) < MERGES:
        counts = Counter(pair for sequence in sequences for pair in zip(sequence, sequence[1:]))
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(f"{left} {right}")
        if left + right not in tokens:
            tokens.append(left + right)
        for at, sequence in enumerate(sequences):
            merged = []
            for symbol in sequence:
                if merged and (merged[-1], symbol) == (left, right):
                    merged[-1] = left + right
                else:
                    merged.append(symbol)
            sequences[at] = merged
    return tokens, merges


def write(path, pre, tokens, merges):
    """A GGUF file with a vocabulary and a model of zeros."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in dict(context_length=64, embedding_length=32, block_count=1, feed_forward_length=32).items():
        getattr(writer, f"add_{key}")(value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in (shapes | {f"blk.0.{name}": (32, 32) for name in matrices}).items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenize(path, texts):
    """The ids of each text with llama.cpp, without special tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 64, 1, False, 1
    server = xllamacpp.Server(params)
    result = []
    for text in texts:
        body = json.dumps(dict(content=text, add_special=False)).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            result.append(json.load(answer)["tokens"])
    return result


def digest(ids):
    """The number of ids, and a hash: the ids are the digits of a number in base 1000003, modulo 2^32."""
    value = 0
    for token in ids:
        value = (value * 1_000_003 + token) % 2**32
    return [len(ids), value]


def main():
    written = texts()
    tokens, merges = learn(written)
    digests = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            path = Path(folder) / f"{pre}.gguf"
            write(path, pre, tokens, merges)
            digests[pre] = [digest(ids) for ids in tokenize(path, written)]
            print(f"{pre}: {sum(count for count, _ in digests[pre])} tokens")
    fixture = dict(texts=written, tokens=tokens, merges=merges, digests=digests)
    OUT.write_text(json.dumps(fixture, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
