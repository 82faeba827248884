# A server:
#   docker build -t planetserve .
#   docker run --rm -p 31337:31337 -v planetserve:/data planetserve \
#     MODEL --block_indices 0:8 --new_swarm --port 31337 --identity_path /data/server.key
# With a GPU, add --gpus all. Weights and the key are kept in the volume.

FROM python:3.11-slim-bookworm AS build
WORKDIR /build
# The kernels in src/planetserve/native are compiled here; the second stage needs no compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
RUN python -m venv /opt/planetserve
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN /opt/planetserve/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 1000 planetserve \
 && install --directory --owner planetserve /data
COPY --from=build /opt/planetserve /opt/planetserve
ENV PATH=/opt/planetserve/bin:$PATH \
    HF_HOME=/data/huggingface \
    PYTHONUNBUFFERED=1
USER planetserve
WORKDIR /data
VOLUME /data
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "planetserve.run_server"]
CMD ["--help"]
