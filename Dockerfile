# Everything from requirements.lock, each file by its hash: torch with its CUDA packages.
#
#   docker build -t act-harness .
#   docker run --rm act-harness tasks
#   docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache" act-harness \
#       eval --pretrained MODEL --artifact HEADS.json --tasks act_sst2 --output outputs
FROM python:3.12-slim AS build
WORKDIR /source
RUN python -m venv /opt/act-harness
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock ./
RUN /opt/act-harness/bin/pip install --require-hashes --requirement requirements.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY act_harness act_harness
COPY tasks tasks
COPY search search
COPY results/baselines results/baselines
RUN /opt/act-harness/bin/pip install --no-deps --no-build-isolation .

FROM python:3.12-slim
# Triton compiles its launcher with the C compiler of the machine it runs on.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/act-harness /opt/act-harness
RUN useradd --create-home --uid 1000 user && mkdir /work /cache && chown user /work /cache
ENV PATH=/opt/act-harness/bin:$PATH HF_HOME=/cache TOKENIZERS_PARALLELISM=false
USER user
WORKDIR /work
ENTRYPOINT ["act-harness"]
CMD ["--help"]
