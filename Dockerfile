# syntax=docker/dockerfile:1
#
# docker build -t meshwire:0.1.0 .                                            operator and agent
# docker build -t meshwire-userspace:0.1.0 --target userspace .               WireGuard outside the kernel
#
# Debian 12 throughout: the programs are compiled with the libbpf headers of the very release that loads them.

FROM debian:bookworm-slim AS programs
RUN apt-get update \
 && apt-get install --yes --no-install-recommends clang libbpf-dev linux-libc-dev make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY bpf bpf
RUN make -C bpf programs

FROM python:3.11-slim-bookworm AS wheels
WORKDIR /src
COPY pyproject.toml README.md ./
COPY operator operator
COPY encryption encryption
COPY bpf bpf
COPY crds crds
COPY --from=programs /src/bpf/meshwire/bpf/objects bpf/meshwire/bpf/objects
# Without the extras: neither part needs the official Kubernetes client.
RUN pip wheel --no-cache-dir --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels --no-compile meshwire
# The agent's pod says otherwise: it has to be root on its node.
USER 65532:65532

FROM base AS userspace
USER root
RUN apt-get update \
 && apt-get install --yes --no-install-recommends wireguard-go \
 && rm -rf /var/lib/apt/lists/*
# It opens /dev/net/tun as root with NET_ADMIN alone.
ENTRYPOINT ["meshwire-userspace"]

FROM base AS meshwire
USER root
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libbpf1 \
 && rm -rf /var/lib/apt/lists/*
USER 65532:65532
CMD ["meshwire-operator"]
