# docker build -t paradiffusion .
# docker run --rm -it --gpus all --shm-size 8g -v "$PWD/runs:/home/paradiffusion/work/runs" paradiffusion make demo
# torch's wheels carry the CUDA runtime; of the host only NVIDIA's driver and container toolkit are needed, and without a GPU all runs too.
# This file was not built where it was written (no Docker there); its RUN lines were tried by hand, as a user of that name.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home paradiffusion && install -d -o paradiffusion /home/paradiffusion/work /home/paradiffusion/work/runs
USER paradiffusion
WORKDIR /home/paradiffusion/work
# First what seldom changes, so that an edit of the code does not install torch again.
COPY --chown=paradiffusion requirements.txt requirements-dev.txt Makefile ./
RUN make setup && rm -rf ~/.cache/pip
COPY --chown=paradiffusion . .
ENV PATH=/home/paradiffusion/work/.venv/bin:$PATH
CMD ["python", "sample.py", "ckpt=data/nano", "prompt_file=data/prompts.txt"]
