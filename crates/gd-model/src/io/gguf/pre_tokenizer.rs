//! The pre-tokenizers of byte-level BPE: how a text is split before the merges, by the values of `tokenizer.ggml.pre`.
//!
//! The patterns are those of llama.cpp (src/llama-vocab.cpp) for these values, and the same as those in the `tokenizer.json`
//! of the models except where noted. llama.cpp replaces white space outside of ASCII by a control character before it
//! matches a pattern without `\p`; here, such patterns exclude white space (`&&\S`).

/// A pre-tokenizer of byte-level BPE.
pub(super) struct PreTokenizer {
    /// Its names in `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Whether each digit is a token of its own.
    pub(super) digits: bool,
    /// The patterns that split the text, applied in this order; empty for the pattern of GPT-2.
    pub(super) patterns: &'static [&'static str],
    /// Whether a segment that is a token becomes this token regardless of the merges (`ignore_merges`).
    pub(super) ignore_merges: bool,
    /// Whether a text starts with the begin token by default.
    pub(super) add_bos: bool,
}

impl PreTokenizer {
    /// A pre-tokenizer that merges every segment and adds no begin token.
    const fn new(names: &'static [&'static str], patterns: &'static [&'static str]) -> Self {
        Self { names, digits: false, patterns, ignore_merges: false, add_bos: false }
    }

    /// The pre-tokenizer of this name.
    ///
    /// # Errors
    /// Names the value and those that are supported.
    pub(super) fn find(name: &str) -> Result<&'static Self, String> {
        ALL.iter().find(|candidate| candidate.names.contains(&name)).ok_or_else(|| {
            let supported =
                ALL.iter().map(|candidate| candidate.names.join(", ")).collect::<Vec<_>>().join(", ");
            format!("key tokenizer.ggml.pre is {name:?}, which is not supported (supported: {supported})")
        })
    }

    /// The name of the pre-tokenizer with these steps; `None` if there is none.
    pub(super) fn name_of(digits: bool, patterns: &[String], ignore_merges: bool) -> Option<&'static str> {
        // The contractions as the tokenizer.json of models has them, and as llama.cpp has them.
        let plain = |pattern: &String| pattern.replace(CONTRACTIONS.0, CONTRACTIONS.1);
        let patterns: Vec<String> = patterns.iter().map(plain).collect();
        let is_same = |candidate: &&Self| {
            (candidate.digits, candidate.ignore_merges) == (digits, ignore_merges)
                && patterns == candidate.patterns
        };
        ALL.iter().find(is_same)?.names.first().copied()
    }
}

/// A pattern for contractions in any case, with a flag and with sets of letters.
const CONTRACTIONS: (&str, &str) =
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]");

/// The pattern of GPT-2.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The pattern of Llama 3: groups of up to three digits.
const LLAMA3: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The pattern of Qwen 2: single digits.
const QWEN2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The pattern of Mistral's Tekken as llama.cpp has it: words start at an upper-case letter of ASCII that follows a
/// lower-case one. The `tokenizer.json` of the models distinguishes the cases of all letters.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Runs of the scripts without spaces between words, from U+0800 to U+9FA5 and from U+AC00 to U+D7FF.
const CJK: &str = r"[[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]&&\S]+";

/// Words of the scripts that have cases, as DeepSeek LLM lists them.
const CASED_WORDS: &str = concat!(
    r"\s?[A-Za-z",
    r"\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}",
    r"\x{370}-\x{373}\x{376}-\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}",
    r"\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}",
    r"\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}",
    r"\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}",
    r"\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}",
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}",
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}",
    r"\x{2183}-\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}-\x{2CF3}",
    r"\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}",
    r"\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}",
    r"\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}",
    r"\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}",
    r"]+"
);

/// Punctuation of ASCII (and its letters, which are split before), of full width, quotation marks, and that of Chinese.
const PUNCTUATION: &str = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}-\x{3002}]+";

static ALL: [PreTokenizer; 9] = [
    PreTokenizer::new(
        &[
            "gpt-2",
            "gpt2",
            "phi-2",
            "jina-es",
            "jina-de",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "mellum",
        ],
        &[],
    ),
    PreTokenizer {
        digits: true,
        ..PreTokenizer::new(
            &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
            &[],
        )
    },
    PreTokenizer {
        ignore_merges: true,
        add_bos: true,
        ..PreTokenizer::new(&["llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"], &[LLAMA3])
    },
    PreTokenizer::new(&["smaug-bpe"], &[LLAMA3]),
    PreTokenizer::new(&["qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"], &[QWEN2]),
    PreTokenizer { ignore_merges: true, add_bos: true, ..PreTokenizer::new(&["tekken"], &[TEKKEN]) },
    PreTokenizer::new(&["deepseek-llm"], &[r"[\r\n]", CASED_WORDS, PUNCTUATION, r"\s+$", CJK, r"\p{N}+"]),
    PreTokenizer::new(&["deepseek-coder"], &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"]),
    // The default of llama.cpp.
    PreTokenizer::new(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];
