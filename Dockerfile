# Two images of one build: `tenantry` (the last stage, so the default) and
# `clarifaisim`, the simulator that docker-compose.yml runs beside it.
#
#   docker build --build-arg RELEASE=v1.2.3 -t tenantry:v1.2.3 .
#   docker build --target clarifaisim -t clarifaisim .
#
# No BuildKit-only syntax: docker, podman and buildah build it alike.
# `make image-check` builds it without a container engine.

FROM golang:1.26-bookworm AS build
# For those who fetch modules elsewhere; unset, Go's own defaults hold.
ARG GOPROXY
ARG GOSUMDB
ARG GONOSUMDB
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG RELEASE
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.release=$RELEASE" \
        -o /usr/local/bin/ ./cmd/tenantry ./cmd/clarifaisim
# The one folder that may be written: a volume takes its owner from here.
RUN install -d -m 0700 -o 65532 -g 65532 /var/lib/tenantry

FROM scratch AS clarifaisim
LABEL org.opencontainers.image.title="clarifaisim" \
      org.opencontainers.image.description="A simulated Clarifai for apps and keys, for tests and demonstrations" \
      org.opencontainers.image.source="https://github.com/tenantry/tenantry" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /src/LICENSE /LICENSE
COPY --from=build /usr/local/bin/clarifaisim /usr/local/bin/clarifaisim
COPY --from=build --chown=65532:65532 /var/lib/tenantry /var/lib/clarifaisim
ENV CLARIFAISIM_ADDR=:8090
EXPOSE 8090
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/clarifaisim"]

FROM scratch AS tenantry
ARG RELEASE
LABEL org.opencontainers.image.title="tenantry" \
      org.opencontainers.image.description="Gives every tenant a Clarifai app and a key of its own" \
      org.opencontainers.image.source="https://github.com/tenantry/tenantry" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$RELEASE"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/LICENSE /LICENSE
COPY --from=build /usr/local/bin/tenantry /usr/local/bin/tenantry
COPY --from=build --chown=65532:65532 /var/lib/tenantry /var/lib/tenantry
# The internal listener is opened to probes and scrapers; it is not to be published.
ENV TENANTRY_ADDR=:8080 TENANTRY_INTERNAL_ADDR=:8081
EXPOSE 8080 8081
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["/usr/local/bin/tenantry", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/tenantry"]
CMD ["serve"]
