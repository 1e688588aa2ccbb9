//! Refinement: the part of a query `[D]` that a selection has not used up.

use super::theory::Pair;
use super::{add_scaled, dot};

/// The query without its component along the jump to the selected key: `q - <q, g> g`.
pub fn residual_query(query: &[f64], key: &[f64]) -> Vec<f64> {
    let g = Pair::new(query, key).direction;
    let along = dot(query, &g);
    query.iter().zip(&g).map(|(q, g)| q - along * g).collect()
}

/// The gradients of query and key from the gradient of the residual query.
pub fn residual_query_backward(query: &[f64], key: &[f64], gradient: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let Pair { direction: g, length, .. } = Pair::new(query, key);
    let mut d_query = gradient.to_vec();
    let mut d_key = vec![0.0; key.len()];
    if length > 0.0 {
        add_scaled(&mut d_query, -dot(gradient, &g), &g);
        // Through the direction: dg = -(<G, g> q + <q, g> G), and only its part across g turns it.
        let mut turn = vec![0.0; key.len()];
        add_scaled(&mut turn, -dot(gradient, &g), query);
        add_scaled(&mut turn, -dot(query, &g), gradient);
        let along = dot(&turn, &g);
        add_scaled(&mut turn, -along, &g);
        add_scaled(&mut d_key, 1.0 / length, &turn);
        add_scaled(&mut d_query, -1.0 / length, &turn);
    }
    (d_query, d_key)
}
