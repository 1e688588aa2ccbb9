//! The viewer: a trace as one HTML page, or two traces side by side. The page holds all it needs, and its policy
//! forbids it to fetch anything.
//!
//! Records, little endian, one after the other: a u32 length, then that many bytes:
//! - u32 position (each one more than the last), u32 token id, u32 flags (1: generated), u16 length and UTF-8 text;
//! - for every layer of the header that selects, and each of its heads: i32 selected position (-1: abstained); f32
//!   energy, margin to the runner-up (+inf: none), coherence u* (NaN: not resolved), gate, share of the output's norm
//!   from the selected value, share from the running average; the i32 position read in each later round (-1: none);
//!   u8 count and as many candidates: i32 position, u8 flags (1 protected, 2 rejected by the threshold, 4 lifted by
//!   the barrier), f32 energy as scanned, and after a lift the f32 energy that it gave.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use gd_model::error::{Error, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The page, with a comment where each part goes.
const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
/// One module in the browser, in the order in which they build on each other.
const SCRIPTS: [&str; 4] =
    [include_str!("trace.js"), include_str!("text.js"), include_str!("panels.js"), include_str!("page.js")];

/// A trace as the viewer gets it.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a> {
    /// What the page calls it.
    pub name: &'a str,
    /// The trace's header; the page needs `layers`, a list of objects with `layer` (a number), `mechanism`, `selects`
    /// and, where that is true, `heads` and optionally `rounds` (1) and `threshold` (a number a head).
    pub header: &'a Value,
    /// The hash that the trace's chain ends in, hexadecimal.
    pub head: &'a str,
    /// The records, as this module's text lays them out.
    pub records: &'a [u8],
}

/// One self-contained page that shows one trace, or two side by side.
///
/// # Errors
/// Names the number of traces, or the trace whose header or records cannot be shown.
pub fn page(traces: &[Shown]) -> Result<String> {
    if !(1..=2).contains(&traces.len()) {
        return Err(Error::Invalid(format!("the viewer shows one trace or two, not {}", traces.len())));
    }
    let script = SCRIPTS.concat();
    let mut data = String::new();
    for (n, trace) in traces.iter().enumerate() {
        check(trace).map_err(|what| Error::Invalid(format!("trace {}: {what}", trace.name)))?;
        data += &embed(n, trace)?;
    }
    // Only these very texts run and style the page, so that nothing in a trace can, whatever it holds.
    let policy = format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; img-src data:; base-uri 'none'; form-action 'none'",
        digest(&script),
        digest(STYLE)
    );
    let parts = [
        ("<!--policy-->", format!("<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">")),
        ("<!--style-->", format!("<style>{STYLE}</style>")),
        ("<!--data-->", data),
        ("<!--script-->", format!("<script type=\"module\">{script}</script>")),
    ];
    let (mut page, mut rest) = (String::new(), PAGE);
    for (place, part) in parts {
        let Some((before, after)) = rest.split_once(place) else {
            return Err(Error::Invalid(format!("the viewer's page has no place {place}")));
        };
        page += before;
        page += &part;
        rest = after;
    }
    Ok(page + rest)
}

/// How a policy names an inline text.
fn digest(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

/// The elements that hold a trace: what it is as JSON, and its records as base64 of gzip.
fn embed(n: usize, trace: &Shown) -> Result<String> {
    let Shown { name, header, head, records } = trace;
    // Without `<` no text can end its element.
    let about = json!({ "name": name, "header": header, "head": head }).to_string().replace('<', "\\u003c");
    let failed = |e: std::io::Error| Error::Invalid(format!("trace {name}: {e}"));
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(records).map_err(failed)?;
    let packed = STANDARD.encode(packed.finish().map_err(failed)?);
    Ok(format!(
        "<script type=\"application/json\" data-trace>{about}</script>\n\
         <script type=\"application/octet-stream\" id=\"records-{n}\">{packed}</script>\n"
    ))
}

/// What the page could only say once it is open: a header without layers, records that are cut off.
fn check(trace: &Shown) -> std::result::Result<(), String> {
    let layers = trace.header.get("layers").and_then(Value::as_array).ok_or("its header has no layers")?;
    for (n, layer) in layers.iter().enumerate() {
        let selects = layer.get("selects").and_then(Value::as_bool);
        let selects =
            selects.ok_or_else(|| format!("layer {n} of its header does not say whether it selects"))?;
        if selects && layer.get("heads").and_then(Value::as_u64).is_none_or(|heads| heads == 0) {
            return Err(format!("layer {n} of its header has no heads"));
        }
    }
    let (mut rest, mut count) = (trace.records, 0usize);
    while !rest.is_empty() {
        let whole = rest.split_first_chunk().and_then(|(length, after)| {
            after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
        });
        (_, rest) = whole.ok_or_else(|| format!("record {count} of {} bytes is cut off", rest.len()))?;
        count += 1;
    }
    if count == 0 { Err("it has no records".into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::*;

    const EVIL: &str = "</script><img src=x onerror=alert(1)><!--<script>";

    fn header() -> Value {
        json!({ "layers": [
            { "layer": 0, "mechanism": "gd", "selects": true, "heads": 2, "rounds": 1 },
            { "layer": 1, "mechanism": "softmax", "selects": false },
        ], "interventions": [EVIL] })
    }

    /// A record of a token with a text, its cells left out: this side does not read them.
    fn record(position: u32, text: &str) -> Vec<u8> {
        let mut bytes = [position, 7, 0].map(u32::to_le_bytes).concat();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        [(bytes.len() as u32).to_le_bytes().as_slice(), &bytes].concat()
    }

    /// The text between two others.
    fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
        let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no {before}"));
        rest.split_once(after).unwrap_or_else(|| panic!("no {after}")).0
    }

    #[test]
    fn what_goes_in_comes_out() {
        let (header, records) = (header(), [record(0, "a"), record(1, EVIL)].concat());
        let other = record(0, "<!--script-->");
        let shown = Shown { name: EVIL, header: &header, head: "ab12", records: &records };
        let page = page(&[shown, Shown { name: "<!--script-->", records: &other, ..shown }]).unwrap();
        let abouts: Vec<_> = page.split(" data-trace>").skip(1).collect();
        assert_eq!(abouts.len(), 2);
        let about: Value = serde_json::from_str(abouts[0].split_once("</script>").unwrap().0).unwrap();
        assert_eq!(about, json!({ "name": EVIL, "header": header, "head": "ab12" }));
        for (n, records) in [&records, &other].into_iter().enumerate() {
            let packed = between(&page, &format!("id=\"records-{n}\">"), "</script>");
            let mut back = Vec::new();
            GzDecoder::new(&STANDARD.decode(packed).unwrap()[..]).read_to_end(&mut back).unwrap();
            assert_eq!(&back, records);
        }
    }

    #[test]
    fn no_text_of_a_trace_becomes_part_of_the_page() {
        let (header, records) = (header(), record(0, EVIL));
        let page = page(&[Shown { name: EVIL, header: &header, head: EVIL, records: &records }]).unwrap();
        assert!(!page.contains("<img"), "{EVIL} is in the page");
        // The three elements of this page, and no more.
        assert_eq!((page.matches("<script").count(), page.matches("</script").count()), (3, 3));
        assert!(page.contains("\\u003c/script>\\u003cimg src=x"));
    }

    #[test]
    fn the_policy_names_the_texts_that_are_there_and_no_address() {
        let (header, records) = (header(), record(0, "a"));
        let page = page(&[Shown { name: "x", header: &header, head: "", records: &records }]).unwrap();
        let policy = between(&page, "Content-Security-Policy\" content=\"", "\"");
        assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
        for (before, after) in [("<style>", "</style>"), ("<script type=\"module\">", "</script>")] {
            let text = between(&page, before, after);
            assert!(text.len() > 1000 && policy.contains(&digest(text)), "{before} {policy}");
        }
        // The one address names a vocabulary of elements and is not fetched.
        let foreign = page.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !foreign.contains("http:") && !foreign.contains("https:") && !foreign.contains("<!--style-->")
        );
        assert!(!foreign.contains("@import") && !foreign.contains("url("));
    }

    #[test]
    fn what_cannot_be_shown_is_named() {
        let (header, records) = (header(), [record(0, "a"), record(1, "b")].concat());
        let good = Shown { name: "this one", header: &header, head: "", records: &records };
        let refused = |traces: &[Shown], words: &[&str]| {
            let text = page(traces).unwrap_err().to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
        };
        assert!(page(&[good, good]).is_ok());
        refused(&[], &["one trace or two, not 0"]);
        refused(&[good; 3], &["not 3"]);
        for cut in [1, 4, records.len() - 1] {
            refused(&[good, Shown { records: &records[..cut], ..good }], &["this one", "cut off"]);
        }
        refused(&[Shown { records: &records[..records.len() - 1], ..good }], &["record 1"]);
        refused(&[Shown { records: &[], ..good }], &["no records"]);
        refused(&[Shown { header: &json!({ "layers": 3 }), ..good }], &["no layers"]);
        refused(&[Shown { header: &json!({ "layers": [{ "heads": 3 }] }), ..good }], &["layer 0", "selects"]);
        refused(
            &[Shown { header: &json!({ "layers": [{ "selects": true }] }), ..good }],
            &["layer 0", "heads"],
        );
    }
}
