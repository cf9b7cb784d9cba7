# ndonnx as a command in a container; written with care, not built in CI.
#
#     docker build -t ndonnx .
#     docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/work" ndonnx compress model.onnx --data calib.npz -o student.onnx
#
# The package index serves torch with its CUDA libraries (5.7 GB in all). For a CPU-only image name the index that
# pytorch.org shows for CPU: docker build --build-arg TORCH_INDEX=URL -t ndonnx .

FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ndonnx ndonnx
COPY cli cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG TORCH_INDEX=""
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
# torch first: what is installed then takes the build that is there.
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' /tmp/constraints.txt)" \
    && pip install --no-cache-dir -c /tmp/constraints.txt /tmp/wheels/*.whl \
    && rm -rf /tmp/wheels /tmp/constraints.txt
# Any user may run it: what libraries cache goes to a folder that everybody can write.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["ndonnx"]
CMD ["--help"]
