//! Interventions on the selection of single heads. They show the effect of a selection on the predictions: a record alone
//! only shows what a head read.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Result, Tensor};
use gd_kernels::{CANDIDATES, Candidates};
use gd_layer::CandidateView;
use serde::{Deserialize, Serialize};

/// An intervention on one head. The text form is `force LAYER.HEAD[@QUERY]:POSITION`, `ban LAYER.HEAD[@QUERY]:POSITION` or
/// `ablate LAYER.HEAD[@QUERY]`. QUERY is a position or `all`, and by default the last position of the prompt.
///
/// ```
/// use gd_model::trace::{Act, Intervention, Query};
///
/// let intervention: Intervention = "ban 2.5@17:1".parse()?;
/// assert_eq!((intervention.layer, intervention.head), (2, 5));
/// assert_eq!((intervention.act, intervention.query), (Act::Ban(1), Query::At(17)));
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Intervention {
    /// The kind of intervention.
    pub act: Act,
    /// The layer.
    pub layer: usize,
    /// The query head.
    pub head: usize,
    /// The queries that it applies to.
    pub query: Query,
}

/// A kind of intervention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// The head reads this position. Its energy is reduced to the threshold if it is higher, so that the threshold admits
    /// it.
    Force(usize),
    /// The head selects as if this position were not visible.
    Ban(usize),
    /// The head abstains. The running averages of the Beacon do not change.
    Ablate,
}

/// The queries of an intervention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Query {
    /// The last position of the prompt.
    Last,
    /// This position.
    At(usize),
    /// All positions. [`Act::Force`] applies only to those that see the forced position.
    All,
}

impl Act {
    /// The kind of this name with its position, if it has one.
    fn parse(name: &str, position: Option<usize>) -> std::result::Result<Self, String> {
        match (name, position) {
            ("force", Some(position)) => Ok(Self::Force(position)),
            ("ban", Some(position)) => Ok(Self::Ban(position)),
            ("ablate", None) => Ok(Self::Ablate),
            ("force" | "ban", None) => Err(format!("{name} needs a position: LAYER.HEAD[@QUERY]:POSITION")),
            ("ablate", Some(_)) => Err("ablate takes no position: LAYER.HEAD[@QUERY]".into()),
            _ => Err(format!("`{name}` is not one of force, ban, ablate")),
        }
    }
}

impl Intervention {
    /// Parses the name of an intervention and the text after it, such as `ban` and `2.5@17:1`.
    ///
    /// # Errors
    /// The part that is invalid, and the expected format.
    pub fn parse(name: &str, place: &str) -> std::result::Result<Self, String> {
        let number = |text: &str| {
            let wrong =
                |_| format!("`{text}` in `{place}` is not a number; expected LAYER.HEAD[@QUERY][:POSITION]");
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

    /// Replaces [`Query::Last`] by the last position of a prompt of `tokens` tokens.
    pub fn with_position(self, tokens: usize) -> Self {
        match self.query {
            Query::Last => Self { query: Query::At(tokens.saturating_sub(1)), ..self },
            _ => self,
        }
    }

    /// Whether it applies to the query at `position` of a head.
    pub(super) fn applies(&self, layer: usize, head: usize, position: usize) -> bool {
        let matches = match self.query {
            Query::At(query) => query == position,
            Query::All => true,
            Query::Last => false,
        };
        matches && (self.layer, self.head) == (layer, head)
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
        let (name, place) = text
            .split_once(' ')
            .ok_or_else(|| format!("`{text}` is not the name and the target of an intervention"))?;
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

/// The number of candidates that a layer with `configured` candidates must scan for, so that `configured` and, if there is
/// only one and `runner_up` is to be named, that one are left after the banned ones are removed.
pub(super) fn scanned_candidates(
    all: &[Intervention],
    layer: usize,
    configured: usize,
    runner_up: bool,
) -> usize {
    let bans = |i: &&Intervention| i.layer == layer && matches!(i.act, Act::Ban(_));
    let needed = configured + usize::from(runner_up && configured == 1) + all.iter().filter(bans).count();
    if needed == configured {
        return configured;
    }
    CANDIDATES.into_iter().find(|&k| k >= needed).unwrap_or(configured)
}

/// A key that was scanned only as the runner-up, and its energy.
pub(super) type RunnerUp = Option<(i32, f32)>;

/// Applies the interventions of a layer to the candidates of one sequence, whose query 0 is at position `start`. If
/// `runner_up` is to be named and the layer has one candidate, the key after it is removed from the candidates and returned,
/// for each head and query; otherwise the list is empty.
pub(super) fn apply(
    all: &[Intervention],
    view: CandidateView,
    start: usize,
    runner_up: bool,
) -> Result<(Candidates, Vec<RunnerUp>)> {
    let layer = view.layer;
    let of_layer: Vec<_> = all.iter().filter(|i| i.layer == layer).copied().collect();
    let names_next = runner_up && view.configured == 1;
    if of_layer.is_empty() && !names_next {
        return Ok((view.candidates, Vec::new()));
    }
    let (_, heads, n, slots) = view.candidates.index.dims4()?;
    let mut index = view.candidates.index.flatten_all()?.to_vec1::<i32>()?;
    let mut energy = view.candidates.energy.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let flags = &view.candidates.protected;
    let mut flags = flags.as_ref().map(|f| f.flatten_all()?.to_vec1::<u8>()).transpose()?;
    let limit = view.limit.map(|t| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()).transpose()?;
    let mut runners_up = Vec::new();
    for (row, (keys, energies)) in index.chunks_mut(slots).zip(energy.chunks_mut(slots)).enumerate() {
        let (h, i) = (row / n, row % n);
        let mut flags = flags.as_mut().map(|f| &mut f[row * slots..][..slots]);
        let position = start + i;
        let mut forced = None;
        for intervention in of_layer.iter().filter(|x| x.applies(layer, h, position)) {
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
            (keys[0], energies[0]) =
                (key as i32, limit.as_ref().map_or(energy, |limit| energy.min(limit[row])));
            if let Some(flags) = flags.as_deref_mut() {
                flags.fill(0);
            }
        }
        // Removes the additional candidates that the layer would not have had without the larger scan.
        let left = keys.iter_mut().enumerate().filter(|(_, key)| **key >= 0);
        let mut next = None;
        for (_, (slot, key)) in left.enumerate().filter(|(rank, _)| *rank >= view.configured) {
            if flags.as_ref().is_none_or(|f| f[slot] == 0) {
                next = next.or(Some((*key, energies[slot])));
                *key = -1;
            }
        }
        if names_next {
            runners_up.push(next);
        }
        pack(keys, energies, flags);
    }
    let shape = (1, heads, n, slots);
    let device = view.candidates.index.device().clone();
    let candidates = Candidates {
        index: Tensor::from_vec(index, shape, &device)?,
        energy: Tensor::from_vec(energy, shape, &device)?,
        protected: flags.map(|flags| Tensor::from_vec(flags, shape, &device)).transpose()?,
        rescored: view.candidates.rescored.clone(),
    };
    Ok((candidates, runners_up))
}

/// Moves the remaining candidates to the front and fills the other slots with padding.
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

/// Checks that layers, heads and positions of the interventions exist, for a prompt of `tokens` tokens.
///
/// # Errors
/// [`crate::Error::Invalid`] names the intervention and the layer, head or position that does not exist.
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
        if let Some(position) = [position, query].into_iter().flatten().find(|&p| p >= tokens) {
            return fail(format!("position {position} of a text of {tokens} tokens"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interventions_parse_as_they_are_displayed() {
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
        assert_eq!(last.with_position(9).to_string(), "ban 1.2@8:5");
    }

    #[test]
    fn remaining_candidates_move_to_the_front_in_order() {
        let (mut keys, mut energies) = ([3, -1, 5, -1, 2], [0.1, 0.2, 0.3, 0.4, 0.5]);
        let mut flags = [0, 1, 1, 0, 0];
        pack(&mut keys, &mut energies, Some(&mut flags));
        assert_eq!((keys, flags), ([3, 5, 2, -1, -1], [0, 1, 0, 0, 0]));
        assert_eq!(energies, [0.1, 0.3, 0.5, f32::INFINITY, f32::INFINITY]);
    }
}
