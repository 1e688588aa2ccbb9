//! What is done to a head to see what it causes: a pick proves what a head read, not that it mattered.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Result, Tensor};
use gd_kernels::{CANDIDATES, Candidates};
use gd_layer::CandidateView;
use serde::{Deserialize, Serialize};

/// A change to what one head may select: `LAYER.HEAD[@QUERY]:POSITION` where one is forced or banned,
/// `LAYER.HEAD[@QUERY]` where the head is silenced. QUERY is a position, or `all`; if left out the last one of
/// the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Intervention {
    /// What is done.
    pub act: Act,
    /// The layer.
    pub layer: usize,
    /// The query head.
    pub head: usize,
    /// At which positions.
    pub query: Query,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// The head reads this position. It counts as consistent: its energy is taken for the threshold at most.
    Force(usize),
    /// The head chooses as if this position were not there.
    Ban(usize),
    /// The head reads nothing. The Beacon's running averages stay.
    Ablate,
}

/// At which positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Query {
    /// The last of the prompt.
    Last,
    /// This one.
    At(usize),
    /// All, where the position that is forced or banned is seen.
    All,
}

impl Act {
    /// The act of this name, on the position where it has one.
    fn parse(name: &str, position: Option<usize>) -> std::result::Result<Self, String> {
        match (name, position) {
            ("force", Some(position)) => Ok(Self::Force(position)),
            ("ban", Some(position)) => Ok(Self::Ban(position)),
            ("ablate", None) => Ok(Self::Ablate),
            ("force" | "ban", None) => Err(format!("{name} needs a position: LAYER.HEAD[@QUERY]:POSITION")),
            ("ablate", Some(_)) => Err("ablate takes no position: LAYER.HEAD[@QUERY]".into()),
            _ => Err(format!("`{name}` is none of force, ban, ablate")),
        }
    }
}

impl Intervention {
    /// From its name and its place, as on the command line.
    ///
    /// # Errors
    /// Says what was expected.
    pub fn parse(name: &str, place: &str) -> std::result::Result<Self, String> {
        let number = |text: &str| {
            let wrong =
                |_| format!("`{text}` in `{place}` is no number; expected LAYER.HEAD[@QUERY][:POSITION]");
            text.parse::<usize>().map_err(wrong)
        };
        let (head, position) = match place.split_once(':') {
            Some((head, position)) => (head, Some(number(position)?)),
            None => (place, None),
        };
        let (head, query) = match head.split_once('@') {
            Some((head, "all")) => (head, Query::All),
            Some((head, query)) => (head, Query::At(number(query)?)),
            None => (head, Query::Last),
        };
        let (layer, head) = head.split_once('.').ok_or_else(|| {
            format!("`{place}` names no layer and head; expected LAYER.HEAD[@QUERY][:POSITION]")
        })?;
        Ok(Self { act: Act::parse(name, position)?, layer: number(layer)?, head: number(head)?, query })
    }

    /// The same with the last position of a prompt of `tokens` tokens by its number.
    pub fn placed(self, tokens: usize) -> Self {
        match self.query {
            Query::Last => Self { query: Query::At(tokens.saturating_sub(1)), ..self },
            _ => self,
        }
    }

    /// Whether it holds for a query.
    pub(super) fn concerns(&self, layer: usize, head: usize, position: usize) -> bool {
        let here = match self.query {
            Query::At(query) => query == position,
            Query::All => true,
            Query::Last => false,
        };
        here && (self.layer, self.head) == (layer, head)
    }
}

impl fmt::Display for Intervention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, position) = match self.act {
            Act::Force(position) => ("force", Some(position)),
            Act::Ban(position) => ("ban", Some(position)),
            Act::Ablate => ("ablate", None),
        };
        write!(f, "{name} {}.{}", self.layer, self.head)?;
        match self.query {
            Query::Last => {}
            Query::At(query) => write!(f, "@{query}")?,
            Query::All => f.write_str("@all")?,
        }
        position.map_or(Ok(()), |position| write!(f, ":{position}"))
    }
}

impl FromStr for Intervention {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, place) = text.split_once(' ').ok_or_else(|| format!("`{text}` names no act and place"))?;
        Self::parse(name, place)
    }
}

impl TryFrom<String> for Intervention {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Intervention> for String {
    fn from(intervention: Intervention) -> Self {
        intervention.to_string()
    }
}

/// How many candidates a layer that keeps `own` scans for, so that as many are left without the banned ones.
pub(super) fn wanted(all: &[Intervention], layer: usize, own: usize) -> usize {
    let bans = |i: &&Intervention| i.layer == layer && matches!(i.act, Act::Ban(_));
    let needed = own + all.iter().filter(bans).count();
    if needed == own {
        return own;
    }
    CANDIDATES.into_iter().find(|&k| k >= needed).unwrap_or(own)
}

/// The candidates of one sequence with the interventions of a layer; query 0 stands at position `start`.
pub(super) fn apply(all: &[Intervention], view: CandidateView, start: usize) -> Result<Candidates> {
    let layer = view.layer;
    let here: Vec<_> = all.iter().filter(|i| i.layer == layer).copied().collect();
    if here.is_empty() {
        return Ok(view.candidates);
    }
    let (_, heads, n, slots) = view.candidates.index.dims4()?;
    let mut index = view.candidates.index.flatten_all()?.to_vec1::<i32>()?;
    let mut energy = view.candidates.energy.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let flags = &view.candidates.protected;
    let mut flags = flags.as_ref().map(|f| f.flatten_all()?.to_vec1::<u8>()).transpose()?;
    let tau = view.threshold.map(|t| t.to_dtype(DType::F32)?.to_vec1::<f32>()).transpose()?;
    for (row, (keys, energies)) in index.chunks_mut(slots).zip(energy.chunks_mut(slots)).enumerate() {
        let (h, i) = (row / n, row % n);
        let mut flags = flags.as_mut().map(|f| &mut f[row * slots..][..slots]);
        let position = start + i;
        let mut forced = None;
        for intervention in here.iter().filter(|x| x.concerns(layer, h, position)) {
            match intervention.act {
                Act::Ablate => keys.fill(-1),
                Act::Ban(key) => keys.iter_mut().filter(|k| **k == key as i32).for_each(|k| *k = -1),
                Act::Force(key) => match view.energy([0, h, i], key)? {
                    Some(energy) => forced = Some((key, energy as f32)),
                    None if intervention.query == Query::All => {}
                    None => candle_core::bail!("{intervention}: position {position} does not see {key}"),
                },
            }
        }
        if let Some((key, energy)) = forced {
            keys.fill(-1);
            energies.fill(f32::INFINITY);
            (keys[0], energies[0]) = (key as i32, tau.as_ref().map_or(energy, |tau| energy.min(tau[h])));
            if let Some(flags) = flags.as_deref_mut() {
                flags.fill(0);
            }
        }
        // Those that a layer with its own number of candidates would not have kept.
        let left = keys.iter_mut().enumerate().filter(|(_, key)| **key >= 0);
        for (_, (slot, key)) in left.enumerate().filter(|(rank, _)| *rank >= view.configured) {
            if flags.as_ref().is_none_or(|f| f[slot] == 0) {
                *key = -1;
            }
        }
        pack(keys, energies, flags);
    }
    let shape = (1, heads, n, slots);
    let device = view.candidates.index.device().clone();
    Ok(Candidates {
        index: Tensor::from_vec(index, shape, &device)?,
        energy: Tensor::from_vec(energy, shape, &device)?,
        protected: flags.map(|flags| Tensor::from_vec(flags, shape, &device)).transpose()?,
        rescored: view.candidates.rescored.clone(),
    })
}

/// Moves the candidates that are left to the front, and pads behind them.
fn pack(keys: &mut [i32], energies: &mut [f32], mut flags: Option<&mut [u8]>) {
    let mut to = 0;
    for from in 0..keys.len() {
        if keys[from] < 0 {
            continue;
        }
        keys.swap(to, from);
        energies.swap(to, from);
        if let Some(flags) = flags.as_deref_mut() {
            flags.swap(to, from);
        }
        to += 1;
    }
    energies[to..].fill(f32::INFINITY);
    if let Some(flags) = flags {
        flags[to..].fill(0);
    }
}

/// Checks interventions against a model of `heads` heads in each of its selecting layers.
///
/// # Errors
/// Names the layer, head or position that is not there.
pub(super) fn check(
    all: &[Intervention],
    layers: &[super::header::Layer],
    tokens: usize,
) -> crate::Result<()> {
    for intervention in all {
        let fail = |text: String| Err(crate::Error::Invalid(format!("{intervention}: {text}")));
        match layers.get(intervention.layer) {
            None => return fail(format!("the model has {} layers", layers.len())),
            Some(layer) if !layer.selects => return fail("that layer does not select".into()),
            Some(layer) if intervention.head >= layer.heads => {
                return fail(format!("that layer has {} heads", layer.heads));
            }
            Some(_) => {}
        }
        let position = match intervention.act {
            Act::Force(position) | Act::Ban(position) => Some(position),
            Act::Ablate => None,
        };
        let query = match intervention.query {
            Query::At(query) => Some(query),
            Query::Last | Query::All => None,
        };
        if let Some(beyond) = [position, query].into_iter().flatten().find(|&p| p >= tokens) {
            return fail(format!("position {beyond} of a text of {tokens} tokens"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_they_are_written() {
        for text in ["force 1.2:5", "force 0.3@17:0", "ban 2.1@all:9", "ablate 10.11", "ablate 0.0@4"] {
            let intervention: Intervention = text.parse().unwrap();
            assert_eq!(intervention.to_string(), text);
        }
        for text in
            ["force 1.2", "ablate 1.2:3", "ban 1:2", "turn 1.2:3", "force x.2:1", "force 1.2@:3", "force"]
        {
            assert!(text.parse::<Intervention>().is_err(), "{text}");
        }
        let last: Intervention = "ban 1.2:5".parse().unwrap();
        assert_eq!(last.placed(9).to_string(), "ban 1.2@8:5");
    }

    #[test]
    fn what_is_left_moves_to_the_front_in_order() {
        let (mut keys, mut energies) = ([3, -1, 5, -1, 2], [0.1, 0.2, 0.3, 0.4, 0.5]);
        let mut flags = [0, 1, 1, 0, 0];
        pack(&mut keys, &mut energies, Some(&mut flags));
        assert_eq!((keys, flags), ([3, 5, 2, -1, -1], [0, 1, 0, 0, 0]));
        assert_eq!(energies, [0.1, 0.3, 0.5, f32::INFINITY, f32::INFINITY]);
    }
}
