# Three images: `router` and `store`, without torch, and `worker`, for prefill and decode alike.
#
#   docker build -t pdmesh .
#   docker build -t pdmesh-router --target router .
#   docker build -t pdmesh-store --target store .
#
# The worker's torch is for CPUs; for CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
# Wheels that the base image brings in /opt/wheels come first, so that it also builds where no index is in reach.
# Plain steps only, so that every builder can build it.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --uid 10001 --create-home pdmesh
WORKDIR /app
# Dependencies first: a change of code does not install them again. What pip installs is an empty pdmesh that brings
# them and the `pdmesh` command; the code lies here and comes before it.
ENV PYTHONPATH=/app

FROM base AS router
COPY pyproject.toml README.md LICENSE /tmp/project/
RUN mkdir /tmp/project/pdmesh && touch /tmp/project/pdmesh/__init__.py \
    && pip install '/tmp/project[router]' && rm -rf /tmp/project
COPY pdmesh pdmesh
COPY kvstore kvstore
COPY router router
USER pdmesh
# Listen on every interface of the container; others reach it by the container's host name.
ENV PDMESH_HOST=0.0.0.0 PDMESH_PORT=50051
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["pdmesh", "health"]
ENTRYPOINT ["python", "-m"]
CMD ["router"]

FROM base AS store
COPY pyproject.toml README.md LICENSE /tmp/project/
RUN mkdir /tmp/project/pdmesh && touch /tmp/project/pdmesh/__init__.py \
    && pip install '/tmp/project[kvstore]' && rm -rf /tmp/project
COPY pdmesh pdmesh
COPY kvstore kvstore
# A volume mounted here belongs to who runs the store.
RUN mkdir /kv && chown pdmesh /kv
USER pdmesh
ENV PDMESH_HOST=0.0.0.0 PDMESH_PORT=50051 PDMESH_KV_HOST_GIB=1
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["pdmesh", "health"]
ENTRYPOINT ["python", "-m"]
CMD ["kvstore"]

# The CPU kernels, for every kind of processor that the image may meet: the worker's image has no compiler.
FROM base AS kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY engine/__init__.py engine/__init__.py
COPY engine/cpu engine/cpu
RUN python -m engine.cpu.build /kernels

FROM base AS worker
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN if ls /opt/wheels/torch-2.13.0* >/dev/null 2>&1; then pip install --find-links /opt/wheels torch==2.13.0; \
    else pip install --index-url "$TORCH_INDEX" torch==2.13.0; fi
COPY pyproject.toml README.md LICENSE /tmp/project/
RUN mkdir /tmp/project/pdmesh && touch /tmp/project/pdmesh/__init__.py \
    && pip install '/tmp/project[engine]' && rm -rf /tmp/project
COPY pdmesh pdmesh
COPY kvstore kvstore
COPY engine engine
COPY --from=kernels /kernels engine/cpu/built
COPY worker worker
COPY prefill prefill
COPY decode decode
USER pdmesh
ENV PDMESH_HOST=0.0.0.0 PDMESH_PORT=50051
EXPOSE 50051
# A worker serves once its weights are loaded, which may take minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 CMD ["pdmesh", "health"]
ENTRYPOINT ["python", "-m"]
CMD ["decode"]
