# The whole toolkit on CPUs: library, training program, data makers. For NVIDIA GPUs: docker/Dockerfile.cuda.
#
#   docker build -t visionzip-ft .
#   docker run --rm visionzip-ft visionzip benchmark data/tiny-llava --budgets 16
#   docker run --rm -v visionzip-runs:/home/user/visionzip-ft/runs visionzip-ft visionzip train --config configs/tiny-llava/demo.yaml
#   docker run --rm -p 7860:7860 visionzip-ft visionzip app data/tiny-llava --host 0.0.0.0
FROM python:3.12-slim-bookworm

# DeepSpeed compiles a small extension the first time it is used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 user
WORKDIR /home/user/visionzip-ft
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false

# Dependencies first: a change of the source does not install them again. The default torch for Linux contains CUDA; this one does not.
COPY constraints.txt pyproject.toml README.md LICENSE ./
# Behind a mirror: docker build --build-arg TORCH_INDEX=https://...
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -c constraints.txt --extra-index-url ${TORCH_INDEX} torch==2.13.0+cpu
RUN mkdir visionzip && touch visionzip/__init__.py && pip install -c constraints.txt -e '.[train,video,viz,real]'

COPY train.py ./
COPY visionzip visionzip
COPY train train
COPY data data
COPY configs configs
COPY scripts scripts
COPY examples examples
RUN mkdir runs && chown -R user:user .

USER user
CMD ["visionzip", "--help"]
