# One image for every role: `docker run headrace run router`. It includes MLX's CPU build, llama.cpp and the default model,
# so `headrace run mlx` works without a network. Containers cannot use Metal.

FROM python:3.12-slim AS build
WORKDIR /src
COPY requirements.txt .
RUN python -m venv /opt/headrace \
    && /opt/headrace/bin/pip install --quiet --no-cache-dir --require-hashes -r requirements.txt
COPY . .
RUN /opt/headrace/bin/pip install --quiet --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 headrace && install --directory --owner headrace /config
COPY --from=build /opt/headrace /opt/headrace
ENV PATH=/opt/headrace/bin:$PATH PYTHONUNBUFFERED=1
USER headrace
WORKDIR /home/headrace
RUN headrace pull smollm2
ENTRYPOINT ["headrace"]
CMD ["--help"]
