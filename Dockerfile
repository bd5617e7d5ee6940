# CUDA's torch and penstock, with its server. Built by nobody here, where there is no network: take it as a start.
#   docker build -t penstock .
#   docker run --gpus all -v /models:/models -v "$PWD":/out penstock demo -o /out/demo.mp4
FROM python:3.12-slim
RUN pip install --no-cache-dir torch
COPY . /src
RUN pip install --no-cache-dir "/src[serve,fast]" && rm -rf /src
# Jobs, the queue and packs live here: mount it to keep them.
ENV PENSTOCK_DATA_DIR=/data PENSTOCK_CACHE=/data/packs PENSTOCK_CONFIG=/data/config
VOLUME /data
# The server listens on 127.0.0.1 unless told; --host 0.0.0.0 needs --api-key.
ENTRYPOINT ["penstock"]
