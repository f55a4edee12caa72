# Everything for GPUs in one image: all packages with vLLM, DeepSpeed and Ray, in the versions of constraints-cuda.txt.
#
#   docker build --tag rlhf . && mkdir -p runs
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD/runs:/runs" rlhf grpo --model tiny --reward length
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD/runs:/runs" --entrypoint python rlhf \
#     /rlhf/benchmarks/gpu.py --output gpu-report
#
# Outputs go to /runs. Models and compiled kernels are cached in /home/rlhf/.cache: mount a folder there to keep them. Nothing
# runs as root, and any user works.
#
# The image has the CUDA compiler, since DeepSpeed and vLLM compile kernels when they are first used. flash-attn is left out:
# torch's own kernels pack rows too. `--build-arg FLASH=1` builds it, which takes an hour.

FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
 && apt-get install --yes --no-install-recommends git python3.12 python3.12-dev python3.12-venv \
 && rm -rf /var/lib/apt/lists/*

RUN python3.12 -m venv /venv
ENV PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 TOKENIZERS_PARALLELISM=false

WORKDIR /rlhf
COPY constraints-cuda.txt ./
RUN pip install --constraint constraints-cuda.txt torch vllm

ARG FLASH=0
RUN if [ "$FLASH" = 1 ]; then pip install --constraint constraints-cuda.txt einops ninja setuptools wheel \
 && pip install --constraint constraints-cuda.txt --no-build-isolation flash-attn; fi

COPY packages packages
COPY benchmarks benchmarks
COPY recipes recipes
COPY pyproject.toml conftest.py ./
RUN pip install --constraint constraints-cuda.txt hypothesis pytest \
    "./packages/core[datasets,lora,qlora,kernels,tensorboard,wandb]" ./packages/algos ./packages/eval-gcg \
    "./packages/rollout-vllm[cuda]" "./packages/strategy-deepspeed[deepspeed]" "./packages/distributed-ray[ray]" \
 && rlhf-run doctor

ENV HOME=/home/rlhf USER=rlhf
RUN mkdir --mode=1777 /home/rlhf /runs
WORKDIR /runs
USER 1000:1000

ENTRYPOINT ["rlhf-run"]
