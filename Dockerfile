# Two stages: wheels are built with compilers, the image that runs has none.
#   docker build -t peftserve .                                     CUDA build of torch (default)
#   docker build -t peftserve --build-arg TORCH_INDEX=URL .         CPU build, a quarter of the size; URL is the CPU
#                                                                   index that PyTorch's installation guide gives
#   docker run -p 8000:8000 -p 50051:50051 -v peftserve:/data -e PEFTSERVE_API_KEYS='{"secret": "default"}' peftserve
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y build-essential \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY kernels kernels
COPY protos protos
COPY clients clients
ARG TORCH_INDEX=
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} .

FROM python:${PYTHON}-slim-bookworm
# OpenMP runtime for torch's CPU kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 peftserve \
    && install --directory --owner=peftserve /data
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PEFTSERVE_HOST=0.0.0.0 \
    PEFTSERVE_DATA_DIR=/data \
    PEFTSERVE_LOG_FORMAT=json
USER 10001
VOLUME /data
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["peftserve"]
CMD ["serve"]
