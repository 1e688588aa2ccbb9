//! The endpoints.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::error::{ApiError, json_response};
use super::job::Job;
use super::reply::{Kind, Reply};
use super::request::{Chat, Completion, Options};
use super::server::Server;
use super::{metrics, page};

/// The paths, which label the counts of requests.
const ENDPOINTS: [&str; 6] =
    ["/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"];

/// All endpoints.
pub(super) fn router(server: Arc<Server>) -> Router {
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .layer(middleware::from_fn_with_state(server.clone(), check_key));
    Router::new()
        .route("/", get(page::page))
        .route("/health", get(health))
        .route("/metrics", get(all_metrics))
        .merge(api)
        .fallback(async || ApiError::refused(StatusCode::NOT_FOUND, "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "the path does not support this method")
        })
        .layer(middleware::from_fn_with_state(server.clone(), count_and_check_host))
        .with_state(server)
}

async fn check_key(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    match server.access.check_key(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn count_and_check_host(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let endpoint = ENDPOINTS.into_iter().find(|endpoint| *endpoint == path).unwrap_or("other");
    let response = match server.access.check_host(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    server.metrics.answered(endpoint, response.status().as_u16());
    response
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.is_draining() {
        true => ApiError::draining().into_response(),
        false => json_response(&json!({ "status": "ok" })),
    }
}

async fn all_metrics(State(server): State<Arc<Server>>) -> Response {
    let mut response = Response::new(Body::from(server.metrics.text()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(metrics::CONTENT_TYPE));
    response
}

fn model_json(server: &Server) -> Value {
    json!({ "id": server.model, "object": "model", "created": 0, "owned_by": "gd" })
}

async fn models(State(server): State<Arc<Server>>) -> Response {
    json_response(&json!({ "object": "list", "data": [model_json(&server)] }))
}

async fn model(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Result<Response, ApiError> {
    match name == server.model {
        true => Ok(json_response(&model_json(&server))),
        false => Err(ApiError::no_such_model(&name, &server.model)),
    }
}

async fn completions(State(server): State<Arc<Server>>, request: Request) -> Result<Response, ApiError> {
    let start = Instant::now();
    let permit = server.admit()?;
    let body = server.body(request).await?;
    let (request, prompts) = on_thread(&server, move |server| {
        let request = Completion::parse(&body, server)?;
        let encode = |prompt| server.prompts.encode(prompt, &server.limits);
        let prompts = request.prompts.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        Ok((request, prompts))
    })
    .await?;
    let Completion { options, echo, .. } = request;
    answer(server, Kind::Completion { echo }, options, prompts, start, permit).await
}

async fn chat_completions(State(server): State<Arc<Server>>, request: Request) -> Result<Response, ApiError> {
    let start = Instant::now();
    let permit = server.admit()?;
    let body = server.body(request).await?;
    let (options, prompt) = on_thread(&server, move |server| {
        let Chat { options, messages, variables } = Chat::parse(&body, server)?;
        let prompt = server.prompts.encode_chat(&messages, variables.as_ref(), &server.limits)?;
        Ok((options, prompt))
    })
    .await?;
    answer(server, Kind::Chat, options, vec![prompt], start, permit).await
}

/// Does work that takes long for long texts on another thread, so that other requests do not wait.
async fn on_thread<T: Send + 'static>(
    server: &Arc<Server>,
    work: impl FnOnce(&Server) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let server = server.clone();
    let result = tokio::task::spawn_blocking(move || work(&server)).await;
    result.unwrap_or_else(|_| Err(ApiError::internal("the request could not be read")))
}

/// Sends a job to the worker and answers with what it writes.
async fn answer(
    server: Arc<Server>,
    kind: Kind,
    options: Options,
    prompts: Vec<Vec<u32>>,
    start: Instant,
    permit: tokio::sync::OwnedSemaphorePermit,
) -> Result<Response, ApiError> {
    let (updates, received) = mpsc::unbounded_channel();
    let copies = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, options.n));
    let seeds = (0..options.n as u64).map(|choice| options.seed.wrapping_add(choice)).cycle();
    let job = Job {
        choices: copies.cloned().zip(seeds).collect(),
        sampling: options.sampling,
        max_tokens: options.max_tokens,
        stop: server.prompts.stop(options.stop)?,
        logprobs: options.logprobs,
        prompt_logprobs: kind.echoes() && options.logprobs.is_some(),
        sources: options.sources,
        start,
        deadline: start + server.limits.time,
        updates,
    };
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let prompts = job.choices.iter().map(|(prompt, _)| prompt.clone()).collect();
    let mut reply = Reply::new(kind, server.clone(), created, prompts, options.n);
    (reply.logprobs, reply.sources) = (options.logprobs.is_some(), options.sources);
    server.jobs.send(job).map_err(|_| ApiError::draining())?;
    match options.stream {
        true => Ok(reply.stream(received, options.include_usage, permit)),
        false => reply.whole(received).await,
    }
}
