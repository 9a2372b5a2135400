# The API server and the client, without libtorch.
FROM rust:1-bookworm AS build
WORKDIR /source
COPY Cargo.toml Cargo.lock build.rs ./
COPY src src
COPY migrations migrations
COPY .sqlx .sqlx
ENV SQLX_OFFLINE=true
RUN cargo build --release --locked --no-default-features --bin relora

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/relora --create-home relora
COPY --from=build /source/target/release/relora /usr/local/bin/relora
USER relora
ENV RELORA_BIND=0.0.0.0:8080 RELORA_DATA_DIR=/var/lib/relora RELORA_LOG_FORMAT=json
# Holds client.json with the first API key, which is shown nowhere else.
VOLUME /var/lib/relora
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s CMD curl -fsS http://127.0.0.1:8080/readyz
ENTRYPOINT ["relora"]
CMD ["serve"]
