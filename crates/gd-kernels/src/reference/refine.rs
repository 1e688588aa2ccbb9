//! Refinement: the residual of a query `[D]` after a selection.

use super::theory::Pair;
use super::{add_scaled, dot};

/// The query without its component along the jump direction g to the selected key: `q - <q, g> g`.
pub fn residual_query(query: &[f64], key: &[f64]) -> Vec<f64> {
    let g = Pair::new(query, key).direction;
    let along = dot(query, &g);
    query.iter().zip(&g).map(|(q, g)| q - along * g).collect()
}

/// The gradients of query and key from the gradient G of the residual query.
pub fn residual_query_backward(query: &[f64], key: &[f64], gradient: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let Pair { direction: g, length, .. } = Pair::new(query, key);
    let mut d_query = gradient.to_vec();
    let mut d_key = vec![0.0; key.len()];
    if length > 0.0 {
        add_scaled(&mut d_query, -dot(gradient, &g), &g);
        // Through the direction: dg = -(<G, g> q + <q, g> G), of which the part orthogonal to g counts.
        let mut d_direction = vec![0.0; key.len()];
        add_scaled(&mut d_direction, -dot(gradient, &g), query);
        add_scaled(&mut d_direction, -dot(query, &g), gradient);
        let along = dot(&d_direction, &g);
        add_scaled(&mut d_direction, -along, &g);
        add_scaled(&mut d_key, 1.0 / length, &d_direction);
        add_scaled(&mut d_query, -1.0 / length, &d_direction);
    }
    (d_query, d_key)
}
