//! Interventions that force, ban or ablate selections, and `gd trace`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::trace::{self, Header, Row};

use super::{CPU, PROMPT, model, models, record};
use crate::program::{error, gd, json};

#[test]
fn interventions_change_the_selections() -> Result<()> {
    for (name, value) in models() {
        let plain = record(&value, PROMPT, 0, &[])?;
        let (heads, last) = (4, plain.records.len() - 1);
        // Rows of layers 1 and 2, which select in all models. Layer 1 may be the first that selects.
        let skipped = plain.header.layers.iter().take_while(|layer| !layer.selects).count();
        let row = |records: &[trace::Record], layer: usize, head: usize, at: usize| -> Row {
            records[at].rows[(layer - skipped) * heads + head].clone()
        };
        // Rows are compared as text because a coherence point that is not computed is NaN.
        let same = |records: &[trace::Record], layer: usize, head: usize, at: usize| {
            format!("{:?}", row(records, layer, head, at))
                == format!("{:?}", row(&plain.records, layer, head, at))
        };
        // The position that the head reads without an intervention, so that the ban has an effect.
        let own = |layer: usize, head: usize, at: usize| row(&plain.records, layer, head, at).selected;
        let at = (5..=last).find(|&at| own(1, 2, at) >= 0).context("every row abstains")?;
        let pick = own(1, 2, at);
        let forced = if pick == 3 { 4 } else { 3 };
        let changed = record(&value, PROMPT, 0, &[&format!("force 1.2@{at}:{forced}")])?;
        ensure!(row(&changed.records, 1, 2, at).selected == forced, "{name}: not forced");
        let changed = record(&value, PROMPT, 0, &[&format!("ban 1.2@{at}:{pick}")])?;
        let (before, after) = (row(&plain.records, 1, 2, at), row(&changed.records, 1, 2, at));
        ensure!(after.selected != pick && after.slots.iter().all(|s| s.key != pick), "{name}: not banned");
        // The runner-up, and the same number of candidates if there are enough keys.
        if let Some(next) = before.slots.iter().find(|s| s.key != pick && !s.rejected && s.lifted.is_none())
            && before.slots.iter().all(|s| s.lifted.is_none())
        {
            ensure!(after.selected == next.key, "{name}: {after:?} after {before:?}");
        }
        ensure!(
            after.slots.len() >= plain.header.layers[1].candidates.min(at),
            "{name}: {after:?} after {before:?}"
        );
        // The other heads of the layer and those of earlier layers are not affected.
        for head in [0, 1, 3] {
            ensure!(same(&changed.records, 1, head, at), "{name}: head {head}");
        }
        ensure!(same(&changed.records, 2, 1, at - 1), "{name}");
        let changed = record(&value, PROMPT, 0, &["ablate 2.1@all"])?;
        ensure!(
            (0..=last).all(|at| row(&changed.records, 2, 1, at).selected == -1),
            "{name}: does not abstain"
        );
    }
    Ok(())
}

/// The log-probabilities of the next token in f64.
fn next(model: &gd_model::model::pretrained::Loaded, ids: &[u32], pass: &Pass) -> Result<Vec<f64>> {
    let ids = Tensor::new(ids, &CPU)?.unsqueeze(0)?;
    let logits = model.model.forward(&ids, pass, None)?.squeeze(0)?;
    let last = logits.get(logits.dim(0)? - 1)?.to_dtype(candle_core::DType::F64)?.to_vec1::<f64>()?;
    let top = last.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = last.iter().map(|x| (x - top).exp()).sum();
    Ok(last.iter().map(|x| x - top - sum.ln()).collect())
}

#[test]
fn the_effect_is_the_divergence_of_two_runs() -> Result<()> {
    let loaded = model(&models()[0].1, 5)?;
    let ids = loaded.tokenizer.encode(PROMPT)?;
    let of = |acts: &[&str]| -> Result<trace::Effect> {
        let acts = acts.iter().map(|a| a.parse::<trace::Intervention>().map(|i| i.with_position(ids.len())));
        let acts = acts.collect::<Result<Vec<_>, _>>().map_err(anyhow::Error::msg)?;
        let header = Header::new(&loaded, "m", &ids, None, &acts, &CPU)?;
        Ok(trace::effect(&loaded, &header, &ids, &CPU)?)
    };
    let effect = of(&["ablate 0.1", "force 2.3:4"])?;
    // Two runs without `effect`.
    let acts = ["ablate 0.1", "force 2.3:4"].map(|a| a.parse::<trace::Intervention>());
    let acts = acts.into_iter().map(|a| a.map(|a| a.with_position(ids.len())));
    let acts = acts.collect::<Result<Vec<_>, _>>().map_err(anyhow::Error::msg)?;
    let header = Header::new(&loaded, "m", &ids, None, &acts, &CPU)?;
    let (mask, recorder) = (Mask::causal(0), trace::Recorder::new(&header));
    let p = next(&loaded, &ids, &Pass::new(&mask))?;
    let q = next(&loaded, &ids, &Pass { probe: Some(&recorder), ..Pass::new(&mask) })?;
    let kl: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
    let tv: f64 = p.iter().zip(&q).map(|(p, q)| (p.exp() - q.exp()).abs()).sum::<f64>() / 2.0;
    ensure!(kl > 1e-5 && (effect.kl - kl).abs() < 1e-6 * (1.0 + kl), "{} against {kl}", effect.kl);
    ensure!((effect.total_variation - tv).abs() < 1e-6, "{} against {tv}", effect.total_variation);
    ensure!(effect.first == ids.len() - 1 && (effect.mean_kl - effect.kl).abs() < 1e-12);
    ensure!(effect.picks.len() == 2 && effect.picks[0].after == -1 && effect.picks[1].after == 4);
    for change in &effect.tokens {
        let (before, after) = (p[change.token as usize].exp(), q[change.token as usize].exp());
        ensure!((change.before - before).abs() < 1e-6 && (change.after - after).abs() < 1e-6, "{change:?}");
    }
    // Forcing the selected position has no effect.
    let plain = record(&models()[0].1, PROMPT, 0, &[])?;
    let own = plain.records[ids.len() - 1].rows[4 + 2].selected;
    let effect = of(&[&format!("force 1.2:{own}")])?;
    ensure!(effect.kl < 1e-12 && effect.others == 0, "{effect:?}");
    for (act, words) in [
        ("force 9.0@5:1", "the model has 3 layers"),
        ("ban 0.4@5:1", "that layer has 4 heads"),
        ("force 0.0@50:1", "position 50 of a text of 38 tokens"),
        ("force 0.0@5:6", "position 5 does not see 6"),
    ] {
        let e = of(&[act]).err().context("accepted")?.to_string();
        ensure!(e.contains(words) && e.contains(act), "{act}: {e}");
    }
    Ok(())
}

pub(super) fn saved(gd: &serde_json::Value, seed: u64, folder: &Path) -> Result<()> {
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    Ok(model(gd, seed)?.save(folder, &card.map(|key| (key, "test".to_owned())))?)
}

/// The private key of RFC 8410, section 10.3, and its public key.
const KEY: &str = "-----BEGIN PRIVATE KEY-----\n\
                   MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
                   -----END PRIVATE KEY-----\n";
const PUBLIC: &str = "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1";

#[test]
fn the_program_records_shows_and_verifies() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    saved(&models()[0].1, 5, &dir.join("m"))?;
    fs::write(dir.join("text.txt"), PROMPT)?;
    fs::write(dir.join("key.pem"), KEY)?;
    let made = json(
        dir,
        "trace m --file text.txt --max-tokens 10 --seed 3 --out t.trace --html t.html --key key.pem --json",
    )?;
    let plain = json(dir, "generate m --prompts text.txt --max-tokens 10 --seed 3 --top-p 1 --json")?;
    let text = made["text"].as_str().context("text")?;
    let whole = format!("{PROMPT}{}", plain["text"].as_str().context("text")?);
    // An incomplete character has no text.
    ensure!(whole.starts_with(text) && text.len() > PROMPT.len(), "{text:?}, generated {whole:?}");
    let head = made["head"].as_str().context("head")?.to_owned();
    let page = fs::read_to_string(dir.join("t.html"))?;
    ensure!(page.contains(&head) && page.contains("</html>"), "no page");
    let verified = json(dir, &format!("verify t.trace --model m --kept {head} --signer {PUBLIC} --json"))?;
    ensure!(verified["head"] == made["head"] && verified["signer"] == PUBLIC, "{verified}");
    ensure!(verified["records"] == 48 && verified["selections"] == 48 * 12, "{verified}");
    let replay = &verified["replay"];
    ensure!(replay["exact"] == true && replay["contradictions"] == 0 && replay["ambiguous"] == 0, "{replay}");
    let text = String::from_utf8(gd(dir, "verify t.trace --model m")?.stdout)?;
    ensure!(text.contains("576 of 576 selections agree") && text.contains(PUBLIC), "{text}");
    json(dir, "trace --from t.trace --from t.trace --html both.html --json")?;
    ensure!(fs::metadata(dir.join("both.html"))?.len() > page.len() as u64);

    let other = "0".repeat(64);
    ensure!(error(dir, &format!("verify t.trace --kept {other}"), 1)?.contains("not the expected"));
    ensure!(error(dir, &format!("verify t.trace --signer {other}"), 1)?.contains("not by"));
    ensure!(error(dir, "verify t.trace --kept abc", 2)?.contains("64 hexadecimal digits"));
    ensure!(error(dir, "verify text.txt", 1)?.contains("not a valid trace"));
    ensure!(error(dir, "verify none.trace", 1)?.contains("no such trace"));
    saved(&models()[0].1, 6, &dir.join("n"))?;
    ensure!(error(dir, "verify t.trace --model n", 1)?.contains("weights differ"));
    let text = String::from_utf8(gd(dir, "trace m --file text.txt --ablate 1.0 --ban 2.3@20:0")?.stdout)?;
    ensure!(text.contains("reads nothing instead of") && text.contains("next token: KL"), "{text}");
    Ok(())
}

#[test]
fn invalid_trace_requests_are_errors() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    saved(&models()[0].1, 5, &dir.join("m"))?;
    saved(&serde_json::json!({ "mechanism": ["softmax"] }), 5, &dir.join("dense"))?;
    for (args, code, words) in [
        ("trace dense --prompt abc --out t", 1, &["dense", "no layer that selects"][..]),
        ("trace m --prompt abc", 2, &["--out"]),
        ("trace m --out t", 2, &["--prompt or --file"]),
        ("trace m --prompt abc --force 1.2", 2, &["--force", "needs a position"]),
        ("trace m --prompt abc --ablate 1.2:4", 2, &["--ablate", "no position"]),
        ("trace m --prompt abc --ban 1.9:1", 1, &["ban 1.9@2:1", "4 heads"]),
        ("trace m --prompt abc --out t --temperature -1", 2, &["temperature"]),
        ("trace m --file none.txt --out t", 1, &["none.txt"]),
        ("trace m --prompt abc --out nowhere.pem/t --key m/config.json", 1, &["m/config.json", "PKCS#8"]),
        ("trace --from none.trace --html h", 1, &["none.trace"]),
        ("trace --from a --from b --from c --html h", 2, &["3 times"]),
        ("verify none.trace --tolerance -1", 2, &["--tolerance -1"]),
    ] {
        let e = error(dir, args, code)?;
        ensure!(words.iter().all(|w| e.contains(w)), "{args}: {e}");
        ensure!(!Path::new(&dir.join("t")).exists() && !dir.join("h").exists(), "{args} left a file");
    }
    Ok(())
}
