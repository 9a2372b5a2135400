# A worker with libtorch for CPU and CUDA, both from the torch wheel. One image serves hosts with and
# without a GPU: the trainer opens libtorch_cuda where there is a driver.
FROM rust:1-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV RELORA_CACHE_DIR=/opt/relora SQLX_OFFLINE=true
WORKDIR /source
COPY scripts/setup-libtorch scripts/setup-libtorch
# The slim directory is what is linked; with its dependencies the same wheel has what CUDA needs.
RUN scripts/setup-libtorch \
    && /opt/relora/python/bin/pip install --quiet --no-cache-dir "torch==$(cat /opt/relora/libtorch-*/build-version)"
COPY Cargo.toml Cargo.lock build.rs ./
COPY src src
COPY migrations migrations
COPY .sqlx .sqlx
RUN LIBTORCH=$(scripts/setup-libtorch) cargo build --release --locked
# Libraries only, under the same paths: the links of the slim directory and the libraries' own search
# paths go on to hold.
RUN cd /opt/relora/python/lib/python3*/site-packages \
    && find . -mindepth 1 -maxdepth 1 ! -name torch ! -name nvidia -exec rm -rf {} + \
    && find torch -mindepth 1 -maxdepth 1 ! -name lib -exec rm -rf {} + \
    && find /opt/relora/python -name '*.a' -delete \
    && find nvidia -type d -name include -prune -exec rm -rf {} + \
    && rm -rf /opt/relora/python/bin

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/relora --create-home relora
COPY --from=build /opt/relora /opt/relora
COPY --from=build /source/target/release/relora /source/target/release/relora-trainer /usr/local/bin/
USER relora
ENV RELORA_DATA_DIR=/var/lib/relora RELORA_LOG_FORMAT=json \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Scratch space: token shards, states, files on their way to the store.
VOLUME /var/lib/relora
STOPSIGNAL SIGTERM
ENTRYPOINT ["relora"]
CMD ["worker"]
