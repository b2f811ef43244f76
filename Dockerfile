# Causerie on a CPU: the chat page and the API on port 8000.
#
#   docker build -t causerie .
#   docker run --init -p 127.0.0.1:8000:8000 -e CAUSERIE_API_KEY=choose-one -v causerie:/var/cache/causerie causerie
#
# The first start prepares the model in the volume; later ones reuse it. Without CAUSERIE_API_KEY the server refuses to
# start, since it listens on all addresses of the container. Other names than localhost: -e CAUSERIE_ALLOWED_HOSTS=...

FROM python:3.12-slim

# For CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.11,<2.14"

# The native kernels are compiled at the first start, for the processor they run on; without a compiler torch serves.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 causerie \
    && install --directory --owner=causerie --group=causerie /var/cache/causerie

WORKDIR /opt/causerie
COPY pyproject.toml README.md LICENSE ./
COPY moderation ./moderation
COPY quant ./quant
COPY serving ./serving
COPY training ./training
COPY ui ./ui
RUN pip install --no-cache-dir .

USER causerie
WORKDIR /home/causerie
ENV CAUSERIE_HOST=0.0.0.0 \
    CAUSERIE_PORT=8000 \
    CAUSERIE_CACHE=/var/cache/causerie
VOLUME /var/cache/causerie
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
ENTRYPOINT ["causerie"]
CMD ["serve"]
