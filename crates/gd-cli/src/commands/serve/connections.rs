//! Connections: how many, how long, and how they end.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};

use super::handlers;
use super::server::Server;

/// Connections beside those of requests in flight.
pub(super) const SPARE: usize = 64;
/// The maximal time in which the headers of a request arrive, and between two requests.
const HEADER_TIME: Duration = Duration::from_secs(30);
/// The wait after an error of `accept`, such as too many open files.
const RETRY_TIME: Duration = Duration::from_millis(100);

/// Serves HTTP until the first signal, and then what is under way until the second one.
///
/// # Errors
/// A listener that cannot be used.
pub(super) fn serve(
    listener: TcpListener,
    server: Arc<Server>,
    connections: usize,
    mut signals: watch::Receiver<u32>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (graceful, free) = (GracefulShutdown::new(), Arc::new(Semaphore::new(connections)));
        let router = handlers::router(server.clone());
        let accept_all = async {
            loop {
                let Ok(permit) = free.clone().acquire_owned().await else { return };
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let connection = connection(stream, router.clone(), &graceful);
                        tokio::spawn(async move {
                            connection.await;
                            drop(permit);
                        });
                    }
                    Err(_) => tokio::time::sleep(RETRY_TIME).await,
                }
            }
        };
        tokio::select! {
            () = accept_all => {}
            _ = signals.changed() => {}
        }
        server.draining.store(true, Ordering::Relaxed);
        drop(listener);
        tokio::select! {
            () = graceful.shutdown() => {}
            _ = signals.changed() => {}
        }
        Ok(())
    })
}

/// Serves one connection. Its errors concern its client only.
fn connection(
    stream: TcpStream,
    router: Router,
    graceful: &GracefulShutdown,
) -> impl Future<Output = ()> + use<> {
    // Events of a stream are small and are not to wait for one another.
    _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router);
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME);
    let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
    async {
        _ = connection.await;
    }
}
