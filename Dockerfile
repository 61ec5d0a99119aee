# The GPU image: docker build -t nemo-aligner . && docker run --gpus all -it nemo-aligner
# NVIDIA's image brings CUDA, cuDNN and the compiler that Transformer Engine is built with.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common git make \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nemo-aligner
COPY . .
RUN make setup PYTHON=python3.11
# Transformer Engine compiles against the torch that is installed, so it is built outside pip's isolation.
RUN .venv/bin/pip install wheel pybind11 ninja \
    && .venv/bin/pip install -c .venv/constraints.txt --no-build-isolation -e '.[gpu,wandb]'

ENV PATH=/opt/nemo-aligner/.venv/bin:$PATH
CMD ["bash"]
