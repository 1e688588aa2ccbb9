//! What all requests share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Request, StatusCode};
use gd_model::infer::sampler::Sampling;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::access::Access;
use super::error::ApiError;
use super::job::Job;
use super::metrics::Metrics;
use super::prompts::Prompts;

/// The maximal time in which the body of a request arrives.
const BODY_TIME: Duration = Duration::from_secs(30);

/// The limits of a request.
#[derive(Debug)]
pub(super) struct Limits {
    pub(super) body_bytes: usize,
    pub(super) prompt_tokens: usize,
    pub(super) new_tokens: usize,
    pub(super) time: Duration,
}

/// The server.
pub(super) struct Server {
    /// The name of the model.
    pub(super) model: String,
    /// Whether a layer selects, so that tokens have sources.
    pub(super) selects: bool,
    pub(super) prompts: Prompts,
    /// The sampling of a request that states none.
    pub(super) sampling: Sampling,
    /// The seed of a request that states none; random if there is none.
    pub(super) seed: Option<u64>,
    pub(super) limits: Limits,
    /// One permit for each request that may still be in flight.
    pub(super) in_flight: Arc<Semaphore>,
    pub(super) access: Access,
    pub(super) metrics: Arc<Metrics>,
    pub(super) jobs: Sender<Job>,
    /// Whether new requests are refused, because the server ends.
    pub(super) draining: AtomicBool,
}

impl Server {
    /// Whether new requests are refused, because the server ends.
    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// A permit for a request, which is held until its answer is sent.
    pub(super) fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        if self.is_draining() {
            return Err(ApiError::draining());
        }
        self.in_flight.clone().try_acquire_owned().map_err(|_| ApiError::overloaded())
    }

    /// The body of a request, which must be JSON.
    pub(super) async fn body(&self, request: Request<Body>) -> Result<Bytes, ApiError> {
        let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("");
        // A page of another site cannot send this type without asking, and the answer is no.
        if !kind.split(';').next().unwrap_or("").trim().eq_ignore_ascii_case("application/json") {
            let message = format!("the Content-Type is {kind:?}; it must be application/json");
            return Err(ApiError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let limit = self.limits.body_bytes;
        let read = to_bytes(request.into_body(), limit);
        match tokio::time::timeout(BODY_TIME, read).await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(_)) => {
                let message = format!("the body has more than {limit} bytes, or did not arrive as announced");
                Err(ApiError::refused(StatusCode::PAYLOAD_TOO_LARGE, message))
            }
            Err(_) => Err(ApiError::refused(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")),
        }
    }
}
