#!/bin/bash
# tests/gpu_check.py on a machine whose pip has no network, and where the project is not installed. In its root:
#   bash tests/gpu_check.sh wheels    here: fetches into wheels/ what a Python 3.12 lacks that has torch and pytest
#   bash tests/gpu_check.sh           there, in a copy of the root with wheels/; arguments as for tests.gpu_check
# $PYTHON is the interpreter, python3 unless it is set.
set -e
python=${PYTHON:-python3}
if [ "$1" = wheels ]; then
  platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 17 24 27 28 31 34)
  $python -m pip download -q -c constraints.txt -d wheels --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp $platforms --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    torchrl tensordict hoptorch pyvers orjson importlib_metadata zipp cloudpickle PyYAML pyglet hydra-core omegaconf pydantic pydantic-core annotated-types typing-inspection gymnasium gym-notices==0.0.8 \
    Farama-Notifications pettingzoo mpe2 pygame-ce
  $python -m pip wheel -q -c constraints.txt -w wheels --no-deps vmas gym antlr4-python3-runtime==4.9.3
  exit
fi
root=$PWD
copy=$(mktemp -d)  # in which the three packages lie in each other
cp -r torchrl_trpo tests pyproject.toml "$copy"
cp -r objectives recipes "$copy/torchrl_trpo"
if [ -d wheels ]; then
  $python -m pip install -q --no-index --no-deps --no-compile --target "$copy" wheels/*.whl
fi
cd "$copy"
export PYTHONPATH=$copy OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} RL_WARNINGS=0 MPLBACKEND=agg
exec $python -m tests.gpu_check --out "${OUT:-$root/outputs/gpu_check}" "$@"
