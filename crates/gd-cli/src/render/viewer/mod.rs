//! The trace viewer: an HTML page that shows one trace, or two traces side by side. The page is self-contained, and its
//! Content-Security-Policy does not allow it to fetch anything.
//!
//! The records are little-endian and concatenated. Each consists of a u32 length and that many bytes:
//! - u32 position (consecutive), u32 token id, u32 flags (1: generated), u16 text length in bytes and UTF-8 text;
//! - for each head of each selecting layer of the header: i32 selected position (-1: abstained); f32 energy, margin to
//!   the runner-up (+inf: no runner-up), coherence point u* (NaN: not computed), gate, share of the output norm that
//!   the selected value has, share that the running average has; i32 position read in each later round (-1: none); for each
//!   further pick of one scan i32 position (-1: none) and f32 weight; u8 number of candidates, and for each candidate: i32 position, u8 flags (1 protected, 2 rejected by the threshold,
//!   4 raised by the barrier, 8 scanned only as the runner-up), f32 energy from the scan, and f32 energy after the barrier if
//!   flag 4 is set;
//! - for each head of each layer of the header with `weights`: u8 number of its greatest weights, and for each of them i32
//!   position and f32 weight.

use std::io::Write;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use gd_model::trace::{self, Trace, hex};
use serde_json::{Value, json};

use super::html::policy;

/// The page, with an HTML comment as placeholder for each part.
const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
/// The scripts, concatenated to one module in this order.
const SCRIPTS: [&str; 4] =
    [include_str!("trace.js"), include_str!("text.js"), include_str!("panels.js"), include_str!("page.js")];

/// The input of the viewer for one trace.
#[derive(Debug, Clone, Copy)]
pub struct TraceView<'a> {
    /// Name of the trace on the page.
    pub name: &'a str,
    /// Header of the trace. The page requires `layers`, a list of objects with `layer` (number), `mechanism` and
    /// `selects`; if `selects` is true also `heads`, and optionally `rounds` and `picks` (default 1), `gate`,
    /// `exclude_below`, `threshold` (one number per head) and `threshold_by_length` (`slope`, one number per head, and
    /// `window`).
    pub header: &'a Value,
    /// Head of the trace's hash chain, hexadecimal.
    pub head: &'a str,
    /// The records in the format that the module documentation describes.
    pub records: &'a [u8],
}

/// Creates a self-contained page for one or two traces.
///
/// # Errors
/// A number of traces other than one or two, or the name of a trace with a malformed header or records.
pub fn page(traces: &[TraceView]) -> Result<String> {
    if !(1..=2).contains(&traces.len()) {
        bail!("the viewer shows one trace or two, not {}", traces.len());
    }
    let script = SCRIPTS.concat();
    let mut data = String::new();
    for (n, trace) in traces.iter().enumerate() {
        check(trace).with_context(|| format!("trace {}", trace.name))?;
        data += &embed(n, trace)?;
    }
    let parts = [
        ("<!--policy-->", policy(Some(&script), STYLE)),
        ("<!--style-->", format!("<style>{STYLE}</style>")),
        ("<!--data-->", data),
        ("<!--script-->", format!("<script type=\"module\">{script}</script>")),
    ];
    let (mut page, mut rest) = (String::new(), PAGE);
    for (placeholder, part) in parts {
        let Some((before, after)) = rest.split_once(placeholder) else {
            bail!("the template of the page has no placeholder {placeholder}");
        };
        page += before;
        page += &part;
        rest = after;
    }
    Ok(page + rest)
}

/// Verifies one trace or two and creates their page, in which each has the name of its file.
///
/// # Errors
/// A trace that is damaged; as [`page`].
pub fn page_of(traces: &[Trace]) -> Result<String> {
    let mut parts = Vec::new();
    for trace in traces {
        let verified = trace::verify(trace, None, None)?;
        let name = trace.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let header = serde_json::to_value(&trace.header)?;
        parts.push((name, header, hex(&verified.seal.head), trace.record_bytes()?));
    }
    let views: Vec<TraceView> =
        parts.iter().map(|(name, header, head, records)| TraceView { name, header, head, records }).collect();
    page(&views)
}

/// The elements that contain a trace: name, header and head as JSON, and the records as base64 of gzip.
fn embed(n: usize, trace: &TraceView) -> Result<String> {
    let TraceView { name, header, head, records } = trace;
    // A text without `<` cannot end the element.
    let info = json!({ "name": name, "header": header, "head": head }).to_string().replace('<', "\\u003c");
    let context = || format!("trace {name}");
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(records).with_context(context)?;
    let encoded = STANDARD.encode(gzip.finish().with_context(context)?);
    Ok(format!(
        "<script type=\"application/json\" data-trace>{info}</script>\n\
         <script type=\"application/octet-stream\" id=\"records-{n}\">{encoded}</script>\n"
    ))
}

/// Detects malformed traces here, which otherwise only the open page would report.
fn check(trace: &TraceView) -> Result<()> {
    let layers = trace.header.get("layers").and_then(Value::as_array).context("its header has no layers")?;
    for (n, layer) in layers.iter().enumerate() {
        let selects = layer.get("selects").and_then(Value::as_bool);
        let selects = selects.with_context(|| format!("layer {n} of its header has no value `selects`"))?;
        if selects && layer.get("heads").and_then(Value::as_u64).is_none_or(|heads| heads == 0) {
            bail!("layer {n} of its header has no heads");
        }
    }
    let (mut rest, mut count) = (trace.records, 0usize);
    while !rest.is_empty() {
        let record = rest.split_first_chunk().and_then(|(length, after)| {
            after.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
        });
        (_, rest) = record.with_context(|| format!("record {count} of {} bytes is cut off", rest.len()))?;
        count += 1;
    }
    if count == 0 { bail!("it has no records") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::super::html::digest;
    use super::*;

    const EVIL: &str = "</script><img src=x onerror=alert(1)><!--<script>";

    fn header() -> Value {
        json!({ "layers": [
            { "layer": 0, "mechanism": "gd", "selects": true, "heads": 2, "rounds": 1 },
            { "layer": 1, "mechanism": "softmax", "selects": false },
        ], "interventions": [EVIL] })
    }

    /// A record of a token with a text. It has no cells because only the page reads them.
    fn record(position: u32, text: &str) -> Vec<u8> {
        let mut bytes = [position, 7, 0].map(u32::to_le_bytes).concat();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        [(bytes.len() as u32).to_le_bytes().as_slice(), &bytes].concat()
    }

    /// The part of `text` between `before` and `after`.
    fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
        let (_, rest) = text.split_once(before).unwrap_or_else(|| panic!("no {before}"));
        rest.split_once(after).unwrap_or_else(|| panic!("no {after}")).0
    }

    #[test]
    fn the_page_contains_the_traces_unchanged() {
        let (header, records) = (header(), [record(0, "a"), record(1, EVIL)].concat());
        let other = record(0, "<!--script-->");
        let view = TraceView { name: EVIL, header: &header, head: "ab12", records: &records };
        let page = page(&[view, TraceView { name: "<!--script-->", records: &other, ..view }]).unwrap();
        let infos: Vec<_> = page.split(" data-trace>").skip(1).collect();
        assert_eq!(infos.len(), 2);
        let info: Value = serde_json::from_str(infos[0].split_once("</script>").unwrap().0).unwrap();
        assert_eq!(info, json!({ "name": EVIL, "header": header, "head": "ab12" }));
        for (n, records) in [&records, &other].into_iter().enumerate() {
            let encoded = between(&page, &format!("id=\"records-{n}\">"), "</script>");
            let mut decoded = Vec::new();
            GzDecoder::new(&STANDARD.decode(encoded).unwrap()[..]).read_to_end(&mut decoded).unwrap();
            assert_eq!(&decoded, records);
        }
    }

    #[test]
    fn text_of_a_trace_cannot_become_markup() {
        let (header, records) = (header(), record(0, EVIL));
        let page = page(&[TraceView { name: EVIL, header: &header, head: EVIL, records: &records }]).unwrap();
        assert!(!page.contains("<img"), "{EVIL} is in the page");
        // Two elements with data and the module, and no others.
        assert_eq!((page.matches("<script").count(), page.matches("</script").count()), (3, 3));
        assert!(page.contains("\\u003c/script>\\u003cimg src=x"));
    }

    #[test]
    fn the_policy_allows_only_the_inline_script_and_style() {
        let (header, records) = (header(), record(0, "a"));
        let page = page(&[TraceView { name: "x", header: &header, head: "", records: &records }]).unwrap();
        let policy = between(&page, "Content-Security-Policy\" content=\"", "\"");
        assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
        for (before, after) in [("<style>", "</style>"), ("<script type=\"module\">", "</script>")] {
            let text = between(&page, before, after);
            assert!(text.len() > 1000 && policy.contains(&digest(text)), "{before} {policy}");
        }
        // The SVG namespace is the only URL. It is not fetched.
        let without_namespace = page.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !without_namespace.contains("http:")
                && !without_namespace.contains("https:")
                && !without_namespace.contains("<!--style-->")
        );
        assert!(!without_namespace.contains("@import") && !without_namespace.contains("url("));
    }

    #[test]
    fn malformed_traces_are_errors_that_name_them() {
        let (header, records) = (header(), [record(0, "a"), record(1, "b")].concat());
        let valid = TraceView { name: "this one", header: &header, head: "", records: &records };
        let refused = |traces: &[TraceView], words: &[&str]| {
            let text = format!("{:#}", page(traces).unwrap_err());
            assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
        };
        assert!(page(&[valid, valid]).is_ok());
        refused(&[], &["one trace or two, not 0"]);
        refused(&[valid; 3], &["not 3"]);
        for cut in [1, 4, records.len() - 1] {
            refused(&[valid, TraceView { records: &records[..cut], ..valid }], &["this one", "cut off"]);
        }
        refused(&[TraceView { records: &records[..records.len() - 1], ..valid }], &["record 1"]);
        refused(&[TraceView { records: &[], ..valid }], &["no records"]);
        refused(&[TraceView { header: &json!({ "layers": 3 }), ..valid }], &["no layers"]);
        refused(
            &[TraceView { header: &json!({ "layers": [{ "heads": 3 }] }), ..valid }],
            &["layer 0", "selects"],
        );
        refused(
            &[TraceView { header: &json!({ "layers": [{ "selects": true }] }), ..valid }],
            &["layer 0", "heads"],
        );
    }
}
