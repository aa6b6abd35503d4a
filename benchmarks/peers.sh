#!/usr/bin/env bash
# Installs what bitmosaic's CPU kernels are measured against, apart from its own environment:
#
#   .peers/python       a virtual environment with onnxruntime, OpenVINO, and what writes their models
#   .peers/llama.cpp    llama-bench and libggml, built for this very CPU from the source that the
#                       llama-cpp-python distribution carries (-march=native: the peer at its best)
#
#     benchmarks/peers.sh [PYTHON]        PYTHON: the interpreter of .venv, so that wheels match
#
# Needs a C++ compiler. Takes about five minutes; what stands already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-.venv/bin/python}
peers=.peers
llama_cpp_python=0.3.36
packages=(onnxruntime==1.32.0 onnx==1.23.2 openvino==2026.4.1 gguf==0.19.0)

if ! [ -e $peers/python/.done ]; then
    "$python" -m venv $peers/python
    $peers/python/bin/python -m pip install --quiet -c constraints.txt "${packages[@]}"
    touch $peers/python/.done
fi

if ! [ -e $peers/llama.cpp/.done ]; then
    source=$peers/source/llama_cpp_python-$llama_cpp_python
    mkdir -p $peers/source
    "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-python \
        --dest $peers/source llama-cpp-python==$llama_cpp_python
    tar -xzf $source.tar.gz -C $peers/source
    PATH="$PWD/.venv/bin:$PATH" cmake -S $source/vendor/llama.cpp -B $peers/build \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON \
        -DCMAKE_C_FLAGS=-w -DCMAKE_CXX_FLAGS=-w \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    nice cmake --build $peers/build --target llama-bench --parallel "${JOBS:-2}"
    mkdir -p $peers/llama.cpp
    cp -a $peers/build/bin/. $peers/llama.cpp/
    echo "llama-cpp-python $llama_cpp_python" > $peers/llama.cpp/.done
    rm -rf $peers/build $peers/source
fi
