# The two commands of the README in a fresh system: `docker build .` trains, saves, reloads and generates, and passes the
# tests. The image has the program as /usr/local/bin/gd.
FROM rust:1-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /gd
COPY . .
RUN cargo run --release -- train
RUN cargo test --workspace

FROM debian:bookworm-slim
COPY --from=build /gd/target/release/gd /usr/local/bin/gd
ENTRYPOINT ["gd"]
