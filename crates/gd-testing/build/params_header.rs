//! Parses `kernels/shared/params.h` and generates the Rust side of the params, and a C++ table of the offsets for the
//! layout test.
//!
//! The parser accepts the forms that the header uses and refuses everything else with its line, so that no declaration
//! can be missing on one side.

use std::fmt::Write as _;

/// A declaration of the header with the comment before it.
#[derive(Debug)]
pub(crate) struct Item {
    doc: Vec<String>,
    name: String,
    body: Body,
}

#[derive(Debug)]
enum Body {
    /// An integer constant.
    Constant(u32),
    /// The values of an enum.
    Enum(Vec<Entry>),
    /// The fields of a struct with their types.
    Struct(Vec<Entry>),
}

/// A field with its type as `value`, or an enum value with its number.
#[derive(Debug)]
struct Entry {
    name: String,
    value: String,
    doc: String,
}

/// The scalar types of fields.
const SCALARS: [&str; 3] = ["u32", "i32", "f32"];

/// The declarations of the header's text.
///
/// # Errors
/// Names the first line that has none of these forms.
pub(crate) fn parse(text: &str) -> Result<Vec<Item>, String> {
    let mut items: Vec<Item> = Vec::new();
    let (mut doc, mut open): (Vec<String>, Option<Item>) = (Vec::new(), None);
    let mut conditional = 0u32;
    for (number, line) in text.lines().enumerate() {
        let fail = |why: &str| format!("params.h:{}: {why}: {line}", number + 1);
        let (code, comment) = line.split_once("//").unwrap_or((line, ""));
        let (code, comment) = (code.trim(), comment.trim().to_owned());
        // Typedefs and includes that differ between compilers are inside of #ifdef.
        if let Some(directive) = code.strip_prefix('#') {
            match directive.split_whitespace().next() {
                Some("ifdef") => conditional += 1,
                Some("endif") => conditional = conditional.checked_sub(1).ok_or_else(|| fail("no #ifdef"))?,
                Some("else" | "include" | "define") if conditional > 0 => {}
                Some("pragma") => {}
                _ => return Err(fail("unknown directive")),
            }
            doc.clear();
            continue;
        }
        if conditional > 0 {
            if !code.starts_with("typedef ") {
                return Err(fail("not a typedef inside of #ifdef"));
            }
            continue;
        }
        match (&mut open, code) {
            (None, "") if line.trim().is_empty() => doc.clear(),
            (None, "") => doc.push(comment),
            (None, _) => {
                let item =
                    declaration(code, std::mem::take(&mut doc)).ok_or_else(|| fail("no declaration"))?;
                match item.body {
                    Body::Constant(_) => items.push(item),
                    _ => open = Some(item),
                }
            }
            (Some(_), "};") => items.extend(open.take()),
            (Some(item), _) => {
                let entry = entry(item, code, comment, &items).ok_or_else(|| fail("no entry"))?;
                match &mut item.body {
                    Body::Enum(entries) | Body::Struct(entries) => entries.push(entry),
                    Body::Constant(_) => return Err(fail("an entry of a constant")),
                }
            }
        }
    }
    match open {
        Some(item) => Err(format!("params.h: {} does not end", item.name)),
        None => Ok(items),
    }
}

/// `enum NAME : u32 {`, `struct NAME {` or `constexpr CONSTANT u32 NAME = N;`.
fn declaration(code: &str, doc: Vec<String>) -> Option<Item> {
    let item = |name: &str, body: Body| {
        let valid = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        valid.then(|| Item { doc, name: name.to_owned(), body })
    };
    if let Some(rest) = code.strip_prefix("struct ") {
        return item(rest.strip_suffix(" {")?, Body::Struct(Vec::new()));
    }
    if let Some(rest) = code.strip_prefix("enum ") {
        return item(rest.strip_suffix(" : u32 {")?, Body::Enum(Vec::new()));
    }
    let rest = code.strip_prefix("constexpr CONSTANT u32 ")?;
    let (name, value) = rest.strip_suffix(';')?.split_once(" = ")?;
    item(name, Body::Constant(value.parse().ok()?))
}

/// `TYPE NAME;` of a struct, or `PREFIX_NAME = N,` of an enum.
fn entry(item: &Item, code: &str, doc: String, items: &[Item]) -> Option<Entry> {
    match &item.body {
        Body::Struct(_) => {
            let (kind, name) = code.strip_suffix(';')?.split_once(' ')?;
            let is_type = SCALARS.contains(&kind) || items.iter().any(|x| x.name == kind && x.is_struct());
            let valid =
                is_type && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            valid.then(|| Entry { name: name.to_owned(), value: kind.to_owned(), doc })
        }
        Body::Enum(_) => {
            let (name, value) = code.strip_suffix(',')?.split_once(" = ")?;
            value.parse::<u32>().ok()?;
            let name = camel(name.strip_prefix(&item.prefix()?)?);
            Some(Entry { name, value: value.to_owned(), doc })
        }
        Body::Constant(_) => None,
    }
}

impl Item {
    fn is_struct(&self) -> bool {
        matches!(self.body, Body::Struct(_))
    }

    /// The prefix of the values of an enum: `MASK_TABLE_` for `MaskTableCode`.
    fn prefix(&self) -> Option<String> {
        let stem = self.name.strip_suffix("Code").or_else(|| self.name.strip_suffix("Bit"))?;
        let mut prefix = String::new();
        for c in stem.chars() {
            if c.is_ascii_uppercase() && !prefix.is_empty() {
                prefix.push('_');
            }
            prefix.push(c.to_ascii_uppercase());
        }
        Some(prefix + "_")
    }
}

/// `VectorLoads` from `VECTOR_LOADS`.
fn camel(name: &str) -> String {
    let word = |word: &str| word[..1].to_owned() + &word[1..].to_ascii_lowercase();
    name.split('_').map(word).collect()
}

/// The part of the Rust file before the declarations.
const HEAD: &str = "\
//! Parameters of the GPU kernels, and the codes and constants that kernels and launch code share.
//!
//! Generated from `kernels/shared/params.h`, where shapes and strides are explained. Do not edit: change the header and
//! run `UPDATE_PARAMS=1 cargo test -p gd-testing params`.

use bytemuck::{Pod, Zeroable};

/// Declares the structs and [`LAYOUTS`].
macro_rules! params {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$about:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy, Default, PartialEq, Pod, Zeroable)]
            #[allow(missing_docs)] // sizes and strides are explained in the header
            pub struct $name { $($(#[$about])* pub $field: $type,)* }
        )*

        /// Name, size and (field, offset) of every struct.
        #[allow(clippy::type_complexity)] // a table for one test
        pub const LAYOUTS: &[(&str, usize, &[(&str, usize)])] = &[$((
            stringify!($name),
            size_of::<$name>(),
            &[$((stringify!($field), std::mem::offset_of!($name, $field)),)*],
        ),)*];
    };
}
";

/// The Rust file.
pub(crate) fn rust(items: &[Item]) -> String {
    let mut out = HEAD.to_owned();
    let doc = |out: &mut String, indent: &str, lines: &[String]| {
        lines.iter().for_each(|line| writeln!(out, "{indent}/// {}", escaped(line)).unwrap_or_default());
    };
    for item in items.iter().filter(|item| !item.is_struct()) {
        out.push('\n');
        doc(&mut out, "", &item.doc);
        match &item.body {
            Body::Constant(value) => {
                let _ = writeln!(out, "pub const {}: u32 = {value};", item.name);
            }
            Body::Enum(entries) => {
                out.push_str("#[derive(Debug, Clone, Copy, PartialEq, Eq)]\n#[repr(u32)]\n");
                let _ = writeln!(out, "pub enum {} {{", item.name);
                for entry in entries {
                    let about = if entry.doc.is_empty() { entry.name.clone() } else { entry.doc.clone() };
                    doc(&mut out, "    ", &[about]);
                    let _ = writeln!(out, "    {} = {},", entry.name, entry.value);
                }
                out.push_str("}\n");
            }
            Body::Struct(_) => {}
        }
    }
    out.push_str("\nparams! {");
    for item in items {
        if let Body::Struct(fields) = &item.body {
            out.push('\n');
            doc(&mut out, "    ", &item.doc);
            let _ = writeln!(out, "    struct {} {{", item.name);
            for field in fields {
                let about = if field.doc.is_empty() { vec![] } else { vec![field.doc.clone()] };
                doc(&mut out, "        ", &about);
                let _ = writeln!(out, "        {}: {},", field.name, field.value);
            }
            out.push_str("    }\n");
        }
    }
    out.push_str("}\n");
    out
}

/// Escapes a comment for rustdoc: brackets around shapes are no links.
fn escaped(line: &str) -> String {
    line.replace('[', "\\[").replace(']', "\\]").replace('<', "\\<")
}

/// A C++ table of the name and size of every struct, and of the name and offset of its fields.
pub(crate) fn offset_table(items: &[Item]) -> String {
    let mut list = String::new();
    for item in items {
        if let Body::Struct(fields) = &item.body {
            let name = &item.name;
            let _ = writeln!(list, "{{\"{name}\", nullptr, sizeof({name})}},");
            for Entry { name: field, .. } in fields {
                let _ = writeln!(list, "{{\"{name}\", \"{field}\", offsetof({name}, {field})}},");
            }
        }
    }
    format!(
        "extern \"C\" {{\nstruct GdField {{ const char *name; const char *field; size_t value; }};\n\
         extern const GdField gd_fields[] = {{\n{list}{{nullptr, nullptr, 0}}\n}};\n}}\n"
    )
}
